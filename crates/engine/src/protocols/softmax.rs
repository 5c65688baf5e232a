//! Exact softmax over the last dimension, for calibrated scores |s| <= bound.
//!
//! 1. m, a [coarse maximum](super::coarse_max) of the row: max - w < m <= max + w for a bucket width w of at most 2
//!    (2 rounds). It cancels out of the result; it only keeps the exponentials in range.
//! 2. p = exp(s - m) by the [trigonometric gate](super::trigonometric) on -(2 bound + w) ..= w (1 round), fitted so
//!    that the error falls with the value.
//! 3. [1 / sum p](super::inverse) (3 rounds, one value a row) and the product (1 round). The result has 60 fractional
//!    bits; the next verb truncates.
//!
//! 7 rounds, where published protocols take 41 to 116. Each way 13.4 bytes an element (8 of them for opening p) if s has
//! 16 fractional bits and bound is 15, and 71 a row (rows of up to 255). Dealer: to the second party 32 bytes an element
//! for the buckets, 16 an element and harmonic (16 harmonics for bound 15), 8 for the product; to both some 5 KB a row.
//!
//! Error at most 1e-3 for rows of up to 300 entries (the conformance suite), on average below 1e-5. A row's sum adds up the errors
//! of its small terms, each at most 1e-6: for rows of n entries in the thousands allow up to 3e-6 n.

use crate::backend::SoftmaxSpec;
use crate::gates::{Gates, Local, Product};
use crate::lower::{at_most, last_dim};
use crate::series::Series;
use crate::{Error, Result};

use super::activation::MAX_INPUT_SCALE;
use super::coarse_max::CoarseMax;
use super::inverse::power;

/// Softmax of each row; see the module.
pub fn softmax<G: Gates>(g: &G, x: &G::T, spec: &SoftmaxSpec) -> Result<G::T> {
    if !(spec.bound > 0.0 && spec.bound <= 24.0) {
        return Err(Error::program(
            "softmax",
            format!("the bound {} is outside 0 .. 24", spec.bound),
        ));
    }
    let x = at_most(g, x, MAX_INPUT_SCALE)?;
    let dim = last_dim(g, &x, "softmax")?;
    let n = g.meta(&x).dims[dim];
    let coarse = CoarseMax::for_bound(spec.bound);
    let width = coarse.width();
    let max = g.coarse_max(&x, &coarse)?;
    let shifted = g.sum_of(&x, &max, true)?;
    let p = g.series(&shifted, &Series::exp_tail(2.0 * spec.bound + width, width)?)?;
    let total = g.local(&p, &Local::Sum(dim))?;
    // The largest term is at least exp(-width).
    let range = (0.98 * (-width).exp(), 1.02 * n.max(1) as f64 * width.exp());
    let inverse = power(g, &total, 1.0, -1.0, range, 20)?;
    g.product(Product::Elementwise, &p, &inverse)
}
