//! LayerNorm and RMSNorm over the last dimension, without the affine part, for a calibrated range of sigma.
//!
//! 1. LayerNorm: the mean of each row (one truncation a row, 1 round) is subtracted. An input of more than 16
//!    fractional bits is truncated in the same round, on the opening that both share.
//! 2. The centred row is opened once (1 round); its square and its product with 1/sigma use that opening.
//! 3. [1/sigma](super::inverse) from the sum of squares (3 rounds, one value a row) and the product (1 round).
//!
//! 6 rounds (RMSNorm 5). Each way 8 bytes an element and about 50 a row; dealer 16 bytes an element to the second party
//! and some 1 KB a row to both. The result has 30 to 40 fractional bits; up to 34, which is sigma up to 16, it feeds a
//! linear layer as it is. Relative error at most 2e-4 within the calibrated range.

use crate::backend::{NormKind, NormSpec};
use crate::gates::{Gates, LIMIT_BITS, Local, Product, SCALE};
use crate::lower::{at_most, last_dim, refine};
use crate::{Error, Result};

use super::inverse::power;

/// (x - mean) / sigma, or x / rms, of each row; see the module.
pub fn normalize<G: Gates>(g: &G, x: &G::T, spec: &NormSpec) -> Result<G::T> {
    let (low, high) = spec.sigma;
    if !(low > 0.0 && low < high && high <= 1024.0 * low && high.is_finite()) {
        return Err(Error::program(
            "normalize",
            format!("sigma {low} ..= {high}: calibrate a positive range of ratio at most 1024"),
        ));
    }
    let dim = last_dim(g, x, "normalize")?;
    let d = g.meta(x).dims[dim].max(1) as f64;
    let x = match spec.kind {
        NormKind::Layer => centred(g, x, dim, d)?,
        NormKind::Rms => refine(g, &at_most(g, x, SCALE)?, SCALE)?,
    };
    let square = g.product(Product::Elementwise, &x, &x)?;
    let sum = g.local(&square, &Local::Sum(dim))?;
    let eps = (spec.eps * d * 2f64.powi(2 * SCALE as i32)).round() as u64;
    let sum = g.add_constant(&sum, eps)?;
    // 1/sigma = sqrt(d) / sqrt(sum of squares + d eps), with thirteen bits or more at the largest sigma.
    let bits = (14.0 + high.log2()).ceil().clamp(14.0, 24.0) as u32;
    let inverse = power(g, &sum, d.sqrt(), -0.5, (d * low * low, d * high * high), bits)?;
    g.product(Product::Elementwise, &x, &inverse)
}

/// x less its rows' means, with [`SCALE`] fractional bits: one round.
fn centred<G: Gates>(g: &G, x: &G::T, dim: usize, d: f64) -> Result<G::T> {
    /// Fractional bits of 1/d.
    const BITS: u32 = 20;
    // The sum times 2^20 / d must stay below 2^62, for means below 2^8.
    let x = refine(g, &at_most(g, x, LIMIT_BITS - BITS - 8)?, SCALE)?;
    let scale = g.meta(&x).scale;
    if scale > SCALE {
        // What is computed from an opened value is open.
        g.open(&[&x])?;
    }
    let sum = g.local(&x, &Local::Sum(dim))?;
    let mean = g.local(&sum, &Local::Times((2f64.powi(BITS as i32) / d).round() as i64))?;
    let mean = g.local(&mean, &Local::Relabel(scale + BITS))?;
    let mean_bits = scale + BITS - SCALE;
    if scale == SCALE {
        let mean = g.truncate(&[(&mean, mean_bits)], false)?.remove(0);
        return g.sum_of(&x, &mean, true);
    }
    let both = g.truncate(&[(&x, scale - SCALE), (&mean, mean_bits)], false)?;
    g.sum_of(&both[0], &both[1], true)
}
