//! A search that spends little: short trainings first, doubled for the candidates that may still be the best.
//!
//! The paper's controller trains every sample in full and learns from rewards alone, so that its few dozen samples are little
//! better than random ones. Three things are known that it does not use:
//!
//! * **Latencies are exact and free.** For the efficient goal only candidates faster than the fastest that has reached the
//!   accuracy are of interest, for the useful goal only those within the latency: everything else is never trained.
//! * **Short trainings tell most.** Successive halving (Jamieson and Talwalkar, 2016) trains an eighth, doubles for the better
//!   half, and so on. Here it is done without fixed rounds: each step gives *one* candidate its next doubling, so that a round
//!   is never spent on candidates that the first few results have already ruled out.
//! * **Accuracy has trends.** It grows with rank and scope until it saturates, heads and norm shift it, and what more epochs
//!   add is much the same for all. A Gaussian process (the `model` module) learns these from all trials together, short ones
//!   included, and predicts for each candidate the accuracy after a full training and how sure that is. The trend in size
//!   also skips candidates outright: one whose wider or deeper sibling (same heads and norm) fell short after a full
//!   training by more than `MARGIN` is out.
//!
//! Each step takes the candidate with the most expected gain for its training cost, where the gain of a full training is
//!
//! * looking for efficiency: the probability of reaching the accuracy, times the share of latency saved over the fastest
//!   that has reached it (over twice the slowest, as long as none has);
//! * looking for utility: the expected improvement on the best accuracy so far (Mockus, 1975).
//!
//! The first trials, before the process knows anything, spread over the latencies in question. The search ends when no gain
//! is worth a training (`WORTH_LATENCY`, `WORTH_ACCURACY`), though not before one full training has shown what the short ones
//! are worth. The best candidate is trained in full before it is named, if it meets the goal; should it then miss it, the
//! search goes on without it. Equal gains are decided by the seed.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::model::{Input, Model, normal};
use super::run::{best, latest, work};
use super::{Candidate, Field, Goal, Settings, Strategy, Trial};

/// The first training is this part of a full one.
const PARTS: usize = 8;
/// Candidates trained before the model is asked.
const FIRST: usize = 3;
/// Accuracy by which a candidate may surpass a wider or deeper sibling.
const MARGIN: f64 = 0.005;
/// Expected share of latency saved that is worth another training.
const WORTH_LATENCY: f64 = 0.01;
/// Expected gain in accuracy that is worth another training.
const WORTH_ACCURACY: f64 = 0.0005;

pub struct Halving<'a> {
    field: &'a Field,
    settings: &'a Settings,
    /// Candidates that the goal's latency allows, in the order that decides between equals.
    order: Vec<usize>,
    /// The same by latency.
    by_latency: Vec<usize>,
    left: f64,
}

impl<'a> Halving<'a> {
    pub fn new(field: &'a Field, settings: &'a Settings) -> Self {
        let allowed = |&i: &usize| match settings.goal {
            Goal::Utility { seconds } => field.points[i].latency <= seconds,
            Goal::Efficiency { .. } => true,
        };
        let mut order: Vec<usize> = (0..field.points.len()).filter(allowed).collect();
        order.shuffle(&mut StdRng::seed_from_u64(settings.seed));
        let mut by_latency = order.clone();
        by_latency.sort_by(|&a, &b| field.points[a].latency.total_cmp(&field.points[b].latency));
        Halving {
            field,
            settings,
            order,
            by_latency,
            left: 0.0,
        }
    }

    /// Epochs of the shortest training.
    fn shortest(&self) -> usize {
        self.settings.epochs.div_ceil(PARTS)
    }

    /// Epochs in total after the next doubling; the last one makes the training full.
    fn longer(&self, epochs: Option<usize>) -> usize {
        match epochs {
            None => self.shortest(),
            Some(e) if 3 * e > self.settings.epochs => self.settings.epochs,
            Some(e) => 2 * e,
        }
    }

    fn input(&self, id: usize, epochs: usize) -> Input {
        let (c, space) = (&self.field.points[id].candidate, &self.settings.space);
        let place = |value: usize, all: &[usize]| {
            let least = *all.iter().min().expect("a space has candidates") as f64;
            let most = *all.iter().max().expect("a space has candidates") as f64;
            if most > least {
                (value as f64 / least).ln() / (most / least).ln()
            } else {
                0.0
            }
        };
        Input {
            id,
            heads: place(c.heads, &space.heads),
            rank: place(c.rank, &space.ranks),
            scope: place(c.scope, &space.scopes),
            norm: c.norm as usize,
            epochs: place(epochs, &[self.shortest(), self.settings.epochs]),
        }
    }

    /// The expected gain of training candidate `id` in full.
    fn gain(&self, id: usize, model: &Model, incumbent: Option<&Trial>, ceiling: f64) -> f64 {
        let latency = self.field.points[id].latency;
        let (mean, deviation) = model.predict(&self.input(id, self.settings.epochs));
        match self.settings.goal {
            Goal::Efficiency { accuracy } => {
                let reached = incumbent.filter(|t| t.accuracy >= accuracy);
                let slowest = self
                    .by_latency
                    .last()
                    .map_or(latency, |&i| self.field.points[i].latency);
                let compared = reached.map_or(2.0 * slowest, |t| t.latency);
                if ceiling < accuracy || latency >= compared {
                    return 0.0;
                }
                normal((mean - accuracy) / deviation).1 * (1.0 - latency / compared)
            }
            Goal::Utility { .. } => {
                let best = incumbent.map_or(0.0, |t| t.accuracy);
                if ceiling < best {
                    return 0.0;
                }
                let (density, probability) = normal((mean - best) / deviation);
                (mean - best) * probability + deviation * density
            }
        }
    }

    /// The accuracy that full trainings of siblings at least as wide and deep leave possible.
    fn ceiling(&self, c: &Candidate, latest: &BTreeMap<Candidate, &Trial>) -> f64 {
        let full = latest.values().filter(|t| t.epochs == self.settings.epochs);
        let above = full.filter(|t| {
            let o = &t.candidate;
            (o.heads, o.norm) == (c.heads, c.norm) && o.rank >= c.rank && o.scope >= c.scope
        });
        above.map(|t| t.accuracy + MARGIN).fold(f64::INFINITY, f64::min)
    }
}

impl Strategy for Halving<'_> {
    fn next(&mut self, history: &[Trial]) -> Option<(Candidate, usize)> {
        let full = self.settings.epochs;
        if history.len() < FIRST.min(self.by_latency.len()) {
            // Odd eighths of the latencies in question: 1, 4 and 7 of 8.
            let last = self.by_latency.len() - 1;
            let wanted = (1 + 3 * history.len()) * last / 8;
            let untrained = |&&i: &&usize| {
                let c = self.field.points[i].candidate;
                history.iter().all(|t| t.candidate != c)
            };
            let (before, after) = self.by_latency.split_at(wanted);
            let first = after.iter().find(untrained).or(before.iter().rfind(untrained))?;
            let costs = self.by_latency.iter().map(|&i| self.field.points[i].cost);
            let mean = costs.sum::<f64>() / self.by_latency.len() as f64;
            let first_ones = FIRST.min(self.by_latency.len()) - history.len();
            self.left = first_ones as f64 * work(None, self.shortest()) as f64 * mean;
            return Some((self.field.points[*first].candidate, self.shortest()));
        }
        if history.is_empty() {
            return None;
        }

        let inputs: Vec<Input> = history
            .iter()
            .map(|t| self.input(self.field.index[&t.candidate], t.epochs))
            .collect();
        let accuracies: Vec<f64> = history.iter().map(|t| t.accuracy).collect();
        let model = Model::fit(&inputs, &accuracies);
        let incumbent = best(history, &self.settings.goal);
        let latest = latest(history);
        let worth = match self.settings.goal {
            Goal::Efficiency { .. } => WORTH_LATENCY,
            Goal::Utility { .. } => WORTH_ACCURACY,
        };
        let mut choice: Option<(f64, Candidate, usize)> = None;
        self.left = 0.0;
        for &id in &self.order {
            let point = &self.field.points[id];
            let trained = latest.get(&point.candidate).map(|t| t.epochs);
            if trained == Some(full) {
                continue;
            }
            let gain = self.gain(id, &model, incumbent, self.ceiling(&point.candidate, &latest));
            if gain < worth {
                continue;
            }
            let epochs = self.longer(trained);
            self.left += work(trained, epochs) as f64 * point.cost;
            // The gain is one of a full training, so what counts is what remains to that: a long training that has kept its
            // promise is finished before many others are begun.
            let remaining = work(trained, full) as f64 * point.cost;
            if choice.is_none_or(|c| gain / remaining > c.0) {
                choice = Some((gain / remaining, point.candidate, epochs));
            }
        }
        if let Some((_, candidate, epochs)) = choice {
            return Some((candidate, epochs));
        }
        if latest.values().all(|t| t.epochs < full) {
            // What a full training adds is still a guess: not yet the time to give up.
            let best = incumbent?;
            return Some((best.candidate, self.longer(Some(best.epochs))));
        }
        let unconfirmed = incumbent.filter(|t| t.epochs < full && self.settings.goal.value(t).0)?;
        Some((unconfirmed.candidate, full))
    }

    fn left(&self) -> f64 {
        self.left
    }
}
