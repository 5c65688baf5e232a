//! What is minimised and what is reported, from the logits of the label words.

use serde::{Deserialize, Deserializer, Serialize};

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Minus the logarithm of the right label's probability, among the label words alone.
    #[default]
    CrossEntropy,
    /// By how much each wrong label is not `margin` below the right one.
    Hinge {
        /// Black-box tuning takes 2.
        margin: f64,
    },
}

impl Loss {
    /// Of one example, `logits` of each label; NaN where a logit is not finite.
    ///
    /// # Panics
    /// If there is no such label.
    pub fn of(self, logits: &[f32], label: usize) -> f64 {
        if !logits.iter().all(|l| l.is_finite()) {
            return f64::NAN;
        }
        let right = f64::from(logits[label]);
        let over = logits.iter().map(|&l| f64::from(l) - right);
        match self {
            Loss::CrossEntropy => {
                let most = over.clone().fold(0.0, f64::max);
                most + over.map(|x| (x - most).exp()).sum::<f64>().ln()
            }
            Loss::Hinge { margin } => {
                let wrong = over.enumerate().filter(|(i, _)| *i != label);
                wrong.map(|(_, x)| (x + margin).max(0.0)).sum()
            }
        }
    }
}

/// What is reported, and decides which prompt is the best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Share of right answers.
    #[default]
    Accuracy,
    /// Harmonic mean of precision and recall of the label `positive`.
    F1 {
        /// Its number.
        positive: usize,
    },
}

impl Metric {
    /// Of `answers` where `labels` are right, 0 to 1. Without anything to find and anything found, F1 is 0.
    pub fn of(self, answers: &[usize], labels: &[usize]) -> f64 {
        let count = |of: &dyn Fn(usize, usize) -> bool| {
            let pairs = answers.iter().zip(labels);
            pairs.filter(|&(&a, &l)| of(a, l)).count() as f64
        };
        let (hits, all) = match self {
            Metric::Accuracy => (count(&|a, l| a == l), labels.len() as f64),
            Metric::F1 { positive } => {
                let found = count(&|a, _| a == positive);
                let there = count(&|_, l| l == positive);
                (2.0 * count(&|a, l| a == positive && l == positive), found + there)
            }
        };
        if all > 0.0 { hits / all } else { 0.0 }
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 { .. } => "F1",
        }
    }
}

/// The most likely label; of equal ones the first.
pub fn answer(logits: &[f32]) -> usize {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (1..logits.len()).fold(0, better)
}

/// How well a prompt does on examples.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Mean over the examples; NaN if a logit was not finite.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// 0 to 1.
    pub metric: f64,
}

/// JSON has no NaN; it is written as null.
pub(crate) fn or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Losses are the data owner's secret.
impl std::fmt::Debug for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Score(..)")
    }
}

impl Score {
    /// Of one prompt's `logits`, `[example, label]`.
    ///
    /// # Panics
    /// If there are not `classes` logits for each label.
    pub fn of(logits: &[f32], labels: &[usize], classes: usize, loss: Loss, metric: Metric) -> Self {
        assert_eq!(logits.len(), labels.len() * classes, "logits of other examples");
        let examples = || logits.chunks_exact(classes).zip(labels);
        let total: f64 = examples().map(|(l, &label)| loss.of(l, label)).sum();
        let answers: Vec<usize> = examples().map(|(l, _)| answer(l)).collect();
        Score {
            loss: total / labels.len() as f64,
            metric: metric.of(&answers, labels),
        }
    }

    /// Whether this is the better one: by the metric, then by the loss. A loss that is not a number is never better.
    pub fn beats(&self, other: &Score) -> bool {
        let order = self.metric.total_cmp(&other.metric);
        !self.loss.is_nan() && order.then(other.loss.total_cmp(&self.loss)).is_gt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HINGE: Loss = Loss::Hinge { margin: 2.0 };

    #[test]
    fn cross_entropy_is_that_of_the_softmax() {
        let logits = [1.0f32, -2.0, 0.5];
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (label, &l) in logits.iter().enumerate() {
            let want = -(f64::from(l).exp() / sum).ln();
            assert!((Loss::CrossEntropy.of(&logits, label) - want).abs() < 1e-12);
        }
        assert!(
            (Loss::CrossEntropy.of(&[1e30, 0.0], 1) - 1e30).abs() < 1e24,
            "no overflow"
        );
        assert_eq!(Loss::CrossEntropy.of(&[1e30, 0.0], 0), 0.0);
    }

    #[test]
    fn the_hinge_counts_what_the_margin_lacks() {
        assert_eq!(HINGE.of(&[3.0, 1.0, 0.0], 0), 0.0);
        assert_eq!(HINGE.of(&[3.0, 2.5, 0.0], 0), 1.5);
        assert_eq!(HINGE.of(&[3.0, 2.5, 0.0], 2), 5.0 + 4.5);
    }

    #[test]
    fn what_is_not_finite_is_no_loss() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Loss::CrossEntropy.of(&[bad, 1.0], 1).is_nan());
            assert!(HINGE.of(&[1.0, bad], 0).is_nan());
        }
    }

    #[test]
    fn metrics_count_by_hand() {
        let (answers, labels) = ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1]);
        assert_eq!(Metric::Accuracy.of(&answers, &labels), 0.6);
        // Precision 2/3, recall 2/3.
        assert!((Metric::F1 { positive: 1 }.of(&answers, &labels) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(Metric::F1 { positive: 0 }.of(&answers, &labels), 0.5);
        assert_eq!(Metric::F1 { positive: 7 }.of(&answers, &labels), 0.0);
        assert_eq!(answer(&[0.0, 2.0, 2.0, f32::NAN]), 1);
    }

    #[test]
    fn scores_average_and_compare() {
        let score = Score::of(&[1.0, 0.0, 0.0, 4.0], &[0, 0], 2, HINGE, Metric::Accuracy);
        assert_eq!((score.loss, score.metric), ((1.0 + 6.0) / 2.0, 0.5));
        let with = |loss, metric| Score { loss, metric };
        assert!(with(1.0, 0.6).beats(&with(0.1, 0.5)));
        assert!(with(0.1, 0.5).beats(&with(1.0, 0.5)));
        assert!(!with(1.0, 0.5).beats(&with(1.0, 0.5)));
        assert!(!with(f64::NAN, 0.9).beats(&with(1.0, 0.5)));
        assert!(with(1.0, 0.5).beats(&with(f64::NAN, 0.5)));
        assert_eq!(format!("{score:?}"), "Score(..)");
    }
}
