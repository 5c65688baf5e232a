//! Reciprocal and inverse square root of positive values, one a row: a piecewise linear function on geometric
//! intervals.
//!
//! The intervals are 1/24 octave wide for 1/v and 1/15 for 1/sqrt(v); the [line](super::lines) of v's interval is evaluated on the
//! opening of v (1 round), and truncated on an opening of its own (1 round), after which it is [ready to multiply](super::carried).
//! Where published systems iterate Newton's method from a guess, this needs no guess and no iteration, and its relative error is the
//! same over almost the whole range: at most 1.1e-4, and 1.4e-4 in the lowest octaves, where v may be taken for one beyond the
//! interval by a sixteenth of its width; plus rounding of the result to its last bit.
//!
//! 2 rounds; 16 bytes each way a value; dealer: a comparison-function key (about 32 bytes a bit of what tells intervals apart, some 10
//! bits and those of the range) to both, and some 20 bytes to the second party. A key evaluation a value and interval.

use std::sync::Arc;

use crate::gates::{Gates, MAX_SCALE, SCALE};
use crate::lower::{at_most, refine};
use crate::{Error, Result};

use super::lines::Lines;

/// Intervals an octave on which lines are within 1.1e-4 of v^exponent: an interpolation's error is that of the curvature,
/// exponent (exponent - 1).
fn intervals(exponent: f64) -> f64 {
    (24.0 * (0.5 * exponent * (exponent - 1.0)).sqrt()).ceil()
}

/// 1 / x for x in `range`, elementwise, with a relative error of at most 1.4e-4 and at least 14 bits of the smallest
/// result.
pub fn reciprocal<G: Gates>(g: &G, x: &G::T, range: (f64, f64)) -> Result<G::T> {
    let (low, high) = range;
    if !(low > 0.0 && low < high && high.is_finite()) {
        return Err(Error::program(
            "reciprocal",
            format!("{low} ..= {high}: calibrate a positive range"),
        ));
    }
    // Room for x with two bits to spare; enough of its bits to tell the intervals apart.
    let most = (60.0 - high.log2()).floor().clamp(0.0, f64::from(MAX_SCALE)) as u32;
    let least = (12.0 - low.log2()).ceil().max(0.0) as u32;
    let x = refine(g, &at_most(g, x, most)?, least)?;
    let bits = (14.0 + high.log2()).ceil().clamp(f64::from(SCALE), 30.0) as u32;
    power(g, &x, 1.0, -1.0, range, bits, &[])
}

/// factor * v^exponent for v in `range` (one value a row), with `bits` fractional bits: piecewise linear on geometric
/// intervals, then one truncation. Two rounds; elementwise products with the result open nothing for it. What they open of
/// the other factor, `with`, is opened in the second of these rounds.
pub fn power<G: Gates>(
    g: &G,
    v: &G::T,
    factor: f64,
    exponent: f64,
    range: (f64, f64),
    bits: u32,
    with: &[&G::T],
) -> Result<G::T> {
    let scale = g.meta(v).scale;
    let (low, high) = range;
    let octaves = (high / low).log2();
    let count = (octaves * intervals(exponent)).ceil().max(1.0) as usize;
    let geometric = |i: usize| low * (high / low).powf(i as f64 / count as f64);
    let function = |v: f64| factor * v.powf(exponent);

    // Scales: fourteen bits of v at the low end, thirteen of the slope at the high end, or, for a wide range, as many as fit: with
    // eight it is off by less than a quarter of what the interpolation is.
    let coarse = ((15.0 - low.log2()).ceil().max(1.0) as u32).min(scale);
    let slope_at = |bits: f64| (bits - (exponent.abs() * function(high) / high).log2()).ceil();
    let room = (61.0 - function(low).log2()).ceil() - 1.0 - f64::from(coarse);
    if room < slope_at(9.0) {
        return Err(Error::program(
            "inverse",
            format!("a range of ratio 2^{octaves:.0} is too wide; calibrate a narrower one"),
        ));
    }
    let slope_bits = slope_at(14.0).min(room).max(0.0) as u32;
    let out = slope_bits + coarse;
    let fixed = |x: f64, scale: u32| (x * 2f64.powi(scale as i32)).round() as i64 as u64;
    // Intervals are told apart to within a sixteenth of the narrowest: v is taken for less or more by up to half of that, about knots
    // that lie in the middle between two whole numbers of it.
    let narrowest = (geometric(1) - low) * 2f64.powi(coarse as i32);
    let cut = (narrowest.log2().floor() as i32 - 4).max(0) as u32;
    let unit = 2f64.powi(cut as i32 - coarse as i32);
    let threshold = |i: usize| (geometric(i) / unit + 0.5).round();
    let knot = |i: usize| match i {
        i if i == 0 || i == count => geometric(i),
        i => (threshold(i) - 0.5) * unit,
    };
    let (mut constants, mut slopes) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for i in 0..count {
        let (l, r) = (knot(i), knot(i + 1));
        // Interpolation at the two Chebyshev nodes.
        let (mid, half) = (0.5 * (l + r), 0.5 * (r - l) * std::f64::consts::FRAC_1_SQRT_2);
        let slope = (function(mid + half) - function(mid - half)) / (2.0 * half);
        let slope = fixed(slope, slope_bits);
        let rounded = slope as i64 as f64 / 2f64.powi(slope_bits as i32);
        let value = 0.5 * (function(mid + half) + function(mid - half));
        constants.push(fixed(value - rounded * mid, out));
        slopes.push(slope);
    }
    let lines = Arc::new(Lines {
        // Two bits to spare: just beyond the range the last line goes on, and far beyond it the result is garbage.
        bits: (high.log2() + f64::from(scale)).ceil() as u32 + 2,
        shift: scale - coarse,
        cut,
        thresholds: (1..count).map(|i| threshold(i) as u64).collect(),
        constants,
        slopes,
        scale: out,
    });
    let y = g.lines(v, &lines)?;
    if out <= bits {
        return refine(g, &y, bits);
    }
    if !with.is_empty() {
        g.open(&[with, &[&y]].concat())?;
    }
    Ok(g.truncate_carried(&[(&y, out - bits)])?.remove(0))
}
