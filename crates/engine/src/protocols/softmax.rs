//! Exact softmax over the last dimension, for calibrated scores |s| <= bound.
//!
//! 1. m, a [coarse maximum](super::coarse_max) of the row: max - w < m <= max + w for a bucket width w of at most 2
//!    (2 rounds). It cancels out of the result; it only keeps the exponentials in range.
//! 2. p = exp(s - m) by the [trigonometric gate](super::trigonometric) on -(2 bound + w) ..= w (1 round), fitted so
//!    that the error falls with the value.
//! 3. [1 / sum p](super::inverse) (2 rounds, one value a row; p is opened in the second), and the product on these
//!    openings. The result has 60 fractional bits; the next verb truncates.
//!
//! Scores of a wider range (bound above 24, at most 248) are first brought into it: less another coarse maximum, those more
//! than 16 and a bucket below it are raised to there by a [comparison](super::compare) (4 rounds more, 7
//! with masked bits, and one for scores of more than 16 fractional bits; each way about 11 bytes an element more, 13 with masked
//! bits, and 31 a row; dealer what the comparison and a second coarse maximum take). Where buckets are too wide for one such step
//! (bound above 248, at most 1984), two of them follow each other, at twice the cost but for the round of finer scores.
//!
//! 5 rounds, where published protocols take 41 to 116. Each way 13.4 bytes an element (8 of them for opening p) if s has
//! 16 fractional bits and bound is 15, and 47 a row (rows of up to 255). Dealer: to the second party 32 bytes an element
//! for the buckets, 16 an element and harmonic (16 harmonics for bound 15), 11 for the product; to both some 5 KB a row.
//!
//! Error at most 1e-3 for rows of up to 300 entries (the conformance suite), on average below 1e-5. A row's sum adds up the errors
//! of its small terms, each at most 1e-6: for rows of n entries in the thousands allow up to 3e-6 n. With a bound above 24 the raised scores are equal, and so are their errors: 1e-3
//! + 1e-5 n is tested.

use crate::backend::SoftmaxSpec;
use crate::gates::{Gates, Local, Product, SCALE};
use crate::lower::{at_most, last_dim};
use crate::series::Series;
use crate::{Error, Result};

use super::activation::MAX_INPUT_SCALE;
use super::coarse_max::CoarseMax;
use super::inverse::power;
use super::trigonometric::Form;

/// Fractional bits of an exponential.
const EXP_BITS: u32 = 24;
/// Scores so far below the largest are raised: what they add to a sum is at most exp(-NEGLIGIBLE) of it, each.
const NEGLIGIBLE: f64 = 16.0;

/// Softmax of each row; see the module.
pub fn softmax<G: Gates>(g: &G, x: &G::T, spec: &SoftmaxSpec) -> Result<G::T> {
    if !(spec.bound > 0.0 && spec.bound <= SoftmaxSpec::WIDEST) {
        return Err(Error::program(
            "softmax",
            format!("the bound {} is outside 0 .. {}", spec.bound, SoftmaxSpec::WIDEST),
        ));
    }
    let dim = last_dim(g, x, "softmax")?;
    let (mut x, mut bound) = (x.clone(), spec.bound);
    let wide = [SoftmaxSpec::NARROW, SoftmaxSpec::WIDE].into_iter();
    for _ in wide.filter(|limit| spec.bound > *limit) {
        (x, bound) = clamped(g, &x, bound)?;
    }
    let x = at_most(g, &x, MAX_INPUT_SCALE)?;
    let n = g.meta(&x).dims[dim];
    let coarse = CoarseMax::for_bound(bound);
    let width = coarse.width();
    let max = g.coarse_max(&x, &coarse)?;
    let shifted = g.sum_of(&x, &max, true)?;
    let series = Series::exp_tail(2.0 * bound + width, width)?;
    let p = g.series(&shifted, &series, Form::Rounded(EXP_BITS))?;
    let total = g.local(&p, &Local::Sum(dim))?;
    // The largest term is at least exp(-width).
    let range = (0.98 * (-width).exp(), 1.02 * n.max(1) as f64 * width.exp());
    let inverse = power(g, &total, 1.0, -1.0, range, 20, &[&p])?;
    g.product(Product::Elementwise, &p, &inverse)
}

/// Scores of a wide range, less a coarse maximum of their row, with those that do not matter raised; and their new bound, which is
/// 8 and a bucket's width, a rounding error aside: at most [`SoftmaxSpec::NARROW`] for [`SoftmaxSpec::WIDE`], and less than that for
/// [`SoftmaxSpec::WIDEST`].
fn clamped<G: Gates>(g: &G, x: &G::T, bound: f64) -> Result<(G::T, f64)> {
    let x = at_most(g, x, SCALE)?;
    let scale = g.meta(&x).scale;
    let coarse = CoarseMax::for_bound(bound);
    let width = coarse.width();
    let max = g.coarse_max(&x, &coarse)?;
    // From -depth to width, the largest above -width.
    let depth = NEGLIGIBLE + width;
    let fixed = |v: f64| (v * 2f64.powi(scale as i32)).round() as i64 as u64;
    let raised = g.add_constant(&g.sum_of(&x, &max, true)?, fixed(depth))?;
    let kept = g.positive_part(&raised, 0)?;
    let middle = 0.5 * (depth + width);
    // Fixed-point rounding may leave the range by a few units.
    Ok((
        g.add_constant(&kept, fixed(middle).wrapping_neg())?,
        middle + 1e-3,
    ))
}
