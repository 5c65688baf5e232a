//! The private part of CryptPEFT (Xia et al., NDSS 2026): adapters in one-way communication with a public backbone,
//! a final normalisation and a head.
//!
//! With the backbone's hidden states h_0 .. h_L and scope s:
//!
//! ```text
//! a = 0;  for i in L-s .. L-1:  u = a + h_i;  a = A_i(u) + u
//! logits = head(norm(h_L + a)[class token])
//! ```
//!
//! The backbone never sees a, so its owner runs it in the clear. Only the class token reaches the head: the last
//! adapter is evaluated for that token alone, the others for all.
//!
//! A model is trained in the plain form and served in the folded one ([`fold`]): every norm's affine part, the scale
//! of the scores and of the branches are then part of a neighbouring linear layer, and in the last adapter query and
//! key weights are one matrix a head, value and output weights another, so that keys and values are never formed.

use serde::{Deserialize, Serialize};
use veiltune_engine::{Backend, NormSpec, Params, Result};
use veiltune_hub::{Array, Tensors};

use crate::layers::{Linear, Norm, join_heads, rank3, split_heads};
use crate::{Error, Result as ModelResult};

/// The method's name in an artefact.
pub const PEFT_TYPE: &str = "CRYPTPEFT";

/// Architecture and calibration; public.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwcConfig {
    /// Width d of the backbone.
    pub hidden_size: usize,
    /// Tokens n, the class token included.
    pub tokens: usize,
    /// Adapters s.
    pub scope: usize,
    /// Width r within an adapter.
    pub rank: usize,
    /// Attention heads h; they divide the rank.
    pub heads: usize,
    /// Factor of each adapter's output.
    pub scale: f64,
    /// Calibrated norms of each adapter, the first first.
    pub norms: Vec<AdapterNorms>,
    /// Calibrated final norm.
    pub final_norm: NormSpec,
    /// Names of the classes.
    pub labels: Vec<String>,
    /// Whether the weights are in the folded form.
    #[serde(default)]
    pub folded: bool,
}

/// The norms of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterNorms {
    /// Before the attention.
    pub attention: NormSpec,
    /// Before the MLP.
    pub mlp: NormSpec,
}

impl OwcConfig {
    /// Refuses what no model has.
    pub fn check(&self) -> ModelResult<()> {
        let sizes = [
            self.hidden_size,
            self.tokens,
            self.scope,
            self.rank,
            self.heads,
            self.labels.len(),
        ];
        if sizes.iter().any(|n| !(1..=1 << 16).contains(n)) {
            return Err(Error::Config("a size of the adapter is zero or absurd".into()));
        }
        if !self.rank.is_multiple_of(self.heads) {
            return Err(Error::Config(format!(
                "rank {} is no multiple of {} heads",
                self.rank, self.heads
            )));
        }
        if self.norms.len() != self.scope {
            return Err(Error::Config(format!(
                "{} adapters, norms for {}",
                self.scope,
                self.norms.len()
            )));
        }
        let specs = self
            .norms
            .iter()
            .flat_map(|n| [n.attention, n.mlp])
            .chain([self.final_norm]);
        for NormSpec {
            eps,
            sigma: (low, high),
            ..
        } in specs
        {
            if !(eps > 0.0 && 0.0 < low && low < high && high.is_finite()) {
                return Err(Error::Config(format!(
                    "norm with eps {eps} and sigma {low} ..= {high}"
                )));
            }
        }
        if !self.scale.is_finite() {
            return Err(Error::Config("scale is not finite".into()));
        }
        Ok(())
    }

    /// Of all of a backbone's hidden states, those that [`Owc::forward`] takes, the last at the class token.
    pub fn states<B: Backend>(&self, b: &B, hidden: &[B::Tensor]) -> Result<Vec<B::Tensor>> {
        let Some(start) = hidden.len().checked_sub(self.scope + 1) else {
            return Err(wrong_states(self.scope, hidden.len()));
        };
        let (last, whole) = hidden[start..].split_last().expect("at least one is taken");
        Ok(whole.iter().cloned().chain([b.narrow(last, 1, 0, 1)?]).collect())
    }
}

/// Adapters, norm and head.
pub struct Owc<B: Backend> {
    adapters: Vec<Adapter<B>>,
    norm: Norm<B>,
    head: Linear<B>,
}

impl<B: Backend> Owc<B> {
    /// In the form that `config.folded` says.
    pub fn load(p: &Params<B>, config: &OwcConfig) -> ModelResult<Self> {
        config.check()?;
        let adapters = (0..config.scope).map(|i| Adapter::load(&p.pp("adapters").pp(i), config, i));
        Ok(Owc {
            adapters: adapters.collect::<Result<_>>()?,
            norm: Norm::load(
                &p.pp("norm"),
                config.hidden_size,
                config.final_norm,
                !config.folded,
            )?,
            head: Linear::load(&p.pp("head"), config.hidden_size, config.labels.len(), true)?,
        })
    }

    /// Logits `[batch, classes]` from the last s + 1 hidden states: the first s whole, `[batch, tokens, d]`, and the
    /// last at the class token, `[batch, 1, d]`.
    pub fn forward(&self, b: &B, hidden: &[B::Tensor]) -> Result<B::Tensor> {
        let [first, rest @ ..] = hidden else {
            return Err(wrong_states(self.adapters.len(), 0));
        };
        if rest.len() != self.adapters.len() {
            return Err(wrong_states(self.adapters.len(), hidden.len()));
        }
        // Each adapter's result is added to the next hidden state at once.
        let mut u = first.clone();
        for (adapter, next) in self.adapters.iter().zip(rest) {
            u = b.add(&adapter.forward(b, &u)?, next)?;
        }
        self.classify(b, &u)
    }

    fn classify(&self, b: &B, z: &B::Tensor) -> Result<B::Tensor> {
        let logits = self.head.forward(b, &self.norm.forward(b, z)?)?;
        let (batch, _, classes) = rank3(b, &logits)?;
        b.reshape(&logits, &[batch, classes])
    }
}

fn wrong_states(scope: usize, given: usize) -> veiltune_engine::Error {
    let detail = format!("{scope} adapters take {} hidden states, {given} given", scope + 1);
    veiltune_engine::Error::program("adapter", detail)
}

/// A(u) + u, where A is `scale * up(Block(down(u)))`.
struct Adapter<B: Backend> {
    down: Linear<B>,
    norm1: Norm<B>,
    attention: Attention<B>,
    norm2: Norm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    up: Linear<B>,
    /// None: part of `up`.
    scale: Option<f64>,
}

/// Which tokens come out.
enum Attention<B: Backend> {
    All(LinAtten<B>),
    Class(LinAtten<B>),
    ClassFolded(ClassAtten<B>),
}

impl<B: Backend> Adapter<B> {
    fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let (d, r, block) = (c.hidden_size, c.rank, p.pp("block"));
        let (last, norms) = (index + 1 == c.scope, c.norms[index]);
        let attention = block.pp("attn");
        Ok(Adapter {
            down: Linear::load(&p.pp("down"), d, r, true)?,
            norm1: Norm::load(&block.pp("norm1"), r, norms.attention, !c.folded)?,
            attention: match (last, c.folded) {
                (false, _) => Attention::All(LinAtten::load(&attention, c)?),
                (true, false) => Attention::Class(LinAtten::load(&attention, c)?),
                (true, true) => Attention::ClassFolded(ClassAtten::load(&attention, c)?),
            },
            norm2: Norm::load(&block.pp("norm2"), r, norms.mlp, !c.folded)?,
            fc1: Linear::load(&block.pp("fc1"), r, r, true)?,
            fc2: Linear::load(&block.pp("fc2"), r, r, true)?,
            up: Linear::load(&p.pp("up"), r, d, true)?,
            scale: (!c.folded).then_some(c.scale),
        })
    }

    fn forward(&self, b: &B, u: &B::Tensor) -> Result<B::Tensor> {
        let x = self.down.forward(b, u)?;
        let normal = self.norm1.forward(b, &x)?;
        match &self.attention {
            Attention::All(a) => self.rest(b, u, &x, &a.forward(b, &normal)?),
            Attention::Class(a) => self.class_only(b, u, &x, &a.forward_class(b, &normal)?),
            Attention::ClassFolded(a) => self.class_only(b, u, &x, &a.forward(b, &normal)?),
        }
    }

    fn class_only(&self, b: &B, u: &B::Tensor, x: &B::Tensor, attended: &B::Tensor) -> Result<B::Tensor> {
        self.rest(b, &b.narrow(u, 1, 0, 1)?, &b.narrow(x, 1, 0, 1)?, attended)
    }

    /// What follows the attention is done token by token.
    fn rest(&self, b: &B, u: &B::Tensor, x: &B::Tensor, attended: &B::Tensor) -> Result<B::Tensor> {
        let x = b.add(x, attended)?;
        let hidden = b.relu(&self.fc1.forward(b, &self.norm2.forward(b, &x)?)?)?;
        let x = b.add(&x, &self.fc2.forward(b, &hidden)?)?;
        let mut a = self.up.forward(b, &x)?;
        if let Some(scale) = self.scale {
            a = b.scale(&a, scale)?;
        }
        b.add(&a, u)
    }
}

/// Attention without softmax: a head's scores `S = Q K^T / sqrt(width)`, mixed along the tokens by one learned
/// matrix, `P = S W^T + c`, and `O = P V`; then an output projection.
struct LinAtten<B: Backend> {
    qkv: Linear<B>,
    mix: B::Weight,
    mix_bias: B::Weight,
    proj: Linear<B>,
    heads: usize,
    rank: usize,
    /// None: part of `qkv`.
    scale: Option<f64>,
}

impl<B: Backend> LinAtten<B> {
    fn load(p: &Params<B>, c: &OwcConfig) -> Result<Self> {
        let (n, r) = (c.tokens, c.rank);
        Ok(LinAtten {
            // A norm's folded bias becomes one here.
            qkv: Linear::load(&p.pp("qkv"), r, 3 * r, c.folded)?,
            mix: p.pp("mix").get("weight", &[n, n])?,
            mix_bias: p.pp("mix").get("bias", &[1, n])?,
            proj: Linear::load(&p.pp("proj"), r, r, true)?,
            heads: c.heads,
            rank: r,
            scale: (!c.folded).then(|| 1.0 / (r as f64 / c.heads as f64).sqrt()),
        })
    }

    /// All tokens. Without a softmax the product can be associated from the right,
    /// `P V = Q ((W K)^T V) + c V`, so that nothing of size n * n is formed.
    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let [q, k, v] = self.heads(b, x)?;
        let mixed = b.linear(&b.transpose(&k, 2, 3)?, &self.mix, None)?;
        let constant = b.transpose(&b.linear(&b.transpose(&v, 2, 3)?, &self.mix_bias, None)?, 2, 3)?;
        b.prepare(&[&mixed, &v])?;
        let inner = b.matmul(&mixed, &v)?;
        b.prepare(&[&q, &inner])?;
        let out = b.add(&b.matmul(&q, &inner)?, &constant)?;
        self.proj.forward(b, &join_heads(b, &out)?)
    }

    /// The class token alone, `[batch, 1, rank]`: one row of scores a head.
    fn forward_class(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let [q, k, v] = self.heads(b, x)?;
        let q = b.narrow(&q, 2, 0, 1)?;
        b.prepare(&[&q, &k, &v])?;
        let scores = b.matmul(&q, &b.transpose(&k, 2, 3)?)?;
        let shares = b.add_weight(&b.linear(&scores, &self.mix, None)?, &self.mix_bias)?;
        self.proj.forward(b, &join_heads(b, &b.matmul(&shares, &v)?)?)
    }

    /// Scaled queries, keys and values, each `[batch, heads, tokens, width]`.
    fn heads(&self, b: &B, x: &B::Tensor) -> Result<[B::Tensor; 3]> {
        let qkv = self.qkv.forward(b, x)?;
        // Opened here, the three parts share one opening however they are turned.
        b.prepare(&[&qkv])?;
        let part = |i| split_heads(b, &b.narrow(&qkv, 2, i * self.rank, self.rank)?, self.heads);
        let q = match self.scale {
            Some(c) => b.scale(&part(0)?, c)?,
            None => part(0)?,
        };
        Ok([q, part(1)?, part(2)?])
    }
}

/// [`LinAtten`] of the class token, folded. With x the normalised rows and x_0 the class token's, a head's scores are
/// `(M x_0 + m) x^T + (c x_0 + e)`, and its output `V (P x) + v sum(P)`: both maps are one linear layer for all heads.
struct ClassAtten<B: Backend> {
    /// Rank to heads * rank queries against x, then heads constants.
    query: Linear<B>,
    mix: B::Weight,
    mix_bias: B::Weight,
    /// Heads * rank mixed rows, then heads sums, to rank.
    value: Linear<B>,
    heads: usize,
}

impl<B: Backend> ClassAtten<B> {
    fn load(p: &Params<B>, c: &OwcConfig) -> Result<Self> {
        let (n, r, wide) = (c.tokens, c.rank, c.heads * (c.rank + 1));
        Ok(ClassAtten {
            query: Linear::load(&p.pp("query"), r, wide, true)?,
            mix: p.pp("mix").get("weight", &[n, n])?,
            mix_bias: p.pp("mix").get("bias", &[1, n])?,
            value: Linear::load(&p.pp("value"), wide, r, true)?,
            heads: c.heads,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let (batch, _, r) = rank3(b, x)?;
        let h = self.heads;
        // Opened whole: the class token's row, and x twice as an operand, reuse it.
        b.prepare(&[x])?;
        let query = self.query.forward(b, &b.narrow(x, 1, 0, 1)?)?;
        b.prepare(&[&query])?;
        let constant = b.reshape(&b.narrow(&query, 2, h * r, h)?, &[batch, h, 1])?;
        let query = b.reshape(&b.narrow(&query, 2, 0, h * r)?, &[batch, h, r])?;
        let scores = b.add(&b.matmul(&query, &b.transpose(x, 1, 2)?)?, &constant)?;
        let shares = b.add_weight(&b.linear(&scores, &self.mix, None)?, &self.mix_bias)?;
        let rows = b.reshape(&b.matmul(&shares, x)?, &[batch, 1, h * r])?;
        let sums = b.reshape(&b.sum(&shares, 2)?, &[batch, 1, h])?;
        self.value.forward(b, &b.cat(&[&rows, &sums], 2)?)
    }
}

/// Turns trained weights into the folded form, and the configuration with them. Folded ones are returned as they are.
pub fn fold(config: &OwcConfig, tensors: &Tensors) -> ModelResult<(OwcConfig, Tensors)> {
    config.check()?;
    if config.folded {
        return Ok((config.clone(), tensors.clone()));
    }
    let (d, r, n) = (config.hidden_size, config.rank, config.tokens);
    let from = Source(tensors);
    let mut out = Tensors::new();
    for i in 0..config.scope {
        let (at, block) = (format!("adapters.{i}"), format!("adapters.{i}.block"));
        let attn = format!("{block}.attn");
        put(
            &mut out,
            &format!("{at}.down"),
            from.map(&format!("{at}.down"), r, d)?,
        );
        let qkv = Affine::unbiased(from.get(&format!("{attn}.qkv.weight"), &[3 * r, r])?, r);
        let qkv = qkv
            .after(&from, &format!("{block}.norm1"))?
            .scaled_rows(0..r, (r as f64 / config.heads as f64).powf(-0.5));
        let proj = from.map(&format!("{attn}.proj"), r, r)?;
        if i + 1 < config.scope {
            put(&mut out, &format!("{attn}.qkv"), qkv);
            put(&mut out, &format!("{attn}.proj"), proj);
        } else {
            put(&mut out, &format!("{attn}.query"), query_map(&qkv, config));
            put(&mut out, &format!("{attn}.value"), value_map(&qkv, &proj, config));
        }
        for (name, dims) in [("mix.weight", [n, n]), ("mix.bias", [1, n])] {
            let name = format!("{attn}.{name}");
            out.insert(
                name.clone(),
                Array {
                    dims: dims.to_vec(),
                    values: narrow(from.get(&name, &dims)?),
                },
            );
        }
        let fc1 = from
            .map(&format!("{block}.fc1"), r, r)?
            .after(&from, &format!("{block}.norm2"))?;
        put(&mut out, &format!("{block}.fc1"), fc1);
        put(
            &mut out,
            &format!("{block}.fc2"),
            from.map(&format!("{block}.fc2"), r, r)?,
        );
        put(
            &mut out,
            &format!("{at}.up"),
            from.map(&format!("{at}.up"), d, r)?
                .scaled_rows(0..d, config.scale),
        );
    }
    put(
        &mut out,
        "head",
        from.map("head", config.labels.len(), d)?.after(&from, "norm")?,
    );
    Ok((
        OwcConfig {
            folded: true,
            scale: 1.0,
            ..config.clone()
        },
        out,
    ))
}

/// `K^T Q` a head: rank to `[heads, rank]` queries against the rows, then `[heads]` constants from the keys' bias.
fn query_map(qkv: &Affine, c: &OwcConfig) -> Affine {
    let (r, width) = (c.rank, c.rank / c.heads);
    let mut map = Affine::zero(c.heads * (r + 1), r);
    for h in 0..c.heads {
        for row in h * width..(h + 1) * width {
            for j in 0..r {
                map.add_row(h * r + j, qkv, row, qkv.weight[(r + row) * r + j]);
            }
            map.add_row(c.heads * r + h, qkv, row, qkv.bias[r + row]);
        }
    }
    map
}

/// `proj V` a head: `[heads, rank]` mixed rows, then `[heads]` sums of shares for the values' bias, to rank.
fn value_map(qkv: &Affine, proj: &Affine, c: &OwcConfig) -> Affine {
    let (r, width) = (c.rank, c.rank / c.heads);
    let wide = c.heads * (r + 1);
    let mut map = Affine::zero(r, wide);
    map.bias.clone_from(&proj.bias);
    for o in 0..r {
        for row in 0..r {
            let (h, factor) = (row / width, proj.weight[o * r + row]);
            for j in 0..r {
                map.weight[o * wide + h * r + j] += factor * qkv.weight[(2 * r + row) * r + j];
            }
            map.weight[o * wide + c.heads * r + h] += factor * qkv.bias[2 * r + row];
        }
    }
    map
}

/// x W^T + b in double precision, `W [rows, columns]`.
struct Affine {
    columns: usize,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Affine {
    fn zero(rows: usize, columns: usize) -> Self {
        Affine {
            columns,
            weight: vec![0.0; rows * columns],
            bias: vec![0.0; rows],
        }
    }

    fn unbiased(weight: Vec<f64>, columns: usize) -> Self {
        Affine {
            bias: vec![0.0; weight.len() / columns],
            columns,
            weight,
        }
    }

    /// The norm's gain and bias, applied before, become part of this map.
    fn after(mut self, from: &Source, norm: &str) -> ModelResult<Self> {
        let gain = from.get(&format!("{norm}.weight"), &[self.columns])?;
        let shift = from.get(&format!("{norm}.bias"), &[self.columns])?;
        for (row, bias) in self.weight.chunks_mut(self.columns).zip(&mut self.bias) {
            *bias += row.iter().zip(&shift).map(|(w, s)| w * s).sum::<f64>();
            row.iter_mut().zip(&gain).for_each(|(w, g)| *w *= g);
        }
        Ok(self)
    }

    fn scaled_rows(mut self, rows: std::ops::Range<usize>, by: f64) -> Self {
        let span = rows.start * self.columns..rows.end * self.columns;
        self.weight[span]
            .iter_mut()
            .chain(&mut self.bias[rows])
            .for_each(|v| *v *= by);
        self
    }

    fn add_row(&mut self, to: usize, from: &Affine, row: usize, factor: f64) {
        let source = &from.weight[row * from.columns..][..from.columns];
        self.weight[to * self.columns..]
            .iter_mut()
            .zip(source)
            .for_each(|(w, s)| *w += factor * s);
        self.bias[to] += factor * from.bias[row];
    }
}

/// Trained weights, with their shapes checked.
struct Source<'a>(&'a Tensors);

impl Source<'_> {
    fn get(&self, name: &str, dims: &[usize]) -> ModelResult<Vec<f64>> {
        let array = self
            .0
            .get(name)
            .ok_or_else(|| Error::Config(format!("no tensor {name}")))?;
        if array.dims != dims || array.values.len() != dims.iter().product::<usize>() {
            return Err(Error::Config(format!(
                "tensor {name} is {:?}, not {dims:?}",
                array.dims
            )));
        }
        Ok(array.values.iter().map(|&v| v as f64).collect())
    }

    fn map(&self, name: &str, rows: usize, columns: usize) -> ModelResult<Affine> {
        let weight = self.get(&format!("{name}.weight"), &[rows, columns])?;
        Ok(Affine {
            columns,
            weight,
            bias: self.get(&format!("{name}.bias"), &[rows])?,
        })
    }
}

fn put(out: &mut Tensors, name: &str, map: Affine) {
    let rows = map.bias.len();
    out.insert(
        format!("{name}.weight"),
        Array {
            dims: vec![rows, map.columns],
            values: narrow(map.weight),
        },
    );
    out.insert(
        format!("{name}.bias"),
        Array {
            dims: vec![rows],
            values: narrow(map.bias),
        },
    );
}

fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use veiltune_engine::{Owner, Plain};

    use super::*;
    use crate::load::params;
    use crate::testing::{noise, owc_config, random};

    /// Hidden states of two pictures, all whole.
    fn hidden(c: &OwcConfig) -> Vec<Tensor> {
        (0..=c.scope)
            .map(|i| noise(&[2, c.tokens, c.hidden_size], 10 + i as u64))
            .collect()
    }

    fn states(c: &OwcConfig) -> Vec<Tensor> {
        c.states(&Plain::new(), &hidden(c)).unwrap()
    }

    fn assert_near(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let size = a.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let apart = (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(size > 0.1 && apart < 1e-4 * size, "{apart} apart at size {size}");
    }

    fn logits(c: &OwcConfig, tensors: &Tensors) -> Tensor {
        let b = Plain::new();
        Owc::load(&params(&b, Owner::Public, tensors), c)
            .unwrap()
            .forward(&b, &states(c))
            .unwrap()
    }

    #[test]
    fn folded_equals_trained() {
        for scope in [1, 2, 3] {
            let config = owc_config(scope);
            let tensors = random(|p| Owc::load(p, &config));
            let (folded, served) = fold(&config, &tensors).unwrap();
            assert!(folded.folded && !served.keys().any(|name| name.contains("norm")));
            assert_near(&logits(&folded, &served), &logits(&config, &tensors));
            assert_eq!(
                fold(&folded, &served).unwrap(),
                (folded, served),
                "folding again changes nothing"
            );
        }
    }

    #[test]
    fn the_class_token_alone_equals_all_tokens() {
        let b = Plain::new();
        for scope in [1, 2] {
            let config = owc_config(scope);
            let tensors = random(|p| Owc::load(p, &config));
            let mut model = Owc::load(&params(&b, Owner::Public, &tensors), &config).unwrap();
            let short = model.forward(&b, &states(&config)).unwrap();

            let last = model.adapters.pop().unwrap();
            let Attention::Class(attention) = last.attention else {
                panic!("the last is for the class token")
            };
            model.adapters.push(Adapter {
                attention: Attention::All(attention),
                ..last
            });
            let full = hidden(&config);
            let mut u = full[0].clone();
            for (adapter, next) in model.adapters.iter().zip(&full[1..]) {
                u = b.add(&adapter.forward(&b, &u).unwrap(), next).unwrap();
            }
            let class = b.narrow(&u, 1, 0, 1).unwrap();
            assert_near(&short, &model.classify(&b, &class).unwrap());
        }
    }

    #[test]
    fn attention_is_its_definition() -> candle_core::Result<()> {
        let (b, c) = (Plain::new(), owc_config(1));
        let (r, n, width) = (c.rank, c.tokens, c.rank / c.heads);
        let tensors = random(|p| LinAtten::<Plain>::load(p, &c).map_err(Error::from));
        let model = LinAtten::load(&params(&b, Owner::Public, &tensors), &c).unwrap();
        let x = noise(&[1, n, r], 3);
        let got = model.forward(&b, &x).unwrap();

        let get = |name: &str| {
            Tensor::from_slice(&tensors[name].values, tensors[name].dims.as_slice(), &Device::Cpu)
        };
        let qkv = x.squeeze(0)?.matmul(&get("qkv.weight")?.t()?)?;
        let mut heads = Vec::new();
        for h in 0..c.heads {
            let part = |i: usize| qkv.narrow(1, i * r + h * width, width);
            let scores = (part(0)?.matmul(&part(1)?.t()?)? / (width as f64).sqrt())?;
            let shares = scores
                .matmul(&get("mix.weight")?.t()?)?
                .broadcast_add(&get("mix.bias")?)?;
            heads.push(shares.matmul(&part(2)?.contiguous()?)?);
        }
        let joined = Tensor::cat(&heads, 1)?;
        let want = joined
            .matmul(&get("proj.weight")?.t()?)?
            .broadcast_add(&get("proj.bias")?)?
            .unsqueeze(0)?;
        assert_near(&got, &want);
        Ok(())
    }

    #[test]
    fn gradients_reach_every_parameter() {
        let (b, config) = (Plain::new(), owc_config(2));
        let tensors = random(|p| Owc::load(p, &config));
        let var = |a: &Array| {
            let values = Tensor::from_slice(&a.values, a.dims.as_slice(), &Device::Cpu).unwrap();
            Var::from_tensor(&values).unwrap()
        };
        let vars: std::collections::BTreeMap<_, _> =
            tensors.iter().map(|(n, a)| (n.clone(), var(a))).collect();
        let p = Params::<Plain>::new(|name, _| Ok(vars[name].as_tensor().clone()));
        let model = Owc::load(&p, &config).unwrap();
        let loss = model
            .forward(&b, &states(&config))
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap();
        let grads = loss.backward().unwrap();
        for (name, var) in &vars {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = grad.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
        }
    }

    #[test]
    fn impossible_configurations_and_states_are_refused() {
        let good = owc_config(1);
        let mut norm = good.final_norm;
        norm.sigma = (1.0, 0.5);
        for bad in [
            OwcConfig {
                heads: 3,
                ..good.clone()
            },
            OwcConfig {
                scope: 2,
                ..good.clone()
            },
            OwcConfig {
                rank: 0,
                ..good.clone()
            },
            OwcConfig {
                tokens: usize::MAX,
                ..good.clone()
            },
            OwcConfig {
                scale: f64::NAN,
                ..good.clone()
            },
            OwcConfig {
                final_norm: norm,
                ..good.clone()
            },
        ] {
            assert!(matches!(bad.check(), Err(Error::Config(_))));
        }
        let (b, tensors) = (Plain::new(), random(|p| Owc::load(p, &good)));
        let model = Owc::load(&params(&b, Owner::Public, &tensors), &good).unwrap();
        assert!(model.forward(&b, &[]).is_err());
        assert!(model.forward(&b, &hidden(&good)[..1]).is_err());
        assert!(good.states(&b, &hidden(&good)[..1]).is_err());
    }
}
