//! Linear discriminant analysis with a shrunk covariance (Friedman, Regularized discriminant analysis, JASA 1989): a linear
//! classifier in closed form.
//!
//! With standardised features x, class means m_c and the covariance S within classes, a class is as likely as
//! `exp((x - m_c / 2)^T ((1 - a) S + a I)^-1 m_c / t)`. A few epochs of descent on the cross-entropy may follow, with features left
//! out at random. The shrinkage a, the temperature t, and whether and with how many features left out it descends, are those of
//! which a fifth of each class is the likeliest after a fit to the others.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use candle_core::{Device, Tensor};
use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::optim::{Optimizer, Rule, cosine};
use crate::workers::{Seen, Workers};
use crate::{Error, Result, Variables};

/// Shrinkages to choose from.
const SHRINKAGES: [f64; 8] = [0.01, 0.03, 0.06, 0.12, 0.2, 0.3, 0.5, 0.7];
/// Temperatures to choose from.
const TEMPERATURES: [f64; 8] = [1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0];
/// Probabilities to choose from with which the descent leaves a feature out of a step.
const DROPOUTS: [f64; 3] = [0.0, 0.25, 0.5];
/// One example of each class in so many is held out for the choice.
const FOLDS: usize = 5;
/// Penalty of an imitation's weights, as a share of a standardised feature's variance.
const RIDGE: f64 = 1e-4;
/// Columns of one product.
const COLUMNS: usize = 256;
/// Epochs of descent.
const EPOCHS: usize = 15;
/// Examples of one step.
const BATCH: usize = 256;
/// Peak learning rate of AdamW on standardised features, as a share of the weights' root mean square: where few examples make the
/// analysis shrink much, its weights are small, and so are the steps.
const RATE: f64 = 0.01;

/// Features `[views * examples, width]`, row after row, all examples in one view after the other, and the examples' labels.
#[derive(Clone, Copy)]
pub struct Examples<'a> {
    pub features: &'a [f32],
    pub width: usize,
    pub labels: &'a [u32],
    pub classes: usize,
}

/// What a fit is done with.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    pub workers: &'a Workers,
    /// Of the descent's order, and of what it leaves out.
    pub seed: u64,
    /// Ends it with [`Error::Interrupted`].
    pub interrupted: &'a AtomicBool,
    pub seen: &'a Seen<'a>,
}

/// What is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    shrinkage: f64,
    temperature: f64,
    /// None: no descent.
    dropout: Option<f64>,
}

/// Logits `weight x + bias` of the features as they are.
pub struct Discriminant {
    /// `[classes, width]`.
    pub weight: Mat<f64>,
    pub bias: Vec<f64>,
    /// Logits of the mean of the examples.
    pub mean: Vec<f64>,
}

impl Discriminant {
    /// Fits to `examples`, with a choice if there is one already.
    ///
    /// # Errors
    /// If there is no example, or a feature is not finite.
    pub fn fit(examples: &Examples, choice: Option<Choice>, means: Means) -> Result<(Discriminant, Choice)> {
        let (n, width) = (examples.labels.len(), examples.width);
        let views = examples.features.len() / (n * width).max(1);
        if n == 0 || width == 0 || examples.features.iter().any(|x| !x.is_finite()) {
            return Err(Error::Settings(
                "a linear classifier needs examples with finite features; a state of the backbone has others"
                    .into(),
            ));
        }
        let scale = Scale::of(examples.features, width);
        // Of each class, the last of every FOLDS examples is held out; those come last here.
        let mut seen = vec![0_usize; examples.classes];
        let (held, mut order): (Vec<usize>, Vec<usize>) = (0..n).partition(|&i| {
            let count = &mut seen[examples.labels[i] as usize];
            *count += 1;
            count.is_multiple_of(FOLDS)
        });
        // In all views, those that are held out in the first one first: it is as in testing.
        let all_views = |which: &[usize]| {
            let rows = (0..views).flat_map(|view| which.iter().map(move |i| view * n + i));
            rows.collect::<Vec<_>>()
        };
        let (fitted, judged) = (views * order.len(), held.len());
        order = [all_views(&order), all_views(&held)].concat();
        let rows = order
            .iter()
            .flat_map(|row| scale.apply(&examples.features[row * width..][..width]));
        let standard: Vec<f32> = rows.collect();
        let labels: Vec<u32> = order.iter().map(|row| examples.labels[row % n]).collect();
        let all = Standardised {
            features: &standard,
            labels: &labels,
            width,
            classes: examples.classes,
        };
        let (fitted, held) = all.split(fitted);
        let mut moments = fitted.moments(means.workers);
        let choice = match choice {
            Some(choice) => choice,
            None => choose(&fitted, &held.split(judged).0, &moments, means)?,
        };
        moments.add(&held.moments(means.workers));
        let found = moments.solve(choice.shrinkage)?.cooled(choice.temperature);
        let found = match choice.dropout {
            Some(dropout) => {
                let what = (means.seen, "fitting a classifier");
                let own = (means.seed, means.interrupted);
                let fits = means
                    .workers
                    .shown(what, &[dropout], |dropout| found.descend(&all, *dropout, own));
                fits.into_iter().collect::<Result<Vec<_>>>()?.remove(0)
            }
            None => found,
        };
        Ok((scale.undone(found), choice))
    }

    /// Of other features `[examples, width]`, what comes closest to `logits [classes, examples]`, by least squares; and the share
    /// of the logits' variance that it meets.
    ///
    /// # Errors
    /// If a feature is not finite.
    pub fn imitating(
        logits: &Mat<f32>,
        features: &[f32],
        width: usize,
        workers: &Workers,
    ) -> Result<(Discriminant, f64)> {
        let scale = Scale::of(features, width);
        let standard: Vec<f32> = features
            .chunks_exact(width)
            .flat_map(|row| scale.apply(row))
            .collect();
        let (classes, n) = logits.shape();
        let rows = MatRef::from_row_major_slice(&standard, n, width);
        let mean = |c: usize| logits.row(c).iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        let bias: Vec<f64> = (0..classes).map(mean).collect();
        let wanted = Mat::from_fn(classes, n, |c, i| logits[(c, i)] - bias[c] as f32);
        let variance = f64::from(wanted.norm_l2()).powi(2);
        let wanted = wanted * rows;
        let wanted = Mat::from_fn(classes, width, |c, j| f64::from(wanted[(c, j)]));
        let mut products = products(rows, workers);
        for j in 0..width {
            products[(j, j)] += RIDGE * n as f64;
        }
        let factor = products.llt(Side::Lower).map_err(|_| not_inverted())?;
        let weight = factor.solve(wanted.transpose()).transpose().to_owned();
        let met: f64 = (0..classes)
            .map(|c| weight.row(c) * wanted.row(c).transpose())
            .sum();
        Ok((scale.undone(Classifier { weight, bias }), met / variance))
    }

    /// Of `features [examples, width]`: `[classes, examples]`.
    pub fn logits(&self, features: &[f32]) -> Mat<f32> {
        let width = self.weight.ncols();
        let rows = MatRef::from_row_major_slice(features, features.len() / width, width);
        logits(&self.weight, &self.bias, rows)
    }
}

/// What features are standardised with.
struct Scale {
    mean: Vec<f64>,
    deviation: Vec<f64>,
}

impl Scale {
    fn of(features: &[f32], width: usize) -> Scale {
        let n = (features.len() / width) as f64;
        let (mut mean, mut deviation) = (vec![0.0; width], vec![0.0; width]);
        for row in features.chunks_exact(width) {
            mean.iter_mut()
                .zip(row)
                .for_each(|(m, x)| *m += f64::from(*x) / n);
        }
        for row in features.chunks_exact(width) {
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

    /// From standardised features, whose mean is zero, to those that are given.
    fn undone(&self, found: Classifier) -> Discriminant {
        let (classes, width) = found.weight.shape();
        let weight = Mat::from_fn(classes, width, |c, j| found.weight[(c, j)] / self.deviation[j]);
        let shift = |c: usize| (0..width).map(|j| weight[(c, j)] * self.mean[j]).sum::<f64>();
        let bias = found.bias.iter().enumerate().map(|(c, b)| b - shift(c)).collect();
        Discriminant {
            weight,
            bias,
            mean: found.bias,
        }
    }
}

/// Examples whose features are standardised.
#[derive(Clone, Copy)]
struct Standardised<'a> {
    features: &'a [f32],
    labels: &'a [u32],
    width: usize,
    classes: usize,
}

impl Standardised<'_> {
    /// The first `count`, and the others.
    fn split(&self, count: usize) -> (Standardised<'_>, Standardised<'_>) {
        let (features, other_features) = self.features.split_at(count * self.width);
        let (labels, other_labels) = self.labels.split_at(count);
        (
            Standardised {
                features,
                labels,
                ..*self
            },
            Standardised {
                features: other_features,
                labels: other_labels,
                ..*self
            },
        )
    }

    fn rows(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(self.features, self.labels.len(), self.width)
    }

    fn moments(&self, workers: &Workers) -> Moments {
        let width = self.width;
        let mut sums = Mat::zeros(self.classes, width);
        let mut counts = vec![0.0; self.classes];
        for (row, &label) in self.features.chunks_exact(width).zip(self.labels) {
            counts[label as usize] += 1.0;
            for (j, value) in row.iter().enumerate() {
                sums[(label as usize, j)] += f64::from(*value);
            }
        }
        Moments {
            products: products(self.rows(), workers),
            sums,
            counts,
        }
    }
}

/// `x^T x` of `x [examples, width]`, of which the lower half counts.
fn products(x: MatRef<f32>, workers: &Workers) -> Mat<f64> {
    let width = x.ncols();
    // A block of columns after the other.
    let blocks: Vec<usize> = (0..width).step_by(COLUMNS).collect();
    let product = |&from: &usize| {
        let columns = x.subcols(from, COLUMNS.min(width - from));
        x.subcols(from, width - from).transpose() * columns
    };
    let mut all = Mat::zeros(width, width);
    for (from, block) in blocks.iter().zip(workers.map(&blocks, product)) {
        for j in 0..block.ncols() {
            for i in j..block.nrows() {
                all[(from + i, from + j)] = f64::from(block[(i, j)]);
            }
        }
    }
    all
}

/// Sums over standardised examples.
struct Moments {
    /// `x^T x`, of which the lower half counts.
    products: Mat<f64>,
    /// Of each class, `[classes, width]`.
    sums: Mat<f64>,
    counts: Vec<f64>,
}

impl Moments {
    fn add(&mut self, other: &Moments) {
        self.products += &other.products;
        self.sums += &other.sums;
        self.counts
            .iter_mut()
            .zip(&other.counts)
            .for_each(|(a, b)| *a += b);
    }

    /// At temperature one. A class without an example is one of few at the mean.
    fn solve(&self, shrinkage: f64) -> Result<Classifier> {
        let (classes, width) = self.sums.shape();
        let n: f64 = self.counts.iter().sum::<f64>().max(1.0);
        let means = Mat::from_fn(classes, width, |c, j| self.sums[(c, j)] / self.counts[c].max(1.0));
        let mut within = &self.products - self.sums.transpose() * &means;
        within *= faer::Scale((1.0 - shrinkage) / n);
        for i in 0..width {
            within[(i, i)] += shrinkage;
        }
        let factor = within.llt(Side::Lower).map_err(|_| not_inverted())?;
        let weight = factor.solve(means.transpose()).transpose().to_owned();
        let bias = (0..classes)
            .map(|c| ((self.counts[c] + 0.5) / n).ln() - 0.5 * (weight.row(c) * means.row(c).transpose()))
            .collect();
        Ok(Classifier { weight, bias })
    }
}

fn not_inverted() -> Error {
    Error::Settings("the features' covariance cannot be inverted".into())
}

/// `[classes, examples]` of `rows [examples, width]`.
fn logits(weight: &Mat<f64>, bias: &[f64], rows: MatRef<f32>) -> Mat<f32> {
    let weight = Mat::from_fn(weight.nrows(), weight.ncols(), |c, j| weight[(c, j)] as f32);
    let mut logits = weight * rows.transpose();
    for column in logits.col_iter_mut() {
        column.iter_mut().zip(bias).for_each(|(v, b)| *v += *b as f32);
    }
    logits
}

/// Weights `[classes, width]` and biases for standardised features.
struct Classifier {
    weight: Mat<f64>,
    bias: Vec<f64>,
}

impl Classifier {
    fn cooled(self, temperature: f64) -> Classifier {
        Classifier {
            weight: self.weight * faer::Scale(1.0 / temperature),
            bias: self.bias.iter().map(|b| b / temperature).collect(),
        }
    }

    /// Descends on the cross-entropy of `examples`, in an order of that seed.
    fn descend(
        &self,
        examples: &Standardised,
        dropout: f64,
        (seed, interrupted): (u64, &AtomicBool),
    ) -> Result<Classifier> {
        let (width, classes) = (examples.width, examples.classes);
        let shapes = [
            ("bias".to_owned(), vec![classes]),
            ("weight".to_owned(), vec![classes, width]),
        ];
        let vars = Variables::new(&shapes, |name, _| match name {
            "bias" => self.bias.iter().map(|v| *v as f32).collect(),
            _ => {
                let rows = (0..classes).flat_map(|c| (0..width).map(move |j| (c, j)));
                rows.map(|at| self.weight[at] as f32).collect()
            }
        })?;
        let (bias, weight) = (vars.vars()[0].clone(), vars.vars()[1].clone());
        let peak = (RATE * self.weight.norm_l2() / ((width * classes) as f64).sqrt()) as f32;
        let mut optimizer = Optimizer::new(Rule::ADAMW, 0.0, f32::INFINITY, &vars);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..examples.labels.len()).collect();
        let steps = order.len().div_ceil(BATCH) * EPOCHS;
        let kept = (1.0 / (1.0 - dropout)) as f32;
        let mut step = 0;
        for _ in 0..EPOCHS {
            if interrupted.load(Relaxed) {
                return Err(Error::Interrupted);
            }
            order.shuffle(&mut rng);
            for batch in order.chunks(BATCH) {
                let rows = batch
                    .iter()
                    .flat_map(|i| &examples.features[i * width..][..width]);
                let x: Vec<f32> = match dropout > 0.0 {
                    true => rows
                        .map(|v| if rng.random_bool(dropout) { 0.0 } else { kept * v })
                        .collect(),
                    false => rows.copied().collect(),
                };
                let x = Tensor::from_vec(x, (batch.len(), width), &Device::Cpu)?;
                let logits = x.matmul(&weight.t()?)?.broadcast_add(&bias)?;
                // The cross-entropy's gradient: probabilities less the truth.
                let mut error = logits
                    .broadcast_sub(&logits.log_sum_exp(1)?.unsqueeze(1)?)?
                    .exp()?
                    .flatten_all()?
                    .to_vec1::<f32>()?;
                for (row, &i) in error.chunks_exact_mut(classes).zip(batch) {
                    row[examples.labels[i] as usize] -= 1.0;
                    row.iter_mut().for_each(|v| *v /= batch.len() as f32);
                }
                let error = Tensor::from_vec(error, (batch.len(), classes), &Device::Cpu)?;
                let gradients = [
                    error.sum(0)?.to_vec1()?,
                    error.t()?.matmul(&x)?.flatten_all()?.to_vec1()?,
                ];
                optimizer.step(&vars, &gradients, cosine(peak, step, steps, steps / 50))?;
                step += 1;
            }
        }
        let values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
        let bias: Vec<f32> = bias.to_vec1()?;
        if let Some(value) = values.iter().chain(&bias).find(|v| !v.is_finite()) {
            return Err(Error::Diverged(*value));
        }
        Ok(Classifier {
            weight: Mat::from_fn(classes, width, |c, j| f64::from(values[c * width + j])),
            bias: bias.into_iter().map(f64::from).collect(),
        })
    }
}

/// Sum of the cross-entropies of logits `[classes, examples]` at a temperature.
fn cross_entropies(logits: &Mat<f32>, labels: &[u32], temperature: f64) -> f64 {
    let by = 1.0 / temperature;
    let loss = |(i, &label): (usize, &u32)| {
        let scaled = |v: &f32| f64::from(*v) * by;
        let most = logits.col(i).iter().map(scaled).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.col(i).iter().map(|v| (scaled(v) - most).exp()).sum();
        most + sum.ln() - scaled(&logits[(label as usize, i)])
    };
    labels.iter().enumerate().map(loss).sum()
}

/// With what, fitted to some examples, those that are held out are likeliest.
fn choose(fitted: &Standardised, held: &Standardised, moments: &Moments, means: Means) -> Result<Choice> {
    // With too few to tell, strongly shrunk.
    let few = Choice {
        shrinkage: 0.5,
        temperature: 1.0,
        dropout: None,
    };
    if held.labels.is_empty() {
        return Ok(few);
    }
    let (seed, interrupted) = (means.seed, means.interrupted);
    let what = (means.seen, "choosing how a classifier is fitted");
    let analyses = means.workers.shown(what, &SHRINKAGES, |&shrinkage| {
        if interrupted.load(Relaxed) {
            return Err(Error::Interrupted);
        }
        let found = moments.solve(shrinkage)?;
        let logits = logits(&found.weight, &found.bias, held.rows());
        let at = |&temperature: &f64| {
            let loss = cross_entropies(&logits, held.labels, temperature);
            let choice = Choice {
                shrinkage,
                temperature,
                dropout: None,
            };
            (loss, choice)
        };
        Ok(TEMPERATURES.iter().map(at).collect::<Vec<_>>())
    });
    let likelier = |a: &(f64, Choice), b: &(f64, Choice)| a.0.total_cmp(&b.0);
    let analyses = analyses.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let (loss, choice) = analyses
        .into_iter()
        .min_by(likelier)
        .unwrap_or((f64::INFINITY, few));
    let start = moments.solve(choice.shrinkage)?.cooled(choice.temperature);
    let descents = means.workers.shown(what, &DROPOUTS, |&dropout| {
        let found = start.descend(fitted, dropout, (seed, interrupted))?;
        let logits = logits(&found.weight, &found.bias, held.rows());
        let dropout = Some(dropout);
        Ok((
            cross_entropies(&logits, held.labels, 1.0),
            Choice { dropout, ..choice },
        ))
    });
    let descents = descents.into_iter().collect::<Result<Vec<_>>>()?;
    let best = descents.into_iter().fold((loss, choice), |best, other| {
        std::cmp::min_by(best, other, likelier)
    });
    Ok(best.1)
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

    fn given<'a>(features: &'a [f32], labels: &'a [u32]) -> Examples<'a> {
        Examples {
            features,
            width: 20,
            labels,
            classes: 3,
        }
    }

    fn fit_with(examples: &Examples, choice: Option<Choice>) -> Result<(Discriminant, Choice)> {
        let means = Means {
            workers: &Workers::new(2).unwrap(),
            seed: 1,
            interrupted: &AtomicBool::new(false),
            seen: &|_, _, _| (),
        };
        Discriminant::fit(examples, choice, means)
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
        let given = given(&features, &labels);
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
    fn a_second_view_that_is_the_first_changes_nothing() {
        let (features, _) = examples(24, 1);
        // Nothing can be learnt of these. Were an example held out in one view alone, what is learnt by heart would look right.
        let labels: Vec<u32> = (0..24).map(|i| i / 3 % 3).collect();
        let (_, choice) = fit_with(&given(&features, &labels), None).unwrap();
        let twice = [&features[..], &features].concat();
        let (_, chosen) = fit_with(&given(&twice, &labels), None).unwrap();
        assert_eq!(
            (choice.shrinkage, choice.temperature),
            (chosen.shrinkage, chosen.temperature)
        );
        let bare = Choice {
            dropout: None,
            ..choice
        };
        let [one, two] = [&features, &twice].map(|f| fit_with(&given(f, &labels), Some(bare)).unwrap().0);
        let difference = (&one.weight - &two.weight).norm_max();
        assert!(difference < 1e-4 * one.weight.norm_max(), "{difference}");
    }

    #[test]
    fn an_imitation_says_the_same_of_other_features() {
        let (features, labels) = examples(60, 1);
        let given = given(&features, &labels);
        let (fit, _) = fit_with(&given, None).unwrap();
        let logits = fit.logits(&features);
        let workers = Workers::new(2).unwrap();
        // Sums of neighbours, of another size, and one that says nothing.
        let other = |features: &[f32]| -> Vec<f32> {
            let row = |row: &[f32]| {
                let sums: Vec<f32> = (0..20)
                    .map(|j| 0.1 * (row[j] + 0.5 * row[(j + 1) % 20]))
                    .collect();
                sums.into_iter().chain([7.0])
            };
            features.chunks(20).flat_map(row).collect()
        };
        let (found, met) = Discriminant::imitating(&logits, &other(&features), 21, &workers).unwrap();
        assert!(met > 0.99 && met <= 1.0, "{met}");
        let (unseen, _) = examples(600, 2);
        let (wanted, got) = (fit.logits(&unseen), found.logits(&other(&unseen)));
        let difference = (&wanted - &got).norm_l2();
        assert!(difference < 0.05 * wanted.norm_l2(), "{difference}");
        // Two features of twenty say less.
        let two: Vec<f32> = features.chunks(20).flat_map(|row| [row[0], row[1]]).collect();
        let (_, met) = Discriminant::imitating(&logits, &two, 2, &workers).unwrap();
        assert!((0.0..0.9).contains(&met), "{met}");
        let mut broken = other(&features);
        broken[7] = f32::NAN;
        assert!(Discriminant::imitating(&logits, &broken, 21, &workers).is_err());
    }

    #[test]
    fn classes_without_examples_are_unlikely_and_what_is_not_finite_is_refused() {
        let (features, labels) = examples(60, 1);
        let given = Examples {
            classes: 4,
            ..given(&features, &labels)
        };
        let (fit, _) = fit_with(&given, None).unwrap();
        assert_eq!(fit.weight.shape(), (4, 20));
        assert!(
            fit.weight
                .col_iter()
                .flat_map(|c| c.iter())
                .chain(&fit.bias)
                .all(|w| w.is_finite())
        );
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
