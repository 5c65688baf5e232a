//! Comparison with zero and ReLU, by function secret sharing or by [masked bits](super::compare_bits).
//!
//! For |x| < 2^[`VALUE_BITS`], x is an integer of n = scale + VALUE_BITS + 1 bits in two's complement. With X = x + r
//! open and c = X mod 2^n, sign(x) = msb(c) xor msb(r mod 2^n) xor [low(c) < low(r)], low = the n - 1 other bits. That
//! comparison is one key of n - 1 bits, evaluated at one point (SIGMA's DReLU), or the tree of
//! [compare_bits](super::compare_bits). So x >= 0 is a bit b shared by xor. The parties open e = b xor s for a random
//! bit s of which they hold arithmetic shares (and of s*r), and then b = e + (1 - 2e) s and
//! b*x = e x + (1 - 2e) (X s - s r) are local. A product of many fractional bits is truncated on the same opening:
//! [x' = A - ρ + B m](super::carried) takes the place of x, with dealt shares of ρ, m, s ρ and s m.
//!
//! By function secret sharing, two rounds (one if x is open already). Bytes each way: 8 an element if not open, and 1
//! bit. Dealer: a comparison key of n - 1 bits an element (352 bytes for 16 fractional bits) to both; 16 bytes (8 for the
//! bit alone, 24 and 2f bits for a result truncated by f bits) to the second party. By masked bits, three or four rounds
//! more, 2 to 4 bytes an element more each way, and 14 to 23 bytes from the dealer, to the second party, in place of the
//! key. Exact, but for the rounding of the truncation.

use serde::{Deserialize, Serialize};
use veiltune_fss::cmp;
use veiltune_ring::Ring;

use super::truncate::{offset, shifted};
use super::{compare_bits, product::take};
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta, VALUE_BITS};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::opening::BOTH;
use crate::{Error, Owner, Result};

/// First slot of the truncation; [masked bits](compare_bits) use those from 4 on, one for each level and plane.
const TRUNCATION: u16 = 1 << 15;

/// How two numbers are compared. Results are the same; the cost is not
/// ([`cheapest_comparison`](crate::session::cheapest_comparison) chooses).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comparison {
    /// By function secret sharing: fewer rounds, more bytes from the dealer. See [compare](self).
    #[default]
    Fss,
    /// By a tree of ANDs on masked bits: more rounds, fewer bytes from the dealer. See [compare_bits].
    MaskedBits,
}

/// Bits of the two's complement integer.
fn width(x: &Meta) -> Result<u32> {
    let n = x.scale + VALUE_BITS + 1;
    if n > 64 {
        return Err(Error::program(
            "compare",
            format!("{} fractional bits leave no room for the value", x.scale),
        ));
    }
    Ok(n)
}

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// [x >= 0], of scale 0.
    Bit,
    /// max(x, 0), truncated by so many bits.
    Positive(u32),
}

impl Want {
    fn output(self, x: &Meta) -> Result<Meta> {
        let scale = match self {
            Want::Bit => 0,
            Want::Positive(cut) => x
                .scale
                .checked_sub(cut)
                .ok_or_else(|| Error::program("compare", format!("{cut} of {} fractional bits", x.scale)))?,
        };
        Ok(Meta {
            dims: x.dims.clone(),
            scale,
            owner: Owner::Shared,
            zeros: 0,
        })
    }

    fn detail(self, comparison: Comparison) -> [u8; 3] {
        let (select, cut) = match self {
            Want::Bit => (0, 0),
            Want::Positive(cut) => (1, cut as u8),
        };
        [select, cut, comparison as u8]
    }
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, want: Want) -> Result<OffTensor> {
    let meta = want.output(o.meta(x))?;
    let (n, bits) = (o.meta(x).len(), width(o.meta(x))?);
    o.open_for(&[(x, BOTH)]);
    let gate = o.gate("compare", &want.detail(o.comparison()));
    let mask = if o.is_dealer() {
        o.mask(x)?
    } else {
        Ring::zeros([0])
    };
    let r = mask.as_slice();
    match o.comparison() {
        Comparison::Fss => o.keys(
            "compare",
            (gate, 0),
            n,
            cmp::key_bytes(bits - 1),
            |range, roots, keys| {
                let alphas: Vec<u64> = r[range].iter().map(|r| r & low_bits(bits - 1)).collect();
                Ok(cmp::generate_into(bits - 1, &alphas, roots, keys)?)
            },
        )?,
        Comparison::MaskedBits => compare_bits::offline(o, gate, n, bits - 1, r)?,
    }
    // The random bit: the parties' random bits, xor the mask's top bit.
    let blind = o.small_mask(gate, 1, n, 1).unwrap_or_default();
    let s = || -> Vec<u64> {
        blind
            .iter()
            .zip(r)
            .map(|(u, r)| u ^ (r >> (bits - 1) & 1))
            .collect()
    };
    o.exchanged("compare", [veiltune_ring::pack::packed_len(n, 1) as u64; 2]);
    o.deal("compare", (gate, 2), n, 64, || Ok(s()))?;
    if let Want::Positive(cut) = want {
        let part = |shift: u32| move || Ok(r.iter().map(|r| r >> shift).collect());
        let selected = |shift: u32| {
            let s = &s;
            move || Ok(s().iter().zip(r).map(|(s, r)| s * (r >> shift)).collect())
        };
        o.deal("compare", (gate, 3), n, 64, selected(cut))?;
        if cut > 0 {
            o.deal("compare", (gate, TRUNCATION), n, cut, selected(63))?;
            o.deal("compare", (gate, TRUNCATION + 1), n, 64, part(cut))?;
            o.deal("compare", (gate, TRUNCATION + 2), n, cut, part(63))?;
        }
    }
    o.end_gate()?;
    Ok(o.tensor(meta))
}

pub(crate) fn online(p: &Online, x: &Share, want: Want) -> Result<Share> {
    let (meta, bits) = (want.output(p.meta(x))?, width(p.meta(x))?);
    p.open_for(&[(x, BOTH)])?;
    let (gate, mut material) = p.gate()?;
    let masked = p.masked(x)?;
    let low: Vec<u64> = masked.as_slice().iter().map(|c| c & low_bits(bits - 1)).collect();
    let below = match p.comparison() {
        Comparison::Fss => {
            let (roots, keys) = take(&mut material.keys)?;
            cmp::evaluate(p.party().index(), bits - 1, &roots, &keys, &low)?
        }
        Comparison::MaskedBits => compare_bits::online(p, gate, &mut material, bits - 1, &low)?,
    };
    let mut bit = p.small_mask(gate, 1, meta.len(), 1);
    for (i, b) in bit.iter_mut().enumerate() {
        *b ^= below[i / 64] >> (i % 64) & 1;
        if p.is_first() {
            *b ^= 1 ^ (masked.as_slice()[i] >> (bits - 1) & 1);
        }
    }
    let e = p.open_words(bit, 1)?; // addition modulo 2 is xor
    let mut out = take(&mut material.words)?;
    if let Want::Positive(cut) = want {
        // x or x', masked and as a share, and s times it.
        let (mut masked, mut share) = (masked.into_vec(), p.share_or_zeros(x).into_vec());
        let cross = take(&mut material.words)?;
        for ((s, x), cross) in out.iter_mut().zip(&masked).zip(&cross) {
            let at = if cut == 0 { *x } else { shifted(*x, cut) };
            *s = at.wrapping_mul(*s).wrapping_sub(*cross);
        }
        if cut > 0 {
            let carry = |x: u64, m: u64| {
                if offset(x) >> 63 == 0 { m << (64 - cut) } else { 0 }
            };
            let selected = take(&mut material.words)?;
            let (parts, carries) = (take(&mut material.words)?, take(&mut material.words)?);
            let one = u64::from(p.is_first());
            for i in 0..out.len() {
                let x = masked[i];
                out[i] = out[i].wrapping_add(carry(x, selected[i]));
                masked[i] = shifted(x, cut);
                share[i] = one
                    .wrapping_mul(masked[i])
                    .wrapping_sub(parts[i])
                    .wrapping_add(carry(x, carries[i]));
            }
        }
        for ((o, e), x) in out.iter_mut().zip(&e).zip(&share) {
            if *e == 1 {
                *o = x.wrapping_sub(*o);
            }
        }
    } else {
        for (o, e) in out.iter_mut().zip(&e) {
            *o = if *e == 1 {
                u64::from(p.is_first()).wrapping_sub(*o)
            } else {
                *o
            };
        }
    }
    Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims, out)?)))
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, want: Want) -> Result<FixedTensor> {
    let (meta, bits) = (want.output(f.meta(x))?, width(f.meta(x))?);
    f.assert_below("compare", f.ring(x), bits - 1)?;
    f.open_for(&[(x, BOTH)]);
    f.gate();
    let mut value = f.ring(x).clone();
    for (x, r) in value.make_mut().iter_mut().zip(f.mask(x)?.as_slice()) {
        *x = match want {
            _ if (*x as i64) < 0 => 0,
            Want::Bit => 1,
            Want::Positive(cut) => {
                let low = low_bits(cut);
                (*x >> cut) + u64::from((*x & low) + (r & low) > low)
            }
        };
    }
    Ok(f.tensor(meta, value))
}
