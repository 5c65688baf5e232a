//! Exact softmax over the last dimension, for calibrated scores |s| <= bound.
//!
//! 1. m, a [coarse maximum](super::coarse_max) of the row: max - w < m <= max + w for a bucket width w of at most 2
//!    (2 rounds). It cancels out of the result; it only keeps the exponentials in range.
//! 2. p = exp(s - m) by the [trigonometric gate](super::trigonometric) on -(2 bound + w) ..= w (1 round), fitted so
//!    that the error falls with the value.
//! 3. [1 / sum p](super::inverse) (2 rounds, one value a row; p is opened in the second), and the product on these
//!    openings. The result has 60 fractional bits; the next verb truncates.
//!
//! **Times values** ([`attend`]), the division comes last, as there are fewer results than scores. p is made as large as a
//! truncation takes it, which the dealer's sines need fewer bits for; it is opened (1 round), [truncated](super::truncate) to 24
//! fractional bits, opened again with the sum (1 round), and multiplied by the values. The product is opened with the inverse (1 round),
//! truncated, and multiplied by it on these openings. A result has 34 fractional bits, 18 of them zero: a linear layer takes it as it is.
//! Values of more than 26 fractional bits are truncated to 16 on their opening too, and what that leaves is opened.
//!
//! Scores of a wider range (bound above 24, at most 248) are first brought into it: less another coarse maximum, those more
//! than 16 and a bucket below it are raised to there by a [comparison](super::compare) (4 rounds more, 7
//! with masked bits, and one for scores of more than 16 fractional bits; each way about 11 bytes an element more, 13 with masked
//! bits, and 31 a row; dealer what the comparison and a second coarse maximum take). Where buckets are too wide for one such step
//! (bound above 248, at most 1984), two of them follow each other, at twice the cost but for the round of finer scores.
//!
//! 5 rounds, where published protocols take 41 to 116. Each way 11.4 bytes an element (6 of them for opening p) if s has
//! 16 fractional bits and bound is 15, and 45 a row (of 128 to 255 entries; the counters in buckets are as long as needed). Dealer: to the second party 32 bytes an element
//! for the buckets, 16 an element and harmonic (16 harmonics for bound 15), 11 for the product; to both some 5 KB a row.
//! With values 6 rounds, each way 13.4 bytes a score (8 of them for both openings of p), 8 a value that is not open yet, 8 a result, and 47 a row; dealer 11 an
//! element and harmonic, 12 a score in place of the product's 11, and some 33 a result. (Truncating what `softmax` gives and multiplying that takes 22.9
//! bytes a score.)
//!
//! Error at most 1e-3 for rows of up to 300 entries (the conformance suite), on average below 1e-5. A row's sum adds up the errors
//! of its small terms, each at most 1e-6, and noise of about 1e-5 a term, of either sign: for rows of n entries in the thousands allow up to 3e-6 n. With a bound above 24 the raised scores are equal, and so are their errors: 1e-3
//! + 1e-5 n is tested. With values, 1e-3 of the largest one, and 2e-3 with a bound above 24.

use std::sync::Arc;

use crate::backend::SoftmaxSpec;
use crate::gates::{Gates, Local, MAX_SCALE, Product, SCALE};
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
    let exponents = Exponents::of(g, x, spec)?;
    let p = g.series(&exponents.x, &exponents.exp, Form::Rounded(EXP_BITS))?;
    let total = g.local(&p, &Local::Sum(exponents.dim))?;
    let inverse = power(g, &total, 1.0, -1.0, exponents.total(), 20, &[&p])?;
    g.product(Product::Elementwise, &p, &inverse)
}

/// Softmax of each row of `scores`, times `values`; see the module.
pub fn attend<G: Gates>(g: &G, scores: &G::T, values: &G::T, spec: &SoftmaxSpec) -> Result<G::T> {
    let exponents = Exponents::of(g, scores, spec)?;
    let size = (1.01 * exponents.width.exp()).log2().ceil() as u32;
    let raised = Form::RaisedRounded { size, bits: EXP_BITS };
    let p = g.series(&exponents.x, &exponents.exp, raised)?;
    // On these openings both are truncated.
    g.open(&[&p, values])?;
    let p = g.truncate(&[(&p, g.meta(&p).scale - EXP_BITS)], false)?.remove(0);
    let values = at_most(g, values, MAX_SCALE - EXP_BITS)?;
    let total = g.local(&p, &Local::Sum(exponents.dim))?;
    g.open(&[&total, &p, &values])?;
    let mixed = g.product(Product::MatMul, &p, &values)?;
    // Together both factors have what a linear layer takes. The sum of n exponentials is between that of one and n of them, and the
    // factors' errors matter at either end: each gets half of the bits between.
    let bits = SCALE + exponents.n.ilog2().div_ceil(2);
    let inverse = power(g, &total, 1.0, -1.0, exponents.total(), bits, &[&mixed])?;
    let cut = g.meta(&mixed).scale - (MAX_SCALE - SCALE - bits);
    let mixed = g.truncate_carried(&[(&mixed, cut)])?.remove(0);
    g.product(Product::Elementwise, &mixed, &inverse)
}

/// Scores less a coarse maximum of their row.
struct Exponents<T> {
    x: T,
    /// The dimension of a row, and how many there are in one.
    dim: usize,
    n: usize,
    /// The largest is at least -width, and at most width.
    width: f64,
    /// exp on their range.
    exp: Arc<Series>,
}

impl<T: Clone> Exponents<T> {
    fn of<G: Gates<T = T>>(g: &G, x: &T, spec: &SoftmaxSpec) -> Result<Exponents<T>> {
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
        let coarse = CoarseMax::for_bound(bound);
        let width = coarse.width();
        let max = g.coarse_max(&x, &coarse)?;
        Ok(Exponents {
            n: g.meta(&x).dims[dim].max(1),
            x: g.sum_of(&x, &max, true)?,
            dim,
            width,
            exp: Series::exp_tail(2.0 * bound + width, width)?,
        })
    }

    /// Smallest and largest sum of a row's exponentials.
    fn total(&self) -> (f64, f64) {
        (
            0.98 * (-self.width).exp(),
            1.02 * self.n as f64 * self.width.exp(),
        )
    }
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
