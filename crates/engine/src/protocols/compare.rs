//! Comparison with zero and ReLU, by function secret sharing or by [masked bits](super::compare_bits).
//!
//! For |x| < 2^[`VALUE_BITS`], x is an integer of n = scale + VALUE_BITS + 1 bits in two's complement. With X = x + r
//! open and c = X mod 2^n, sign(x) = msb(c) xor msb(r mod 2^n) xor [low(c) < low(r)], low = the n - 1 other bits. That
//! comparison is one key of n - 1 bits, evaluated at one point (SIGMA's DReLU), or the tree of
//! [compare_bits](super::compare_bits). So x >= 0 is a bit b shared by xor. The parties open e = b xor s for a random
//! bit s of which they hold arithmetic shares (and of s*r), and then b = e + (1 - 2e) s and
//! b*x = e x + (1 - 2e) (X s - s r) are local.
//!
//! By function secret sharing, two rounds (one if x is open already). Bytes each way: 8 an element if not open, and 1
//! bit. Dealer: a comparison key of n - 1 bits an element (352 bytes for 16 fractional bits) to both; 16 bytes (8 for the
//! bit alone) to the second party. By masked bits, three or four rounds more, 2 to 4 bytes an element more each way, and
//! 14 to 23 bytes from the dealer, to the second party, in place of the key. Exact.

use serde::{Deserialize, Serialize};
use veiltune_fss::cmp;
use veiltune_ring::Ring;

use super::{compare_bits, product::take};
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta, VALUE_BITS};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::opening::BOTH;
use crate::{Error, Owner, Result};

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

/// max(x, 0) keeps the scale; the bit has scale 0.
fn output(x: &Meta, select: bool) -> Meta {
    Meta {
        dims: x.dims.clone(),
        scale: if select { x.scale } else { 0 },
        owner: Owner::Shared,
    }
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, select: bool) -> Result<OffTensor> {
    let (n, bits) = (o.meta(x).len(), width(o.meta(x))?);
    o.open_for(&[(x, BOTH)]);
    let gate = o.gate("compare", &[u8::from(select), o.comparison() as u8]);
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
    o.exchanged("compare", [veiltune_wire::pack::packed_len(n, 1) as u64; 2]);
    o.deal("compare", (gate, 2), n, 64, || Ok(s()))?;
    if select {
        o.deal("compare", (gate, 3), n, 64, || {
            Ok(s().iter().zip(r).map(|(s, r)| s.wrapping_mul(*r)).collect())
        })?;
    }
    o.end_gate()?;
    Ok(o.tensor(output(o.meta(x), select)))
}

pub(crate) fn online(p: &Online, x: &Share, select: bool) -> Result<Share> {
    let (meta, bits) = (output(p.meta(x), select), width(p.meta(x))?);
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
    if select {
        let cross = take(&mut material.words)?;
        let share = p.share_or_zeros(x);
        for i in 0..out.len() {
            let sx = masked.as_slice()[i].wrapping_mul(out[i]).wrapping_sub(cross[i]);
            out[i] = if e[i] == 1 {
                share.as_slice()[i].wrapping_sub(sx)
            } else {
                sx
            };
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

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, select: bool) -> Result<FixedTensor> {
    let (meta, bits) = (output(f.meta(x), select), width(f.meta(x))?);
    f.assert_below("compare", f.ring(x), bits - 1)?;
    f.open_for(&[(x, BOTH)])?;
    f.gate();
    let value = f.ring(x).map(|x| match (x as i64 >= 0, select) {
        (true, true) => x,
        (true, false) => 1,
        (false, _) => 0,
    });
    Ok(f.tensor(meta, value))
}
