//! Short trigonometric series of smooth functions: the public half of the trigonometric gate.
//!
//! A function on a bounded range `[lo, hi]` is fitted by least squares with
//! `f(x) = linear x + constant + sum_k cos_k cos(2 pi k x / P) + sin_k sin(2 pi k x / P)`, P = 2^p / m larger than the
//! range (a "Fourier extension": beyond the range the series does what it likes). The gate evaluates it from an
//! opened `d = m x + t mod 2^p` and dealt shares of `cos(k theta_t), sin(k theta_t)`.
//!
//! Both parties must derive *bit-identical* public coefficients from `d`: a difference in the last bit would be
//! multiplied by a share, which is a uniform ring element. So [`harmonics`] computes the same bits on every machine, and
//! the fitted coefficients are part of the program hash that the roles compare before they start.

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::sync::{Arc, LazyLock, Mutex};

use veiltune_ring::harmonics;

use crate::{Activation, Error, Result};

/// Most harmonics that a fit may use.
const MAX_HARMONICS: usize = 40;

/// A fitted series, with the fixed-point scales at which it is evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Period: 2^turn_bits / factor.
    pub period: f64,
    /// What x is multiplied by.
    pub factor: u64,
    /// log2 of what a turn is of that product.
    pub turn_bits: i32,
    /// Coefficient of x.
    pub linear: f64,
    /// Constant term.
    pub constant: f64,
    /// Cosine coefficients of harmonics 1, 2, ...
    pub cos: Vec<f64>,
    /// Sine coefficients of harmonics 1, 2, ...
    pub sin: Vec<f64>,
    /// Range on which it was fitted.
    pub range: (f64, f64),
    /// Largest error of the fit on the range, before fixed-point rounding.
    pub fit_error: f64,
    /// Fractional bits of the public coefficients.
    pub coefficient_scale: u32,
    /// Fractional bits of the dealt sines and cosines.
    pub dealt_scale: u32,
}

/// What to fit.
struct Target<'a> {
    f: &'a dyn Fn(f64) -> f64,
    linear: f64,
    range: (f64, f64),
    /// Errors are divided by this before they are compared with `tolerance`.
    weight: &'a dyn Fn(f64) -> f64,
    tolerance: f64,
    /// Fractional bits of coefficients and dealt values.
    scales: (u32, u32),
    /// Bits of a rounding that the fit weighs coefficients by.
    ridge: i32,
}

impl Series {
    /// The series of an activation on |x| <= bound, fitted to 3e-5 at the worst point where 40 harmonics allow it
    /// (see [`Series::fit_error`]). Cached for the process.
    pub fn for_activation(f: Activation, bound: f64) -> Result<Arc<Series>> {
        if !(bound.is_finite() && (0.25..=64.0).contains(&bound)) {
            return Err(Error::program(
                "activation",
                format!("the range {bound} is outside 0.25 ..= 64"),
            ));
        }
        cached((f, bound.to_bits(), 0), || {
            fit(&Target {
                f: &|x| f.exact(x),
                linear: if matches!(f, Activation::Gelu | Activation::Silu) {
                    0.5
                } else {
                    0.0
                },
                range: (-bound, bound),
                weight: &|_| 1.0,
                tolerance: 3e-5,
                scales: (15, 16),
                ridge: 16,
            })
        })
    }

    /// exp on `[-depth, head]`, fitted so that the error falls with the value: at most 1e-4 exp(x) + 1e-6, because
    /// a softmax sums many small terms.
    pub fn exp_tail(depth: f64, head: f64) -> Result<Arc<Series>> {
        if !(depth > 0.0 && head > 0.0 && depth + head < 60.0) {
            return Err(Error::program(
                "softmax",
                format!("no exponential series on -{depth} ..= {head}"),
            ));
        }
        cached((Activation::Exp, depth.to_bits(), head.to_bits()), || {
            fit(&Target {
                f: &f64::exp,
                linear: 0.0,
                range: (-depth, head),
                weight: &|x| 1.0 / (x.exp() + 1e-2),
                tolerance: 1e-4,
                // Coefficients are large, and dealt values multiplied by them; these noises are about equal. A larger ridge takes more
                // harmonics.
                scales: (18, 22),
                ridge: 20,
            })
        })
    }

    /// sin(2 pi x) and cos(2 pi x): one harmonic, exact for every x.
    pub fn turns() -> [Arc<Series>; 2] {
        let one = |cos: f64, sin: f64| {
            Arc::new(Series {
                period: 1.0,
                factor: 1,
                turn_bits: 0,
                linear: 0.0,
                constant: 0.0,
                cos: vec![cos],
                sin: vec![sin],
                range: (f64::NEG_INFINITY, f64::INFINITY),
                fit_error: 0.0,
                coefficient_scale: 15,
                dealt_scale: 16,
            })
        };
        [one(0.0, 1.0), one(1.0, 0.0)]
    }

    /// Number of harmonics.
    pub fn harmonics(&self) -> usize {
        self.cos.len()
    }

    /// Fractional bits of the result for an input of `input` fractional bits. The linear term is exact only if the
    /// result is one bit finer than the input; otherwise the scales are those of the fit.
    pub fn scale(&self, input: u32) -> u32 {
        self.coefficients_for(input) + self.dealt_scale
    }

    fn coefficients_for(&self, input: u32) -> u32 {
        if self.linear == 0.0 {
            self.coefficient_scale
        } else {
            self.coefficient_scale
                .max((input + 1).saturating_sub(self.dealt_scale))
        }
    }

    /// Bits of the modulus for an input of fractional bits `scale`: a turn of its product with the factor is 2^bits.
    pub fn modulus_bits(&self, scale: u32) -> Result<u32> {
        let bits = scale as i32 + self.turn_bits;
        if !(8..=64).contains(&bits) {
            return Err(Error::program(
                "activation",
                format!(
                    "an input of {scale} fractional bits and a turn of 2^{} need {bits} bits; 8 to 64 are possible",
                    self.turn_bits
                ),
            ));
        }
        Ok(bits as u32)
    }

    /// The series in floating point.
    pub fn eval(&self, x: f64) -> f64 {
        let w = TAU / self.period;
        let mut y = self.linear * x + self.constant;
        for (k, (c, s)) in self.cos.iter().zip(&self.sin).enumerate() {
            let angle = (k + 1) as f64 * w * x;
            y += c * angle.cos() + s * angle.sin();
        }
        y
    }

    /// Everything that must be equal at all roles, for the program hash.
    pub fn fingerprint(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for v in [self.period, self.factor as f64, self.linear, self.constant]
            .iter()
            .chain(&self.cos)
            .chain(&self.sin)
        {
            out.extend(v.to_bits().to_le_bytes());
        }
        out.extend([self.coefficient_scale as u8, self.dealt_scale as u8]);
        out
    }

    /// cos(k theta_t) and sin(k theta_t) in fixed point for masks `t` modulo 2^bits; of a whole number of [`harmonics::TILE`] masks,
    /// they are followed by those of what masks there are more.
    pub fn deal(&self, t: &[u64], bits: u32) -> Vec<u64> {
        let (t, bits) = leading(t, bits);
        harmonics::dealt(&t, bits, self.harmonics(), self.dealt_scale)
    }

    /// What [`deal`](Series::deal) gives, made where [`accumulate`](Series::accumulate) reads it.
    pub fn dealing<'a>(&self, t: &'a [u64], bits: u32) -> impl Fn(usize, &mut [u64]) + Sync + 'a {
        let ((t, bits), harmonics, scale) = (leading(t, bits), self.harmonics(), self.dealt_scale);
        move |first, out| harmonics::dealt_tiles(&t, bits, harmonics, scale, first, out)
    }

    /// The trigonometric part for opened `d` modulo 2^bits, with so many fractional bits of the coefficients beside those of the
    /// dealt values, which `read` gives as for [`harmonics::combine`]. Linear in these: on shares it gives shares.
    pub fn accumulate(
        &self,
        d: &[u64],
        bits: u32,
        coefficients: u32,
        read: impl Fn(usize, &mut [u64]) + Sync,
    ) -> Vec<u64> {
        let (d, bits) = leading(d, bits);
        harmonics::combine(&d, bits, (&self.cos, &self.sin), coefficients, read)
    }
}

/// Bits of an angle that a double holds.
const ANGLE_BITS: u32 = 53;

/// The leading bits of angles modulo 2^bits: the difference of two is then off by at most the last bit, 2^-53 of a period.
fn leading(angles: &[u64], bits: u32) -> (std::borrow::Cow<'_, [u64]>, u32) {
    match bits.checked_sub(ANGLE_BITS) {
        None | Some(0) => (angles.into(), bits),
        Some(cut) => (angles.iter().map(|a| a >> cut).collect(), ANGLE_BITS),
    }
}

impl Activation {
    /// The function itself, in double precision.
    pub fn exact(self, x: f64) -> f64 {
        match self {
            Activation::Gelu => {
                0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / std::f64::consts::SQRT_2))
            }
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Exp => x.exp(),
            Activation::Sin => x.sin(),
            Activation::Cos => x.cos(),
        }
    }
}

type Key = (Activation, u64, u64);

fn cached(key: Key, make: impl FnOnce() -> Result<Series>) -> Result<Arc<Series>> {
    static CACHE: LazyLock<Mutex<HashMap<Key, Arc<Series>>>> = LazyLock::new(Default::default);
    let mut cache = CACHE.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(found) = cache.get(&key) {
        return Ok(found.clone());
    }
    let made = Arc::new(make()?);
    cache.insert(key, made.clone());
    Ok(made)
}

/// Factors of the input: periods lie at most a third apart.
const FACTORS: [u64; 4] = [1, 3, 5, 7];

/// Periods to choose from, at least so many times the range; the longest is the first power of two beyond the second.
const PERIODS: (f64, f64) = (1.04, 1.2);

/// The cheapest series that meets the tolerance: the dealer pays by the harmonic, the parties by the bit of a turn. The most accurate
/// where none meets it.
fn fit(target: &Target) -> Result<Series> {
    let range = target.range.1 - target.range.0;
    let longest = (range * PERIODS.1).log2().ceil() as i32;
    let cost = |bits: i32, harmonics: usize| bits + 2 * harmonics as i32;
    let (mut best, mut nearest): (Option<Series>, Option<(Series, f64)>) = (None, None);
    for factor in FACTORS {
        let bits = longest + factor.ilog2() as i32;
        for turn in [(factor, bits), (factor, bits - 1)] {
            if period(turn) < range * PERIODS.0 {
                continue;
            }
            // The error falls with the harmonics, by and large.
            let cheaper = |h: &usize| {
                best.as_ref()
                    .is_none_or(|b| cost(turn.1, *h) < cost(b.turn_bits, b.harmonics()))
            };
            let most = (0..=MAX_HARMONICS).rev().find(cheaper).unwrap_or(0);
            let (mut few, mut enough) = (1, most + 1);
            while few + 1 < enough {
                let harmonics = usize::midpoint(few, enough);
                let (series, error) = fit_with(target, turn, harmonics);
                if error <= target.tolerance {
                    enough = harmonics;
                    best = Some(series);
                } else {
                    few = harmonics;
                    if nearest.as_ref().is_none_or(|(_, least)| error < *least) {
                        nearest = Some((series, error));
                    }
                }
            }
        }
    }
    let nearest = nearest.map(|(series, _)| series);
    Ok(best.or(nearest).expect("at least one fit"))
}

/// Of a factor and bits of a turn.
fn period((factor, turn_bits): (u64, i32)) -> f64 {
    2f64.powi(turn_bits) / factor as f64
}

fn fit_with(target: &Target, turn: (u64, i32), harmonics: usize) -> (Series, f64) {
    let (lo, hi) = target.range;
    let period = period(turn);
    let w = TAU / period;
    let columns = 2 * harmonics + 1;
    let row = |x: f64| {
        let mut row = vec![1.0];
        for k in 1..=harmonics {
            let a = k as f64 * w * x;
            row.extend([a.cos(), a.sin()]);
        }
        row
    };
    // Chebyshev nodes; a ridge weighs a coefficient as rounding of what it multiplies.
    let nodes = 16 * columns;
    let ridge = 2f64.powi(-target.ridge) / 12f64.sqrt() * (nodes as f64).sqrt();
    let mut matrix = Vec::with_capacity((nodes + columns) * (columns + 1));
    for i in 0..nodes {
        let node = ((i as f64 + 0.5) * std::f64::consts::PI / nodes as f64).cos();
        let x = 0.5 * (lo + hi) + 0.5 * (hi - lo) * node;
        let weight = (target.weight)(x);
        matrix.extend(row(x).into_iter().map(|v| v * weight));
        matrix.push(((target.f)(x) - target.linear * x) * weight);
    }
    for i in 0..columns {
        matrix.extend((0..=columns).map(|j| if i == j { ridge } else { 0.0 }));
    }
    let c = least_squares(&mut matrix, nodes + columns, columns);
    let mut series = Series {
        period,
        factor: turn.0,
        turn_bits: turn.1,
        linear: target.linear,
        constant: c[0],
        cos: c[1..].iter().step_by(2).copied().collect(),
        sin: c[2..].iter().step_by(2).copied().collect(),
        range: target.range,
        fit_error: 0.0,
        coefficient_scale: target.scales.0,
        dealt_scale: target.scales.1,
    };
    let mut weighted: f64 = 0.0;
    for i in 0..=4000 {
        let x = lo + (hi - lo) * i as f64 / 4000.0;
        let error = (series.eval(x) - (target.f)(x)).abs();
        series.fit_error = series.fit_error.max(error);
        weighted = weighted.max(error * (target.weight)(x));
    }
    (series, weighted)
}

/// Least squares by Householder reflections; `matrix` is row-major with the right side as its last column.
fn least_squares(matrix: &mut [f64], rows: usize, columns: usize) -> Vec<f64> {
    let width = columns + 1;
    for j in 0..columns {
        let norm = (j..rows)
            .map(|i| matrix[i * width + j].powi(2))
            .sum::<f64>()
            .sqrt();
        let pivot = matrix[j * width + j];
        let alpha = if pivot > 0.0 { -norm } else { norm };
        let mut v: Vec<f64> = (j..rows).map(|i| matrix[i * width + j]).collect();
        v[0] -= alpha;
        let length: f64 = v.iter().map(|a| a * a).sum();
        if length == 0.0 {
            continue;
        }
        let mut dots = vec![0.0; width - j];
        for (i, v) in v.iter().enumerate() {
            let row = &matrix[(i + j) * width + j..(i + j + 1) * width];
            for (d, m) in dots.iter_mut().zip(row) {
                *d += v * m;
            }
        }
        for (i, v) in v.iter().enumerate() {
            let row = &mut matrix[(i + j) * width + j..(i + j + 1) * width];
            for (d, m) in dots.iter().zip(row) {
                *m -= 2.0 * v / length * d;
            }
        }
    }
    let mut x = vec![0.0; columns];
    for j in (0..columns).rev() {
        let known: f64 = (j + 1..columns).map(|k| matrix[j * width + k] * x[k]).sum();
        x[j] = (matrix[j * width + columns] - known) / matrix[j * width + j];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_meet_their_tolerance() {
        for (f, bound) in [
            (Activation::Gelu, 6.4),
            (Activation::Silu, 12.8),
            (Activation::Tanh, 6.4),
            (Activation::Sigmoid, 12.8),
            (Activation::Sin, 6.4),
            (Activation::Cos, 6.4),
        ] {
            let s = Series::for_activation(f, bound).unwrap();
            assert!(
                s.fit_error <= 3e-5,
                "{f:?} {} harmonics {}",
                s.fit_error,
                s.harmonics()
            );
        }
        // Some of each factor.
        for (bound, harmonics, factor) in [
            (6.4, 11, 1),
            (7.0, 11, 7),
            (8.0, 13, 3),
            (11.0, 16, 5),
            (13.0, 19, 1),
        ] {
            let s = Series::for_activation(Activation::Gelu, bound).unwrap();
            assert_eq!((s.harmonics(), s.factor), (harmonics, factor), "{bound}");
            assert!(s.fit_error <= 3e-5, "{bound}: {}", s.fit_error);
            assert!(s.period > 2.0 * PERIODS.0 * bound && s.period < 4.0 * PERIODS.1 * bound);
            // Rounding of dealt values cannot add up to more than a part of the tolerance.
            let most: f64 = s.cos.iter().chain(&s.sin).map(|c| c.abs()).sum();
            assert!(most < 5.0, "{bound}: {most}");
        }
        // The noise that dealt values bring along, of coefficients as large as they are.
        for (bound, width) in [(4.0, 0.5), (15.0, 1.0), (16.0, 2.0), (24.0, 2.0)] {
            let s = Series::exp_tail(2.0 * bound + width, width).unwrap();
            let squares: f64 = s.cos.iter().chain(&s.sin).map(|c| c * c).sum();
            let noise = (squares / 12.0).sqrt() / 2f64.powi(s.dealt_scale as i32);
            assert!(noise < 1e-5, "{bound}: {noise}");
        }
        let s = Series::exp_tail(34.0, 1.0).unwrap();
        assert!(s.harmonics() <= 24, "{}", s.harmonics());
        for i in 0..=3500 {
            let x = -34.0 + i as f64 / 100.0;
            assert!((s.eval(x) - x.exp()).abs() <= 1e-4 * x.exp() + 1e-6);
        }
    }

    #[test]
    fn shares_of_dealt_values_give_the_series() {
        for bound in [6.4, 7.0, 8.0] {
            let s = Series::for_activation(Activation::Gelu, bound).unwrap();
            let bits = s.modulus_bits(16).unwrap();
            let n = 600; // more than two tiles
            let x: Vec<u64> = (0..n)
                .map(|i| ((i as f64 / 50.0 - 6.0) * 65536.0) as i64 as u64)
                .collect();
            let t: Vec<u64> = (0..n as u64)
                .map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits))
                .collect();
            let d: Vec<u64> = x
                .iter()
                .zip(&t)
                .map(|(x, t)| x.wrapping_mul(s.factor).wrapping_add(*t) & ((1 << bits) - 1))
                .collect();
            let all = s.deal(&t, bits);
            let read = |first: usize, out: &mut [u64]| out.copy_from_slice(&all[first..first + out.len()]);
            let sum = s.accumulate(&d, bits, s.coefficient_scale, read);
            for (x, y) in x.iter().zip(sum) {
                let x = *x as i64 as f64 / 65536.0;
                let y = y as i64 as f64 / (1u64 << s.scale(16)) as f64 + s.constant + s.linear * x;
                assert!((y - Activation::Gelu.exact(x)).abs() < 5e-4, "{x} {y}");
            }
        }
    }
}
