//! What tuning is compared with: a linear classifier on a model's pooled features, fitted to the same few texts.

use std::fmt;

use nalgebra::DMatrix;

use crate::{Error, Loss, Metric, Result, Score};

/// Strengths of the penalty among which validation chooses, times the number of features.
const PENALTIES: [f64; 7] = [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3];

/// Features `[texts, width]` of texts, and their labels. Holds labels: its debug print shows sizes alone.
#[derive(Clone, Copy)]
pub struct Labelled<'a> {
    /// Row-major.
    pub features: &'a [f32],
    /// One for each row.
    pub labels: &'a [usize],
}

impl fmt::Debug for Labelled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Labelled[{}]", self.labels.len())
    }
}

/// Ridge regression to one-hot labels. Knows the texts that it was fitted to, and so has no `Debug`.
pub struct Linear {
    mean: Vec<f64>,
    deviation: Vec<f64>,
    /// `[width, classes]`.
    weight: DMatrix<f64>,
    bias: Vec<f64>,
}

impl Linear {
    /// Fits to `train`, with the penalty of which `metric` on `validation` is highest, of equals the strongest.
    ///
    /// # Errors
    /// If there are no texts, the sizes do not fit together, or a feature is not finite.
    pub fn fit(train: Labelled, validation: Labelled, classes: usize, metric: Metric) -> Result<Linear> {
        let width = train.features.len() / train.labels.len().max(1);
        let fits = |set: &Labelled| {
            set.features.len() == width * set.labels.len()
                && set.features.iter().all(|x| x.is_finite())
                && set.labels.iter().all(|l| *l < classes)
        };
        if width == 0 || !fits(&train) || !fits(&validation) {
            let detail =
                "a linear classifier needs texts with finite features of one width, and their labels";
            return Err(Error::Settings(detail.into()));
        }
        let mut best: Option<(f64, Linear)> = None;
        for penalty in PENALTIES {
            let linear = Linear::solve(train, width, classes, penalty * width as f64)?;
            let logits = linear.logits(validation.features);
            let score = Score::of(&logits, validation.labels, classes, Loss::CrossEntropy, metric).metric;
            if best.as_ref().is_none_or(|(highest, _)| score >= *highest) {
                best = Some((score, linear));
            }
        }
        best.map(|(_, linear)| linear)
            .ok_or_else(|| Error::Settings("a linear classifier without a penalty".into()))
    }

    fn solve(train: Labelled, width: usize, classes: usize, penalty: f64) -> Result<Linear> {
        let n = train.labels.len();
        let x = DMatrix::from_row_iterator(n, width, train.features.iter().map(|x| f64::from(*x)));
        let mean: Vec<f64> = x.column_iter().map(|c| c.mean()).collect();
        // A feature that never changes says nothing, whatever it is divided by.
        let deviation: Vec<f64> = x
            .column_iter()
            .map(|c| c.variance().sqrt())
            .map(|d| if d > 1e-9 { d } else { 1.0 })
            .collect();
        let x = DMatrix::from_fn(n, width, |i, j| (x[(i, j)] - mean[j]) / deviation[j]);
        let one_hot = DMatrix::from_fn(n, classes, |i, j| f64::from(u8::from(train.labels[i] == j)));
        let bias: Vec<f64> = one_hot.column_iter().map(|c| c.mean()).collect();
        let y = DMatrix::from_fn(n, classes, |i, j| one_hot[(i, j)] - bias[j]);
        // There are fewer texts than features: w = X^T (X X^T + penalty)^-1 y.
        let gram = &x * x.transpose() + DMatrix::identity(n, n) * penalty;
        let dual = gram
            .cholesky()
            .ok_or_else(|| Error::Settings("features of which no linear classifier can be made".into()))?
            .solve(&y);
        Ok(Linear {
            mean,
            deviation,
            weight: x.transpose() * dual,
            bias,
        })
    }

    /// `[texts, classes]` of `features [texts, width]`; the largest is the answer.
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        let width = self.mean.len();
        let row = |x: &[f32]| -> Vec<f32> {
            let x: Vec<f64> = x
                .iter()
                .zip(self.mean.iter().zip(&self.deviation))
                .map(|(x, (mean, deviation))| (f64::from(*x) - mean) / deviation)
                .collect();
            let column = self.weight.column_iter().zip(&self.bias);
            column
                .map(|(w, bias)| (bias + w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>()) as f32)
                .collect()
        };
        features.chunks_exact(width).flat_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Noise in most of 12 features, and the label in one of them.
    fn texts(count: usize, seed: u64) -> (Vec<f32>, Vec<usize>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let labels: Vec<usize> = (0..count).map(|i| i % 3).collect();
        let features = labels
            .iter()
            .flat_map(|l| {
                let mut row: Vec<f32> = (0..12).map(|_| rng.random_range(-1.0..1.0)).collect();
                row[*l] += 4.0;
                row[11] = 7.0;
                row
            })
            .collect();
        (features, labels)
    }

    #[test]
    fn it_finds_what_tells_classes_apart() {
        let (x, y) = texts(30, 1);
        let (vx, vy) = texts(30, 2);
        let (tx, ty) = texts(300, 3);
        let set = |features, labels| Labelled { features, labels };
        let linear = Linear::fit(set(&x, &y), set(&vx, &vy), 3, Metric::Accuracy).unwrap();
        let score = Score::of(&linear.logits(&tx), &ty, 3, Loss::CrossEntropy, Metric::Accuracy);
        assert!(score.metric > 0.95, "{}", score.metric);
        // Labels that have nothing to do with the features are not learned.
        let wrong: Vec<usize> = ty.iter().enumerate().map(|(i, _)| i / 7 % 3).collect();
        let chance = Score::of(
            &linear.logits(&tx),
            &wrong,
            3,
            Loss::CrossEntropy,
            Metric::Accuracy,
        );
        assert!(chance.metric < 0.5, "{}", chance.metric);
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let (x, y) = texts(6, 1);
        let set = |features, labels| Labelled { features, labels };
        let fit = |train, validation| Linear::fit(train, validation, 3, Metric::Accuracy).is_err();
        assert!(fit(set(&[], &[]), set(&x, &y)));
        assert!(fit(set(&x[1..], &y), set(&x, &y)));
        assert!(fit(set(&x, &y), set(&x, &[9; 6])));
        let mut broken = x.clone();
        broken[3] = f32::NAN;
        assert!(fit(set(&broken, &y), set(&x, &y)));
    }
}
