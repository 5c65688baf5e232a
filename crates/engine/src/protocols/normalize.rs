//! LayerNorm and RMSNorm over the last dimension, without the affine part, for a calibrated range of sigma.
//!
//! 1. x is opened (1 round), and truncated to 16 fractional bits on that opening if it has more. LayerNorm subtracts the
//!    mean of each row, truncated on the same opening. The row is now [known up to dealt values](super::carried).
//! 2. The sum of squares, opened (1 round), and [1/sigma](super::inverse) of it, opened and truncated (1 round; one value a
//!    row). The product of both opens nothing.
//!
//! 3 rounds, for either kind; one more for LayerNorm of an input of more than 34 fractional bits, whose mean is made of the
//! truncated row and opened by itself (8 bytes a row). Each way 8 bytes an element, less the zeros of x, and 16 a row. Dealer, to
//! the second party: about 11 bytes an element for an input of 16 fractional bits, else 25; to both some 1 KB a row. The result has
//! 30 to 40 fractional bits; up to 34, which is sigma up to 16, it feeds a linear layer as it is. Of an input that was truncated 16
//! of them are kept, and the others are zero. Relative error at most 2e-4 within the calibrated range, and 2^-16.
//!
//! Rows whose mean is known to be zero need no mean: RMSNorm is then LayerNorm, without the rounding of the mean.

use crate::backend::{NormKind, NormSpec};
use crate::gates::{Gates, LIMIT_BITS, Local, MAX_SCALE, Product, SCALE};
use crate::lower::{last_dim, refine};
use crate::{Error, Owner, Result};

use super::inverse::power;

/// (x - mean) / sigma, or x / rms, of each row; see the module.
pub fn normalize<G: Gates>(g: &G, x: &G::T, spec: &NormSpec) -> Result<G::T> {
    let (low, high) = spec.sigma;
    if !(low > 0.0 && low < high && high <= NormSpec::RATIO * low && high.is_finite()) {
        return Err(Error::program(
            "normalize",
            format!(
                "sigma {low} ..= {high}: calibrate a positive range of ratio at most {}",
                NormSpec::RATIO
            ),
        ));
    }
    let dim = last_dim(g, x, "normalize")?;
    let d = g.meta(x).dims[dim].max(1) as f64;
    let x = match spec.kind {
        NormKind::Layer => centred(g, x, dim, d)?,
        NormKind::Rms => whole(g, &refine(g, x, SCALE)?)?,
    };
    let sum = g.square_sum(&x)?;
    let eps = (spec.eps * d * 2f64.powi(2 * SCALE as i32)).round() as u64;
    let sum = g.add_constant(&sum, eps)?;
    // 1/sigma = sqrt(d) / sqrt(sum of squares + d eps), with thirteen bits or more at the largest sigma.
    let bits = (14.0 + high.log2()).ceil().clamp(14.0, 24.0) as u32;
    // What one party alone knows was squared without being opened; now the other factor of the product needs it open.
    let with = [&x];
    let with = if g.meta(&x).owner == Owner::Shared {
        &[]
    } else {
        &with[..]
    };
    let inverse = power(
        g,
        &sum,
        d.sqrt(),
        -0.5,
        (d * low * low, d * high * high),
        bits,
        with,
    )?;
    let y = g.product(Product::Elementwise, &x, &inverse)?;
    // Beyond what it was rounded to, zeros: the fewer bits an opening takes.
    match g.meta(&y).zeros {
        0 => Ok(y),
        _ => refine(g, &y, MAX_SCALE - SCALE),
    }
}

/// x with [`SCALE`] fractional bits, known up to dealt values.
fn whole<G: Gates>(g: &G, x: &G::T) -> Result<G::T> {
    let scale = g.meta(x).scale;
    if scale == SCALE {
        return Ok(x.clone());
    }
    Ok(g.truncate_carried(&[(x, scale - SCALE)])?.remove(0))
}

/// x less its rows' means, with [`SCALE`] fractional bits: one round.
fn centred<G: Gates>(g: &G, x: &G::T, dim: usize, d: f64) -> Result<G::T> {
    /// Fractional bits of 1/d.
    const BITS: u32 = 20;
    let x = refine(g, x, SCALE)?;
    let mut scale = g.meta(&x).scale;
    // What is computed from an opened value is open.
    g.open(&[&x])?;
    let row = whole(g, &x)?;
    // The sum times 2^20 / d must stay below 2^62, for means below 2^8; else it is made of what was truncated, and opened.
    let fits = scale <= LIMIT_BITS - BITS - 8;
    let from = if fits { &x } else { &row };
    scale = g.meta(from).scale;
    let sum = g.local(from, &Local::Sum(dim))?;
    let mean = g.local(&sum, &Local::Times((2f64.powi(BITS as i32) / d).round() as i64))?;
    let mean = g.local(&mean, &Local::Relabel(scale + BITS))?;
    let mean = g.truncate_carried(&[(&mean, scale + BITS - SCALE)])?.remove(0);
    g.sum_of(&row, &mean, true)
}
