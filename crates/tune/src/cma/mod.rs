//! CMA-ES: the evolution strategy with covariance matrix adaptation, asked for candidates and told their losses.
//!
//! The (mu/mu_w, lambda) strategy with cumulative step-size adaptation, rank-one and rank-mu updates and negative weights
//! for the worse half (Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772), with the default parameters
//! of `pycma` 4.5, whose runs the tests replay. Crates exist, but none whose state can be stored and taken up again to
//! the same bits, which an interrupted tuning needs.
//!
//! The course is a function of the seed and the losses alone: the random numbers of a generation come from a stream of
//! their own, so that a stored state needs no generator, and candidates that were asked for but not told of are asked for
//! again. It depends on the losses through their order only.

mod parameters;
mod state;

use nalgebra::{DMatrix, SymmetricEigen};
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize, Serializer};

pub use parameters::Parameters;
use state::State;
pub(crate) use state::bits;

use crate::{Error, Result};

/// Most eigenvalues of the covariance may differ by.
const CONDITION: f64 = 1e14;
/// Most that a generation changes the logarithm of the step size by.
const STEP: f64 = 1.0;
/// Step sizes beyond these bounds serve nobody, and would overflow.
const SIGMA: [f64; 2] = [1e-150, 1e150];
/// Largest dimension: 8 GB of state.
const MAX_DIMENSION: usize = 16_384;
/// Largest population.
const MAX_POPULATION: usize = 65_536;

/// The strategy. Stored and read back through serde, it goes on to the same bits.
#[derive(Clone, Deserialize)]
#[serde(try_from = "State")]
pub struct Cma {
    state: State,
    parameters: Parameters,
}

impl Serialize for Cma {
    fn serialize<S: Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        self.state.serialize(out)
    }
}

/// Where the strategy stands is the data owner's secret: only sizes are shown.
impl std::fmt::Debug for Cma {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Cma")
            .field("dimension", &self.dimension())
            .field("population", &self.population())
            .field("generation", &self.state.generation)
            .finish_non_exhaustive()
    }
}

impl Cma {
    /// A strategy that starts at zero with step size `sigma` and `population` candidates a generation.
    ///
    /// # Errors
    /// If there are fewer than 2 dimensions or 4 candidates, too many of either, or `sigma` is not positive and finite.
    pub fn new(dimension: usize, population: usize, sigma: f64, seed: u64) -> Result<Self> {
        if !(2..=MAX_DIMENSION).contains(&dimension) {
            let detail =
                format!("a search space of {dimension} dimensions; 2 to {MAX_DIMENSION} are possible");
            return Err(Error::Settings(detail));
        }
        if !(4..=MAX_POPULATION).contains(&population) {
            let detail = format!("a population of {population}; 4 to {MAX_POPULATION} are possible");
            return Err(Error::Settings(detail));
        }
        if !(SIGMA[0]..=SIGMA[1]).contains(&sigma) {
            let detail = format!("a step size of {sigma}; it must be positive");
            return Err(Error::Settings(detail));
        }
        Ok(Cma {
            state: State::new(dimension, population, sigma, seed),
            parameters: Parameters::new(dimension, population),
        })
    }

    /// Coordinates of a candidate.
    pub fn dimension(&self) -> usize {
        self.state.mean.len()
    }

    /// Candidates of a generation.
    pub fn population(&self) -> usize {
        self.parameters.weights.len()
    }

    /// Generations told.
    pub fn generation(&self) -> u64 {
        self.state.generation
    }

    /// The step size.
    pub fn sigma(&self) -> f64 {
        self.state.sigma
    }

    /// The distribution's mean, the strategy's best guess of the optimum.
    pub fn mean(&self) -> &[f64] {
        &self.state.mean
    }

    /// The generation's candidates, `[population][dimension]`; the same ones until [`Cma::tell`].
    pub fn ask(&self) -> Vec<Vec<f64>> {
        let State { mean, sigma, .. } = &self.state;
        let mut candidates = self.steps();
        for candidate in &mut candidates {
            for (x, m) in candidate.iter_mut().zip(mean) {
                *x = m + sigma * *x;
            }
        }
        candidates
    }

    /// Learns from the losses of [`Cma::ask`]'s candidates, in their order. A loss that is not a number is the worst; of
    /// equal losses the first is the better.
    ///
    /// # Errors
    /// If there is not one loss for each candidate, or none of them is a number: the state is then as before. And if the
    /// numbers break down, which finite losses do not cause.
    pub fn tell(&mut self, losses: &[f64]) -> Result<()> {
        if losses.len() != self.population() {
            let detail = format!("{} losses for {} candidates", losses.len(), self.population());
            return Err(Error::Optimiser(detail));
        }
        if losses.iter().all(|l| l.is_nan()) {
            let detail = "none of the generation's losses is a number: check the model and the step size";
            return Err(Error::Optimiser(detail.into()));
        }
        let rank = |l: f64| if l.is_nan() { f64::INFINITY } else { l };
        let mut order: Vec<usize> = (0..losses.len()).collect();
        order.sort_by(|&a, &b| rank(losses[a]).total_cmp(&rank(losses[b])));
        let mut steps = self.steps();
        let sorted: Vec<Vec<f64>> = order.into_iter().map(|i| std::mem::take(&mut steps[i])).collect();
        self.update(&sorted)
    }

    /// The generation's candidates as steps from the mean in units of the step size: normal with the covariance.
    fn steps(&self) -> Vec<Vec<f64>> {
        let state = &self.state;
        let mut random = ChaCha12Rng::seed_from_u64(state.seed);
        random.set_stream(state.generation);
        let n = self.dimension();
        let candidate = |_| {
            let mut step = vec![0.0; n];
            for (axis, length) in state.axes.chunks_exact(n).zip(&state.lengths) {
                let normal: f64 = StandardNormal.sample(&mut random);
                add(&mut step, length * normal, axis);
            }
            step
        };
        (0..self.population()).map(candidate).collect()
    }

    /// Moves the distribution, given the candidates' steps from the best to the worst.
    fn update(&mut self, steps: &[Vec<f64>]) -> Result<()> {
        let n = self.dimension();
        let Parameters {
            weights,
            mueff,
            cc,
            c1,
            cmu,
            cs,
            damps,
            gap,
        } = &self.parameters;
        let (cc, c1, cmu, cs) = (*cc, *c1, *cmu, *cs);
        let mut shift = vec![0.0; n];
        for (step, &weight) in steps.iter().zip(weights).filter(|(_, w)| **w > 0.0) {
            add(&mut shift, weight, step);
        }

        let whitened = self.state.whiten(&shift);
        let state = &mut self.state;
        state.generation += 1;
        add(&mut state.mean, state.sigma, &shift);

        decay(&mut state.sigma_path, 1.0 - cs);
        let pace = (cs * (2.0 - cs) * mueff).sqrt();
        for (axis, w) in state.axes.chunks_exact(n).zip(&whitened) {
            add(&mut state.sigma_path, pace * w, axis);
        }
        let length = dot(&state.sigma_path, &state.sigma_path);
        // While the step size still grows fast, the long path would inflate the covariance as well.
        let settled = 1.0 - (1.0 - cs).powf(2.0 * state.generation as f64);
        let stalled = length / settled / n as f64 - 1.0 >= 1.0 + 4.0 / (n as f64 + 1.0);

        decay(&mut state.path, 1.0 - cc);
        if !stalled {
            add(&mut state.path, (cc * (2.0 - cc) * mueff).sqrt(), &shift);
        }
        let lost = if stalled { c1 * cc * (2.0 - cc) } else { 0.0 };
        let kept = 1.0 - (c1 - lost) - cmu * weights.iter().sum::<f64>();
        let scale = |(step, &w): (_, &f64)| {
            // A worse candidate counts by its direction alone, so that a far one cannot make the covariance indefinite.
            let unit = |s: &Vec<f64>| {
                let white = self.state.whiten(s);
                n as f64 / (dot(&white, &white).sqrt() + 1e-9).powi(2)
            };
            if w < 0.0 { cmu * w * unit(step) } else { cmu * w }
        };
        let scales: Vec<f64> = steps.iter().zip(weights).map(scale).collect();
        let state = &mut self.state;
        state.learn(kept, c1, &scales, steps);

        let excess = length.sqrt() / expected_length(n) - 1.0;
        let change = (cs / damps * excess).clamp(-STEP, STEP);
        state.sigma = (state.sigma * change.exp()).clamp(SIGMA[0], SIGMA[1]);
        if (state.generation - state.decomposed) as f64 >= *gap {
            state.decompose()?;
        }
        Ok(())
    }
}

impl State {
    /// `D^-1 B^T step`: as normal as the numbers that it was sampled from.
    fn whiten(&self, step: &[f64]) -> Vec<f64> {
        let axes = self.axes.chunks_exact(step.len()).zip(&self.lengths);
        axes.map(|(axis, length)| dot(axis, step) / length).collect()
    }

    /// The covariance's exponential average, with the path and each step at their weight.
    fn learn(&mut self, kept: f64, c1: f64, scales: &[f64], steps: &[Vec<f64>]) {
        let mut row = &mut self.covariance[..];
        for i in 0..self.mean.len() {
            let (this, rest) = row.split_at_mut(i + 1);
            decay(this, kept);
            add(this, c1 * self.path[i], &self.path[..=i]);
            for (step, scale) in steps.iter().zip(scales) {
                add(this, scale * step[i], &step[..=i]);
            }
            row = rest;
        }
    }

    /// Brings axes and lengths up to date with the covariance. One that is nearly singular, or that rounding made
    /// indefinite, grows along its diagonal first.
    fn decompose(&mut self) -> Result<()> {
        let n = self.mean.len();
        let broken = || Error::Optimiser("the covariance matrix is no longer finite".into());
        if !self.covariance.iter().all(|c| c.is_finite()) {
            return Err(broken());
        }
        let at = |i: usize, j: usize| self.covariance[i * (i + 1) / 2 + j];
        let matrix = DMatrix::from_fn(n, n, |i, j| if i >= j { at(i, j) } else { at(j, i) });
        let eigen = SymmetricEigen::try_new(matrix, f64::EPSILON, 1000 * n).ok_or_else(broken)?;
        let mut values = eigen.eigenvalues;
        let (low, high) = (values.min(), values.max());
        if high <= 0.0 {
            return Err(broken());
        }
        let lift = (high - CONDITION * low) / (CONDITION - 1.0);
        if lift > 0.0 {
            for i in 0..n {
                self.covariance[i * (i + 1) / 2 + i] += lift;
            }
            values.add_scalar_mut(lift);
        }
        self.lengths = values.iter().map(|v| v.sqrt()).collect();
        // Column by column, that is eigenvector by eigenvector.
        self.axes = eigen.eigenvectors.as_slice().to_vec();
        self.decomposed = self.generation;
        Ok(())
    }
}

/// Mean length of a standard normal vector: those of `k` and `k + 1` coordinates have the product `k`.
fn expected_length(n: usize) -> f64 {
    let first = (2.0 / std::f64::consts::PI).sqrt();
    (1..n).fold(first, |length, k| k as f64 / length)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor * from`.
fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

fn decay(v: &mut [f64], factor: f64) {
    v.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests;
