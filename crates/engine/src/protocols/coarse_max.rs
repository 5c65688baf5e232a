//! A coarse maximum of each row, in two rounds: what a softmax needs so that its exponentials neither vanish nor
//! overflow. The softmax itself does not depend on it, so it need not be exact.
//!
//! For scores in [low, low + 31 w), w a power of two, computes m with max(x) - w < m <= max(x) + w for each row.
//!
//! 1. Open c = (x - low) + t modulo 2^n, n = scale + log2(w) + 5, t uniform over that modulus. The bucket of x is the
//!    difference of the top five bits of c and t, or one less. The dealer deals shares of the one-hot vector of -top(t)
//!    in a small group Z_{2^g} (2^g more than entries of a row); rotated by top(c) they are shares of the one-hot
//!    vector of the bucket, and summed over the row they count the entries of each bucket.
//! 2. Open the masked suffix counts; a point function tells which are zero. m = low + w * (highest non-empty bucket).
//!
//! Two rounds; n bits an element and 31 g bits a row each way. Dealer: 4 g bytes an element to the second party; 31
//! point-function keys of g bits, 16 g bytes each, a row to both. (Not published elsewhere to our knowledge; built from one-hot tables as
//! in Ishai et al. 2013 and distributed point functions.)

use veiltune_fss::dpf;
use veiltune_ring::{Ring, pack};

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::{Error, Owner, Result};

const BUCKET_BITS: u32 = 5;
const BUCKETS: usize = 1 << BUCKET_BITS;
/// Scores whose one-hot vectors are dealt at a time: they stay in the cache.
const BATCH: usize = 1 << 10;
/// Suffixes that can be empty; the one from bucket 0 never is.
const SUFFIXES: usize = BUCKETS - 1;

/// Range and bucket width of the scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoarseMax {
    /// Least score.
    pub low: f64,
    /// log2 of the bucket width.
    pub width_bits: i32,
}

impl CoarseMax {
    /// For |score| <= bound: the finest power-of-two width with which 31 buckets hold the range (the last of 32 stays
    /// free, because a bucket can come out one too high). Where 31 buckets are the range exactly, at 15.5 times a power of two, the
    /// bound itself is not in it; calibrated bounds have a margin.
    pub fn for_bound(bound: f64) -> CoarseMax {
        CoarseMax {
            low: -bound,
            width_bits: (2.0 * bound / SUFFIXES as f64).log2().ceil() as i32,
        }
    }

    /// Bucket width.
    pub fn width(&self) -> f64 {
        2f64.powi(self.width_bits)
    }

    /// (low as a ring element, bits below the bucket index)
    fn fixed(&self, scale: u32) -> Result<(u64, u32)> {
        let shift = scale as i32 + self.width_bits;
        if !(1..=58).contains(&shift) {
            return Err(Error::program(
                "softmax",
                format!("scores of {scale} fractional bits in buckets of {}", self.width()),
            ));
        }
        Ok((
            (self.low * 2f64.powi(scale as i32)).round() as i64 as u64,
            shift as u32,
        ))
    }
}

/// (row length, rows, bits of the counting group)
fn shape(x: &Meta) -> Result<(usize, usize, u32)> {
    let row = *x
        .dims
        .last()
        .ok_or_else(|| Error::program("softmax", "a scalar has no rows"))?;
    if row > usize::from(u16::MAX) {
        return Err(Error::program(
            "softmax",
            format!("rows of {row} are longer than {}", u16::MAX),
        ));
    }
    Ok((row, x.len().checked_div(row).unwrap_or(0), row.max(1).ilog2() + 1))
}

fn output(x: &Meta) -> Meta {
    let mut dims = x.dims.clone();
    *dims.last_mut().expect("checked by shape") = 1;
    Meta {
        dims,
        scale: x.scale,
        owner: Owner::Shared,
        zeros: 0,
    }
}

/// low + width * (number of non-empty suffixes), from the number of *empty* ones.
fn from_empty(empty: u64, low: u64, shift: u32, with_constant: bool) -> u64 {
    let constant = if with_constant {
        low.wrapping_add((SUFFIXES as u64) << shift)
    } else {
        0
    };
    constant.wrapping_sub(empty << shift)
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, spec: &CoarseMax) -> Result<OffTensor> {
    let (_, rows, group) = shape(o.meta(x))?;
    let (_, shift) = spec.fixed(o.meta(x).scale)?;
    let (n, bits) = (o.meta(x).len(), shift + BUCKET_BITS);
    let gate = o.gate("coarse_max", format!("{spec:?}").as_bytes());
    o.exchanged("coarse_max", [pack::packed_len(n, bits) as u64; 2]);
    let t = o.small_mask(gate, 0, n, bits);
    let t = t.unwrap_or_default();
    o.deal_many("coarse_max", (gate, 1), (n, BUCKETS, BATCH), group, |range| {
        let mut one_hot = vec![0; range.len() * BUCKETS];
        for (entry, t) in one_hot.chunks_exact_mut(BUCKETS).zip(&t[range]) {
            entry[(t >> shift).wrapping_neg() as usize % BUCKETS] = 1;
        }
        one_hot
    })?;
    let counts = rows * SUFFIXES;
    o.exchanged("coarse_max", [pack::packed_len(counts, group) as u64; 2]);
    let v = o.small_mask(gate, 2, counts, group).unwrap_or_default();
    o.keys(
        "coarse_max",
        (gate, 3),
        counts,
        dpf::key_bytes(group),
        |range, roots, keys| Ok(dpf::generate_into(group, &v[range], roots, keys)?),
    )?;
    o.end_gate()?;
    Ok(o.tensor(output(o.meta(x))))
}

pub(crate) fn online(p: &Online, x: &Share, spec: &CoarseMax) -> Result<Share> {
    let (row, rows, group) = shape(p.meta(x))?;
    let (low, shift) = spec.fixed(p.meta(x).scale)?;
    let (meta, n, bits) = (output(p.meta(x)), p.meta(x).len(), shift + BUCKET_BITS);
    let (gate, mut material) = p.gate()?;

    let mut mine = p.small_mask(gate, 0, n, bits);
    if let Some(share) = p.share(x) {
        mine.iter_mut()
            .zip(share.as_slice())
            .for_each(|(m, x)| *m = m.wrapping_add(*x));
    }
    let offset = if p.is_first() { low } else { 0 };
    mine.iter_mut()
        .for_each(|m| *m = m.wrapping_sub(offset) & low_bits(bits));
    let c = p.open_words(mine, bits)?;

    let dealt = take(&mut material.dealt)?;
    let mut counts = vec![[0u64; BUCKETS]; rows];
    let mut one_hot = vec![0; BATCH.min(n) * BUCKETS];
    for start in (0..n).step_by(BATCH) {
        let one_hot = &mut one_hot[..BATCH.min(n - start) * BUCKETS];
        dealt.read(start * BUCKETS, one_hot);
        for (j, entry) in (start..).zip(one_hot.chunks_exact(BUCKETS)) {
            // Entry b of the rotated vector is entry b - top(c) of the dealt one.
            let (start, end) = entry.split_at(BUCKETS - (c[j] >> shift) as usize);
            let (head, tail) = counts[j / row].split_at_mut(end.len());
            head.iter_mut()
                .zip(end)
                .for_each(|(a, b)| *a = a.wrapping_add(*b));
            tail.iter_mut()
                .zip(start)
                .for_each(|(a, b)| *a = a.wrapping_add(*b));
        }
    }
    let mut suffixes = p.small_mask(gate, 2, rows * SUFFIXES, group);
    for (counts, out) in counts.iter().zip(suffixes.chunks_exact_mut(SUFFIXES)) {
        let mut sum = 0u64;
        for b in (1..BUCKETS).rev() {
            sum = sum.wrapping_add(counts[b]);
            out[b - 1] = out[b - 1].wrapping_add(sum) & low_bits(group);
        }
    }
    let opened = p.open_words(suffixes, group)?;
    let (roots, keys) = take(&mut material.keys)?;
    let empty = dpf::evaluate(p.party().index(), group, &roots, &keys, &opened)?;
    let out = empty
        .chunks_exact(SUFFIXES)
        .map(|e| {
            from_empty(
                e.iter().fold(0, |a: u64, b| a.wrapping_add(*b)),
                low,
                shift,
                p.is_first(),
            )
        })
        .collect();
    Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims, out)?)))
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, spec: &CoarseMax) -> Result<FixedTensor> {
    let (row, rows, _) = shape(f.meta(x))?;
    let (low, shift) = spec.fixed(f.meta(x).scale)?;
    let (meta, bits) = (output(f.meta(x)), shift + BUCKET_BITS);
    let gate = f.gate();
    let t = f.small_mask(gate, 0, f.meta(x).len(), bits);
    let limit = (SUFFIXES as u64) << shift;
    let mut out = Vec::with_capacity(rows);
    for (x, t) in f
        .ring(x)
        .as_slice()
        .chunks_exact(row.max(1))
        .zip(t.chunks_exact(row.max(1)))
    {
        let mut top = 0;
        for (x, t) in x.iter().zip(t) {
            let offset = x.wrapping_sub(low);
            if offset >= limit {
                let detail = format!(
                    "a score is outside {} ..= {}; calibrate a wider bound",
                    spec.low, -spec.low
                );
                return Err(f.out_of_range("softmax", detail));
            }
            let c = offset.wrapping_add(*t) & low_bits(bits);
            top = top.max((c >> shift).wrapping_sub(t >> shift) % BUCKETS as u64);
        }
        out.push(from_empty(SUFFIXES as u64 - top, low, shift, true));
    }
    Ok(f.tensor(meta.clone(), Ring::new(meta.dims, out)?))
}
