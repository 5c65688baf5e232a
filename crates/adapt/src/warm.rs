//! Where training starts: at a discriminant analysis of what the model reads.
//!
//! The head's features are at first those of the backbone, so a head is fitted to them ([`crate::discriminant`]). Adapters whose
//! attention starts as a plain mean of the tokens are linear then, and so is all that the model makes of the class tokens' rows
//! and of the tokens' means in the hidden states that it reads: one analysis of all of these says what each adapter should add, as
//! far as its rank holds it. Every view of a picture is an example of its own. Training then improves on a linear classifier of
//! all that the adapters see, instead of spending its epochs, and its few pictures, on getting there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use candle_core::{D, DType, Device, Tensor};
use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, MatRef, Side};
use veiltune_engine::{Params, Plain};
use veiltune_nn::attention::AttentionSpec;
use veiltune_nn::layers::BATCH_NORM_EPS;
use veiltune_nn::owc::{Branch, NormChoice, OwcConfig};
use veiltune_nn::{Method, Private, Read};

use crate::discriminant::{Choice, Discriminant, Examples, Means};
use crate::train::Pictures;
use crate::workers::{Seen, Workers};
use crate::{Error, Result};

/// Pictures of one pass.
const PASS: usize = 100;
/// Penalty of the equations for an adapter's weights, as a share of their mean eigenvalue.
const RIDGE: f64 = 1e-3;
/// Share of the variance of a classifier's logits above which an imitation replaces it; what less leaves out are classes.
const MET: f64 = 0.995;
/// What a LayerNorm adds to a variance.
const LAYER_NORM_EPS: f64 = 1e-6;

/// Share of what a classifier uses of an adapter's input that its whole variance is counted as, so that it chooses where nothing
/// is used.
const UNUSED: f64 = 1e-6;
/// Directions are scaled to a variance of one, but for those in which the pictures do not vary: these have less than this.
const VARIES: f64 = 0.5;

/// What is added to a LayerNorm's inputs, or subtracted from them, whose deviations are one.
const OFFSET: f64 = 2.0;

/// Parameters by name.
pub type Values = BTreeMap<String, Tensor>;

/// What linear adapters read, and a linear classifier of that.
pub(crate) struct Analysis {
    downs: Vec<Down>,
    /// What the norm before each attention multiplies by, on average.
    gains: Vec<f64>,
    /// Deviations of the entries of the class token's row in the sum of all states.
    spread: Vec<f64>,
    /// Of each adapter's projection down, what of the class token's row does not vary.
    is_constant: Vec<Vec<bool>>,
    /// What the head's norm divides by, on average; 1 for a batch norm.
    divisor: f64,
    /// A classifier of, divided by that, the class token's row, and for each adapter of its row behind the projection down and of the
    /// mean of all tokens behind the norm; all less their means.
    fit: Discriminant,
    /// What it says of the pictures, `[classes, pictures]`, in the first view.
    pub logits: Mat<f32>,
}

/// Where the untrained model and the pictures are.
pub struct Ground<'a, F> {
    /// A parameter as it is before training, running averages too.
    pub initial: F,
    pub pictures: Pictures<'a>,
    pub reads: &'a [Read],
    pub workers: &'a Workers,
    pub seed: u64,
    pub interrupted: &'a AtomicBool,
    pub seen: &'a Seen<'a>,
}

impl<F: Fn(&str, &[usize]) -> veiltune_engine::Result<Tensor> + Sync> Ground<'_, F> {
    /// The parameters that training starts with, as far as they are not the initial ones.
    ///
    /// # Errors
    /// [`Error::Interrupted`] soon after it is asked for.
    pub fn start(&self, method: &Method) -> Result<Values> {
        match method {
            Method::Owc(c) if is_linear(c) => self.adapters(c, &self.analyse(c)?),
            _ => self.head(method),
        }
    }

    /// Of each pass over some of the pictures, all in one of the first `views` after the other.
    fn each<R: Send>(
        &self,
        what: &'static str,
        views: usize,
        pass: impl Fn(&[Tensor]) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let Pictures { states, which } = self.pictures;
        let passes: Vec<(usize, &[usize])> = (0..views)
            .flat_map(|view| which.chunks(PASS).map(move |which| (view, which)))
            .collect();
        let one = |(view, which): &(usize, &[usize])| match self.interrupted.load(Relaxed) {
            true => Err(Error::Interrupted),
            false => pass(&states.batch(*view, which, self.reads)?),
        };
        let results = self.workers.shown((self.seen, what), &passes, one);
        results.into_iter().collect()
    }

    fn fit(
        &self,
        features: &[f32],
        width: usize,
        classes: usize,
        choice: Option<Choice>,
    ) -> Result<(Discriminant, Choice)> {
        let all = self.pictures.states.labels();
        let labels: Vec<u32> = self.pictures.which.iter().map(|&i| all[i]).collect();
        let examples = Examples {
            features,
            width,
            labels: &labels,
            classes,
        };
        let means = Means {
            workers: self.workers,
            seed: self.seed,
            interrupted: self.interrupted,
            seen: self.seen,
        };
        Discriminant::fit(&examples, choice, means)
    }

    /// A head fitted to what it is given, and its norm's averages if that is a batch norm.
    pub fn head(&self, method: &Method) -> Result<Values> {
        let (width, mut values) = (method.hidden_size(), Values::new());
        let views = self.pictures.states.views();
        // A head that hands on what it is given.
        let bare = method.with_labels((0..width).map(|i| i.to_string()).collect());
        let initial = &self.initial;
        let load = |name: &str, dims: &[usize]| -> veiltune_engine::Result<Tensor> {
            match name {
                "head.weight" => Ok(Tensor::eye(width, DType::F32, &Device::Cpu)?),
                "head.bias" => Ok(Tensor::zeros(width, DType::F32, &Device::Cpu)?),
                _ => Ok(initial(name, dims)?.detach()),
            }
        };
        let rows = self.each("reading states", views, |inputs| {
            let params = Params::new(load);
            let model: Private<Plain> = bare.load(&params, &params)?;
            numbers(&model.forward(&Plain::new(), inputs)?)
        })?;
        let mut features = rows.concat();
        if let Method::Owc(OwcConfig {
            norm: NormChoice::Batch,
            ..
        }) = method
        {
            // Its averages were 0 and 1 so far.
            let unit = (1.0 + BATCH_NORM_EPS).sqrt() as f32;
            features.iter_mut().for_each(|v| *v *= unit);
            values.extend(batch_normalise(&mut features, width)?.0);
        }
        let (fit, _) = self.fit(&features, width, method.labels().len(), None)?;
        values.insert("head.weight".into(), matrix(&fit.weight)?);
        values.insert("head.bias".into(), vector(fit.bias)?);
        Ok(values)
    }

    /// What linear adapters should read and add.
    pub(crate) fn analyse(&self, c: &OwcConfig) -> Result<Analysis> {
        let (d, r, s, classes) = (c.hidden_size, c.rank, c.scope, c.labels.len());
        let states = self.parts_of_states(c)?;
        let width = (1 + 2 * s) * d;
        // What the head's norm will divide a picture's sum of rows by, as far as it is known.
        let divisors: Vec<f32> = states
            .chunks_exact(width)
            .map(|row| match c.norm {
                NormChoice::Layer => deviation(&sum_of_rows(row, d)),
                NormChoice::Batch => 1.0,
            })
            .collect();
        let features = divided(&states, &divisors);
        let (fit, choice) = self.fit(&features, width, classes, None)?;
        let logits = fit.logits(&features);
        drop(features);

        let downs = projections_down(c, &fit, &states)?;
        drop(states);

        // And which function of them, as they come out of the norm before the attention?
        let (features, gains) = self.parts_behind(c, &downs)?;
        let width = d + 2 * r * s;
        let (_, variance) = moments(&features, width);
        let features = divided(&features, &divisors);
        // One that says the same, if there is one: one that is fitted to the labels again learns them by heart, since the
        // directions are those of these very pictures. But where the rank is too small for that, learning again is better.
        let (imitation, met) = Discriminant::imitating(&logits, &features, width, self.workers)?;
        let fit = match met > MET {
            true => imitation,
            false => self.fit(&features, width, classes, Some(choice))?.0,
        };
        let is_constant = |i: usize| {
            let (row, mean) = variance[d + 2 * i * r..].split_at(r);
            row.iter()
                .zip(mean)
                .map(|(row, mean)| *row < 1e-6 * mean)
                .collect()
        };
        Ok(Analysis {
            downs,
            gains,
            spread: variance[..d].iter().map(|v| v.sqrt().max(1e-6)).collect(),
            is_constant: (0..s).map(is_constant).collect(),
            divisor: divisors.iter().map(|v| f64::from(*v)).sum::<f64>() / divisors.len() as f64,
            logits: fit.logits(&features[..self.pictures.which.len() * width]),
            fit,
        })
    }

    /// Of each picture the last class token's row, then the class token's row and the tokens' mean of each state that an adapter
    /// reads, `[pictures, (1 + 2 scope) d]`; pictures of all views.
    fn parts_of_states(&self, c: &OwcConfig) -> Result<Vec<f32>> {
        let views = self.pictures.states.views();
        let parts = self.each("reading states", views, |inputs| {
            let mut parts = vec![class_row(&inputs[c.scope])?];
            for state in &inputs[..c.scope] {
                parts.push(class_row(state)?);
                parts.push(state.mean(1)?);
            }
            numbers(&Tensor::cat(&parts, 1)?)
        })?;
        Ok(parts.concat())
    }

    /// Of each picture the class token's row in the sum of all states, less its mean for a LayerNorm, then of each adapter the class
    /// token's row behind the projection down and the tokens' mean behind the norm, `[pictures, d + 2 rank scope]`; and what each
    /// of these norms multiplies by, on average.
    fn parts_behind(&self, c: &OwcConfig, downs: &[Down]) -> Result<(Vec<f32>, Vec<f64>)> {
        let (views, s) = (self.pictures.states.views(), c.scope);
        let parts = self.each("reading what adapters are to see", views, |inputs| {
            let mut u = inputs[0].clone();
            let (mut parts, mut gains) = (Vec::new(), Vec::new());
            for i in 0..s {
                let z = downs[i].of(&u)?;
                let (normal, gain) = match c.norm {
                    NormChoice::Layer => layer_normal(&z)?,
                    NormChoice::Batch => (z.clone(), 1.0),
                };
                parts.push(class_row(&z)?.broadcast_mul(&downs[i].used)?);
                parts.push(normal.mean(1)?.broadcast_mul(&downs[i].used)?);
                gains.push(gain * inputs[0].dim(0)? as f64);
                u = match i + 1 < s {
                    true => (u + &inputs[i + 1])?,
                    false => (class_row(&u)? + class_row(&inputs[s])?)?,
                };
            }
            if c.norm == NormChoice::Layer {
                u = u.broadcast_sub(&u.mean_keepdim(D::Minus1)?)?;
            }
            parts.insert(0, u);
            Ok((numbers(&Tensor::cat(&parts, 1)?)?, gains))
        })?;
        let n = (views * self.pictures.which.len()) as f64;
        let gain = |i: usize| parts.iter().map(|(_, gains)| gains[i]).sum::<f64>() / n;
        let gains = (0..s).map(gain).collect();
        Ok((parts.into_iter().flat_map(|(rows, _)| rows).collect(), gains))
    }

    /// Adapters, norm and head.
    pub(crate) fn adapters(&self, c: &OwcConfig, analysis: &Analysis) -> Result<Values> {
        let d = c.hidden_size;
        let solved = analysis.solve(c)?;
        let mut values = self.as_parameters(c, &analysis.downs, &solved)?;

        // What then comes out, and what the norms' averages are.
        let (averages, mut rows) = self.forward(c, &analysis.downs, &solved)?;
        let mut weight = analysis.of_class(d);
        if c.norm == NormChoice::Layer {
            let offset = analysis.offset(&rows, d)?;
            for row in rows.chunks_exact_mut(d) {
                (0..d).for_each(|j| row[j] += offset[(j, 0)] as f32);
            }
            let tokens = (self.pictures.which.len(), 1, d);
            rows = numbers(&layer_normal(&Tensor::from_vec(rows, tokens, &Device::Cpu)?)?.0)?;
            let bias = (0..d).map(|j| offset[(j, 0)] / c.scale).collect();
            values.insert(format!("adapters.{}.up.bias", c.scope - 1), vector(bias)?);
        } else {
            for (i, (moments, own)) in averages.into_iter().zip(&solved).enumerate() {
                let norm = own.behind_batch_norm(moments)?;
                values.extend(norm.map(|(name, value)| (format!("adapters.{i}.block.{name}"), value)));
            }
            let (norm, deviations) = batch_normalise(&mut rows, d)?;
            for (j, by) in deviations.iter().enumerate() {
                weight.col_mut(j).iter_mut().for_each(|w| *w *= by);
            }
            values.extend(norm);
        }

        // The head on that: as sharp as the analysis, and right on average.
        let rows = MatRef::from_row_major_slice(&rows, self.pictures.which.len(), d);
        let logits = Mat::from_fn(c.labels.len(), d, |c, j| weight[(c, j)] as f32) * rows.transpose();
        let (factor, bias) = regression(&logits, &analysis.logits);
        values.insert("head.weight".into(), matrix(&(weight * faer::Scale(factor)))?);
        values.insert("head.bias".into(), vector(bias)?);
        Ok(values)
    }

    /// Adapters of these projections, whose attentions are means of the tokens and whose feed-forward parts add nothing.
    fn as_parameters(&self, c: &OwcConfig, downs: &[Down], solved: &[Solved]) -> Result<Values> {
        let r = c.rank;
        let zeros = |dims| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let mut values = Values::new();
        for (i, (Solved { up, project }, down)) in solved.iter().zip(downs).enumerate() {
            let at = format!("adapters.{i}");
            let block = format!("{at}.block");
            let qkv = (self.initial)(&format!("{block}.attn.qkv.weight"), &[3 * r, r])?.detach();
            let identity = Tensor::eye(r, DType::F32, &Device::Cpu)?;
            let qkv = Tensor::cat(&[qkv.narrow(0, 0, 2 * r)?, identity], 0)?;
            values.extend([
                (format!("{at}.down.weight"), down.weight.clone()),
                (format!("{at}.down.bias"), down.bias.clone()),
                (
                    format!("{at}.up.weight"),
                    matrix(&(up * faer::Scale(1.0 / c.scale)))?,
                ),
                (format!("{block}.attn.qkv.weight"), qkv),
                (format!("{block}.attn.mix.weight"), zeros((c.tokens, c.tokens))?),
                (format!("{block}.attn.proj.weight"), matrix(project)?),
                (format!("{block}.fc2.weight"), zeros((r, r))?),
            ]);
        }
        Ok(values)
    }

    /// Mean and variance, over all tokens, of what each projection down gives, and the class token's row before the head's norm,
    /// picture after picture; for a batch norm with projections as if norms before attentions did nothing.
    fn forward(&self, c: &OwcConfig, downs: &[Down], solved: &[Solved]) -> Result<(Vec<Moments>, Vec<f32>)> {
        let (d, r) = (c.hidden_size, c.rank);
        let tensors = solved
            .iter()
            .map(|Solved { up, project }| Ok((matrix(up)?.t()?, matrix(project)?.t()?)));
        let tensors: Vec<(Tensor, Tensor)> = tensors.collect::<Result<_>>()?;
        let passes = self.each("running the adapters", 1, |inputs| {
            let mut u = inputs[0].clone();
            let mut sums = Vec::new();
            for (i, (up, project)) in tensors.iter().enumerate() {
                let z = downs[i].of(&u)?;
                sums.push([numbers(&z.mean((0, 1))?)?, numbers(&z.sqr()?.mean((0, 1))?)?]);
                let normal = match c.norm {
                    NormChoice::Layer => layer_normal(&z)?.0,
                    NormChoice::Batch => z.clone(),
                };
                let mixed = normal.mean(1)?.matmul(project)?.unsqueeze(1)?;
                let (z, next) = match i + 1 < c.scope {
                    true => (z, &inputs[i + 1]),
                    false => {
                        u = u.narrow(1, 0, 1)?;
                        (z.narrow(1, 0, 1)?, &inputs[i + 1].narrow(1, 0, 1)?)
                    }
                };
                let (batch, tokens, _) = z.dims3()?;
                let x = z.broadcast_add(&mixed)?.reshape((batch * tokens, r))?;
                u = ((u + x.matmul(up)?.reshape((batch, tokens, d))?)? + next)?;
            }
            Ok((inputs[0].dim(0)? as f64, sums, numbers(&u)?))
        })?;
        let n = self.pictures.which.len() as f64;
        let average = |i: usize, which: usize, j: usize| -> f64 {
            let of =
                |(count, sums, _): &(f64, Vec<[Vec<f32>; 2]>, _)| count / n * f64::from(sums[i][which][j]);
            passes.iter().map(of).sum()
        };
        let moments = |i: usize| {
            let mean: Vec<f64> = (0..r).map(|j| average(i, 0, j)).collect();
            let variance = (0..r).map(|j| (average(i, 1, j) - mean[j].powi(2)).max(0.0));
            let variance = variance.collect();
            (mean, variance)
        };
        let moments = (0..c.scope).map(moments).collect();
        Ok((
            moments,
            passes.into_iter().flat_map(|(_, _, rows)| rows).collect(),
        ))
    }
}

impl Analysis {
    /// What the classifier makes of the class token's row, `[classes, d]`.
    fn of_class(&self, d: usize) -> Mat<f64> {
        self.fit.weight.as_ref().subcols(0, d).to_owned()
    }

    /// Adapters whose results the head, on the class token's row alone, makes what the classifier makes of their parts.
    fn solve(&self, c: &OwcConfig) -> Result<Vec<Solved>> {
        let (d, r, s) = (c.hidden_size, c.rank, c.scope);
        let layer_norm = c.norm == NormChoice::Layer;
        let weight = self.fit.weight.as_ref();
        // Each adapter's result also passes through those after it, so the last one is solved first. Of what an adapter hands on the
        // logits are `on_row` times the class token's row and `on_mean` times the tokens' mean.
        let of_class = self.of_class(d);
        let mut on_row = if layer_norm { centred(&of_class) } else { of_class };
        let mut on_mean = Mat::<f64>::zeros(on_row.nrows(), d);
        let mut solved = Vec::new();
        for i in (0..s).rev() {
            let (row, mean) = (d + 2 * i * r, d + (2 * i + 1) * r);
            let of_mean = weight.subcols(mean, r);
            // The class token is the same in all pictures before the first block. What its row is mapped to is free then, and what
            // the mean is to be mapped to has to be within reach.
            let of_row = Mat::from_fn(on_row.nrows(), r, |c, j| match self.is_constant[i][j] {
                true => of_mean[(c, j)],
                false => weight[(c, row + j)],
            });
            // on_row up = of_row
            let up = preimage(&on_row, &self.spread, &of_row)?;
            // (on_row + on_mean) up project norm = of_mean norm - on_mean up, where norm is linear, or nearly.
            let norm = match layer_norm {
                true => centred(&Mat::<f64>::identity(r, r)) * faer::Scale(self.gains[i]),
                false => Mat::identity(r, r),
            };
            let both = (&on_row + &on_mean) * &up;
            let wanted = of_mean * &norm - &on_mean * &up;
            let project = ridge(both.transpose() * &both)?.solve(both.transpose() * wanted);
            let project = if layer_norm { centred(&project) } else { project };
            let down = double(&self.downs[i].weight)?;
            let through_row = &on_row * &up * &down;
            let through_mean = (&both * &project + &on_mean * &up) * &down;
            on_row += through_row;
            on_mean += through_mean;
            solved.push(Solved {
                up,
                project: project * faer::Scale(1.0 / self.gains[i]),
            });
        }
        solved.reverse();
        Ok(solved)
    }

    /// What to add to `rows [pictures, d]` before the head's LayerNorm, so that logits are right on average: a head's bias would not be
    /// divided by the norm as all else is.
    fn offset(&self, rows: &[f32], d: usize) -> Result<Mat<f64>> {
        let map = centred(&self.of_class(d));
        let (mean, _) = moments(rows, d);
        let now = &map * Mat::from_fn(d, 1, |j, _| mean[j]);
        let wanted = Mat::from_fn(map.nrows(), 1, |c, _| {
            self.fit.mean[c] * self.divisor - now[(c, 0)]
        });
        preimage(&map, &self.spread, &wanted)
    }
}

/// What an adapter adds: its projection up `[d, rank]`, times the scale, and its attention's `[rank, rank]`, for a norm before the
/// attention that does nothing, or of which only the average gain is known.
struct Solved {
    up: Mat<f64>,
    project: Mat<f64>,
}

impl Solved {
    /// The attention's projection behind a batch norm of these averages, and that norm.
    fn behind_batch_norm(&self, (mean, variance): Moments) -> Result<[(&'static str, Tensor); 4]> {
        let r = mean.len();
        let project = &self.project;
        let by: Vec<f64> = variance.iter().map(|v| (v + BATCH_NORM_EPS).sqrt()).collect();
        let bias = (0..r).map(|k| (0..r).map(|j| project[(k, j)] * mean[j]).sum());
        let bias = vector(bias.collect())?;
        let project = Mat::from_fn(r, r, |k, j| project[(k, j)] * by[j]);
        Ok([
            ("attn.proj.weight", matrix(&project)?),
            ("attn.proj.bias", bias),
            ("norm1.running_mean", vector(mean)?),
            ("norm1.running_var", vector(variance)?),
        ])
    }
}

/// Which directions of its input each adapter should read, for a classifier `fit` of the parts of `states` (see
/// [`Ground::parts_of_states`]).
///
/// Adapter i reads the sum of the states up to its own, and its result is part of all sums after it: so it is to say what its state
/// says and the next one's does not.
fn projections_down(c: &OwcConfig, fit: &Discriminant, states: &[f32]) -> Result<Vec<Down>> {
    let (d, s) = (c.hidden_size, c.scope);
    let width = (1 + 2 * s) * d;
    let part = |i: usize| fit.weight.as_ref().subcols(i * d, d);
    let none = Mat::zeros(c.labels.len(), d);
    let mut downs = Vec::new();
    let mut sums = vec![0.0; states.len() / width * 2 * d];
    for i in 0..s {
        for (sum, row) in sums.chunks_exact_mut(2 * d).zip(states.chunks_exact(width)) {
            let own = &row[(1 + 2 * i) * d..][..2 * d];
            sum.iter_mut().zip(own).for_each(|(s, v)| *s += v);
        }
        let (next_row, next_mean) = match i + 1 < s {
            true => (part(3 + 2 * i), part(4 + 2 * i)),
            false => (part(0), none.as_ref()),
        };
        let of_row = part(1 + 2 * i) - next_row;
        let of_mean = part(2 + 2 * i) - next_mean;
        let Directions { map, mut bias, used } = directions(&of_row, &of_mean, &sums, c.rank)?;
        if c.norm == NormChoice::Layer {
            // A LayerNorm's divisor then changes little from token to token, and is nowhere near zero.
            for (j, v) in bias.iter_mut().enumerate() {
                *v += if j % 2 == 0 { OFFSET } else { -OFFSET };
            }
        }
        downs.push(Down {
            weight: matrix(&map)?,
            bias: vector(bias)?,
            used: vector(used)?,
        });
    }
    Ok(downs)
}

/// Whether its attentions start as means of the tokens, and its inputs have room for the rank.
fn is_linear(c: &OwcConfig) -> bool {
    let is_mean = |i| c.attention_of(i) == AttentionSpec::LinAtten;
    c.branch == Branch::Transformer && c.rank <= c.hidden_size && (0..c.scope).all(is_mean)
}

/// Mean and variance of each feature.
type Moments = (Vec<f64>, Vec<f64>);

/// An adapter's projection down.
struct Down {
    /// `[rank, d]`.
    weight: Tensor,
    /// `[rank]`.
    bias: Tensor,
    /// `[rank]`: 1 where it gives what the classifier uses; 0 where it gives what only training may come to use. Whatever is fitted
    /// to that is what few pictures are learnt by heart with.
    used: Tensor,
}

impl Down {
    /// `[batch, tokens, rank]` of `u [batch, tokens, d]`.
    fn of(&self, u: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, tokens, d) = u.dims3()?;
        let flat = u.reshape((batch * tokens, d))?.matmul(&self.weight.t()?)?;
        flat.broadcast_add(&self.bias)?
            .reshape((batch, tokens, self.bias.elem_count()))
    }
}

/// `[batch, d]` of `[batch, tokens, d]`.
fn class_row(state: &Tensor) -> candle_core::Result<Tensor> {
    state.narrow(1, 0, 1)?.squeeze(1)
}

/// Of a picture's parts, see [`Ground::parts_of_states`], the sum of the class token's rows.
fn sum_of_rows(parts: &[f32], d: usize) -> Vec<f32> {
    let rows = parts.chunks_exact(d).enumerate();
    let rows = rows.filter(|(i, _)| *i == 0 || i % 2 == 1);
    rows.fold(vec![0.0; d], |mut sum, (_, row)| {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        sum
    })
}

/// Features `[pictures, width]` less their means, each picture's divided by its own divisor.
fn divided(features: &[f32], divisors: &[f32]) -> Vec<f32> {
    let width = features.len() / divisors.len();
    let (mean, _) = moments(features, width);
    let rows = features.chunks_exact(width).zip(divisors);
    rows.flat_map(|(row, by)| {
        row.iter()
            .zip(&mean)
            .map(move |(v, m)| ((f64::from(*v) - m) as f32) / by)
    })
    .collect()
}

/// The least `x` of which `map x` is `wanted`, nearly, when each entry is measured by its `spread`.
fn preimage(map: &Mat<f64>, spread: &[f64], wanted: &Mat<f64>) -> Result<Mat<f64>> {
    let scaled = Mat::from_fn(map.nrows(), map.ncols(), |i, j| map[(i, j)] * spread[j]);
    let x = scaled.transpose() * ridge(&scaled * scaled.transpose())?.solve(wanted);
    Ok(Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] * spread[i]))
}

/// A factor for all `logits [classes, pictures]`, and a bias for each class, that bring them closest to those `wanted`.
fn regression(logits: &Mat<f32>, wanted: &Mat<f32>) -> (f64, Vec<f64>) {
    let (classes, n) = logits.shape();
    let mean = |a: &Mat<f32>| -> Vec<f64> {
        let of = |c: usize| a.row(c).iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        (0..classes).map(of).collect()
    };
    let (centre, goal) = (mean(logits), mean(wanted));
    let (mut product, mut square) = (0.0, 0.0);
    for i in 0..n {
        for c in 0..classes {
            let own = f64::from(logits[(c, i)]) - centre[c];
            product += own * (f64::from(wanted[(c, i)]) - goal[c]);
            square += own * own;
        }
    }
    let factor = if square > 0.0 { product / square } else { 1.0 };
    let bias = goal.iter().zip(centre).map(|(goal, own)| goal - factor * own);
    (factor, bias.collect())
}

/// What a LayerNorm divides `values` by.
fn deviation(values: &[f32]) -> f32 {
    let (_, variance) = moments_of(values.iter().map(|v| f64::from(*v)), values.len());
    (variance + LAYER_NORM_EPS).sqrt() as f32
}

/// Makes of rows of `width` entries what a batch norm makes of them that has their averages; its parameters, and what it divides by.
fn batch_normalise(rows: &mut [f32], width: usize) -> Result<(Values, Vec<f64>)> {
    let (mean, variance) = moments(rows, width);
    let by: Vec<f64> = variance.iter().map(|v| (v + BATCH_NORM_EPS).sqrt()).collect();
    for row in rows.chunks_exact_mut(width) {
        for ((v, mean), by) in row.iter_mut().zip(&mean).zip(&by) {
            *v = ((f64::from(*v) - mean) / by) as f32;
        }
    }
    let values = Values::from([
        ("norm.running_mean".into(), vector(mean)?),
        ("norm.running_var".into(), vector(variance)?),
    ]);
    Ok((values, by))
}

/// What a LayerNorm makes of the rows of `z [batch, tokens, r]`, and by what it multiplies them on average.
fn layer_normal(z: &Tensor) -> Result<(Tensor, f64)> {
    let centred = z.broadcast_sub(&z.mean_keepdim(D::Minus1)?)?;
    let by = centred
        .sqr()?
        .mean_keepdim(D::Minus1)?
        .affine(1.0, LAYER_NORM_EPS)?
        .sqrt()?
        .recip()?;
    let gain = f64::from(by.mean_all()?.to_scalar::<f32>()?);
    Ok((centred.broadcast_mul(&by)?, gain))
}

/// Rows less their means.
fn centred(a: &Mat<f64>) -> Mat<f64> {
    let (rows, columns) = a.shape();
    let means: Vec<f64> = (0..rows)
        .map(|i| a.row(i).iter().sum::<f64>() / columns as f64)
        .collect();
    Mat::from_fn(rows, columns, |i, j| a[(i, j)] - means[i])
}

/// Coordinates of an adapter's input.
struct Directions {
    /// `[rank, d]`, to at most deviation one.
    map: Mat<f64>,
    /// What centres the class token's.
    bias: Vec<f64>,
    /// 1 where the classifier uses them, else 0.
    used: Vec<f64>,
}

/// The `rank` directions of an adapter's input that a classifier uses most, whose weights `[classes, d]` are `of_row` for the class
/// token's row and `of_mean` for the tokens' mean, which are `inputs [pictures, 2 d]`. A classifier of few classes uses fewer than
/// `rank`; the others are those that vary most, and of no use before training.
fn directions(of_row: &Mat<f64>, of_mean: &Mat<f64>, inputs: &[f32], rank: usize) -> Result<Directions> {
    let d = of_row.ncols();
    let eigen = |a: &Mat<f64>| {
        a.self_adjoint_eigen(Side::Lower)
            .map_err(|_| Error::Settings("an adapter's input has no directions".into()))
    };
    let inputs = MatRef::from_row_major_slice(inputs, inputs.len() / (2 * d), 2 * d);
    // Both inputs are weighed by what they vary.
    let (row, centre) = covariance(inputs.subcols(0, d));
    let (mean, _) = covariance(inputs.subcols(d, d));
    let trace = |a: &Mat<f64>| (0..d).map(|i| a[(i, i)]).sum::<f64>().max(1e-12);
    let (of_rows, of_means) = (trace(&row), trace(&mean));
    let metric = &row * faer::Scale(1.0 / of_rows) + &mean * faer::Scale(1.0 / of_means);
    let used = of_row.transpose() * of_row * faer::Scale(of_rows)
        + of_mean.transpose() * of_mean * faer::Scale(of_means);
    // Few pictures do not vary in all directions. What a classifier says of the others is by chance, and what others, or tokens, vary
    // there is not to be blown up.
    let least = 1e-4 * trace(&metric) / d as f64;
    let of_metric = eigen(&metric)?;
    let scaled = |by: &dyn Fn(f64) -> f64| {
        let (u, values) = (of_metric.U(), of_metric.S().column_vector());
        Mat::from_fn(d, d, |i, j| u[(i, j)] * by(values[j])) * u.transpose()
    };
    let root = scaled(&|value| if value < least { 0.0 } else { value.sqrt() });
    let inverse = scaled(&|value| value.max(least).sqrt().recip());
    let inner = &root * used * &root;
    // A classifier of few classes uses fewer directions than there is room for. The others are those that vary most: so little of
    // the variance chooses among them only. Left to chance, they would be what few pictures hardly vary in but others do.
    let least_use = UNUSED * trace(&inner);
    let of_inner = eigen(&(&inner + &metric * faer::Scale(least_use / trace(&metric))))?;
    // The last ones are the largest.
    let chosen = of_inner.U().subcols(d - rank, rank);
    let along = |chosen: &Mat<f64>, of: &Mat<f64>| {
        let all = chosen * of * chosen.transpose();
        (0..rank).map(|i| all[(i, i)]).collect::<Vec<_>>()
    };
    let chosen = chosen.transpose().to_owned();
    let is_used = along(&chosen, &inner).into_iter().map(|share| share > least_use);
    let used: Vec<f64> = is_used.map(|used| f64::from(u8::from(used))).collect();
    let chosen = chosen * inverse;
    let (of_row, of_mean) = (along(&chosen, &row), along(&chosen, &mean));
    let most = of_rows.max(of_means);
    let deviation: Vec<f64> = along(&chosen, &metric)
        .into_iter()
        .enumerate()
        .map(|(i, varies)| match varies > VARIES {
            true => of_row[i].max(of_mean[i]).max(0.01 * most).sqrt(),
            // Other pictures may vary there, as much as in any direction.
            false => chosen.row(i).norm_l2() * (most / d as f64).sqrt(),
        })
        .collect();
    let map = Mat::from_fn(rank, d, |i, j| chosen[(i, j)] / deviation[i]);
    let bias = (0..rank).map(|i| -(0..d).map(|j| map[(i, j)] * centre[j]).sum::<f64>());
    let bias = bias.collect();
    let is_finite = map.col_iter().all(|column| column.iter().all(|v| v.is_finite()));
    match is_finite {
        true => Ok(Directions { map, bias, used }),
        false => Err(Error::Settings("an adapter's input does not vary".into())),
    }
}

/// Of `rows [examples, width]`; and their mean.
fn covariance(rows: MatRef<f32>) -> (Mat<f64>, Vec<f64>) {
    let (n, width) = rows.shape();
    let mean = |j: usize| rows.col(j).iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
    let mean: Vec<f64> = (0..width).map(mean).collect();
    let centred = Mat::from_fn(n, width, |i, j| (f64::from(rows[(i, j)]) - mean[j]) as f32);
    let product = centred.transpose() * &centred;
    let covariance = Mat::from_fn(width, width, |i, j| f64::from(product[(i, j)]) / n as f64);
    (covariance, mean)
}

/// Mean and variance of each of `width` features, of rows one after the other.
fn moments(rows: &[f32], width: usize) -> Moments {
    let column = |j: usize| rows.iter().skip(j).step_by(width).map(|v| f64::from(*v));
    (0..width)
        .map(|j| moments_of(column(j), rows.len() / width))
        .unzip()
}

/// Mean and variance of `count` values.
fn moments_of(values: impl Iterator<Item = f64> + Clone, count: usize) -> (f64, f64) {
    let mean = values.clone().sum::<f64>() / count as f64;
    (
        mean,
        values.map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64,
    )
}

/// `a` with a penalty, factored.
fn ridge(mut a: Mat<f64>) -> Result<Llt<f64>> {
    let trace: f64 = (0..a.nrows()).map(|i| a[(i, i)]).sum();
    let penalty = (RIDGE * trace / a.nrows() as f64).max(1e-12);
    for i in 0..a.nrows() {
        a[(i, i)] += penalty;
    }
    a.llt(Side::Lower)
        .map_err(|_| Error::Settings("the pictures determine no adapter to start from".into()))
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn matrix(a: &Mat<f64>) -> Result<Tensor> {
    let (rows, columns) = a.shape();
    let values = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
    let values: Vec<f32> = values.map(|at| a[at] as f32).collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

fn double(tensor: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = tensor.dims2()?;
    let values = numbers(tensor)?;
    Ok(Mat::from_fn(rows, columns, |i, j| {
        f64::from(values[i * columns + j])
    }))
}

fn vector(values: Vec<f64>) -> Result<Tensor> {
    let count = values.len();
    let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
    Ok(Tensor::from_vec(values, count, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::variables::normal;

    const WIDTH: usize = 40;

    /// Inputs `[count, 2 WIDTH]` that vary less from entry to entry: rows, and means that are nearly those.
    fn inputs(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        let noise = normal(&mut rng, count * 2 * WIDTH, 1.0);
        let sized = |j: usize, v: f32| v * 0.9_f32.powi(j as i32);
        let rows = noise.chunks(2 * WIDTH).flat_map(|noise| {
            let (row, other) = noise.split_at(WIDTH);
            let mean = row.iter().zip(other).map(|(a, b)| 0.7 * a + 0.7 * b);
            let row = row.iter().copied().enumerate();
            row.chain(mean.enumerate()).map(move |(j, v)| sized(j, v))
        });
        rows.collect()
    }

    #[test]
    fn what_few_pictures_do_not_vary_in_is_not_read() {
        // A classifier of two classes as few pictures determine it: all that it looks at is in what they span.
        let few = inputs(14, 1);
        let pull = normal(&mut StdRng::seed_from_u64(2), 2 * 14, 0.3);
        let part = |of: usize| {
            Mat::from_fn(2, WIDTH, |c, j| {
                let one = |i: usize| f64::from(pull[c * 14 + i] * few[i * 2 * WIDTH + of * WIDTH + j]);
                (0..14).map(one).sum::<f64>()
            })
        };
        let (of_row, of_mean) = (part(0), part(1));
        let said = |inputs: &[f32]| {
            let inputs = MatRef::from_row_major_slice(inputs, inputs.len() / (2 * WIDTH), 2 * WIDTH);
            let value = |c: usize, i: usize, j: usize| {
                of_row[(c, j)] * f64::from(inputs[(i, j)])
                    + of_mean[(c, j)] * f64::from(inputs[(i, WIDTH + j)])
            };
            Mat::from_fn(2, inputs.nrows(), |c, i| {
                (0..WIDTH).map(|j| value(c, i, j)).sum::<f64>() as f32
            })
        };
        let unseen = inputs(400, 3);
        // The classifier uses four directions, and the pictures vary in 26.
        for rank in [4, 20, 36] {
            let found = directions(&of_row, &of_mean, &few, rank).unwrap();
            assert_eq!(found.used.iter().sum::<f64>(), 4.0);
            let seen = |inputs: &[f32]| -> Vec<f32> {
                let part = |part: &[f32]| -> Vec<f32> {
                    let one = |i: usize| {
                        let sum = (0..WIDTH).map(|j| found.map[(i, j)] * f64::from(part[j]));
                        (found.used[i] * (sum.sum::<f64>() + found.bias[i])) as f32
                    };
                    (0..rank).map(one).collect()
                };
                inputs.chunks(WIDTH).flat_map(part).collect()
            };
            let workers = Workers::new(1).unwrap();
            let (imitation, met) =
                Discriminant::imitating(&said(&few), &seen(&few), 2 * rank, &workers).unwrap();
            let wanted = said(&unseen);
            let off = (imitation.logits(&seen(&unseen)) - &wanted).norm_l2() / wanted.norm_l2();
            assert!(met > MET && off < 0.5, "rank {rank}: {met}, {off}");
        }
    }
}
