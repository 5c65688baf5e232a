//! Truncation by f bits: x / 2^f, the scale reduced by f.
//!
//! One round (none if x is open already), for |x| < 2^62. Let z = x + 2^62 and c = z + r mod 2^64 open; the dealer
//! deals shares of r >> f and, modulo 2^f, of m = msb(r). Since z < 2^63, the sum z + r overflows exactly if m is set
//! and msb(c) is not, so
//!
//! x >> f = (c >> f) - (r >> f) + m (1 - msb(c)) 2^(64-f) - 2^(62-f) - borrow,  borrow = [c mod 2^f < r mod 2^f].
//!
//! - **One-round form**: the borrow is left out. The result is floor or floor + 1, the latter with probability
//!   (x mod 2^f) / 2^f: unbiased. The rounding bit depends on the opened value.
//! - **Faithful form**: the borrow is a comparison key of f bits, evaluated on the same opening: exactly floor. For
//!   values that are revealed.
//!
//! Zeros of x ([`Meta::zeros`]) are zeros of r too: they are not sent, and below 2^f nothing is left to be rounded.
//!
//! **Opening the result** of the one-round form, x' = A - ρ + 2^(64-f) b m with A and the bit b public, ρ = r >> f and m dealt,
//! takes f bits: only b m is not open yet. Its mask is ρ + 2^(64-f) s for a fresh s, uniform modulo 2^f, and
//! x' + ρ + 2^(64-f) s = A + 2^(64-f) (b m + s), of which the parties send their shares of b m + s. ρ is uniform modulo 2^(64-f), and
//! so the mask is in the ring; nothing is seen but c, which was, and b m + s, which is uniform whatever c is. If the result
//! is multiplied by 2^q first, the carry is left modulo 2^(f-q), and that is what is sent.
//!
//! Bytes each way: 8 an element, if not open yet. Dealer to the second party: 8 bytes and f bits an element; faithful:
//! also a key of f bits to both. (Escudero et al. 2020, Damgard et al. 2019 for dealer-aided truncation.) Shares are
//! never truncated locally: that fails by 2^(64-f) with probability |x| / 2^63.

use veiltune_fss::dcf;
use veiltune_ring::Ring;

use super::carried::{Carried, OffCarried, Traced};
use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, LIMIT_BITS, Meta};
use crate::offline::{OffCut, OffTensor, Offline, low_bits};
use crate::online::{Cut, Online, Share};
use crate::opening::{BOTH, Carry};
use crate::{Error, Owner, Result};

const OFFSET: u64 = 1 << LIMIT_BITS;

/// The opened value of x + 2^62, from that of x.
pub(crate) fn offset(masked: u64) -> u64 {
    masked.wrapping_add(OFFSET)
}

/// The public part of x / 2^bits, from the opened value of x.
pub(crate) fn shifted(masked: u64, bits: u32) -> u64 {
    (offset(masked) >> bits).wrapping_sub(OFFSET >> bits)
}

/// What the result is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// One-round form.
    Near,
    /// Faithful form.
    Faithful,
    /// One-round form whose result stays known up to dealt values; see [`carried`](super::carried).
    Carried,
}

impl Mode {
    pub(crate) fn of(faithful: bool) -> Mode {
        if faithful { Mode::Faithful } else { Mode::Near }
    }
}

fn output(x: &Meta, bits: u32) -> Result<Meta> {
    if bits == 0 || bits > x.scale || bits >= LIMIT_BITS {
        return Err(Error::program(
            "truncate",
            format!("{bits} of {} fractional bits", x.scale),
        ));
    }
    // A truncated value of one party is computed like a shared one: the result is shared.
    let owner = if x.owner == Owner::Public {
        Owner::Public
    } else {
        Owner::Shared
    };
    Ok(Meta {
        dims: x.dims.clone(),
        scale: x.scale - bits,
        owner,
        zeros: x.zeros.saturating_sub(bits),
    })
}

/// Arithmetic shift of a public tensor.
fn public_shift(x: &Ring, bits: u32) -> Ring {
    x.map(|v| ((v as i64) >> bits) as u64)
}

pub(crate) fn offline(o: &Offline, xs: &[(&OffTensor, u32)], mode: Mode) -> Result<Vec<OffTensor>> {
    let secret = |x: &OffTensor| o.meta(x).owner != Owner::Public;
    o.open_for(
        &xs.iter()
            .filter(|(x, _)| secret(x))
            .map(|(x, _)| (*x, BOTH))
            .collect::<Vec<_>>(),
    );
    xs.iter()
        .map(|&(x, bits)| {
            let meta = output(o.meta(x), bits)?;
            if secret(x) {
                let n = meta.len();
                let gate = o.gate("truncate", &[bits as u8, mode as u8]);
                let mask = if o.is_dealer() {
                    o.mask(x)?
                } else {
                    Ring::zeros([0])
                };
                let r = mask.as_slice();
                let shares = o.correlate_as("truncate", (gate, 0), &meta, || {
                    Ok(r.iter().map(|r| r >> bits).collect())
                })?;
                let mut dealt = o.is_dealer().then(|| mask.map(|r| r >> bits));
                if let Some(shares) = shares {
                    if mode == Mode::Near {
                        dealt = Some(Ring::new(meta.dims.clone(), shares.clone())?);
                    }
                    o.put(shares);
                }
                o.deal("truncate", (gate, 1), n, bits, || {
                    Ok(r.iter().map(|r| r >> 63).collect())
                })?;
                if mode == Mode::Faithful {
                    o.keys(
                        "truncate",
                        (gate, 2),
                        n,
                        dcf::key_bytes(bits),
                        |range, roots, keys| {
                            let alphas: Vec<u64> = r[range].iter().map(|r| r & low_bits(bits)).collect();
                            Ok(dcf::generate_into(
                                bits,
                                &alphas,
                                &vec![1; alphas.len()],
                                roots,
                                keys,
                            )?)
                        },
                    )?;
                }
                o.end_gate()?;
                return Ok(match mode {
                    Mode::Near => {
                        let cut = OffCut {
                            left: Carry { bits },
                            shift: 0,
                            stream: (gate, 0),
                            bits: meta.bits(),
                            dealt,
                        };
                        o.truncated(meta, cut)
                    }
                    Mode::Carried => {
                        let carry = o.is_dealer().then(|| mask.map(|r| r >> 63));
                        let carried = OffCarried::truncated(&meta.dims, bits, dealt, carry);
                        o.carrying(meta, carried)
                    }
                    Mode::Faithful => o.tensor(meta),
                });
            }
            Ok(o.tensor(meta))
        })
        .collect()
}

/// A party's share of the result without its borrow: from the opened value with its offset, and shares of r >> f and of m.
fn share_of_result(c: &Ring, bits: u32, shifted: &[u64], carries: Vec<u64>, first: bool) -> Vec<u64> {
    let mut out = carries;
    for ((o, r), c) in out.iter_mut().zip(shifted).zip(c.as_slice()) {
        let carry = if c >> 63 == 0 { *o << (64 - bits) } else { 0 };
        let public = if first {
            (c >> bits).wrapping_sub(OFFSET >> bits)
        } else {
            0
        };
        *o = public.wrapping_sub(*r).wrapping_add(carry);
    }
    out
}

pub(crate) fn online(p: &Online, xs: &[(&Share, u32)], mode: Mode) -> Result<Vec<Share>> {
    let secret = |x: &Share| p.meta(x).owner != Owner::Public;
    p.open_for(
        &xs.iter()
            .filter(|(x, _)| secret(x))
            .map(|(x, _)| (*x, BOTH))
            .collect::<Vec<_>>(),
    )?;
    xs.iter()
        .map(|&(x, bits)| {
            let meta = output(p.meta(x), bits)?;
            if !secret(x) {
                return Ok(p.tensor(meta, p.known(x).map(|x| public_shift(&x, bits))));
            }
            let (_, mut material) = p.gate()?;
            let c = p.masked(x)?.add_scalar(OFFSET);
            let shifted = take(&mut material.words)?;
            let carries = take(&mut material.words)?;
            let carry = (mode != Mode::Faithful).then(|| carries.clone());
            let mut out = share_of_result(&c, bits, &shifted, carries, p.is_first());
            if mode == Mode::Faithful {
                let (roots, keys) = take(&mut material.keys)?;
                let low: Vec<u64> = c.as_slice().iter().map(|c| c & low_bits(bits)).collect();
                let borrow = dcf::evaluate(p.party().index(), bits, &roots, &keys, 1, &low)?;
                out.iter_mut()
                    .zip(borrow)
                    .for_each(|(o, b)| *o = o.wrapping_sub(b));
            }
            let out = Ring::new(meta.dims.clone(), out)?;
            Ok(match (carry, mode) {
                (Some(m), Mode::Carried) => p.carrying(meta, out, Carried::truncated(&c, OFFSET, bits, m)?),
                (Some(mut m), _) => {
                    // b m, modulo 2^bits.
                    for (m, c) in m.iter_mut().zip(c.as_slice()) {
                        *m &= (c >> 63).wrapping_sub(1);
                    }
                    let cut = Cut {
                        public: c.map(|c| (c >> bits).wrapping_sub(OFFSET >> bits)),
                        carry: Ring::new(meta.dims.clone(), m)?,
                        left: Carry { bits },
                    };
                    p.truncated(meta, out, cut)
                }
                (None, _) => p.tensor(meta, Some(out)),
            })
        })
        .collect()
}

pub(crate) fn fixed(f: &Fixed, xs: &[(&FixedTensor, u32)], mode: Mode) -> Result<Vec<FixedTensor>> {
    for (x, _) in xs {
        f.assert_below("truncate", f.ring(x), LIMIT_BITS)?;
    }
    let secret = |x: &FixedTensor| f.meta(x).owner != Owner::Public;
    f.open_for(
        &xs.iter()
            .filter(|(x, _)| secret(x))
            .map(|(x, _)| (*x, BOTH))
            .collect::<Vec<_>>(),
    );
    xs.iter()
        .map(|&(x, bits)| {
            let meta = output(f.meta(x), bits)?;
            let mut value = public_shift(f.ring(x), bits);
            let mut carried = None;
            if secret(x) {
                let gate = f.gate();
                let mask = f.mask(x)?;
                if mode != Mode::Faithful {
                    let low = low_bits(bits);
                    for ((v, x), r) in value
                        .make_mut()
                        .iter_mut()
                        .zip(f.ring(x).as_slice())
                        .zip(mask.as_slice())
                    {
                        let carry = (x & low) + (r & low) > low;
                        *v = v.wrapping_add(u64::from(carry));
                    }
                }
                if mode == Mode::Carried {
                    let c = f.ring(x).add(&mask)?.add_scalar(OFFSET);
                    let mut shifted = f.first_of_dealt((gate, 0), meta.len(), meta.bits());
                    shifted.iter_mut().for_each(|r| *r <<= meta.zeros);
                    let carries = f.first_of_dealt((gate, 1), meta.len(), bits);
                    let first = share_of_result(&c, bits, &shifted, carries.clone(), true);
                    carried = Some(Traced {
                        carried: Carried::truncated(&c, OFFSET, bits, carries)?,
                        share: Some(Ring::new(meta.dims.clone(), first)?),
                    });
                }
                if mode == Mode::Near {
                    return Ok(f.truncated(meta, value, mask.map(|r| r >> bits), Carry { bits }));
                }
            }
            Ok(f.carrying(meta, value, carried))
        })
        .collect()
}
