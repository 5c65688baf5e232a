//! The adapters' attention.

use veiltune_engine::{Backend, Owner, Params, Result};

use super::OwcConfig;
use crate::attention::AttentionSpec;
use crate::layers::{Linear, join_heads, rank3, settled, split_heads};

/// From scores to weights.
struct Weighting<B: Backend> {
    spec: AttentionSpec,
    /// LinAtten: a matrix that mixes the scores of a row, and a constant, `P = S W^T + c`.
    mix: Option<(B::Weight, B::Weight)>,
}

impl<B: Backend> Weighting<B> {
    fn load(p: &Params<B>, c: &OwcConfig, spec: AttentionSpec) -> Result<Self> {
        let (p, n) = (p.pp("mix"), c.tokens);
        let mix = match spec {
            AttentionSpec::LinAtten => Some((p.get("weight", &[n, n])?, p.get("bias", &[1, n])?)),
            _ => None,
        };
        Ok(Weighting { spec, mix })
    }

    fn forward(&self, b: &B, scores: &B::Tensor) -> Result<B::Tensor> {
        match &self.mix {
            Some((mix, constant)) => b.add_weight(&b.linear(scores, mix, None)?, constant),
            None => self.spec.weights(b, &settled(b, scores)?),
        }
    }

    fn attend(&self, b: &B, scores: &B::Tensor, values: &B::Tensor) -> Result<B::Tensor> {
        match &self.mix {
            Some(_) => b.matmul(&self.forward(b, scores)?, values),
            None => self.spec.attend(b, &settled(b, scores)?, values),
        }
    }
}

/// A head's scores are `S = Q K^T / sqrt(width)`, its output is `O = P V` with weights P made of S; an output projection
/// follows.
pub(super) struct Attention<B: Backend> {
    qkv: Linear<B>,
    weighting: Weighting<B>,
    proj: Linear<B>,
    heads: usize,
    rank: usize,
    /// None: part of `qkv`.
    scale: Option<f64>,
}

impl<B: Backend> Attention<B> {
    pub fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let r = c.rank;
        let out = if c.folded { c.stream() } else { r };
        Ok(Attention {
            // A norm's folded bias becomes one here.
            qkv: Linear::load(&p.pp("qkv"), r, 3 * r, c.folded)?,
            weighting: Weighting::load(p, c, c.attention_of(index))?,
            proj: Linear::load(&p.pp("proj"), r, out, true)?,
            heads: c.heads,
            rank: r,
            scale: (!c.folded).then(|| 1.0 / (r as f64 / c.heads as f64).sqrt()),
        })
    }

    /// All tokens. Without a function of each score, the product can be associated from the right,
    /// `P V = Q ((W K)^T V) + c V`, so that nothing of size n * n is formed.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let [q, k, v] = self.heads(b, x)?;
        let kt = b.transpose(&k, 2, 3)?;
        let out = match &self.weighting.mix {
            Some((mix, constant)) => {
                // c is one more row of (W K)^T.
                let mut shape = b.dims(&kt);
                let width = std::mem::replace(&mut shape[2], 1);
                let zeros = vec![0.0; shape.iter().product()];
                let zeros = b.input(Owner::Public, &shape, Some(&zeros))?;
                let mixed = b.linear(&kt, mix, None)?;
                let mixed = b.cat(&[&mixed, &b.add_weight(&zeros, constant)?], 2)?;
                let inner = b.matmul(&mixed, &v)?;
                let rows = b.matmul(&q, &b.narrow(&inner, 2, 0, width)?)?;
                b.add(&rows, &b.narrow(&inner, 2, width, 1)?)?
            }
            None => self.weighting.attend(b, &b.matmul(&q, &kt)?, &v)?,
        };
        self.proj.forward(b, &join_heads(b, &out)?)
    }

    /// The class token alone, `[batch, 1, rank]`: one row of scores a head.
    pub fn forward_class(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let [q, k, v] = self.heads(b, x)?;
        let scores = b.matmul(&b.narrow(&q, 2, 0, 1)?, &b.transpose(&k, 2, 3)?)?;
        let out = self.weighting.attend(b, &scores, &v)?;
        self.proj.forward(b, &join_heads(b, &out)?)
    }

    /// Scaled queries, keys and values, each `[batch, heads, tokens, width]`.
    fn heads(&self, b: &B, x: &B::Tensor) -> Result<[B::Tensor; 3]> {
        let qkv = settled(b, &self.qkv.forward(b, x)?)?;
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

/// [`Attention`] of the class token, folded. With x the normalised rows and x_0 the class token's, a head's scores are
/// `(M x_0 + m) x^T + (c x_0 + e)`, and its output `V (P x) + v sum(P)`: both maps are one linear layer for all heads.
pub(super) struct ClassAttention<B: Backend> {
    /// Rank to heads * rank queries against x, then heads constants.
    query: Linear<B>,
    weighting: Weighting<B>,
    /// Heads * rank mixed rows, then heads sums, to the stream.
    value: Linear<B>,
    heads: usize,
}

impl<B: Backend> ClassAttention<B> {
    pub fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let (r, wide) = (c.rank, c.heads * (c.rank + 1));
        Ok(ClassAttention {
            query: Linear::load(&p.pp("query"), r, wide, true)?,
            weighting: Weighting::load(p, c, c.attention_of(index))?,
            value: Linear::load(&p.pp("value"), wide, c.stream(), true)?,
            heads: c.heads,
        })
    }

    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let (batch, _, r) = rank3(b, x)?;
        let h = self.heads;
        let x = &settled(b, x)?;
        // Opened whole: the class token's row, and x twice as an operand, reuse it.
        b.prepare(&[x])?;
        let query = self.query.forward(b, &b.narrow(x, 1, 0, 1)?)?;
        let constant = b.reshape(&b.narrow(&query, 2, h * r, h)?, &[batch, h, 1])?;
        let query = b.reshape(&b.narrow(&query, 2, 0, h * r)?, &[batch, h, r])?;
        let scores = b.add(&b.matmul(&query, &b.transpose(x, 1, 2)?)?, &constant)?;
        let shares = self.weighting.forward(b, &scores)?;
        let rows = b.reshape(&b.matmul(&shares, x)?, &[batch, 1, h * r])?;
        let sums = b.reshape(&b.sum(&shares, 2)?, &[batch, 1, h])?;
        self.value.forward(b, &b.cat(&[&rows, &sums], 2)?)
    }
}
