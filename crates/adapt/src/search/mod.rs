//! Architecture search: which heads, rank, scope and norm an adapter should have, for a network and a data set.
//!
//! A [`Search`] asks a [`Method`] which [`Candidate`] to train next, has an [`Evaluate`] train it, and writes the result
//! to a journal before it asks again. A method decides from the trials so far and from its seed alone, so that a search
//! that starts again on its journal arrives where it was without training anything twice, and then goes on as if it had
//! never stopped.
//!
//! Latencies are predicted by the cost model and cost nothing; accuracies are measured on a validation split, cost minutes
//! each, and carry noise. What a search spends is therefore counted in trainings ([`Spent`]).
//!
//! There are two methods: the `reinforce` module holds the controller of the CryptPEFT paper (Xia et al., NDSS 2026,
//! arXiv:2508.12264), the `halving` module a more economical search.

mod halving;
mod journal;
mod model;
mod reinforce;
mod report;
mod run;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use veiltune_nn::owc::NormChoice;

pub use report::{Comparison, Latencies, compare, csv, markdown, svg};
pub use run::{Ended, Method, Outcome, Search, Settings, Spent, Status, Trial, front};

use crate::{Error, Result};

/// Candidates that a space may have.
const MOST: usize = 10_000;

/// One architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// Attention heads; a divisor of the rank.
    pub heads: usize,
    /// Width inside the adapter.
    pub rank: usize,
    /// Adapters, one beside each of the backbone's last layers.
    pub scope: usize,
    /// The adapter's norm.
    pub norm: NormChoice,
}

impl Candidate {
    /// The norm as tables have it.
    pub fn norm_name(&self) -> &'static str {
        match self.norm {
            NormChoice::Layer => "layer",
            NormChoice::Batch => "batch",
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "({}, {}, {}, {})",
            self.heads,
            self.rank,
            self.scope,
            self.norm_name()
        )
    }
}

/// Every combination of these in which the heads divide the rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Numbers of heads.
    pub heads: Vec<usize>,
    /// Ranks.
    pub ranks: Vec<usize>,
    /// Scopes.
    pub scopes: Vec<usize>,
    /// Norms.
    pub norms: Vec<NormChoice>,
}

impl Default for Space {
    /// The paper's, with either norm.
    fn default() -> Self {
        Space {
            heads: vec![1, 2, 4, 6, 10, 12],
            ranks: vec![60, 120, 180, 240, 300],
            scopes: (1..=6).collect(),
            norms: vec![NormChoice::Layer, NormChoice::Batch],
        }
    }
}

impl Space {
    /// Without the scopes that a backbone of `layers` layers does not have, and the ranks above its `width`.
    pub fn within(mut self, layers: usize, width: usize) -> Self {
        self.scopes.retain(|&s| s <= layers);
        self.ranks.retain(|&r| r <= width);
        self
    }

    /// All candidates, sorted, each once.
    ///
    /// # Errors
    /// If there is none, too many to consider, or one without heads, rank or scope.
    pub fn candidates(&self) -> Result<Vec<Candidate>> {
        let refuse = |why: &str| Err(Error::Settings(format!("the search space {why}")));
        let lists = [&self.heads, &self.ranks, &self.scopes];
        let size = lists
            .iter()
            .try_fold(self.norms.len(), |n, l| n.checked_mul(l.len()));
        match size {
            Some(0) => return refuse("is empty"),
            Some(n) if n <= MOST => {}
            _ => return refuse(&format!("has more than {MOST} candidates")),
        }
        if lists.iter().any(|l| l.contains(&0)) {
            return refuse("has a candidate without heads, rank or scope");
        }
        let mut all = Vec::new();
        for &heads in &self.heads {
            for &rank in self.ranks.iter().filter(|&r| r.is_multiple_of(heads)) {
                for &scope in &self.scopes {
                    all.extend(self.norms.iter().map(|&norm| Candidate {
                        heads,
                        rank,
                        scope,
                        norm,
                    }));
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        if all.is_empty() {
            return refuse("has no heads that divide a rank");
        }
        Ok(all)
    }

    /// Whether `c` is one of [`Space::candidates`].
    pub fn contains(&self, c: &Candidate) -> bool {
        self.heads.contains(&c.heads)
            && self.ranks.contains(&c.rank)
            && self.scopes.contains(&c.scope)
            && self.norms.contains(&c.norm)
            && c.rank.is_multiple_of(c.heads)
    }
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// The fastest candidate that reaches a validation accuracy (0 to 1).
    Efficiency {
        /// To reach.
        accuracy: f64,
    },
    /// The most accurate candidate whose inference takes at most so long.
    Utility {
        /// Seconds of one private inference.
        seconds: f64,
    },
}

impl Goal {
    /// Whether a trial meets the goal, and how well it does among those that do (or do not); more is better.
    fn value(&self, t: &Trial) -> (bool, f64) {
        match *self {
            Goal::Efficiency { accuracy } if t.accuracy >= accuracy => (true, -t.latency),
            Goal::Efficiency { .. } => (false, t.accuracy),
            Goal::Utility { seconds } => (t.latency <= seconds, t.accuracy),
        }
    }

    fn check(&self) -> Result<()> {
        let (name, value, most) = match *self {
            Goal::Efficiency { accuracy } => ("accuracy", accuracy, 1.0),
            Goal::Utility { seconds } => ("latency", seconds, f64::MAX),
        };
        if value > 0.0 && value <= most {
            return Ok(());
        }
        Err(Error::Settings(format!("a target {name} of {value}")))
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Goal::Efficiency { accuracy } => {
                write!(f, "the fastest with a validation accuracy of {accuracy}")
            }
            Goal::Utility { seconds } => write!(f, "the most accurate within {seconds} s"),
        }
    }
}

/// Answers a search's questions about a candidate.
pub trait Evaluate {
    /// Seconds of one private inference under the user's network, predicted exactly from the cost model. Cheap, and the
    /// same whenever it is asked.
    fn latency(&mut self, c: &Candidate) -> Result<f64>;

    /// Validation accuracy (0 to 1) after training for `epochs` in total; may continue an earlier, shorter training of the
    /// same candidate. Expensive.
    ///
    /// [`Error::Diverged`] counts as an accuracy of zero. Any other error ends the search; one that comes while the search's
    /// interruption flag is set counts as an interruption.
    fn train(&mut self, c: &Candidate, epochs: usize) -> Result<f64>;

    /// What an epoch of training costs beside other candidates', in any unit; predicted multiplications, say.
    fn training_cost(&self, _: &Candidate) -> f64 {
        1.0
    }
}

/// The candidates with what is known before any is trained.
struct Field {
    points: Vec<Point>,
    index: BTreeMap<Candidate, usize>,
}

struct Point {
    candidate: Candidate,
    /// Seconds.
    latency: f64,
    /// Of an epoch of training.
    cost: f64,
}

impl Field {
    fn new(space: &Space, evaluate: &mut dyn Evaluate) -> Result<Self> {
        let mut points = Vec::new();
        for candidate in space.candidates()? {
            let (latency, cost) = (evaluate.latency(&candidate)?, evaluate.training_cost(&candidate));
            for (name, value) in [("latency", latency), ("training cost", cost)] {
                if !(value.is_finite() && value > 0.0) {
                    return Err(Error::Settings(format!("a {name} of {value} for {candidate}")));
                }
            }
            points.push(Point {
                candidate,
                latency,
                cost,
            });
        }
        let index = points.iter().enumerate().map(|(i, p)| (p.candidate, i)).collect();
        Ok(Field { points, index })
    }

    fn get(&self, c: &Candidate) -> Option<&Point> {
        Some(&self.points[*self.index.get(c)?])
    }

    fn fastest(&self) -> &Point {
        let by_latency = |a: &&Point, b: &&Point| a.latency.total_cmp(&b.latency);
        self.points
            .iter()
            .min_by(by_latency)
            .expect("a field has a candidate")
    }
}

/// Decides what to train, from the trials so far alone.
trait Strategy {
    /// A candidate and the epochs it shall have been trained for in total; none when there is nothing left to learn.
    /// `history` has grown by the trial that was asked for last.
    fn next(&mut self, history: &[Trial]) -> Option<(Candidate, usize)>;

    /// Estimated training cost until the end (epochs, weighted by [`Point::cost`]).
    fn left(&self) -> f64;
}

#[cfg(test)]
mod tests;
