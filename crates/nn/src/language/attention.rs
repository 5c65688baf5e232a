//! Self-attention of a language model: exact softmax or random features, with padding and causal masks, rotary positions and
//! shared keys.

use std::sync::{Mutex, PoisonError};

use veiltune_engine::{Backend, Error, NormSpec, Owner, Params, Party, Result, SoftmaxSpec};

use super::block::scaled;
use super::config::{Attention, AttentionRanges, LanguageConfig};
use super::random::projections;
use crate::layers::{Linear, join_heads, rank3, split_heads};

/// Names of a layer's attention.
pub(crate) const NAMES: [&str; 4] = ["query", "key", "value", "output"];

/// Queries, keys, values and what becomes of them.
pub(crate) struct SelfAttention<B: Backend> {
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    output: Linear<B>,
    shape: Shape,
    /// Factor of the scores; None: part of the queries, or of no effect.
    score_scale: Option<f64>,
    /// Of the residual stream, and so of values.
    stream: f64,
    kind: Kind,
}

/// How heads are laid out.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    groups: usize,
    width: usize,
}

enum Kind {
    Softmax { bound: f64, mask: f64, unknown: bool },
    Rfa(Rfa),
}

/// Random feature attention: of queries and keys scaled to one length only the angle counts, and exp(q . k) is, but for a constant
/// that cancels, exp(-|q - k|^2 / 2), the mean of sin(w . q) sin(w . k) + cos(w . q) cos(w . k) over w ~ N(0, 1).
///
/// An encoder's cost is linear in the number n of tokens: sum_j phi(k_j) [v_j | 1] is one matrix for all queries. A causal model's
/// prefix sums of it would take a product for each token, feature and column, n * 2 D (width + 1) a head, which is more than the n * n
/// scores of the form that masks them up to n = 2 D (width + 1): 8,320 for D = 64 and heads of 64. So scores are masked, except in the
/// last layer, where one query sees all.
struct Rfa {
    norm: NormSpec,
    sum: (f64, f64),
    features: usize,
    /// `[groups, width, features]`: the projections, times the temperature's root and what makes a normalised row a unit vector.
    projections: Vec<f32>,
    trials: Option<Trials>,
}

/// A search for the temperatures with which random features come closest to softmax.
struct Trials {
    /// The same attention, with one of [`TEMPERATURES`] each.
    candidates: Vec<Rfa>,
    /// Of each candidate and group: squared distances to what softmax gives.
    errors: Mutex<Vec<Vec<f64>>>,
}

/// Features are divided by 8, for no more than the fractional bits that a product has room for beside values; what they are all
/// multiplied by cancels.
const SHRUNK: f64 = 0.125;
/// Twice the deviation of one key's part of a denominator. Below it random features may as well sum to zero or less, which has no
/// reciprocal, where a query is far from all keys; and other texts come nearer to that than those that are seen.
pub(crate) fn noise(features: usize) -> f64 {
    let key = features as f64 * SHRUNK * SHRUNK;
    2.0 * key / (2.0 * features as f64).sqrt()
}

/// Features times tokens up to which a sum stays in range.
const SUMMED: usize = 1 << 15;
/// Fractional bits of a reciprocal whose product with a truncated value a linear layer takes as it is.
const FRACTION: u32 = 18;
/// What a search takes off masked scores.
const MASK_OF_TRIALS: f64 = 1e4;
/// What is tried. A higher one lets attention be sharper, and its estimate is noisier.
const TEMPERATURES: [f64; 10] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0];

/// What all layers of a pass share.
pub(crate) struct Scene<B: Backend> {
    /// Which positions are real, `[batch, tokens]`.
    keep: Option<B::Tensor>,
    causal: bool,
    /// Cosines and sines, `[1, 1, tokens, head_dim]`, the first half of the sines negative.
    rotary: Option<[B::Tensor; 2]>,
    tokens: usize,
    /// Queries' heads that share keys.
    heads: usize,
}

impl<B: Backend> Scene<B> {
    pub fn new(b: &B, c: &LanguageConfig, tokens: usize, keep: Option<&B::Tensor>) -> Result<Self> {
        let causal = c.family.causal();
        let rotary = causal
            .then(|| rotary(c, tokens))
            .map(|tables| -> Result<[B::Tensor; 2]> {
                let dims = [1, 1, tokens, c.head_dim];
                let [cos, sin] = tables.map(|table| b.input(Owner::Public, &dims, Some(&table)));
                Ok([cos?, sin?])
            });
        Ok(Scene {
            keep: keep.cloned(),
            causal,
            rotary: rotary.transpose()?,
            tokens,
            heads: c.heads_per_group(),
        })
    }

    /// 1 where a query may attend to a key, else 0: `[batch or 1, 1, rows, tokens]`; None: everywhere. Rows are those of the heads
    /// that share keys, one after the other, each with all positions or `only` one.
    fn allowed(&self, b: &B, only: Option<usize>) -> Result<Option<B::Tensor>> {
        let n = self.tokens;
        let keep = match &self.keep {
            Some(keep) => {
                let batch = b.dims(keep)[0];
                Some(b.reshape(keep, &[batch, 1, 1, n])?)
            }
            None => None,
        };
        // A single position is the last one of a causal model, and sees all.
        if !self.causal || only.is_some() {
            return Ok(keep);
        }
        let triangle = self.triangle(b)?;
        Ok(Some(match keep {
            Some(keep) => b.mul(&keep, &triangle)?,
            None => triangle,
        }))
    }

    /// 1 where a key is not after the query, `[1, 1, rows, tokens]`, public.
    fn triangle(&self, b: &B) -> Result<B::Tensor> {
        let n = self.tokens;
        let row = |i: usize| (0..n).map(move |j| if j <= i { 1.0 } else { 0.0 });
        let once: Vec<f32> = (0..n).flat_map(row).collect();
        let dims = [1, 1, self.heads * n, n];
        b.input(Owner::Public, &dims, Some(&once.repeat(self.heads)))
    }

    /// 1 in rows of padding, `[batch, 1, rows, 1]`; None: there is none.
    fn absent(&self, b: &B) -> Result<Option<B::Tensor>> {
        let Some(keep) = &self.keep else {
            return Ok(None);
        };
        let batch = b.dims(keep)[0];
        let one = b.input(Owner::Public, &[1, 1], Some(&[1.0]))?;
        let absent = b.reshape(&b.sub(&one, keep)?, &[batch, 1, self.tokens, 1])?;
        Ok(Some(b.cat(&vec![&absent; self.heads], 2)?))
    }

    /// x `[batch, heads, tokens (or one), head_dim]` turned by its positions.
    fn rotate(&self, b: &B, x: &B::Tensor, only: Option<usize>) -> Result<B::Tensor> {
        let Some(tables) = &self.rotary else {
            return Ok(x.clone());
        };
        // Its three parts share one truncation.
        let x = b.trim(x)?;
        let width = *b.dims(&x).last().unwrap_or(&0);
        let [first, second] = [0, width / 2].map(|start| b.narrow(&x, 3, start, width / 2));
        let swapped = b.cat(&[&second?, &first?], 3)?;
        let [cos, sin] = tables.each_ref().map(|table| match only {
            Some(i) => b.narrow(table, 2, i, 1),
            None => Ok(table.clone()),
        });
        b.add(&b.mul(&x, &cos?)?, &b.mul(&swapped, &sin?)?)
    }
}

/// Cosines and sines of the angles p / theta^(2 i / width) for entries i and width / 2 + i of position p.
fn rotary(c: &LanguageConfig, tokens: usize) -> [Vec<f32>; 2] {
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let half = c.head_dim / 2;
    for p in 0..tokens {
        for i in 0..c.head_dim {
            let frequency = c.rope_theta.powf(-((i % half) as f64) / half as f64);
            let angle = p as f64 * frequency;
            let sign = if i < half { -1.0 } else { 1.0 };
            cos.push(angle.cos() as f32);
            sin.push((sign * angle.sin()) as f32);
        }
    }
    [cos, sin]
}

impl<B: Backend> SelfAttention<B> {
    /// Layer number `index`. The projections' names are below `p`.
    pub fn load(p: &Params<B>, c: &LanguageConfig, index: usize) -> Result<Self> {
        let shape = Shape {
            heads: c.num_attention_heads,
            groups: c.num_key_value_heads,
            width: c.head_dim,
        };
        let (d, q, kv) = (
            c.hidden_size,
            shape.heads * shape.width,
            shape.groups * shape.width,
        );
        let linear = |i: usize, input, output| Linear::load(&p.pp(NAMES[i]), input, output, c.attention_bias);
        let kind = match (&c.layers[index].attention, c.attention) {
            (
                AttentionRanges::Rfa {
                    norm,
                    temperature,
                    sum,
                },
                Attention::Rfa { features, seed },
            ) => Kind::Rfa(Rfa {
                norm: *norm,
                sum: *sum,
                features,
                projections: projections(seed, index, temperature, shape.width, features),
                trials: None,
            }),
            (ranges @ AttentionRanges::Softmax { bound, mask }, _) => Kind::Softmax {
                bound: *bound,
                mask: *mask,
                unknown: ranges.is_unknown(),
            },
            _ => {
                return Err(Error::program("attention", "ranges of another kind of attention"));
            }
        };
        let scaled = matches!(kind, Kind::Softmax { .. }) && !c.folded;
        Ok(SelfAttention {
            query: linear(0, d, q)?,
            key: linear(1, d, kv)?,
            value: linear(2, d, kv)?,
            output: linear(3, q, d)?,
            shape,
            score_scale: scaled.then(|| (shape.width as f64).powf(-0.5)),
            stream: c.stream(index),
            kind,
        })
    }

    /// `[batch, tokens, d]` to the same shape, or to `[batch, 1, d]` for the position `only`.
    pub fn forward(&self, b: &B, x: &B::Tensor, scene: &Scene<B>, only: Option<usize>) -> Result<B::Tensor> {
        let [q, k, v] = self.heads(b, x, scene, only)?;
        let mixed = match &self.kind {
            Kind::Softmax { bound, mask, unknown } => {
                self.softmax(b, [q, k, v], scene, only, (*bound, *mask, *unknown))?
            }
            Kind::Rfa(Rfa {
                trials: Some(trials), ..
            }) => self.compare(b, [q, k, v], scene, only, trials)?,
            Kind::Rfa(rfa) => rfa.attend(b, [q, k, v], scene, only)?,
        };
        let (batch, rows) = (b.dims(&mixed)[0], b.dims(&mixed)[2]);
        let each = rows * self.shape.groups / self.shape.heads;
        let mixed = b.reshape(&mixed, &[batch, self.shape.heads, each, self.shape.width])?;
        self.output.forward(b, &join_heads(b, &mixed)?)
    }

    /// From now on each pass gives what softmax gives, and random features of several temperatures are compared with it. `index` is
    /// this layer's number.
    pub fn try_temperatures(&mut self, c: &LanguageConfig, index: usize) {
        let (Kind::Rfa(rfa), Attention::Rfa { features, seed }) = (&mut self.kind, c.attention) else {
            return;
        };
        let groups = self.shape.groups;
        let candidate = |t: f64| Rfa {
            norm: rfa.norm,
            sum: rfa.sum,
            features,
            projections: projections(seed, index, &vec![t; groups], self.shape.width, features),
            trials: None,
        };
        rfa.trials = Some(Trials {
            candidates: TEMPERATURES.map(candidate).into(),
            errors: Mutex::new(vec![vec![0.0; groups]; TEMPERATURES.len()]),
        });
    }

    /// The best temperature of each group, if there was a search.
    pub fn best_temperatures(&self) -> Option<Vec<f64>> {
        let Kind::Rfa(Rfa {
            trials: Some(trials), ..
        }) = &self.kind
        else {
            return None;
        };
        let errors = trials.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let best = |group: usize| {
            let tried = TEMPERATURES.iter().zip(errors.iter());
            tried
                .min_by(|(_, a), (_, b)| a[group].total_cmp(&b[group]))
                .map_or(1.0, |(t, _)| *t)
        };
        Some((0..self.shape.groups).map(best).collect())
    }

    fn compare(
        &self,
        b: &B,
        [q, k, v]: [B::Tensor; 3],
        scene: &Scene<B>,
        only: Option<usize>,
        trials: &Trials,
    ) -> Result<B::Tensor> {
        let values = |x: &B::Tensor| {
            let revealed = b.reveal(x, Party::P0)?.map(|r| r.values);
            revealed.ok_or_else(|| Error::program("random features", "temperatures are sought in the clear"))
        };
        let scaled = b.scale(&q, (self.shape.width as f64).powf(-0.5))?;
        let exact = self.softmax(
            b,
            [scaled, k.clone(), v.clone()],
            scene,
            only,
            (1.0, MASK_OF_TRIALS, true),
        )?;
        let want = values(&exact)?;
        let mut errors = trials.errors.lock().unwrap_or_else(PoisonError::into_inner);
        for (rfa, errors) in trials.candidates.iter().zip(errors.iter_mut()) {
            let got = values(&rfa.attend(b, [q.clone(), k.clone(), v.clone()], scene, only)?)?;
            let each = b.dims(&exact)[2..].iter().product::<usize>().max(1);
            for (i, (got, want)) in got.chunks(each).zip(want.chunks(each)).enumerate() {
                let squares = got.iter().zip(want).map(|(a, b)| (a - b).powi(2));
                errors[i % self.shape.groups] += squares.sum::<f64>();
            }
        }
        Ok(exact)
    }

    /// Queries `[batch, groups, rows, width]`, the rows of the heads of a group one after the other; keys and values
    /// `[batch, groups, tokens, width]`.
    fn heads(&self, b: &B, x: &B::Tensor, scene: &Scene<B>, only: Option<usize>) -> Result<[B::Tensor; 3]> {
        let Shape { heads, groups, width } = self.shape;
        // Keys and values first: if x is opened for them, it is opened whole, and a part of it with it.
        let v = scaled(b, self.value.forward(b, x)?, self.stream)?;
        let v = split_heads(b, &v, groups)?;
        let k = split_heads(b, &self.key.forward(b, x)?, groups)?;
        let rows = match only {
            Some(i) => b.narrow(x, 1, i, 1)?,
            None => x.clone(),
        };
        let q = split_heads(b, &self.query.forward(b, &rows)?, heads)?;
        let (q, k) = (scene.rotate(b, &q, only)?, scene.rotate(b, &k, None)?);
        let q = match self.score_scale {
            Some(scale) => b.scale(&q, scale)?,
            None => q,
        };
        let (batch, each, _) = rank3(b, &rows)?;
        let q = b.reshape(&q, &[batch, groups, heads / groups * each, width])?;
        Ok([q, k, v])
    }

    fn softmax(
        &self,
        b: &B,
        [q, k, v]: [B::Tensor; 3],
        scene: &Scene<B>,
        only: Option<usize>,
        (bound, mask, unknown): (f64, f64, bool),
    ) -> Result<B::Tensor> {
        b.prepare(&[&q, &k, &v])?;
        let scores = b.matmul(&q, &b.transpose(&k, 2, 3)?)?;
        let attend = |scores: &B::Tensor, bound| b.attend(scores, &v, &SoftmaxSpec { bound });
        match scene.allowed(b, only)? {
            None => attend(&scores, bound),
            Some(allowed) if unknown => {
                // For a calibration: the bound that is wanted is that of the scores before the mask.
                b.softmax(&scores, &SoftmaxSpec { bound })?;
                attend(&b.add(&scores, &below(b, &allowed, mask, 0.0)?)?, bound)
            }
            Some(allowed) => {
                // From -bound - mask to bound: moved to the middle.
                let middle = 0.5 * mask;
                let masked = b.add(&scores, &below(b, &allowed, mask, middle)?)?;
                attend(&masked, bound + middle)
            }
        }
    }
}

/// `shift` where `allowed` is 1 and `shift - depth` where it is 0.
fn below<B: Backend>(b: &B, allowed: &B::Tensor, depth: f64, shift: f64) -> Result<B::Tensor> {
    let scaled = b.scale(allowed, depth)?;
    let offset = b.input(Owner::Public, &[1; 4], Some(&[(shift - depth) as f32]))?;
    b.add(&scaled, &offset)
}

impl Rfa {
    /// phi(q) (sum_j phi(k_j) [v_j | 1]), its first part divided by its last column.
    fn attend<B: Backend>(
        &self,
        b: &B,
        [q, k, v]: [B::Tensor; 3],
        scene: &Scene<B>,
        only: Option<usize>,
    ) -> Result<B::Tensor> {
        let (rows, tokens) = (b.dims(&q)[2], b.dims(&k)[2]);
        let [batch, groups, _, width] = b.dims(&v)[..] else {
            return Err(Error::program("random features", "values are no heads"));
        };
        let both = b.cat(&[&q, &k], 2)?;
        // One round; values are then cut on that opening.
        b.prepare(&[&both, &v])?;
        let v = b.trim(&v)?;
        let phi = self.features(b, &both)?;
        let (phi_q, phi_k) = (b.narrow(&phi, 2, 0, rows)?, b.narrow(&phi, 2, rows, tokens)?);
        // [v_j | 1], in parts. Values of positions that are not there are taken out, and their ones with them; where all are there,
        // ones are public, and values are open but for their carry.
        let values = match &scene.keep {
            Some(keep) => {
                let keep = b.reshape(keep, &[batch, 1, tokens, 1])?;
                let spread = b.input(Owner::Public, &[1, groups, 1, 1], Some(&vec![1.0; groups]))?;
                vec![b.cat(&[&b.mul(&v, &keep)?, &b.mul(&keep, &spread)?], 3)?]
            }
            None => {
                let ones = vec![1.0; batch * groups * tokens];
                let ones = b.input(Owner::Public, &[batch, groups, tokens, 1], Some(&ones))?;
                vec![v, ones]
            }
        };
        let weigh = |weights: &B::Tensor| {
            let parts = values
                .iter()
                .map(|v| b.matmul(weights, v))
                .collect::<Result<Vec<_>>>()?;
            b.cat(&parts.iter().collect::<Vec<_>>(), 3)
        };
        // Of long texts means instead of sums, which keep products in range; a power of two costs nothing, here and below.
        let count = (self.features * tokens).div_ceil(SUMMED).next_power_of_two() as f64;
        let mixed = match scene.causal && only.is_none() {
            false => {
                b.prepare(&[&phi_q, &phi_k, &values[0]])?;
                let sum = weigh(&b.transpose(&phi_k, 2, 3)?)?;
                b.matmul(&phi_q, &b.scale(&b.trim(&sum)?, 1.0 / count)?)?
            }
            true => {
                let scores = b.matmul(&phi_q, &b.transpose(&phi_k, 2, 3)?)?;
                let scores = b.mul(&scores, &scene.triangle(b)?)?;
                weigh(&b.trim(&b.scale(&scores, 1.0 / count)?)?)?
            }
        };
        b.prepare(&[&mixed])?;
        let numerator = b.narrow(&mixed, 3, 0, width)?;
        let mut sum = b.scale(&b.narrow(&mixed, 3, width, 1)?, count)?;
        if scene.causal
            && only.is_none()
            && let Some(absent) = scene.absent(b)?
        {
            // Padding before the text may attend to nothing. No text reads it, but it must not divide by zero.
            sum = b.add(&sum, &absent)?;
        }
        let reciprocal = b.reciprocal(&sum, self.sum)?;
        // Where sums are large, numerators are too, and reciprocals have the more fractional bits: a power of two from one to the
        // other leaves their product with no more than a linear layer takes.
        let excess = b.fractional_bits(&reciprocal).saturating_sub(FRACTION) as i32;
        let shift = excess.min(self.sum.0.log2() as i32 + 1).max(0);
        let numerator = b.scale(&numerator, 2f64.powi(-shift))?;
        let reciprocal = b.scale(&reciprocal, 2f64.powi(shift))?;
        b.scale(&b.mul(&numerator, &reciprocal)?, count)
    }

    /// sin and cos of the projections of normalised rows: `[.., width]` to `[.., 2 features]`.
    fn features<B: Backend>(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let x = b.normalize(x, &self.norm)?;
        let [batch, groups, rows, width] = b.dims(&x)[..] else {
            return Err(Error::program("random features", "rows are no heads"));
        };
        // In turns, which fixed point reduces by itself.
        let turns: Vec<f32> = self
            .projections
            .iter()
            .map(|w| w / std::f32::consts::TAU)
            .collect();
        let w = b.input(Owner::Public, &[groups, width, self.features], Some(&turns))?;
        let x = b.reshape(&b.transpose(&x, 0, 1)?, &[groups, batch * rows, width])?;
        let x = b.reshape(&b.matmul(&x, &w)?, &[groups, batch, rows, self.features])?;
        let x = b.transpose(&x, 0, 1)?;
        let [sin, cos] = b.turns(&x)?;
        b.scale(&b.cat(&[&sin, &cos], 3)?, SHRUNK)
    }
}
