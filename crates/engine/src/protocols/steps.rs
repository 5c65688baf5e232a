//! Step functions: piecewise constant functions of a non-negative value with public thresholds and public jumps.
//!
//! y_o = base_o + sum_j jump_{o,j} [x >= T_j] for x in 0..2^n. With X = x + r open, c = X mod 2^n and
//! f(v) = [v < r mod 2^n] from one key of a distributed comparison function with payload 1,
//! [x < T] = [c < T] + f(c - T mod 2^n) - f(c): one key serves every threshold (the interval-containment gate of
//! Boyle et al. 2021, with outputs in Z_{2^64}).
//!
//! No round beyond opening x (1, or 0 if open); 8 bytes each way an element if not open. Dealer: one key of n bits an
//! element to both. Exact. Costs J + 1 key evaluations an element: for values that are few, such as one a row
//! (reciprocals, inverse square roots by a piecewise linear function on geometric intervals).

use std::sync::Arc;

use veiltune_fss::dcf;
use veiltune_ring::Ring;

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::opening::BOTH;
use crate::{Error, Owner, Result};

/// Public thresholds and jumps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    /// The input satisfies 0 <= x < 2^bits in the ring.
    pub bits: u32,
    /// Strictly increasing, in 1..2^bits.
    pub thresholds: Vec<u64>,
    /// The functions.
    pub outputs: Vec<StepFunction>,
}

/// One piecewise constant function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepFunction {
    /// Value below the first threshold, in the ring.
    pub base: u64,
    /// Added at each threshold.
    pub jumps: Vec<u64>,
    /// Fractional bits of the values.
    pub scale: u32,
}

impl StepFunction {
    /// From the value on each interval (one more than there are thresholds).
    pub fn from_values(values: &[u64], scale: u32) -> StepFunction {
        let jumps = values.windows(2).map(|w| w[1].wrapping_sub(w[0])).collect();
        StepFunction {
            base: values[0],
            jumps,
            scale,
        }
    }
}

impl Steps {
    fn check(&self) -> Result<()> {
        let increasing = self.thresholds.windows(2).all(|w| w[0] < w[1]);
        let inside = self
            .thresholds
            .iter()
            .all(|t| *t > 0 && *t <= low_bits(self.bits));
        let lengths = self
            .outputs
            .iter()
            .all(|o| o.jumps.len() == self.thresholds.len());
        if increasing && inside && lengths && (1..=64).contains(&self.bits) {
            return Ok(());
        }
        Err(Error::program(
            "steps",
            "thresholds must increase within 1..2^bits, with one jump each",
        ))
    }

    fn fingerprint(&self) -> Vec<u8> {
        format!("{self:?}").into_bytes()
    }

    fn metas(&self, x: &Meta) -> Vec<Meta> {
        let meta = |o: &StepFunction| Meta {
            dims: x.dims.clone(),
            scale: o.scale,
            owner: Owner::Shared,
        };
        self.outputs.iter().map(meta).collect()
    }
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, spec: &Arc<Steps>) -> Result<Vec<OffTensor>> {
    spec.check()?;
    o.open_for(&[(x, BOTH)]);
    let n = o.meta(x).len();
    let gate = o.gate("steps", &spec.fingerprint());
    let mask = if o.is_dealer() {
        o.mask(x)?
    } else {
        Ring::zeros([0])
    };
    o.keys(
        "steps",
        (gate, 0),
        n,
        dcf::key_bytes(spec.bits),
        |range, roots, keys| {
            let alphas: Vec<u64> = mask.as_slice()[range]
                .iter()
                .map(|r| r & low_bits(spec.bits))
                .collect();
            Ok(dcf::generate_into(
                spec.bits,
                &alphas,
                &vec![1; alphas.len()],
                roots,
                keys,
            )?)
        },
    )?;
    o.end_gate()?;
    Ok(spec.metas(o.meta(x)).into_iter().map(|m| o.tensor(m)).collect())
}

pub(crate) fn online(p: &Online, x: &Share, spec: &Arc<Steps>) -> Result<Vec<Share>> {
    spec.check()?;
    p.open_for(&[(x, BOTH)])?;
    let (_, mut material) = p.gate()?;
    let (roots, keys) = take(&mut material.keys)?;
    let low = low_bits(spec.bits);
    let c = p.masked(x)?.map(|c| c & low).into_vec();
    let points = spec.thresholds.len() + 1;
    let mut xs = Vec::with_capacity(c.len() * points);
    for &c in &c {
        xs.push(c);
        xs.extend(spec.thresholds.iter().map(|t| c.wrapping_sub(*t) & low));
    }
    let f = dcf::evaluate(p.party().index(), spec.bits, &roots, &keys, points, &xs)?;
    let one = u64::from(p.is_first());
    let mut outs: Vec<Vec<u64>> = spec
        .outputs
        .iter()
        .map(|o| vec![one.wrapping_mul(o.base); c.len()])
        .collect();
    let mut reached = vec![0; spec.thresholds.len()];
    for (i, (c, f)) in c.iter().zip(f.chunks_exact(points)).enumerate() {
        for (j, t) in spec.thresholds.iter().enumerate() {
            // [x >= T] = 1 - [c < T] - f(c - T) + f(c)
            let public = if c < t { 0 } else { one };
            reached[j] = public.wrapping_sub(f[j + 1]).wrapping_add(f[0]);
        }
        for (out, function) in outs.iter_mut().zip(&spec.outputs) {
            let sum = function
                .jumps
                .iter()
                .zip(&reached)
                .map(|(a, b)| a.wrapping_mul(*b));
            out[i] = sum.fold(out[i], u64::wrapping_add);
        }
    }
    let rings = outs.into_iter().map(|o| Ring::new(p.meta(x).dims.clone(), o));
    spec.metas(p.meta(x))
        .into_iter()
        .zip(rings)
        .map(|(m, r)| Ok(p.tensor(m, Some(r?))))
        .collect()
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, spec: &Arc<Steps>) -> Result<Vec<FixedTensor>> {
    spec.check()?;
    if f.ring(x).as_slice().iter().any(|x| *x > low_bits(spec.bits)) {
        let detail = format!(
            "a value is negative or reaches 2^{}; calibrate a wider range",
            spec.bits
        );
        return Err(Error::Range { op: "steps", detail });
    }
    f.open_for(&[(x, BOTH)])?;
    f.gate();
    let metas = spec.metas(f.meta(x));
    Ok(metas
        .into_iter()
        .zip(&spec.outputs)
        .map(|(meta, function)| {
            let value = f.ring(x).map(|x| {
                let reached = spec.thresholds.partition_point(|t| *t <= x);
                function.jumps[..reached]
                    .iter()
                    .fold(function.base, |a, b| a.wrapping_add(*b))
            });
            f.tensor(meta, value)
        })
        .collect())
}
