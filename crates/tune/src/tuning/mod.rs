//! Forward-only tuning: the optimiser proposes prompts, the model's forward pass judges them, no gradient flows.
//!
//! A generation is evaluated in one batch. Every so often the best prompt so far and the one at the optimiser's mean are
//! validated, the latter because averaging over many directions makes it better than any sample; what does best in
//! validation is kept. The first to be validated is the initial prompt, so that tuning never hands out a worse one.

mod checkpoint;
mod evaluate;
mod settings;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub use evaluate::{Evaluate, Split, score};
pub use settings::{Labels, Planned, Settings};

use crate::cma::{Cma, bits};
use crate::{Error, Projection, Prompt, Result, Score};

/// A generation, as the history tells of it; the first tells of the initial prompt's validation alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Candidates evaluated on the training examples so far.
    pub evaluations: usize,
    /// The generation's best candidate, on the training examples.
    pub train: Option<Score>,
    /// The better of the validated prompts.
    pub validation: Option<Score>,
    /// The optimiser's step size afterwards.
    pub sigma: f64,
    /// Spent so far, with those of earlier sessions.
    pub seconds: f64,
}

/// A prompt, by the point that it is projected from. Its debug print shows no secret.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The optimiser's coordinates.
    #[serde(with = "bits")]
    pub point: Vec<f64>,
    /// How good it is.
    pub score: Score,
    /// Evaluations when it was found.
    pub evaluations: usize,
}

impl fmt::Debug for Best {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Best(after {} evaluations)", self.evaluations)
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What was just done.
    pub record: &'a Record,
    /// The lowest training loss.
    pub train: Option<&'a Best>,
    /// The best in validation.
    pub best: &'a Best,
    /// Evaluations there will be, unless patience ends.
    pub budget: usize,
    /// Seconds until then, by this session's pace; none before its first generation.
    pub left: Option<f64>,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The budget is spent.
    Budget,
    /// Validation has not got better for as long as patience allows.
    Patience,
    /// The interruption flag was set; running again goes on.
    Interrupted,
}

/// What a run found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The best prompt in validation.
    pub prompt: Prompt,
    /// Its point and validation score.
    pub best: Best,
    /// The initial prompt's validation score.
    pub initial: Score,
    /// Why it ended.
    pub ended: Ended,
}

/// All that a run needs to go on.
#[derive(Clone, Serialize, Deserialize)]
struct State {
    cma: Cma,
    /// The lowest training loss.
    train: Option<Best>,
    /// The best in validation.
    best: Option<Best>,
    /// Validations without a better prompt.
    stale: usize,
    history: Vec<Record>,
}

/// A tuning run. With a checkpoint it can be interrupted at any moment, and goes on from the last whole generation to the
/// same prompts, bit for bit.
pub struct Tuner {
    settings: Settings,
    projection: Projection,
    labels: Labels,
    state: State,
    checkpoint: Option<checkpoint::File>,
}

impl Tuner {
    /// A run that is remembered as long as this value.
    ///
    /// # Errors
    /// If the settings or labels make no sense.
    pub fn new(settings: Settings, projection: Projection, labels: Labels) -> Result<Self> {
        settings.check()?;
        labels.check(settings.metric)?;
        let cma = Cma::new(
            projection.dimension(),
            settings.population,
            settings.sigma,
            settings.seed,
        )?;
        Ok(Tuner {
            settings,
            projection,
            labels,
            state: State {
                cma,
                train: None,
                best: None,
                stale: 0,
                history: Vec::new(),
            },
            checkpoint: None,
        })
    }

    /// A run that goes on from the checkpoint at `path`, or writes one there after each generation. `identity` stands for
    /// what the settings do not say and must stay the same: model, task, shots, projection. Budget and patience may differ.
    ///
    /// # Errors
    /// As [`Tuner::new`]; and if the checkpoint is another run's, corrupt, or cannot be read.
    pub fn open(
        settings: Settings,
        projection: Projection,
        labels: Labels,
        identity: &str,
        path: &Path,
    ) -> Result<Self> {
        let mut tuner = Self::new(settings, projection, labels)?;
        let (file, state) =
            checkpoint::File::open(path, identity, &tuner.settings, tuner.projection.dimension())?;
        tuner.checkpoint = Some(file);
        if let Some(state) = state {
            tuner.state = state;
        }
        Ok(tuner)
    }

    /// What happened so far; serialisable, for a plot for instance.
    pub fn history(&self) -> &[Record] {
        &self.state.history
    }

    /// Candidates evaluated so far.
    pub fn evaluations(&self) -> usize {
        self.state.cma.generation() as usize * self.settings.population
    }

    /// Candidates there will be evaluated, unless patience ends.
    pub fn budget(&self) -> usize {
        let generations = self.settings.budget / self.settings.population;
        generations.max(1) * self.settings.population
    }

    /// Where the checkpoint is.
    pub fn checkpoint(&self) -> Option<PathBuf> {
        self.checkpoint.as_ref().map(|file| file.path().to_owned())
    }

    /// Runs until the budget or patience ends, or `stop` is set, which is looked at before the first validation and before
    /// each generation. `progress` hears of every generation that is run, once it is stored. May be called again to go on.
    ///
    /// # Errors
    /// Those of `evaluate`, unless `stop` is set by then; [`Error::Interrupted`] if `stop` is set before the initial prompt
    /// was validated; if `evaluate` returns another number of logits than asked for, or not one candidate with finite ones;
    /// and if the checkpoint cannot be written. A failed generation leaves no trace.
    pub fn run(
        &mut self,
        evaluate: &mut dyn Evaluate,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Outcome> {
        let session = Session {
            start: Instant::now(),
            earlier: self.state.history.last().map_or(0.0, |r| r.seconds),
            evaluations: self.evaluations(),
        };
        let ended = loop {
            let patience = self.settings.patience;
            if patience.is_some_and(|patience| self.state.stale >= patience) {
                break Ended::Patience;
            }
            if self.state.best.is_some() && self.evaluations() >= self.budget() {
                break Ended::Budget;
            }
            let stopped = || stop.load(Ordering::Relaxed);
            if stopped() {
                break Ended::Interrupted;
            }
            let step = match self.state.best {
                None => self.begin(evaluate, &session),
                Some(_) => self.generation(evaluate, &session),
            };
            match step {
                Ok(next) => {
                    if let Some(file) = &self.checkpoint {
                        file.write(&self.settings, &next)?;
                    }
                    self.state = next;
                }
                Err(Error::Evaluation(_)) if stopped() => break Ended::Interrupted,
                Err(e) => return Err(e),
            }
            progress(&self.progress(&session));
        };
        let (Some(best), Some(initial)) = (&self.state.best, self.state.history.first()) else {
            return Err(Error::Interrupted);
        };
        Ok(Outcome {
            prompt: self.prompt(best),
            best: best.clone(),
            initial: initial.validation.unwrap_or(best.score),
            ended,
        })
    }

    fn prompt(&self, best: &Best) -> Prompt {
        let mut prompts = self.projection.prompts(std::slice::from_ref(&best.point));
        prompts.pop().expect("one point, one prompt")
    }

    fn progress(&self, session: &Session) -> Progress<'_> {
        let done = self.evaluations() - session.evaluations;
        let remaining = self.budget().saturating_sub(self.evaluations());
        let pace = session.start.elapsed().as_secs_f64() / done as f64;
        Progress {
            record: self.state.history.last().expect("a step leaves a record"),
            train: self.state.train.as_ref(),
            best: self.state.best.as_ref().expect("validated first"),
            budget: self.budget(),
            left: (done > 0).then_some(pace * remaining as f64),
        }
    }

    /// The state after the initial prompt's validation.
    fn begin(&self, evaluate: &mut dyn Evaluate, session: &Session) -> Result<State> {
        let mut next = self.state.clone();
        let origin = vec![0.0; self.projection.dimension()];
        let validation = self.validate(evaluate, &mut next, vec![origin], 0)?;
        next.stale = 0;
        next.history.push(Record {
            evaluations: 0,
            train: None,
            validation: Some(validation),
            sigma: next.cma.sigma(),
            seconds: session.seconds(),
        });
        Ok(next)
    }

    /// The state after another generation.
    fn generation(&self, evaluate: &mut dyn Evaluate, session: &Session) -> Result<State> {
        let mut next = self.state.clone();
        let mut points = next.cma.ask();
        let scores = self.scores(evaluate, Split::Train, &points)?;
        let losses: Vec<f64> = scores.iter().map(|s| s.loss).collect();
        next.cma.tell(&losses)?;
        let evaluations = self.evaluations() + points.len();

        let lower = |a: usize, b: usize| {
            if losses[b] < losses[a] || losses[a].is_nan() {
                b
            } else {
                a
            }
        };
        let first = (0..losses.len())
            .reduce(lower)
            .expect("populations are not empty");
        let winner = Best {
            point: points.swap_remove(first),
            score: scores[first],
            evaluations,
        };
        if next
            .train
            .as_ref()
            .is_none_or(|best| winner.score.loss < best.score.loss)
        {
            next.train = Some(winner);
        }

        let every = self.settings.validate_every;
        let due = evaluations / every > self.evaluations() / every || evaluations >= self.budget();
        let validation = if due {
            let train = next
                .train
                .as_ref()
                .expect("set by the first generation")
                .point
                .clone();
            let mean = next.cma.mean().to_vec();
            Some(self.validate(evaluate, &mut next, vec![train, mean], evaluations)?)
        } else {
            None
        };
        next.history.push(Record {
            evaluations,
            train: Some(scores[first]),
            validation,
            sigma: next.cma.sigma(),
            seconds: session.seconds(),
        });
        Ok(next)
    }

    /// Validates `points` and keeps the best so far; returns the better one's score.
    fn validate(
        &self,
        evaluate: &mut dyn Evaluate,
        next: &mut State,
        points: Vec<Vec<f64>>,
        evaluations: usize,
    ) -> Result<Score> {
        let split = if self.labels.validation.is_empty() {
            Split::Train
        } else {
            Split::Validation
        };
        let scores = self.scores(evaluate, split, &points)?;
        let scored = points.into_iter().zip(scores);
        let (point, score) = scored
            .reduce(|a, b| if b.1.beats(&a.1) { b } else { a })
            .expect("something to validate");
        next.stale += 1;
        if next.best.as_ref().is_none_or(|best| score.beats(&best.score)) {
            next.stale = 0;
            next.best = Some(Best {
                point,
                score,
                evaluations,
            });
        }
        Ok(score)
    }

    fn scores(&self, evaluate: &mut dyn Evaluate, split: Split, points: &[Vec<f64>]) -> Result<Vec<Score>> {
        let labels = match split {
            Split::Train => &self.labels.train,
            _ => &self.labels.validation,
        };
        let Settings { loss, metric, .. } = self.settings;
        let prompts = self.projection.prompts(points);
        score(
            evaluate,
            split,
            &prompts,
            labels,
            self.labels.classes,
            loss,
            metric,
        )
    }
}

/// A session's clock.
struct Session {
    start: Instant,
    /// Seconds of the sessions before.
    earlier: f64,
    /// Evaluations of the sessions before.
    evaluations: usize,
}

impl Session {
    fn seconds(&self) -> f64 {
        self.earlier + self.start.elapsed().as_secs_f64()
    }
}
