//! What the trials so far say about the accuracy that other candidates would reach: a Gaussian process (Rasmussen and
//! Williams, 2006, algorithm 2.1) over architecture and epochs.
//!
//! The covariance is a sum of effects: one of the size (rank and scope), one of the heads, one of the norm, one of the epochs,
//! small ones that let these interact, and a small one of each candidate's own; so a trial of one candidate informs about all
//! those it shares something with. Their proportions are fixed. The overall scale follows from the data (a conjugate prior
//! keeps it sane while there are few), and the noise and the length scale are those of a grid that make the trials likeliest.

/// Prior belief: accuracy gained from the narrowest to the widest rank, and from the smallest to the largest scope.
const GROWTH: f64 = 0.01;
/// Prior belief: accuracy gained from the shortest to the full training.
const LEARNING: f64 = 0.03;
/// Prior variance of accuracy between candidates, and how many trials that belief weighs as much as.
const PRIOR: (f64, f64) = (4e-4, 4.0);
/// Variance of what all candidates share, and variances of the effects, in units of the scale.
const SHARED: f64 = 400.0;
const SIZE: f64 = 0.5;
const SLOPE: f64 = 0.5;
const HEADS: f64 = 0.25;
const NORM: f64 = 0.15;
const INTERACTION: f64 = 0.1;
const EPOCHS: f64 = 0.3;
const EPOCHS_BY_SIZE: f64 = 0.05;
const OWN: f64 = 0.02;
/// Noise variances to choose from, in units of the scale.
const NOISES: [f64; 5] = [1e-4, 1e-3, 0.01, 0.05, 0.2];
/// Length scales of size to choose from, in units of the space's extent.
const LENGTHS: [f64; 3] = [0.35, 0.7, 1.4];

/// A candidate after some training. Coordinates run from 0 to 1 over the space.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// Which candidate.
    pub id: usize,
    pub heads: f64,
    pub rank: f64,
    pub scope: f64,
    pub norm: usize,
    pub epochs: f64,
}

/// Mean before any trial, less an unknown constant.
fn prior_mean(x: &Input) -> f64 {
    GROWTH * (x.rank + x.scope) + LEARNING * x.epochs
}

fn covariance(a: &Input, b: &Input, length: f64) -> f64 {
    let near = |x: f64, y: f64, length: f64| (-0.5 * ((x - y) / length).powi(2)).exp();
    let size = near(a.rank, b.rank, length) * near(a.scope, b.scope, length);
    let heads = near(a.heads, b.heads, 0.4);
    let norm = f64::from(u8::from(a.norm == b.norm));
    let epochs = near(a.epochs, b.epochs, 1.0);
    SHARED
        + SIZE * size
        + SLOPE * (a.rank * b.rank + a.scope * b.scope + a.epochs * b.epochs)
        + HEADS * heads
        + NORM * norm
        + INTERACTION * size * heads * norm
        + EPOCHS * epochs
        + EPOCHS_BY_SIZE * epochs * size
        + if a.id == b.id { OWN } else { 0.0 }
}

/// A fitted process.
pub struct Model {
    inputs: Vec<Input>,
    length: f64,
    /// Cholesky factor of the covariance of the observations; lower, row by row.
    factor: Vec<Vec<f64>>,
    /// The inverse covariance times the observations.
    weights: Vec<f64>,
    scale: f64,
    centre: f64,
}

impl Model {
    /// Fits accuracies `y` of `inputs`, of which there is at least one.
    pub fn fit(inputs: &[Input], y: &[f64]) -> Self {
        let mut rest: Vec<f64> = inputs.iter().zip(y).map(|(x, y)| y - prior_mean(x)).collect();
        let centre = rest.iter().sum::<f64>() / rest.len() as f64;
        rest.iter_mut().for_each(|r| *r -= centre);
        let mut best: Option<(f64, Model)> = None;
        for length in LENGTHS {
            for noise in NOISES {
                let factor = cholesky(inputs, length, noise);
                let half = forward(&factor, &rest);
                let (strength, count) = (PRIOR.1 / 2.0, rest.len() as f64 / 2.0);
                let squares = PRIOR.0 * strength + half.iter().map(|h| h * h).sum::<f64>() / 2.0;
                let volume: f64 = factor.iter().enumerate().map(|(i, row)| row[i].ln()).sum();
                let likelihood = -volume - (strength + count) * squares.ln();
                if best.as_ref().is_none_or(|b| likelihood > b.0) {
                    let model = Model {
                        inputs: inputs.to_vec(),
                        length,
                        weights: backward(&factor, &half),
                        factor,
                        scale: squares / (strength + count),
                        centre,
                    };
                    best = Some((likelihood, model));
                }
            }
        }
        best.expect("the grids are not empty").1
    }

    /// Mean and standard deviation of the accuracy at `x`, without the noise of measuring it.
    pub fn predict(&self, x: &Input) -> (f64, f64) {
        let k: Vec<f64> = self
            .inputs
            .iter()
            .map(|i| covariance(i, x, self.length))
            .collect();
        let mean: f64 = k.iter().zip(&self.weights).map(|(k, w)| k * w).sum();
        let known: f64 = forward(&self.factor, &k).iter().map(|h| h * h).sum();
        let variance = self.scale * (covariance(x, x, self.length) - known);
        (self.centre + prior_mean(x) + mean, variance.max(1e-12).sqrt())
    }
}

fn cholesky(inputs: &[Input], length: f64, noise: f64) -> Vec<Vec<f64>> {
    let mut factor: Vec<Vec<f64>> = Vec::with_capacity(inputs.len());
    for (i, a) in inputs.iter().enumerate() {
        let mut row: Vec<f64> = Vec::with_capacity(i + 1);
        for (j, b) in inputs[..=i].iter().enumerate() {
            let other = if j == i { &row } else { &factor[j] };
            let done: f64 = row.iter().zip(other).take(j).map(|(x, y)| x * y).sum();
            let rest = covariance(a, b, length) - done;
            let entry = if j == i {
                (rest + noise).max(1e-10).sqrt()
            } else {
                rest / factor[j][j]
            };
            row.push(entry);
        }
        factor.push(row);
    }
    factor
}

/// Solves `factor z = y`.
fn forward(factor: &[Vec<f64>], y: &[f64]) -> Vec<f64> {
    let mut z: Vec<f64> = Vec::with_capacity(y.len());
    for (row, y) in factor.iter().zip(y) {
        let done: f64 = row.iter().zip(&z).map(|(l, z)| l * z).sum();
        z.push((y - done) / row[z.len()]);
    }
    z
}

/// Solves `factor^T z = y`.
fn backward(factor: &[Vec<f64>], y: &[f64]) -> Vec<f64> {
    let mut z = y.to_vec();
    for i in (0..z.len()).rev() {
        z[i] /= factor[i][i];
        for j in 0..i {
            z[j] -= factor[i][j] * z[i];
        }
    }
    z
}

/// Standard normal density and distribution function.
pub fn normal(z: f64) -> (f64, f64) {
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    // Abramowitz and Stegun, 26.2.17; off by at most 7.5e-8.
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let coefficients = [
        1.330_274_429,
        -1.821_255_978,
        1.781_477_937,
        -0.356_563_782,
        0.319_381_530,
    ];
    let tail = density * coefficients.iter().fold(0.0, |sum, c| (sum + c) * t);
    (density, if z < 0.0 { tail } else { 1.0 - tail })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(id: usize, rank: f64, scope: f64, epochs: f64) -> Input {
        Input {
            id,
            heads: 0.0,
            rank,
            scope,
            norm: 0,
            epochs,
        }
    }

    #[test]
    fn the_process_interpolates_and_knows_how_well() {
        let inputs: Vec<Input> = (0..12)
            .map(|i| input(i, (i % 4) as f64 / 3.0, (i / 4) as f64 / 2.0, 1.0))
            .collect();
        let truth = |x: &Input| 0.8 + 0.05 * (1.0 - (-3.0 * x.rank).exp()) + 0.02 * x.scope;
        let y: Vec<f64> = inputs.iter().map(truth).collect();
        let model = Model::fit(&inputs, &y);
        for x in &inputs {
            let (mean, deviation) = model.predict(x);
            assert!(
                (mean - truth(x)).abs() < 2e-3 && deviation < 5e-3,
                "{mean} {deviation}"
            );
        }
        let between = input(20, 0.5, 0.25, 1.0);
        let (mean, near) = model.predict(&between);
        assert!((mean - truth(&between)).abs() < 3.0 * near + 2e-3);
        let (_, far) = model.predict(&Input {
            heads: 1.0,
            norm: 1,
            ..between
        });
        assert!(far > 2.0 * near, "{far} {near}");
    }

    #[test]
    fn one_full_training_tells_what_epochs_add() {
        let short: Vec<Input> = (0..4).map(|i| input(i, i as f64 / 3.0, 0.0, 0.0)).collect();
        let mut inputs = short.clone();
        inputs.push(input(0, 0.0, 0.0, 1.0));
        let model = Model::fit(&inputs, &[0.60, 0.61, 0.62, 0.63, 0.80]);
        let (mean, deviation) = model.predict(&input(3, 1.0, 0.0, 1.0));
        assert!(mean > 0.79 && mean < 0.87, "{mean} {deviation}");
    }

    #[test]
    fn the_factor_solves() {
        let inputs: Vec<Input> = (0..5).map(|i| input(i, i as f64 / 4.0, 0.3, 1.0)).collect();
        let factor = cholesky(&inputs, 0.5, 0.01);
        let y = [1.0, -2.0, 0.5, 3.0, 0.0];
        let z = backward(&factor, &forward(&factor, &y));
        for (i, a) in inputs.iter().enumerate() {
            let row = inputs.iter().enumerate();
            let sum: f64 = row
                .map(|(j, b)| (covariance(a, b, 0.5) + if i == j { 0.01 } else { 0.0 }) * z[j])
                .sum();
            assert!((sum - y[i]).abs() < 1e-6);
        }
    }

    #[test]
    fn the_normal_distribution() {
        for (z, want) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746),
            (-1.96, 0.024_997_895),
            (-6.0, 9.9e-10),
        ] {
            assert!((normal(z).1 - want).abs() < 1e-7);
        }
    }
}
