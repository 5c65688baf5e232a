//! The error bounds that protocols state, on a million random elements each and at the edges of the calibrated range:
//! in fixed point, whose results are the parties' bit for bit.

use veiltune_engine::{Backend, Fixed, NormKind, NormSpec, Owner, Result};
use veiltune_ring::prg::{Prg, Seed};

const COUNT: usize = 1 << 20;

fn fixed() -> Fixed {
    Fixed::with_seeds([3, 4].map(|b| Seed::from_bytes([b; 16])))
}

/// Uniform in -1 ..= 1.
fn uniform(slot: u16, n: usize) -> Vec<f64> {
    let words = Prg::new(&Seed::from_bytes([9; 16]), 0, slot).vec(n);
    words
        .into_iter()
        .map(|w| w as i64 as f64 / 2f64.powi(63))
        .collect()
}

fn floats(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

#[test]
fn reciprocals() -> Result<()> {
    let f = fixed();
    for (low, high) in [(0.25, 256.0), (1.0, 8.0), (1e-3, 0.5), (2e-3, 300.0)] {
        let at = |u: f64| low * f64::powf(high / low, 0.5 + 0.5 * u);
        let mut x: Vec<f64> = uniform(1, COUNT).into_iter().map(at).collect();
        x[..4].copy_from_slice(&[low, high, low * (1.0 + 1e-4), high * (1.0 - 1e-4)]);
        let x = f.input(Owner::Shared, &[COUNT], Some(&floats(&x)))?;
        // The inputs are rounded to 2^-16, by which the smallest may fall just below the range.
        let y = f.reciprocal(&x, (low - 1e-5, high + 1e-5))?;
        let unit = 2f64.powi(-(f.fractional_bits(&y) as i32));
        for (x, y) in f.values(&x).into_iter().zip(f.values(&y)) {
            let error = (y - 1.0 / x).abs();
            assert!(error <= 1.4e-4 / x + unit, "1 / {x} is {y}");
        }
    }
    Ok(())
}

#[test]
fn normalisations() -> Result<()> {
    for (low, high) in [
        (0.05, 8.0),
        (0.05, 0.05 * NormSpec::RATIO),
        (0.0311, 0.0311 * NormSpec::RATIO),
    ] {
        normalised(low, high)?;
    }
    Ok(())
}

fn normalised(low: f64, high: f64) -> Result<()> {
    const ROW: usize = 128;
    let f = fixed();
    let (size, values) = (uniform(2, COUNT / ROW), uniform(3, COUNT));
    // Each row has a deviation of its own, from one end of the range to the other, and a mean.
    let sigma = |row: usize| match row {
        0 => 1.001 * low,
        1 => 0.999 * high,
        _ => 1.001 * low * f64::powf(high / low / 1.002, 0.5 + 0.5 * size[row]),
    };
    for (kind, mean) in [(NormKind::Layer, 3.0), (NormKind::Rms, 0.0)] {
        let mut x = Vec::with_capacity(COUNT);
        for (i, row) in values.chunks(ROW).enumerate() {
            let centre = row.iter().sum::<f64>() / ROW as f64;
            let own = (row.iter().map(|v| (v - centre).powi(2)).sum::<f64>() / ROW as f64).sqrt();
            x.extend(row.iter().map(|v| (v - centre) * sigma(i) / own + mean * size[i]));
        }
        let x = f.input(Owner::Shared, &[COUNT / ROW, ROW], Some(&floats(&x)))?;
        let spec = NormSpec {
            kind,
            eps: 1e-6,
            sigma: (low, high),
        };
        // As it is, after a product with one, and of 49 fractional bits.
        let one = f.input(Owner::Shared, &[1, 1], Some(&[1.0]))?;
        let product = f.mul(&x, &one)?;
        let fine = f.scale(&f.mul(&f.scale(&x, 0.3)?, &one)?, 2.0)?;
        for (input, factor) in [(&x, 1.0), (&product, 1.0), (&fine, 0.6)] {
            let y = f.values(&f.normalize(
                input,
                &NormSpec {
                    sigma: (factor * low, factor * high),
                    ..spec
                },
            )?);
            for (x, y) in f.values(&x).chunks(ROW).zip(y.chunks(ROW)) {
                let x: Vec<f64> = x.iter().map(|x| factor * x).collect();
                let mean = match kind {
                    NormKind::Layer => x.iter().sum::<f64>() / ROW as f64,
                    NormKind::Rms => 0.0,
                };
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / ROW as f64;
                let sigma = (variance + spec.eps).sqrt();
                for (x, y) in x.iter().zip(y) {
                    // Two units of the truncated row, what the inverse errs by, and a unit of the result.
                    let error = (y - (x - mean) / sigma).abs();
                    let bound = 2e-4 * y.abs() + (2.5 / sigma + 1.0) * 2f64.powi(-16);
                    assert!(
                        error <= bound,
                        "{kind:?} {x} at {sigma}: {y}, off by {error:e} of {bound:e}"
                    );
                }
            }
        }
    }
    Ok(())
}
