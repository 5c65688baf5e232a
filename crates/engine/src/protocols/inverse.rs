//! Reciprocal and inverse square root of positive values, one a row: a piecewise linear function on geometric
//! intervals.
//!
//! The intervals are 1/24 octave wide; [step functions](super::steps) of v pick constant and slope of v's interval, on
//! the same opening of v that [truncates](super::truncate) it to a coarser scale (1 round); one product (1 round) and one
//! truncation (1 round) follow. Where published systems iterate Newton's method from a guess, this needs no guess and no
//! iteration, and its relative error is the same over the whole range: at most 1.1e-4 for 1/v and 4e-5 for 1/sqrt(v), plus
//! rounding of the result to its last bit.
//!
//! 3 rounds; 32 bytes each way a value; dealer: a comparison-function key (about 24 bytes a bit of v) to both, and some
//! 30 bytes to the second party. 24 log2(range) + 1 key evaluations a value.

use std::sync::Arc;

use crate::gates::{Gates, Product};
use crate::lower::refine;
use crate::{Error, Result};

use super::steps::{StepFunction, Steps};

/// Intervals an octave of the piecewise linear inverse: relative error at most 1.1e-4 for 1/v, 4e-5 for its root.
const PER_OCTAVE: f64 = 24.0;

/// factor * v^exponent for v in `range` (one value a row), with `bits` fractional bits: piecewise linear on geometric
/// intervals, then one truncation. Three rounds.
pub fn power<G: Gates>(
    g: &G,
    v: &G::T,
    factor: f64,
    exponent: f64,
    range: (f64, f64),
    bits: u32,
) -> Result<G::T> {
    let scale = g.meta(v).scale;
    let (low, high) = range;
    let octaves = (high / low).log2();
    let count = (octaves * PER_OCTAVE).ceil().max(1.0) as usize;
    let knot = |i: usize| low * (high / low).powf(i as f64 / count as f64);
    let function = |v: f64| factor * v.powf(exponent);

    // Scales: fourteen bits of v at the low end, thirteen of the slope at the high end.
    let coarse = ((15.0 - low.log2()).ceil().max(1.0) as u32).min(scale);
    let slope_bits = (14.0 - (exponent.abs() * function(high) / high).log2())
        .ceil()
        .max(0.0) as u32;
    let out = slope_bits + coarse;
    let top = out as f64 + function(low).log2() + 1.0;
    if top >= 62.0 {
        return Err(Error::program(
            "inverse",
            format!("a range of ratio 2^{octaves:.0} is too wide; calibrate a narrower one"),
        ));
    }
    let fixed = |x: f64, scale: u32| (x * 2f64.powi(scale as i32)).round() as i64 as u64;
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
    let steps = Arc::new(Steps {
        // Two bits to spare: just beyond the range the last line goes on, and far beyond it the result is garbage.
        bits: (high.log2() + f64::from(scale)).ceil() as u32 + 2,
        thresholds: (1..count).map(|i| fixed(knot(i), scale)).collect(),
        outputs: vec![
            StepFunction::from_values(&constants, out),
            StepFunction::from_values(&slopes, slope_bits),
        ],
    });
    // One opening of v serves the truncation and the comparison.
    let coarse_v = if scale > coarse {
        g.truncate(&[(v, scale - coarse)], false)?.remove(0)
    } else {
        v.clone()
    };
    let lines = g.steps(v, &steps)?;
    let y = g.sum_of(
        &lines[0],
        &g.product(Product::Elementwise, &lines[1], &coarse_v)?,
        false,
    )?;
    if out > bits {
        Ok(g.truncate(&[(&y, out - bits)], false)?.remove(0))
    } else {
        refine(g, &y, bits)
    }
}
