//! Linear discriminant analysis with a shrunk covariance (Friedman, Regularized discriminant analysis, JASA 1989): a linear
//! classifier in closed form.
//!
//! With standardised features x, class means m_c and the covariance S within classes, a class is as likely as
//! `exp((x - m_c / 2)^T ((1 - a) S + a I)^-1 m_c / t)`. The shrinkage a and the temperature t are those of which a fifth of each class
//! is the likeliest after a fit to the others. A few epochs of descent on the cross-entropy follow, with features left out at
//! random.

use candle_core::{Device, Tensor};
use nalgebra::DMatrix;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::optim::{Optimizer, Rule, cosine, cross_entropy, gradients};
use crate::workers::Workers;
use crate::{Error, Result, Variables};

/// Shrinkages to choose from.
const SHRINKAGES: [f64; 8] = [0.01, 0.03, 0.06, 0.12, 0.2, 0.3, 0.5, 0.7];
/// Temperatures to choose from.
const TEMPERATURES: [f64; 6] = [1.0, 1.4, 2.0, 2.8, 4.0, 5.6];
/// One example of each class in so many is held out for the choice.
const FOLDS: usize = 5;
/// Examples of one product.
const CHUNK: usize = 1000;
/// Epochs of descent.
const EPOCHS: usize = 15;
/// Examples of one step.
const BATCH: usize = 256;
/// Peak learning rate of AdamW, and its weight decay, on standardised features.
const RATE: f32 = 2e-3;
const DECAY: f32 = 0.05;
/// Probability with which a feature is left out of a step.
const DROPOUT: f32 = 0.5;

/// Features `[examples, width]`, row after row, and their labels.
#[derive(Clone, Copy)]
pub struct Examples<'a> {
    pub features: &'a [f32],
    pub width: usize,
    pub labels: &'a [u32],
    pub classes: usize,
}

/// What is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    shrinkage: f64,
    temperature: f64,
}

/// Logits `weight x + bias` of the features as they are.
pub struct Discriminant {
    /// `[classes, width]`.
    pub weight: DMatrix<f64>,
    pub bias: Vec<f64>,
}

impl Discriminant {
    /// Fits to `examples`, with a choice if there is one already; the descent's order is drawn by `seed`.
    ///
    /// # Errors
    /// If there is no example, or a feature is not finite.
    pub fn fit(
        examples: &Examples,
        choice: Option<Choice>,
        seed: u64,
        workers: &Workers,
    ) -> Result<(Discriminant, Choice)> {
        let (n, width) = (examples.labels.len(), examples.width);
        if n == 0 || width == 0 || examples.features.iter().any(|x| !x.is_finite()) {
            return Err(Error::Settings(
                "a linear classifier needs examples with finite features; a state of the backbone has others"
                    .into(),
            ));
        }
        let scale = Scale::of(examples);
        // Of each class, the last of every FOLDS examples is held out.
        let mut seen = vec![0_usize; examples.classes];
        let held: Vec<bool> = examples
            .labels
            .iter()
            .map(|&label| {
                let count = &mut seen[label as usize];
                *count += 1;
                count.is_multiple_of(FOLDS)
            })
            .collect();
        let fitted = Moments::of(examples, &scale, |i| !held[i]);
        let choice = match choice {
            Some(choice) => choice,
            None => fitted.choose(examples, &scale, &held)?,
        };
        let mut all = Moments::of(examples, &scale, |i| held[i]);
        all.add(&fitted);
        let (weight, bias) = all.solve(choice.shrinkage)?;
        let by = 1.0 / choice.temperature;
        let (weight, bias) = (weight * by, bias.iter().map(|b| b * by).collect::<Vec<_>>());
        let (weight, bias) = descend(examples, &scale, (weight, bias), seed, workers)?;
        // From standardised features to those that are given.
        let given = weight.map_with_location(|_, j, w| w / scale.deviation[j]);
        let shift = |c: usize| (0..width).map(|j| given[(c, j)] * scale.mean[j]).sum::<f64>();
        let bias = bias.iter().enumerate().map(|(c, b)| b - shift(c)).collect();
        let weight = given;
        Ok((Discriminant { weight, bias }, choice))
    }
}

/// What features are standardised with.
struct Scale {
    mean: Vec<f64>,
    deviation: Vec<f64>,
}

impl Scale {
    fn of(examples: &Examples) -> Scale {
        let n = examples.labels.len() as f64;
        let (mut mean, mut deviation) = (vec![0.0; examples.width], vec![0.0; examples.width]);
        for row in examples.features.chunks_exact(examples.width) {
            mean.iter_mut()
                .zip(row)
                .for_each(|(m, x)| *m += f64::from(*x) / n);
        }
        for row in examples.features.chunks_exact(examples.width) {
            let squares = row
                .iter()
                .zip(&mean)
                .map(|(x, m)| (f64::from(*x) - m).powi(2) / n);
            deviation.iter_mut().zip(squares).for_each(|(d, s)| *d += s);
        }
        // A feature that never changes says nothing, whatever it is divided by.
        let floor = |variance: &f64| if *variance > 1e-12 { variance.sqrt() } else { 1.0 };
        Scale {
            deviation: deviation.iter().map(floor).collect(),
            mean,
        }
    }

    fn apply(&self, row: &[f32]) -> impl Iterator<Item = f32> {
        let scaled = row.iter().zip(&self.mean).zip(&self.deviation);
        scaled.map(|((x, m), d)| ((f64::from(*x) - m) / d) as f32)
    }
}

/// Descent on the cross-entropy of standardised features from a weight and a bias.
fn descend(
    examples: &Examples,
    scale: &Scale,
    (weight, bias): (DMatrix<f64>, Vec<f64>),
    seed: u64,
    workers: &Workers,
) -> Result<(DMatrix<f64>, Vec<f64>)> {
    let (n, width, classes) = (examples.labels.len(), examples.width, examples.classes);
    let shapes = [
        ("bias".to_owned(), vec![classes]),
        ("weight".to_owned(), vec![classes, width]),
    ];
    let vars = Variables::new(&shapes, |name, _| match name {
        "bias" => bias.iter().map(|v| *v as f32).collect(),
        _ => weight.transpose().iter().map(|v| *v as f32).collect(),
    })?;
    let (var_bias, var_weight) = (vars.vars()[0].clone(), vars.vars()[1].clone());
    let mut optimizer = Optimizer::new(Rule::ADAMW, DECAY, f32::INFINITY, &vars);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..n).collect();
    let steps = n.div_ceil(BATCH) * EPOCHS;
    let mut step = 0;
    for _ in 0..EPOCHS {
        order.shuffle(&mut rng);
        for batch in order.chunks(BATCH) {
            let row = |i: &usize| scale.apply(&examples.features[i * width..][..width]);
            let mut x: Vec<f32> = batch.iter().flat_map(row).collect();
            for v in &mut x {
                *v *= if rng.random::<f32>() < DROPOUT {
                    0.0
                } else {
                    1.0 / (1.0 - DROPOUT)
                };
            }
            let x = Tensor::from_vec(x, (batch.len(), width), &Device::Cpu)?;
            let labels: Vec<u32> = batch.iter().map(|&i| examples.labels[i]).collect();
            let labels = Tensor::from_vec(labels, batch.len(), &Device::Cpu)?;
            let loss = |(): &()| -> Result<(Tensor, ())> {
                let logits = x.matmul(&var_weight.t()?)?.broadcast_add(&var_bias)?;
                Ok((cross_entropy(&logits, &labels)?, ()))
            };
            let (_, grads, _) = gradients(workers, &vars, &[()], &[1.0], loss)?;
            optimizer.step(&vars, &grads, cosine(RATE, step, steps, steps / 50))?;
            step += 1;
        }
    }
    let values = |var: &Tensor| var.flatten_all()?.to_vec1::<f32>();
    let weight = values(&var_weight)?.into_iter().map(f64::from);
    let bias = values(&var_bias)?.into_iter().map(f64::from).collect();
    Ok((DMatrix::from_row_iterator(classes, width, weight), bias))
}

/// Sums over standardised examples.
struct Moments {
    /// `x^T x`.
    products: DMatrix<f64>,
    /// Of each class, `[classes, width]`.
    sums: DMatrix<f64>,
    counts: Vec<f64>,
}

impl Moments {
    fn of(examples: &Examples, scale: &Scale, which: impl Fn(usize) -> bool) -> Moments {
        let width = examples.width;
        let mut moments = Moments {
            products: DMatrix::zeros(width, width),
            sums: DMatrix::zeros(examples.classes, width),
            counts: vec![0.0; examples.classes],
        };
        let rows: Vec<usize> = (0..examples.labels.len()).filter(|&i| which(i)).collect();
        for chunk in rows.chunks(CHUNK) {
            let row = |i: &usize| scale.apply(&examples.features[i * width..][..width]);
            // Columns are examples.
            let x = DMatrix::<f32>::from_iterator(width, chunk.len(), chunk.iter().flat_map(row));
            moments.products += (&x * x.transpose()).cast::<f64>();
            for (column, &i) in x.column_iter().zip(chunk) {
                let class = examples.labels[i] as usize;
                moments.counts[class] += 1.0;
                for (j, value) in column.iter().enumerate() {
                    moments.sums[(class, j)] += f64::from(*value);
                }
            }
        }
        moments
    }

    fn add(&mut self, other: &Moments) {
        self.products += &other.products;
        self.sums += &other.sums;
        self.counts
            .iter_mut()
            .zip(&other.counts)
            .for_each(|(a, b)| *a += b);
    }

    /// Weights and biases for standardised features, at temperature one. A class without an example is one of few at the mean.
    fn solve(&self, shrinkage: f64) -> Result<(DMatrix<f64>, Vec<f64>)> {
        let (classes, width) = self.sums.shape();
        let n: f64 = self.counts.iter().sum::<f64>().max(1.0);
        let means = DMatrix::from_fn(classes, width, |c, j| self.sums[(c, j)] / self.counts[c].max(1.0));
        let mut within = &self.products - self.sums.transpose() * &means;
        within *= (1.0 - shrinkage) / n;
        for i in 0..width {
            within[(i, i)] += shrinkage;
        }
        let factor = within
            .cholesky()
            .ok_or_else(|| Error::Settings("the features' covariance cannot be inverted".into()))?;
        let weight = factor.solve(&means.transpose()).transpose();
        let bias = (0..classes)
            .map(|c| ((self.counts[c] + 0.5) / n).ln() - 0.5 * weight.row(c).dot(&means.row(c)))
            .collect();
        Ok((weight, bias))
    }

    /// What is likeliest on the examples that are held out.
    fn choose(&self, examples: &Examples, scale: &Scale, held: &[bool]) -> Result<Choice> {
        let width = examples.width;
        let which: Vec<usize> = (0..held.len()).filter(|&i| held[i]).collect();
        let rows = which
            .iter()
            .flat_map(|i| scale.apply(&examples.features[i * width..][..width]));
        let x = DMatrix::from_iterator(width, which.len(), rows.map(f64::from));
        // With too few to tell, strongly shrunk.
        let mut best = (
            f64::INFINITY,
            Choice {
                shrinkage: 0.5,
                temperature: 1.0,
            },
        );
        for shrinkage in SHRINKAGES {
            let (weight, bias) = self.solve(shrinkage)?;
            let logits = &weight * &x;
            for temperature in TEMPERATURES {
                let loss = |(column, &i): (nalgebra::DVectorView<f64>, &usize)| {
                    let logit = |c: usize| (column[c] + bias[c]) / temperature;
                    let most = (0..bias.len()).map(logit).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = (0..bias.len()).map(|c| (logit(c) - most).exp()).sum();
                    most + sum.ln() - logit(examples.labels[i] as usize)
                };
                let loss: f64 = logits.column_iter().zip(&which).map(loss).sum();
                if !which.is_empty() && loss < best.0 {
                    best = (
                        loss,
                        Choice {
                            shrinkage,
                            temperature,
                        },
                    );
                }
            }
        }
        Ok(best.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    /// Features of two informative directions, correlated noise in all of them, and more features than examples a class.
    fn examples(count: usize, seed: u64) -> (Vec<f32>, Vec<u32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let noise = crate::variables::normal(&mut rng, count * 21, 1.0);
        let labels: Vec<u32> = (0..count as u32).map(|i| i % 3).collect();
        let features = noise.chunks(21).zip(&labels).flat_map(|(noise, &label)| {
            let angle = label as f32 * std::f32::consts::TAU / 3.0;
            (0..20).map(move |j| {
                let signal = [1.5 * angle.cos(), 1.5 * angle.sin()]
                    .get(j)
                    .copied()
                    .unwrap_or(0.0);
                // The common noise hides the signal from who looks at single features.
                5.0 + (j + 1) as f32 * (signal + noise[j] * 0.5 + 3.0 * noise[20])
            })
        });
        (features.collect(), labels)
    }

    fn fit_with(examples: &Examples, choice: Option<Choice>) -> Result<(Discriminant, Choice)> {
        Discriminant::fit(examples, choice, 1, &Workers::new(1).unwrap())
    }

    fn accuracy(fit: &Discriminant, features: &[f32], labels: &[u32]) -> f64 {
        let right = features.chunks(20).zip(labels).filter(|(row, label)| {
            let logit = |c: usize| {
                let dot: f64 = row
                    .iter()
                    .enumerate()
                    .map(|(j, x)| fit.weight[(c, j)] * f64::from(*x))
                    .sum();
                dot + fit.bias[c]
            };
            let best = (0..3).max_by(|&a, &b| logit(a).total_cmp(&logit(b)));
            best == Some(**label as usize)
        });
        right.count() as f64 / labels.len() as f64
    }

    #[test]
    fn noise_that_features_share_is_seen_through_with_few_examples() {
        let (features, labels) = examples(60, 1);
        let given = Examples {
            features: &features,
            width: 20,
            labels: &labels,
            classes: 3,
        };
        let (fit, choice) = fit_with(&given, None).unwrap();
        let (unseen, truth) = examples(600, 2);
        assert!(accuracy(&fit, &unseen, &truth) > 0.9, "{choice:?}");
        // Without a covariance it is not.
        let bare = Choice {
            shrinkage: 1.0,
            ..choice
        };
        let (bare, _) = fit_with(&given, Some(bare)).unwrap();
        assert!(accuracy(&bare, &unseen, &truth) < 0.85);
    }

    #[test]
    fn classes_without_examples_are_unlikely_and_what_is_not_finite_is_refused() {
        let (features, labels) = examples(60, 1);
        let given = Examples {
            features: &features,
            width: 20,
            labels: &labels,
            classes: 4,
        };
        let (fit, _) = fit_with(&given, None).unwrap();
        assert_eq!(fit.weight.shape(), (4, 20));
        assert!(fit.weight.iter().chain(&fit.bias).all(|w| w.is_finite()));
        assert!(accuracy(&fit, &features, &labels) > 0.9);
        let mut broken = features.clone();
        broken[7] = f32::NAN;
        let broken = Examples {
            features: &broken,
            ..given
        };
        assert!(fit_with(&broken, None).is_err());
        let none = Examples {
            features: &[],
            labels: &[],
            ..given
        };
        assert!(fit_with(&none, None).is_err());
        // A single example of each class: nothing can be held out.
        let few = Examples {
            features: &features[..60],
            labels: &labels[..3],
            ..given
        };
        assert!(fit_with(&few, None).is_ok());
    }
}
