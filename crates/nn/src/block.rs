//! A block of a vision transformer: pre-norm attention and MLP, plain, tuned or folded.

use veiltune_engine::{Activation, Backend, NormSpec, Params, Range, Result};

use crate::attention::AttentionSpec;
use crate::layers::{Linear, Norm, join_heads, split_heads};
use crate::layout::Names;
use crate::vit::{HiddenAct, VitConfig};

/// What a block is made of beyond its backbone's architecture.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub config: &'a VitConfig,
    pub names: &'static Names,
    pub norms: [NormSpec; 2],
    pub attention: AttentionSpec,
    pub range: Range,
    /// Norms' affine parts, the scales of scores, branches and QuickGELU are in the neighbouring linear layers.
    pub folded: bool,
    /// Low-rank changes: rank, factor, and which of query, key and value.
    pub lora: Option<(usize, f64, [bool; 3])>,
    /// AdaptFormer's branch beside the MLP: width and factor.
    pub adapter: Option<(usize, f64)>,
}

/// Pre-norm attention and MLP.
pub(crate) struct Block<B: Backend> {
    norm1: Norm<B>,
    qkv: [Linear<B>; 3],
    lora: [Option<Lora<B>>; 3],
    attention: AttentionSpec,
    out: Linear<B>,
    scale1: Option<B::Weight>,
    norm2: Norm<B>,
    fc1: Linear<B>,
    act: HiddenAct,
    range: Range,
    fc2: Linear<B>,
    scale2: Option<B::Weight>,
    adapter: Option<Parallel<B>>,
    heads: usize,
    /// Factor of the scores; None: part of the queries.
    score_scale: Option<f64>,
    /// Factor before and after QuickGELU's SiLU; None: part of the MLP.
    quick: Option<f64>,
}

/// The factor within [`HiddenAct::QuickGelu`].
pub(crate) const QUICK: f64 = 1.702;

impl<B: Backend> Block<B> {
    pub fn load(p: &Params<B>, parts: &Parts) -> Result<Self> {
        let (c, names, affine) = (parts.config, parts.names, !parts.folded);
        let d = c.hidden_size;
        let bias = c.qkv_bias || parts.folded;
        let qkv = |i: usize| Linear::load(&p.pp(names.qkv[i]), d, d, bias);
        let lora = |i: usize| match parts.lora {
            Some((rank, factor, which)) if which[i] && affine => {
                Lora::load(&p.pp(names.qkv[i]), d, rank, factor).map(Some)
            }
            _ => Ok(None),
        };
        let scale = |name| (c.layer_scale && affine).then(|| p.get(name, &[d])).transpose();
        let adapter = parts
            .adapter
            .map(|(width, factor)| Parallel::load(&p.pp(ADAPTER), d, width, affine.then_some(factor)));
        Ok(Block {
            norm1: Norm::load(&p.pp(names.norm1), d, parts.norms[0], affine)?,
            qkv: [qkv(0)?, qkv(1)?, qkv(2)?],
            lora: [lora(0)?, lora(1)?, lora(2)?],
            attention: parts.attention,
            out: Linear::load(&p.pp(names.out), d, d, true)?,
            scale1: scale(names.scale1)?,
            norm2: Norm::load(&p.pp(names.norm2), d, parts.norms[1], affine)?,
            fc1: Linear::load(&p.pp(names.fc1), d, c.intermediate_size, true)?,
            act: c.hidden_act,
            range: parts.range,
            fc2: Linear::load(&p.pp(names.fc2), c.intermediate_size, d, true)?,
            scale2: scale(names.scale2)?,
            adapter: adapter.transpose()?,
            heads: c.num_attention_heads,
            score_scale: affine.then(|| 1.0 / ((d / c.num_attention_heads) as f64).sqrt()),
            quick: affine.then_some(QUICK),
        })
    }

    /// `[batch, tokens, d]` to the same shape.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        self.rest(b, x, &self.norm1.forward(b, x)?, false)
    }

    /// The class token's output alone, `[batch, 1, d]`.
    pub fn forward_class(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        self.rest(b, &b.narrow(x, 1, 0, 1)?, &self.norm1.forward(b, x)?, true)
    }

    /// From a normalised input that still lacks the norm's affine part, unless this block is folded; x is the class token alone
    /// if `class` says that only its output is wanted.
    pub fn forward_normalised(
        &self,
        b: &B,
        x: &B::Tensor,
        normalised: &B::Tensor,
        class: bool,
    ) -> Result<B::Tensor> {
        self.rest(b, x, &self.norm1.affine(b, normalised)?, class)
    }

    fn rest(&self, b: &B, x: &B::Tensor, normal: &B::Tensor, class: bool) -> Result<B::Tensor> {
        let x = branch(b, x, self.attend(b, normal, class)?, &self.scale1)?;
        let y = self.fc1.forward(b, &self.norm2.forward(b, &x)?)?;
        let y = match (self.act, self.quick) {
            (HiddenAct::Gelu, _) => b.activation(&y, Activation::Gelu, self.range)?,
            (HiddenAct::QuickGelu, Some(quick)) => {
                let y = b.activation(&b.scale(&y, quick)?, Activation::Silu, self.range)?;
                b.scale(&y, 1.0 / quick)?
            }
            (HiddenAct::QuickGelu, None) => b.activation(&y, Activation::Silu, self.range)?,
            (HiddenAct::Relu, _) => b.relu(&y)?,
        };
        let out = branch(b, &x, self.fc2.forward(b, &y)?, &self.scale2)?;
        match &self.adapter {
            Some(adapter) => b.add(&out, &adapter.forward(b, &x)?),
            None => Ok(out),
        }
    }

    fn attend(&self, b: &B, x: &B::Tensor, class: bool) -> Result<B::Tensor> {
        let part = |i: usize, x: &B::Tensor| -> Result<B::Tensor> {
            let y = self.qkv[i].forward(b, x)?;
            let y = match &self.lora[i] {
                Some(lora) => b.add(&y, &lora.forward(b, x)?)?,
                None => y,
            };
            split_heads(b, &y, self.heads)
        };
        // Keys and values first: if x is opened for them, it is opened whole, and the class token's row with it.
        let (v, k) = (part(2, x)?, part(1, x)?);
        let q = match class {
            true => part(0, &b.narrow(x, 1, 0, 1)?)?,
            false => part(0, x)?,
        };
        let q = match self.score_scale {
            Some(scale) => b.scale(&q, scale)?,
            None => q,
        };
        b.prepare(&[&q, &k, &v])?;
        let scores = b.matmul(&q, &b.transpose(&k, 2, 3)?)?;
        self.out
            .forward(b, &join_heads(b, &self.attention.attend(b, &scores, &v)?)?)
    }
}

fn branch<B: Backend>(b: &B, x: &B::Tensor, y: B::Tensor, scale: &Option<B::Weight>) -> Result<B::Tensor> {
    match scale {
        Some(s) => b.add(x, &b.mul_weight(&y, s)?),
        None => b.add(x, &y),
    }
}

/// A low-rank change of a linear layer, `factor * (x A^T) B^T` (LoRA, Hu et al., ICLR 2022).
struct Lora<B: Backend> {
    a: Linear<B>,
    b: Linear<B>,
    factor: f64,
}

impl<B: Backend> Lora<B> {
    fn load(p: &Params<B>, d: usize, rank: usize, factor: f64) -> Result<Self> {
        Ok(Lora {
            a: Linear::load(&p.pp("lora_A"), d, rank, false)?,
            b: Linear::load(&p.pp("lora_B"), rank, d, false)?,
            factor,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        b.scale(&self.b.forward(b, &self.a.forward(b, x)?)?, self.factor)
    }
}

/// Name of AdaptFormer's branch within a block.
pub(crate) const ADAPTER: &str = "adapter";

/// A bottleneck beside the MLP, `factor * up(relu(down(x)))` (AdaptFormer, Chen et al., NeurIPS 2022).
struct Parallel<B: Backend> {
    down: Linear<B>,
    up: Linear<B>,
    /// None: part of `up`.
    factor: Option<f64>,
}

impl<B: Backend> Parallel<B> {
    fn load(p: &Params<B>, d: usize, width: usize, factor: Option<f64>) -> Result<Self> {
        Ok(Parallel {
            down: Linear::load(&p.pp("down"), d, width, true)?,
            up: Linear::load(&p.pp("up"), width, d, true)?,
            factor,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let y = self.up.forward(b, &b.relu(&self.down.forward(b, x)?)?)?;
        match self.factor {
            Some(factor) => b.scale(&y, factor),
            None => Ok(y),
        }
    }
}
