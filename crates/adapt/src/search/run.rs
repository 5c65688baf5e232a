//! Running a search: asking, training, recording, and saying how it ended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::halving::Halving;
use super::journal::Journal;
use super::reinforce::Reinforce;
use super::{Candidate, Evaluate, Field, Goal, Space, Strategy};
use crate::{Error, Result};

/// Relative difference between a journal's latencies and today's that rounding may explain.
const SAME: f64 = 1e-9;

/// How to choose what to train next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The paper's controller: every sample is trained in full.
    Reinforce,
    /// Short trainings first, lengthened for those that may still be the best.
    Halving,
}

/// What to search, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How to choose.
    pub method: Method,
    /// Where to look.
    pub space: Space,
    /// What for.
    pub goal: Goal,
    /// Epochs of a full training; with 0 candidates are measured as training would start them.
    pub epochs: usize,
    /// Of every random choice.
    pub seed: u64,
    /// Identifies what else determines the results: the data and its split, the backbone, the network, the training recipe.
    /// A journal with another is refused.
    pub fingerprint: String,
    /// The search ends before it has spent more full trainings than this.
    pub budget: Option<f64>,
}

impl Settings {
    fn check(&self) -> Result<()> {
        self.space.candidates()?;
        self.goal.check()?;
        if self.budget.is_some_and(|b| b.is_nan() || b <= 0.0) {
            return Err(Error::Settings("a budget of no trainings".into()));
        }
        Ok(())
    }
}

/// A training and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What was trained.
    pub candidate: Candidate,
    /// Epochs, with those of the candidate's earlier trials.
    pub epochs: usize,
    /// On the validation split, 0 to 1.
    pub accuracy: f64,
    /// Predicted seconds of one private inference.
    pub latency: f64,
    /// Seconds that this trial took.
    pub seconds: f64,
    /// Epochs that this trial added, or 1 for a start alone, weighted by [`Evaluate::training_cost`].
    pub cost: f64,
}

/// What trials took together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Different candidates trained.
    pub candidates: usize,
    /// Trained epochs, in full trainings; a start alone counts as one epoch.
    pub trainings: f64,
    /// Trained epochs, weighted by [`Evaluate::training_cost`].
    pub cost: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl Spent {
    /// Of `trials` in their order, where a full training has `epochs`.
    pub fn of(trials: &[Trial], epochs: usize) -> Self {
        let mut longest = BTreeMap::new();
        let mut spent = Spent::default();
        for t in trials {
            longest.insert(t.candidate, t.epochs);
            spent.cost += t.cost;
            spent.seconds += t.seconds;
        }
        spent.candidates = longest.len();
        let done: usize = longest.values().map(|&e| work(None, e)).sum();
        spent.trainings = done as f64 / work(None, epochs) as f64;
        spent
    }
}

/// Where a search stands after a trial.
#[derive(Clone, Debug)]
pub struct Status {
    /// So far, with what an earlier run of the same search spent.
    pub spent: Spent,
    /// The best so far by the search's goal, whether it meets it or not.
    pub best: Option<Trial>,
    /// Estimated seconds until the end, should no candidate that has not been considered yet become promising.
    pub left: f64,
    /// Whether the trial comes from the journal.
    pub replayed: bool,
}

/// Why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its method expects no more from further trainings.
    Complete,
    /// The interruption flag was set.
    Interrupted,
    /// The next training would have exceeded the budget.
    Budget,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The best candidate trained. Meets the goal if `reached`; otherwise the most accurate.
    pub best: Option<Candidate>,
    /// Whether `best` meets the goal.
    pub reached: bool,
    /// Why it ended.
    pub ended: Ended,
    /// The result in a sentence or two; if the goal was not reached, why.
    pub summary: String,
    /// All trials in their order.
    pub trials: Vec<Trial>,
    /// The [`front`] of `trials`.
    pub front: Vec<Trial>,
    /// Altogether.
    pub spent: Spent,
}

/// A search, resumable if it has a journal.
pub struct Search {
    settings: Settings,
    recorded: Vec<Trial>,
    journal: Option<Journal>,
}

impl Search {
    /// A search that is remembered as long as this value.
    ///
    /// # Errors
    /// If the settings make no sense.
    pub fn new(settings: Settings) -> Result<Self> {
        settings.check()?;
        Ok(Search {
            settings,
            recorded: Vec::new(),
            journal: None,
        })
    }

    /// A search that goes on from the journal at `path`, or starts one there.
    ///
    /// # Errors
    /// As [`Search::new`]; and if the journal is another search's, is in use, is corrupt before its last line, or cannot be
    /// read or written.
    pub fn open(settings: Settings, path: &Path) -> Result<Self> {
        settings.check()?;
        let (journal, recorded) = Journal::open(path, &settings)?;
        Ok(Search {
            settings,
            recorded,
            journal: Some(journal),
        })
    }

    /// Runs until the end, the budget, or until `stop` is set, which is looked at between trainings. `progress` hears of every
    /// trial, recorded ones first. May be called again to go on after an interruption.
    ///
    /// # Errors
    /// Those of `evaluate`, and if the journal cannot be written or tells of another course than this search takes.
    pub fn run(
        &mut self,
        evaluate: &mut dyn Evaluate,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&Trial, &Status),
    ) -> Result<Outcome> {
        let settings = &self.settings;
        let field = Field::new(&settings.space, evaluate)?;
        let mut strategy: Box<dyn Strategy + '_> = match settings.method {
            Method::Reinforce => Box::new(Reinforce::new(&field, settings)),
            Method::Halving => Box::new(Halving::new(&field, settings)),
        };
        let mut trials: Vec<Trial> = Vec::new();
        let ended = loop {
            let Some((candidate, epochs)) = strategy.next(&trials) else {
                break Ended::Complete;
            };
            let point = field.get(&candidate).expect("methods choose from the field");
            let earlier = trials.iter().rev().find(|t| t.candidate == candidate);
            let added = work(earlier.map(|t| t.epochs), epochs);
            let replayed = trials.len() < self.recorded.len();
            if replayed {
                let trial = &self.recorded[trials.len()];
                let same = (trial.candidate, trial.epochs) == (candidate, epochs)
                    && (trial.latency - point.latency).abs() <= SAME * point.latency
                    && (0.0..=1.0).contains(&trial.accuracy);
                if !same {
                    return Err(self.mismatch(format!(
                        "trial {} is of {} over {} epochs at {} s, the search wants {candidate} over {epochs} at {} s: \
                         the journal is of another version, cost model or network",
                        trials.len() + 1,
                        trial.candidate,
                        trial.epochs,
                        trial.latency,
                        point.latency
                    )));
                }
            } else {
                if stop.load(Ordering::Relaxed) {
                    break Ended::Interrupted;
                }
                let spent = Spent::of(&trials, settings.epochs).trainings;
                let next = added as f64 / work(None, settings.epochs) as f64;
                if settings.budget.is_some_and(|b| spent + next > b + 1e-9) {
                    break Ended::Budget;
                }
                let start = Instant::now();
                let accuracy = match evaluate.train(&candidate, epochs) {
                    Ok(accuracy) => accuracy,
                    Err(Error::Diverged(_)) => 0.0,
                    Err(_) if stop.load(Ordering::Relaxed) => break Ended::Interrupted,
                    Err(e) => return Err(e),
                };
                if !(0.0..=1.0).contains(&accuracy) {
                    return Err(Error::Settings(format!(
                        "a validation accuracy of {accuracy} for {candidate}"
                    )));
                }
                let trial = Trial {
                    candidate,
                    epochs,
                    accuracy,
                    latency: point.latency,
                    seconds: start.elapsed().as_secs_f64(),
                    cost: added as f64 * point.cost,
                };
                if let Some(journal) = &mut self.journal {
                    journal.push(&trial)?;
                }
                self.recorded.push(trial);
            }
            trials.push(self.recorded[trials.len()].clone());
            let spent = Spent::of(&trials, settings.epochs);
            let status = Status {
                best: best(&trials, &settings.goal).cloned(),
                left: strategy.left() * spent.seconds / spent.cost,
                spent,
                replayed,
            };
            progress(trials.last().expect("just pushed"), &status);
        };
        if trials.len() < self.recorded.len() {
            let detail = format!(
                "{} trials more than the search makes",
                self.recorded.len() - trials.len()
            );
            return Err(self.mismatch(detail));
        }
        Ok(outcome(trials, ended, &field, settings))
    }

    fn mismatch(&self, detail: String) -> Error {
        match &self.journal {
            Some(journal) => journal.mismatch(detail),
            None => Error::Settings(detail),
        }
    }
}

fn outcome(trials: Vec<Trial>, ended: Ended, field: &Field, settings: &Settings) -> Outcome {
    let best = best(&trials, &settings.goal);
    let reached = best.is_some_and(|t| settings.goal.value(t).0);
    let why = match ended {
        Ended::Complete => "nothing untrained is expected to do better",
        Ended::Interrupted => "the search was interrupted",
        Ended::Budget => "the budget is spent",
    };
    let summary = match (best, settings.goal) {
        (Some(t), goal) if reached => format!(
            "{} reaches {:.2} % in {:.4} s after {} epochs (wanted: {goal}); {why}",
            t.candidate,
            100.0 * t.accuracy,
            t.latency,
            t.epochs
        ),
        (Some(t), goal) => format!(
            "not reached: {goal}. The most accurate so far is {} with {:.2} % in {:.4} s after {} epochs; {why}",
            t.candidate,
            100.0 * t.accuracy,
            t.latency,
            t.epochs
        ),
        (None, Goal::Utility { seconds }) if field.fastest().latency > seconds => format!(
            "not reached: even the fastest candidate, {}, takes {:.4} s, more than {seconds} s",
            field.fastest().candidate,
            field.fastest().latency
        ),
        (None, _) => format!("nothing was trained: {why}"),
    };
    Outcome {
        best: best.map(|t| t.candidate),
        reached,
        ended,
        summary,
        front: front(&trials),
        spent: Spent::of(&trials, settings.epochs),
        trials,
    }
}

/// What is to be done to a candidate that has been trained for `from` epochs, if at all, until it has been for `to`: epochs, of
/// which a start alone counts as one.
pub(super) fn work(from: Option<usize>, to: usize) -> usize {
    (to - from.unwrap_or(0)).max(1)
}

/// The longest training of each candidate, in the order of the candidates.
pub(super) fn latest(trials: &[Trial]) -> BTreeMap<Candidate, &Trial> {
    trials.iter().map(|t| (t.candidate, t)).collect()
}

/// The best by `goal`; of equals the faster.
pub(super) fn best<'a>(trials: &'a [Trial], goal: &Goal) -> Option<&'a Trial> {
    let better = |a: &&Trial, b: &&Trial| {
        let ((a_meets, a_value), (b_meets, b_value)) = (goal.value(a), goal.value(b));
        (a_meets.cmp(&b_meets))
            .then(a_value.total_cmp(&b_value))
            .then(b.latency.total_cmp(&a.latency))
    };
    latest(trials).into_values().max_by(better)
}

/// The Pareto front: the candidates, as last trained, of which no other is at least as accurate and faster, by latency.
pub fn front(trials: &[Trial]) -> Vec<Trial> {
    let mut all: Vec<&Trial> = latest(trials).into_values().collect();
    all.sort_by(|a, b| {
        a.latency
            .total_cmp(&b.latency)
            .then(b.accuracy.total_cmp(&a.accuracy))
    });
    let mut highest = f64::NEG_INFINITY;
    all.retain(|t| {
        t.accuracy > highest && {
            highest = t.accuracy;
            true
        }
    });
    all.into_iter().cloned().collect()
}
