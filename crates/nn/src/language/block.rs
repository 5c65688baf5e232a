//! A layer of a language model: attention and MLP, with norms after each branch (BERT) or before it (Llama), plain or folded.

use veiltune_engine::{Activation, Backend, NormSpec, Params, Range, Result};

use super::attention::{Scene, SelfAttention};
use super::config::{Family, LanguageConfig};
use crate::layers::Linear;

/// Names of a layer's norms.
pub(crate) const NORMS: [&str; 2] = ["attention_norm", "mlp_norm"];

/// Attention and MLP.
pub(crate) struct Block<B: Backend> {
    pub attention: SelfAttention<B>,
    norms: [Norm<B>; 2],
    mlp: Mlp<B>,
    order: Order<B>,
}

/// Where the norms are.
enum Order<B: Backend> {
    /// With the change of the stream's scale, and whether that takes more bits than fixed point has.
    Before { rescale: f64, cut: bool },
    /// With the gains of a folded model that residuals still need: of the norm before this layer (the first has none), and of the
    /// one after the attention.
    After { gains: [Option<B::Weight>; 2] },
}

impl<B: Backend> Block<B> {
    /// Layer number `index`; `p` is the whole model's.
    pub fn load(p: &Params<B>, c: &LanguageConfig, index: usize) -> Result<Self> {
        let (d, ranges) = (c.hidden_size, &c.layers[index]);
        let own = p.pp(weights_of(c, index));
        let attention = p.pp(weights_of_attention(c, index)).pp("attention");
        let bias = c.family != Family::Llama;
        let stream = c.stream(index);
        let norm =
            |i: usize, spec| Norm::load(&own.pp(NORMS[i]), d, of_scaled(spec, stream), !c.folded, bias);
        let gain = |p: &Params<B>, name: &str| p.pp(name).get("weight", &[1, d]).map(Some);
        let order = match c.family {
            Family::Llama => Order::Before {
                rescale: stream / index.checked_sub(1).map_or(1.0, |i| c.stream(i)),
                cut: c.stream_is_cut(index),
            },
            _ if !c.folded => Order::After { gains: [None, None] },
            _ => Order::After {
                gains: [
                    match index.checked_sub(1) {
                        Some(before) => gain(&p.pp(weights_of(c, before)), NORMS[1])?,
                        None => None,
                    },
                    gain(&own, NORMS[0])?,
                ],
            },
        };
        Ok(Block {
            attention: SelfAttention::load(&attention, c, index)?,
            norms: [norm(0, ranges.attention_norm)?, norm(1, ranges.mlp_norm)?],
            mlp: Mlp::load(&own.pp("mlp"), c, ranges.activation, stream)?,
            order,
        })
    }

    /// `[batch, tokens, d]` to the same shape, or to `[batch, 1, d]` for the position `only`.
    pub fn forward(&self, b: &B, x: &B::Tensor, scene: &Scene<B>, only: Option<usize>) -> Result<B::Tensor> {
        let rows = |x: &B::Tensor| match only {
            Some(i) => b.narrow(x, 1, i, 1),
            None => Ok(x.clone()),
        };
        let [norm1, norm2] = &self.norms;
        match &self.order {
            Order::Before { rescale, cut } => {
                let x = &scaled(b, x.clone(), *rescale)?;
                let x = &if *cut { b.trim(x)? } else { x.clone() };
                let mixed = self.attention.forward(b, &norm1.forward(b, x)?, scene, only)?;
                let x = b.add(&rows(x)?, &mixed)?;
                b.add(&x, &self.mlp.forward(b, &norm2.forward(b, &x)?)?)
            }
            Order::After { gains } => {
                let mixed = self.attention.forward(b, x, scene, only)?;
                let x = norm1.forward(b, &b.add(&gained(b, &rows(x)?, &gains[0])?, &mixed)?)?;
                let y = self.mlp.forward(b, &x)?;
                norm2.forward(b, &b.add(&gained(b, &x, &gains[1])?, &y)?)
            }
        }
    }
}

/// x times a power of two.
pub(crate) fn scaled<B: Backend>(b: &B, x: B::Tensor, by: f64) -> Result<B::Tensor> {
    if by == 1.0 { Ok(x) } else { b.scale(&x, by) }
}

/// The norm of `by` times what `spec` is for.
pub(crate) fn of_scaled(spec: NormSpec, by: f64) -> NormSpec {
    NormSpec {
        eps: spec.eps * by * by,
        sigma: (spec.sigma.0 * by, spec.sigma.1 * by),
        ..spec
    }
}

/// Where the weights of layer `index` are.
pub(crate) fn weights_of(c: &LanguageConfig, index: usize) -> String {
    match c.family {
        Family::Albert => "layers.0".into(),
        _ => format!("layers.{index}"),
    }
}

/// Where those of its attention are: in ALBERT's folded form the first layer's differs from that of the others.
fn weights_of_attention(c: &LanguageConfig, index: usize) -> String {
    match c.family {
        Family::Albert if c.folded => format!("layers.{}", index.min(1)),
        _ => weights_of(c, index),
    }
}

fn gained<B: Backend>(b: &B, x: &B::Tensor, gain: &Option<B::Weight>) -> Result<B::Tensor> {
    match gain {
        Some(gain) => b.mul_weight(x, gain),
        None => Ok(x.clone()),
    }
}

/// A norm over the last dimension, with gain `[1, width]` (a matrix, because those are opened before the first pass) and perhaps bias, unless they are folded into what follows.
pub(crate) struct Norm<B: Backend> {
    spec: NormSpec,
    gain: Option<B::Weight>,
    bias: Option<B::Weight>,
}

impl<B: Backend> Norm<B> {
    pub fn load(p: &Params<B>, width: usize, spec: NormSpec, affine: bool, bias: bool) -> Result<Self> {
        let gain = affine.then(|| p.get("weight", &[1, width]));
        let bias = (affine && bias).then(|| p.get("bias", &[width]));
        Ok(Norm {
            spec,
            gain: gain.transpose()?,
            bias: bias.transpose()?,
        })
    }

    /// In no more fractional bits than the several layers that read it take.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        b.trim(&self.affine(b, &b.normalize(x, &self.spec)?)?)
    }

    /// Gain and bias alone.
    pub fn affine(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let x = gained(b, x, &self.gain)?;
        match &self.bias {
            Some(bias) => b.add_weight(&x, bias),
            None => Ok(x),
        }
    }
}

/// The activation of a hidden layer, in its calibrated range.
pub(crate) fn activate<B: Backend>(
    b: &B,
    x: &B::Tensor,
    f: Option<Activation>,
    range: Range,
) -> Result<B::Tensor> {
    match f {
        Some(f) => b.activation(x, f, range),
        None => b.relu(x),
    }
}

/// down(f(up(x))), or down(f(gate(x)) * up(x)).
struct Mlp<B: Backend> {
    gate: Option<Linear<B>>,
    up: Linear<B>,
    down: Linear<B>,
    act: Option<Activation>,
    range: Range,
    /// Of the stream, for gated ones.
    stream: f64,
}

impl<B: Backend> Mlp<B> {
    fn load(p: &Params<B>, c: &LanguageConfig, range: Range, stream: f64) -> Result<Self> {
        let (d, width) = (c.hidden_size, c.intermediate_size);
        let gated = c.family == Family::Llama;
        let gate = gated.then(|| Linear::load(&p.pp("gate"), d, width, false));
        Ok(Mlp {
            gate: gate.transpose()?,
            up: Linear::load(&p.pp("up"), d, width, !gated)?,
            down: Linear::load(&p.pp("down"), width, d, !gated)?,
            act: c.hidden_act.smooth(),
            range,
            stream,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let up = self.up.forward(b, x)?;
        let y = match &self.gate {
            Some(gate) => {
                let gate = activate(b, &gate.forward(b, x)?, self.act, self.range)?;
                b.mul(&gate, &scaled(b, up, self.stream)?)?
            }
            None => activate(b, &up, self.act, self.range)?,
        };
        self.down.forward(b, &y)
    }
}
