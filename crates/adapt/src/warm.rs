//! Where training starts: at a discriminant analysis of what the model reads.
//!
//! The head's features are at first those of the backbone, so a head is fitted to them in closed form ([`crate::discriminant`]).
//! An adapter whose attention starts as a plain mean of the tokens adds a linear function of the class token's row and of
//! that mean: the one that a discriminant analysis of both finds, as far as the adapter's rank holds it. One adapter after the other,
//! the first first, each with those before it in place; the head last. Training then improves on a linear classifier of all
//! that the adapters see, instead of spending its epochs, and its few pictures, on getting there.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};
use nalgebra::{DMatrix, SymmetricEigen};
use veiltune_engine::{Params, Plain};
use veiltune_nn::attention::AttentionSpec;
use veiltune_nn::layers::BATCH_NORM_EPS;
use veiltune_nn::owc::{Branch, NormChoice, Owc, OwcConfig};
use veiltune_nn::{Method, Private, Read};

use crate::discriminant::{Discriminant, Examples};
use crate::train::Pictures;
use crate::workers::Workers;
use crate::{Error, Result};

/// Pictures of one pass.
const PASS: usize = 100;
/// Penalty of the equations for an adapter's weights, as a share of their mean eigenvalue.
const RIDGE: f64 = 1e-3;

/// The parameters of every method's last layer.
pub const HEAD: [&str; 2] = ["head.weight", "head.bias"];

/// Parameters by name.
pub type Values = BTreeMap<String, Tensor>;

/// Where the untrained model and the pictures are.
pub struct Ground<'a, F> {
    /// A parameter as it is before training, running averages too.
    pub initial: F,
    pub pictures: Pictures<'a>,
    pub reads: &'a [Read],
    pub workers: &'a Workers,
    pub seed: u64,
}

impl<F: Fn(&str, &[usize]) -> veiltune_engine::Result<Tensor> + Sync> Ground<'_, F> {
    /// Of each pass over some of the pictures.
    fn each<R: Send>(&self, pass: impl Fn(&Plain, &[Tensor]) -> Result<R> + Sync) -> Result<Vec<R>> {
        let passes: Vec<&[usize]> = self.pictures.which.chunks(PASS).collect();
        let one = |which: &&[usize]| pass(&Plain::new(), &self.pictures.states.batch(0, which, self.reads)?);
        self.workers.map(&passes, one).into_iter().collect()
    }

    fn labels(&self) -> Vec<u32> {
        let all = self.pictures.states.labels();
        self.pictures.which.iter().map(|&i| all[i]).collect()
    }

    /// What the head of `method` is given, row after row, and its width.
    fn features(&self, method: &Method) -> Result<(Vec<f32>, usize)> {
        // A head that hands on what it is given.
        let width = method.hidden_size();
        let bare = method.with_labels((0..width).map(|i| i.to_string()).collect());
        let load = |name: &str, dims: &[usize]| -> veiltune_engine::Result<Tensor> {
            match name {
                "head.weight" => Ok(Tensor::eye(width, DType::F32, &Device::Cpu)?),
                "head.bias" => Ok(Tensor::zeros(width, DType::F32, &Device::Cpu)?),
                _ => Ok((self.initial)(name, dims)?.detach()),
            }
        };
        let rows = self.each(|b, inputs| {
            let params = Params::new(load);
            let model: Private<Plain> = bare.load(&params, &params)?;
            Ok(values(&model.forward(b, inputs)?)?)
        })?;
        Ok((rows.concat(), width))
    }

    /// The head of `method`, and its norm's averages if it is a batch norm.
    pub fn head(&self, method: &Method) -> Result<Values> {
        let (mut features, width) = self.features(method)?;
        let labels = self.labels();
        let mut found = Values::new();
        if let Method::Owc(OwcConfig {
            norm: NormChoice::Batch,
            ..
        }) = method
        {
            // Its averages were 0 and 1 so far.
            let n = labels.len() as f64;
            let unit = (1.0 + BATCH_NORM_EPS).sqrt();
            let column = |j: usize| {
                features
                    .iter()
                    .skip(j)
                    .step_by(width)
                    .map(|v| unit * f64::from(*v))
            };
            let mean: Vec<f64> = (0..width).map(|j| column(j).sum::<f64>() / n).collect();
            let variance: Vec<f64> = (0..width)
                .map(|j| column(j).map(|v| (v - mean[j]).powi(2)).sum::<f64>() / n)
                .collect();
            for row in features.chunks_exact_mut(width) {
                for (j, v) in row.iter_mut().enumerate() {
                    let centred = unit * f64::from(*v) - mean[j];
                    *v = (centred / (variance[j] + BATCH_NORM_EPS).sqrt()) as f32;
                }
            }
            found.insert("norm.running_mean".into(), vector(mean)?);
            found.insert("norm.running_var".into(), vector(variance)?);
        }
        let examples = Examples {
            features: &features,
            width,
            labels: &labels,
            classes: method.labels().len(),
        };
        let (fit, _) = Discriminant::fit(&examples, None, self.seed, self.workers)?;
        found.insert(HEAD[0].into(), matrix(&fit.weight)?);
        found.insert(HEAD[1].into(), vector(fit.bias)?);
        Ok(found)
    }

    /// Adapter `index`, given those before it; nothing for one whose attention is no mean of the tokens.
    pub fn adapter(&self, c: &OwcConfig, index: usize) -> Result<Values> {
        let (d, r) = (c.hidden_size, c.rank);
        let is_mean = c.branch == Branch::Transformer && c.attention_of(index) == AttentionSpec::LinAtten;
        if !is_mean || r > d {
            return Ok(Values::new());
        }
        let (labels, classes) = (self.labels(), c.labels.len());
        let fit = |features: &[f32], width, choice| {
            let examples = Examples {
                features,
                width,
                labels: &labels,
                classes,
            };
            Discriminant::fit(&examples, choice, self.seed, self.workers)
        };
        // What the head's norm does to a picture's entry, as far as it is known: LayerNorm divides.
        let divisor = |class: &Tensor| -> candle_core::Result<Tensor> {
            match c.norm {
                NormChoice::Layer => class.var_keepdim(D::Minus1)?.affine(1.0, 1e-6)?.sqrt(),
                NormChoice::Batch => Tensor::ones((class.dim(0)?, 1), DType::F32, &Device::Cpu),
            }
        };
        let at = format!("adapters.{index}");

        // Which directions of the input matter to a classifier of the head's features, the class token's row and the mean?
        let parts = self.each(|b, inputs| {
            let params = Params::new(|name: &str, dims: &[usize]| Ok((self.initial)(name, dims)?.detach()));
            let parts = Owc::<Plain>::load(&params, c)?.parts(b, inputs, index)?;
            let (class, row) = (parts.class.squeeze(1)?, parts.input.narrow(1, 0, 1)?.squeeze(1)?);
            let by = divisor(&class)?;
            let all = Tensor::cat(&[&class, &row, &parts.input.mean(1)?], 1)?;
            Ok((values(&all.broadcast_div(&by)?)?, values(&all)?))
        })?;
        let (features, raw): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let (fitted, choice) = fit(&features.concat(), 3 * d, None)?;
        let down = directions(&fitted.weight, &raw.concat(), d, r)?;

        // And which function of them, as they come out of the norm?
        let (down_weight, down_bias) = (matrix(&down.0)?, vector(down.1)?);
        let load = |name: &str, dims: &[usize]| -> veiltune_engine::Result<Tensor> {
            match name.strip_prefix(&at) {
                Some(".down.weight") => Ok(down_weight.clone()),
                Some(".down.bias") => Ok(down_bias.clone()),
                _ => Ok((self.initial)(name, dims)?.detach()),
            }
        };
        let parts = self.each(|b, inputs| {
            let params = Params::new(load);
            let parts = Owc::<Plain>::load(&params, c)?.parts(b, inputs, index)?;
            let class = parts.class.squeeze(1)?;
            let row = parts.down.narrow(1, 0, 1)?.squeeze(1)?;
            let all = Tensor::cat(&[&class, &row, &parts.normal.mean(1)?], 1)?;
            let all = all.broadcast_div(&divisor(&class)?)?;
            let tokens = parts.down.flatten(0, 1)?;
            let moments = [tokens.mean(0)?, tokens.sqr()?.mean(0)?];
            let moments = [values(&moments[0])?, values(&moments[1])?];
            Ok((values(&all)?, values(&class)?, moments, inputs[0].dim(0)? as f64))
        })?;
        let n = labels.len() as f64;
        let average = |which: usize, j: usize| -> f64 {
            parts
                .iter()
                .map(|(_, _, m, count)| count / n * f64::from(m[which][j]))
                .sum()
        };
        let mean: Vec<f64> = (0..r).map(|j| average(0, j)).collect();
        let variance: Vec<f64> = (0..r)
            .map(|j| (average(1, j) - mean[j].powi(2)).max(0.0))
            .collect();
        let features: Vec<f32> = parts.iter().flat_map(|(all, ..)| all).copied().collect();
        let classes_rows: Vec<f32> = parts.iter().flat_map(|(_, class, ..)| class).copied().collect();
        let (fitted, _) = fit(&features, d + 2 * r, Some(choice))?;
        let of_class = fitted.weight.columns(0, d).into_owned();
        let of_row = fitted.weight.columns(d, r).into_owned();
        let mut of_mean = fitted.weight.columns(d + r, r).into_owned();
        if c.norm == NormChoice::Batch {
            // The norm used averages of 0 and 1, and will use those of the tokens.
            for (j, mut column) in of_mean.column_iter_mut().enumerate() {
                column *= ((variance[j] + BATCH_NORM_EPS) / (1.0 + BATCH_NORM_EPS)).sqrt();
            }
        }
        // head (scale up) = of_row, and up project = of_mean, with the head that goes with them.
        let deviation = deviations(&classes_rows, d);
        let scaled = DMatrix::from_fn(classes, d, |i, j| of_class[(i, j)] * deviation[j]);
        let mut up = scaled.transpose() * ridge(&scaled * scaled.transpose())?.solve(&of_row);
        for (j, mut row) in up.row_iter_mut().enumerate() {
            row *= deviation[j] / c.scale;
        }
        let project = ridge(of_row.transpose() * &of_row)?.solve(&(of_row.transpose() * &of_mean));

        let block = format!("{at}.block");
        let qkv = (self.initial)(&format!("{block}.attn.qkv.weight"), &[3 * r, r])?.detach();
        let values = Tensor::eye(r, DType::F32, &Device::Cpu)?;
        let mut found = Values::from([
            (format!("{at}.down.weight"), down_weight),
            (format!("{at}.down.bias"), down_bias),
            (format!("{at}.up.weight"), matrix(&up)?),
            (
                format!("{block}.attn.qkv.weight"),
                Tensor::cat(&[qkv.narrow(0, 0, 2 * r)?, values], 0)?,
            ),
            (
                format!("{block}.attn.mix.weight"),
                Tensor::zeros((c.tokens, c.tokens), DType::F32, &Device::Cpu)?,
            ),
            (format!("{block}.attn.proj.weight"), matrix(&project)?),
            (
                format!("{block}.fc2.weight"),
                Tensor::zeros((r, r), DType::F32, &Device::Cpu)?,
            ),
        ]);
        if c.norm == NormChoice::Batch {
            found.insert(format!("{block}.norm1.running_mean"), vector(mean)?);
            found.insert(format!("{block}.norm1.running_var"), vector(variance)?);
        }
        Ok(found)
    }
}

/// The `rank` directions of an adapter's input that `weight [classes, 3 d]` uses most, of the rows of which `raw` has `[class, row,
/// mean]`: a map of it to coordinates of deviation one, `[rank, d]`, and what centres them.
fn directions(weight: &DMatrix<f64>, raw: &[f32], d: usize, rank: usize) -> Result<(DMatrix<f64>, Vec<f64>)> {
    let part = |i: usize| -> Vec<f32> {
        raw.chunks_exact(3 * d)
            .flat_map(|row| &row[i * d..][..d])
            .copied()
            .collect()
    };
    // Both inputs are weighed by what they vary.
    let (mut metric, mut used) = (DMatrix::zeros(d, d), DMatrix::zeros(d, d));
    let (mut rows, mut centre) = (DMatrix::zeros(d, d), Vec::new());
    for i in [1, 2] {
        let (covariance, mean) = covariance(&part(i), d);
        let trace = covariance.trace().max(1e-12);
        let own = weight.columns(i * d, d);
        used += own.transpose() * own * trace;
        metric += &covariance / trace;
        (rows, centre) = match i {
            1 => (covariance, mean),
            _ => (rows, mean),
        };
    }
    let eigen = SymmetricEigen::new(metric);
    let roots = eigen.eigenvalues.map(|v| v.max(1e-9).sqrt());
    let turned = |power: i32| {
        &eigen.eigenvectors
            * DMatrix::from_diagonal(&roots.map(|v| v.powi(power)))
            * eigen.eigenvectors.transpose()
    };
    let root = turned(1);
    let inner = &root * used * &root;
    let inner = SymmetricEigen::new((&inner + inner.transpose()) * 0.5);
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&a, &b| inner.eigenvalues[b].total_cmp(&inner.eigenvalues[a]));
    let chosen = DMatrix::from_fn(rank, d, |i, j| inner.eigenvectors[(j, order[i])]);
    let mut map = chosen * turned(-1);
    let spread = &map * rows * map.transpose();
    for (i, mut row) in map.row_iter_mut().enumerate() {
        row /= spread[(i, i)].max(1e-12).sqrt();
    }
    let bias = (0..rank).map(|i| -(0..d).map(|j| map[(i, j)] * centre[j]).sum::<f64>());
    let bias = bias.collect();
    match map.iter().all(|v| v.is_finite()) {
        true => Ok((map, bias)),
        false => Err(Error::Settings("an adapter's input does not vary".into())),
    }
}

/// Of rows of `width` entries; and their mean.
fn covariance(rows: &[f32], width: usize) -> (DMatrix<f64>, Vec<f64>) {
    let n = (rows.len() / width) as f64;
    let mut mean = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut()
            .zip(row)
            .for_each(|(m, x)| *m += f64::from(*x) / n);
    }
    let mut sum = DMatrix::zeros(width, width);
    for chunk in rows.chunks(1000 * width) {
        let centred = chunk
            .iter()
            .enumerate()
            .map(|(i, x)| (f64::from(*x) - mean[i % width]) as f32);
        let x = DMatrix::<f32>::from_iterator(width, chunk.len() / width, centred);
        sum += (&x * x.transpose()).cast::<f64>();
    }
    (sum / n, mean)
}

fn deviations(rows: &[f32], width: usize) -> Vec<f64> {
    let (covariance, _) = covariance(rows, width);
    covariance.diagonal().iter().map(|v| v.sqrt().max(1e-6)).collect()
}

/// `a` with a penalty, factored.
fn ridge(mut a: DMatrix<f64>) -> Result<nalgebra::Cholesky<f64, nalgebra::Dyn>> {
    let penalty = (RIDGE * a.trace() / a.nrows() as f64).max(1e-12);
    for i in 0..a.nrows() {
        a[(i, i)] += penalty;
    }
    a.cholesky()
        .ok_or_else(|| Error::Settings("the pictures determine no adapter to start from".into()))
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

fn matrix(a: &DMatrix<f64>) -> candle_core::Result<Tensor> {
    let rows: Vec<f32> = a.transpose().iter().map(|v| *v as f32).collect();
    Tensor::from_vec(rows, a.shape(), &Device::Cpu)
}

fn vector(values: Vec<f64>) -> candle_core::Result<Tensor> {
    let count = values.len();
    Tensor::from_vec(
        values.into_iter().map(|v| v as f32).collect::<Vec<_>>(),
        count,
        &Device::Cpu,
    )
}
