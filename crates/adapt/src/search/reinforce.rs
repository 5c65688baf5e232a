//! The controller of the CryptPEFT paper, as a method to compare with.
//!
//! A small network whose input is learned too outputs a categorical distribution for the heads, one for the rank, and one for
//! the norm where there is a choice. The scope is fixed and grows from the smallest. A sample that is predicted to be slower
//! than the latency target, or than the smallest adapter at four scopes more, is rejected. An accepted one is trained in full;
//! its reward (the accuracy; looking for efficiency, plus the reciprocal of the latency in seconds) minus a moving average
//! drives a step of REINFORCE (Williams, 1992). Three samples in a row without a better reward end a scope. Looking for
//! efficiency, the first to reach the target ends the search.
//!
//! What the paper leaves open is decided in the controller's favour: a sample that was trained before is not trained again
//! (though it counts as one that is no better), and a scope ends when everything it allows has been trained.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::run::work;
use super::{Candidate, Field, Goal, Settings, Strategy, Trial};

/// Samples without a better reward that end a scope.
const PATIENCE: usize = 3;
/// Samples rejected in a row that end a scope: the controller has settled on what is not allowed.
const REJECTED: usize = 1000;
/// Scopes further at which the smallest adapter bounds the latency.
const AHEAD: usize = 4;
/// Share of the moving average that a new reward does not replace.
const MEMORY: f64 = 0.9;

pub struct Reinforce<'a> {
    field: &'a Field,
    settings: &'a Settings,
    scopes: Vec<usize>,
    /// Index into `scopes`.
    at: usize,
    controller: Controller,
    rng: StdRng,
    /// The sample being trained.
    pending: Option<Sample>,
    baseline: Option<f64>,
    best: f64,
    streak: usize,
}

struct Sample {
    choice: Vec<usize>,
    candidate: Candidate,
}

impl<'a> Reinforce<'a> {
    pub fn new(field: &'a Field, settings: &'a Settings) -> Self {
        let mut rng = StdRng::seed_from_u64(settings.seed);
        let space = &settings.space;
        let mut scopes = space.scopes.clone();
        scopes.sort_unstable();
        scopes.dedup();
        let outputs = [space.heads.len(), space.ranks.len(), space.norms.len()];
        Reinforce {
            field,
            settings,
            scopes,
            at: 0,
            controller: Controller::new(&outputs, &mut rng),
            rng,
            pending: None,
            baseline: None,
            best: f64::NEG_INFINITY,
            streak: 0,
        }
    }

    fn sample(&mut self) -> Sample {
        let choice = self.controller.sample(&mut self.rng);
        let space = &self.settings.space;
        Sample {
            candidate: Candidate {
                heads: space.heads[choice[0]],
                rank: space.ranks[choice[1]],
                scope: self.scopes[self.at],
                norm: space.norms[choice[2]],
            },
            choice,
        }
    }

    /// Whether `c` is in the space and fast enough.
    fn allowed(&self, c: &Candidate) -> bool {
        let Some(point) = self.field.get(c) else {
            return false;
        };
        let within = match self.settings.goal {
            Goal::Utility { seconds } => point.latency <= seconds,
            Goal::Efficiency { .. } => true,
        };
        within && point.latency <= self.bound(c)
    }

    /// The latency of the smallest adapter `AHEAD` scopes further, continued in a straight line beyond the space: every
    /// adapter but the last costs the same.
    fn bound(&self, c: &Candidate) -> f64 {
        let space = &self.settings.space;
        let smallest = (
            space.heads.iter().copied().min(),
            space.ranks.iter().copied().min(),
        );
        let (Some(heads), Some(rank)) = smallest else {
            return f64::INFINITY;
        };
        let latency = |scope| {
            let smallest = Candidate {
                heads,
                rank,
                scope,
                ..*c
            };
            self.field.get(&smallest).map(|p| p.latency)
        };
        let wanted = c.scope + AHEAD;
        if let Some(latency) = latency(wanted) {
            return latency;
        }
        let mut known = self
            .scopes
            .iter()
            .rev()
            .filter_map(|&s| Some((s as f64, latency(s)?)));
        match (known.next(), known.next()) {
            (Some((s1, l1)), Some((s0, l0))) => l1 + (l1 - l0) / (s1 - s0) * (wanted as f64 - s1),
            _ => f64::INFINITY,
        }
    }

    /// Takes the reward of a sample; true if the search is over.
    fn learn(&mut self, sample: &Sample, trial: &Trial) -> bool {
        let reward = match self.settings.goal {
            Goal::Utility { .. } => trial.accuracy,
            Goal::Efficiency { .. } => trial.accuracy + 1.0 / trial.latency,
        };
        let baseline = self.baseline.unwrap_or(reward);
        self.controller.reinforce(&sample.choice, reward - baseline);
        self.baseline = Some(MEMORY * baseline + (1.0 - MEMORY) * reward);
        if reward > self.best {
            (self.best, self.streak) = (reward, 0);
        } else {
            self.streak += 1;
        }
        if self.streak == PATIENCE {
            self.end_scope();
        }
        matches!(self.settings.goal, Goal::Efficiency { accuracy } if trial.accuracy >= accuracy)
    }

    fn end_scope(&mut self) {
        self.at += 1;
        (self.best, self.streak) = (f64::NEG_INFINITY, 0);
    }

    /// Whether this scope allows nothing that has not been trained.
    fn exhausted(&self, history: &[Trial]) -> bool {
        let scope = self.scopes[self.at];
        let mut here = self
            .field
            .points
            .iter()
            .map(|p| &p.candidate)
            .filter(|c| c.scope == scope);
        here.all(|c| !self.allowed(c) || history.iter().any(|t| t.candidate == *c))
    }
}

impl Strategy for Reinforce<'_> {
    fn next(&mut self, history: &[Trial]) -> Option<(Candidate, usize)> {
        if let (Some(sample), Some(trial)) = (self.pending.take(), history.last())
            && self.learn(&sample, trial)
        {
            return None;
        }
        let mut rejected = 0;
        while self.at < self.scopes.len() {
            if rejected == REJECTED || self.exhausted(history) {
                self.end_scope();
                rejected = 0;
                continue;
            }
            let sample = self.sample();
            let candidate = sample.candidate;
            if !self.allowed(&candidate) {
                rejected += 1;
                continue;
            }
            rejected = 0;
            if let Some(trial) = history.iter().find(|t| t.candidate == candidate) {
                self.learn(&sample, trial);
                continue;
            }
            self.pending = Some(sample);
            return Some((candidate, self.settings.epochs));
        }
        None
    }

    fn left(&self) -> f64 {
        let open = self.scopes.len().saturating_sub(self.at);
        let samples = (open * PATIENCE).saturating_sub(self.streak);
        let costs = self.field.points.iter().map(|p| p.cost);
        let mean = costs.sum::<f64>() / self.field.points.len() as f64;
        samples as f64 * mean * work(None, self.settings.epochs) as f64
    }
}

/// Width of the controller's input and layers.
const WIDTH: usize = 64;
/// Adam's step.
const RATE: f64 = 1e-3;

/// A perceptron of two layers over a learned input, with a softmax for each choice. Plain loops in double precision, so
/// that a replay takes the same course.
struct Controller {
    /// Choices of each softmax.
    outputs: Vec<usize>,
    /// Input, then weights `[out, in]` and bias of the two layers and of each softmax.
    params: Vec<f64>,
    moments: Vec<[f64; 2]>,
    steps: i32,
}

impl Controller {
    fn new(outputs: &[usize], rng: &mut StdRng) -> Self {
        let layers = [WIDTH, WIDTH].iter().chain(outputs);
        let size = WIDTH + layers.map(|n| n * (WIDTH + 1)).sum::<usize>();
        let spread = 1.0 / (WIDTH as f64).sqrt();
        let mut params: Vec<f64> = (0..size).map(|_| rng.random_range(-spread..spread)).collect();
        params[..WIDTH].iter_mut().for_each(|x| *x /= spread);
        Controller {
            outputs: outputs.to_vec(),
            moments: vec![[0.0; 2]; size],
            params,
            steps: 0,
        }
    }

    /// Where each layer's weights start, and its outputs.
    fn layers(&self) -> Vec<(usize, usize)> {
        let mut at = WIDTH;
        let sizes = [WIDTH, WIDTH].into_iter().chain(self.outputs.iter().copied());
        sizes
            .map(|n| {
                let start = at;
                at += n * (WIDTH + 1);
                (start, n)
            })
            .collect()
    }

    fn linear(&self, (start, n): (usize, usize), x: &[f64]) -> Vec<f64> {
        let (weights, bias) = self.params[start..start + n * (WIDTH + 1)].split_at(n * WIDTH);
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        weights
            .chunks(WIDTH)
            .zip(bias)
            .map(|(row, b)| dot(row) + b)
            .collect()
    }

    /// The input, both layers' outputs, and each softmax's probabilities.
    fn forward(&self) -> ([Vec<f64>; 3], Vec<Vec<f64>>) {
        let layers = self.layers();
        let relu = |v: Vec<f64>| v.into_iter().map(|x| x.max(0.0)).collect::<Vec<_>>();
        let input = self.params[..WIDTH].to_vec();
        let first = relu(self.linear(layers[0], &input));
        let second = relu(self.linear(layers[1], &first));
        let probabilities = layers[2..]
            .iter()
            .map(|&l| softmax(self.linear(l, &second)))
            .collect();
        ([input, first, second], probabilities)
    }

    fn sample(&self, rng: &mut StdRng) -> Vec<usize> {
        let draw = |p: Vec<f64>| {
            let mut u = rng.random::<f64>();
            let below = |p: &f64| {
                u -= p;
                u < 0.0
            };
            p.iter().position(below).unwrap_or(p.len() - 1)
        };
        self.forward().1.into_iter().map(draw).collect()
    }

    /// A step towards (or, if `advantage` is negative, away from) `choice`.
    fn reinforce(&mut self, choice: &[usize], advantage: f64) {
        let gradient = self.gradient(choice, advantage);
        self.steps += 1;
        let (b1, b2) = (0.9f64, 0.999f64);
        let (c1, c2) = (1.0 - b1.powi(self.steps), 1.0 - b2.powi(self.steps));
        for ((p, [m, v]), g) in self.params.iter_mut().zip(&mut self.moments).zip(gradient) {
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *p -= RATE * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
        }
    }

    /// Of `-advantage * ln P(choice)`.
    fn gradient(&self, choice: &[usize], advantage: f64) -> Vec<f64> {
        let layers = self.layers();
        let ([input, first, second], probabilities) = self.forward();
        let mut gradient = vec![0.0; self.params.len()];
        // Adds a layer's gradient for its outputs' `d`, and gives that of its input.
        let mut back = |(start, n): (usize, usize), x: &[f64], d: &[f64]| {
            let mut dx = vec![0.0; WIDTH];
            for (j, &d) in d.iter().enumerate() {
                let row = start + j * WIDTH;
                for i in 0..WIDTH {
                    gradient[row + i] += d * x[i];
                    dx[i] += d * self.params[row + i];
                }
                gradient[start + n * WIDTH + j] += d;
            }
            dx
        };
        let mask = |mut d: Vec<f64>, y: &[f64]| {
            d.iter_mut()
                .zip(y)
                .for_each(|(d, &y)| *d *= f64::from(u8::from(y > 0.0)));
            d
        };
        let mut d_second = vec![0.0; WIDTH];
        for ((&layer, mut p), &own) in layers[2..].iter().zip(probabilities).zip(choice) {
            p[own] -= 1.0;
            p.iter_mut().for_each(|p| *p *= advantage);
            let d = back(layer, &second, &p);
            d_second.iter_mut().zip(d).for_each(|(s, d)| *s += d);
        }
        let d_first = back(layers[1], &first, &mask(d_second, &second));
        let d_input = back(layers[0], &input, &mask(d_first, &first));
        gradient[..WIDTH].copy_from_slice(&d_input);
        gradient
    }
}

fn softmax(logits: Vec<f64>) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_the_difference_quotient() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut controller = Controller::new(&[3, 4, 1], &mut rng);
        let choice = [2, 0, 0];
        let gradient = controller.gradient(&choice, 0.7);
        let loss = |c: &Controller| {
            let p = c.forward().1;
            -0.7 * p.iter().zip(&choice).map(|(p, &own)| p[own].ln()).sum::<f64>()
        };
        let step = 1e-6;
        for i in (0..controller.params.len()).step_by(37) {
            let kept = controller.params[i];
            controller.params[i] = kept + step;
            let above = loss(&controller);
            controller.params[i] = kept - step;
            let below = loss(&controller);
            controller.params[i] = kept;
            let want = (above - below) / (2.0 * step);
            assert!(
                (gradient[i] - want).abs() < 1e-6,
                "{i}: {} not {want}",
                gradient[i]
            );
        }
    }

    #[test]
    fn a_rewarded_choice_becomes_likely() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut controller = Controller::new(&[4, 5, 2], &mut rng);
        for _ in 0..300 {
            let choice = controller.sample(&mut rng);
            let reward = f64::from(u8::from(choice[0] == 3)) + f64::from(u8::from(choice[1] == 1));
            controller.reinforce(&choice, reward - 0.5);
        }
        let p = controller.forward().1;
        assert!(p[0][3] > 0.8 && p[1][1] > 0.8, "{p:?}");
    }
}
