//! How to tune, and what the right answers are.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Loss, Metric, Result};

/// How to tune; the default is black-box tuning's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Candidates of a generation.
    pub population: usize,
    /// The optimiser's first step size.
    pub sigma: f64,
    /// Candidates to evaluate on the training examples, rounded down to whole generations; one generation at least.
    pub budget: usize,
    /// Evaluations between validations.
    pub validate_every: usize,
    /// Validations without a better prompt after which to stop.
    pub patience: Option<usize>,
    /// What is minimised.
    pub loss: Loss,
    /// What the best prompt is best at.
    pub metric: Metric,
    /// Of the optimiser's random numbers.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            population: 20,
            sigma: 1.0,
            budget: 8000,
            validate_every: 100,
            patience: None,
            loss: Loss::CrossEntropy,
            metric: Metric::Accuracy,
            seed: 0,
        }
    }
}

/// The right answers. The data owner's secret, which the debug print does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Labels {
    /// How many there are to choose from.
    pub classes: usize,
    /// Of the training examples.
    pub train: Vec<usize>,
    /// Of the validation examples; if there are none, the training examples serve for them.
    pub validation: Vec<usize>,
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "Labels[{} + {} of {}]",
            self.train.len(),
            self.validation.len(),
            self.classes
        )
    }
}

/// What a run comes to that its budget ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Generations.
    pub generations: u64,
    /// Validations, that of the initial prompt included.
    pub validations: u64,
    /// Prompts that are validated: the initial one, then the best and the mean of the search.
    pub validated: u64,
}

impl Settings {
    /// What a run comes to that its budget ends: a validation before, whenever as many evaluations are done as there are between two,
    /// and after the last generation.
    pub fn planned(&self) -> Planned {
        let (population, every) = (self.population.max(1), self.validate_every.max(1));
        let generations = (self.budget / population).max(1) as u64;
        let evaluations = u128::from(generations) * population as u128;
        let times = |evaluations: u128| (evaluations / every as u128).min(u128::from(generations));
        let last = times(evaluations) == times(evaluations - population as u128) && population < every;
        let during = times(evaluations) as u64 + u64::from(last);
        Planned {
            generations,
            validations: 1 + during,
            validated: 1 + 2 * during,
        }
    }

    /// Refuses what no run can do.
    pub fn check(&self) -> Result<()> {
        let refuse = |detail: &str| Err(Error::Settings(detail.into()));
        if self.population < 2 {
            let detail = format!(
                "a population of {}: the optimiser compares two prompts at least",
                self.population
            );
            return refuse(&detail);
        }
        if self.budget == 0 {
            return refuse("a budget of 0 evaluations: there is nothing to tune");
        }
        if self.validate_every == 0 {
            return refuse("validation every 0 evaluations: it must be one at least");
        }
        if self.patience == Some(0) {
            return refuse("a patience of 0 validations would stop before the start");
        }
        if let Loss::Hinge { margin } = self.loss
            && !(margin.is_finite() && margin > 0.0)
        {
            return refuse("the hinge's margin must be positive");
        }
        Ok(())
    }
}

impl Labels {
    pub(super) fn check(&self, metric: Metric) -> Result<()> {
        if self.classes < 2 || self.train.is_empty() {
            return Err(Error::Settings(
                "tuning takes two classes and one training example at least".into(),
            ));
        }
        let positive = match metric {
            Metric::F1 { positive } => Some(positive),
            Metric::Accuracy => None,
        };
        let all = self.train.iter().chain(&self.validation).chain(&positive);
        match all.max() {
            Some(label) if *label >= self.classes => Err(Error::Settings(format!(
                "label {label} of {} classes: labels are numbered from 0",
                self.classes
            ))),
            _ => Ok(()),
        }
    }
}
