//! Architecture and calibrated ranges of a language model: all that is public about it.

use serde::{Deserialize, Serialize};
use veiltune_engine::plain::{Site, Verb};
use veiltune_engine::{Activation, NormKind, NormSpec, Range, SoftmaxSpec};

use crate::{Error, Result};

/// Which layout: names in a checkpoint, and where the norms are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Encoder with norms after each branch (Devlin et al., NAACL 2019). MiniLM is one.
    Bert,
    /// The same with other names and positions that start at 2 (Liu et al., 2019).
    Roberta,
    /// The same with one layer's weights for all layers and narrower word vectors (Lan et al., ICLR 2020).
    Albert,
    /// Causal decoder: RMSNorm before each branch, SwiGLU, rotary positions, grouped-query attention.
    Llama,
}

impl Family {
    /// Of a `model_type` in a `config.json` of the model hub.
    pub fn of_type(name: &str) -> Option<Family> {
        match name {
            "bert" => Some(Family::Bert),
            "roberta" | "xlm-roberta" | "camembert" => Some(Family::Roberta),
            "albert" => Some(Family::Albert),
            "llama" => Some(Family::Llama),
            _ => None,
        }
    }

    /// Whether a position attends to itself and those before it alone.
    pub fn causal(self) -> bool {
        self == Family::Llama
    }
}

/// The MLP's activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// x * Phi(x).
    #[serde(alias = "gelu_python")]
    Gelu,
    /// Its approximation by a hyperbolic tangent. It is computed as [`HiddenAct::Gelu`], from which it is at most 4.8e-4 away.
    #[serde(alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluNew,
    /// max(x, 0).
    Relu,
    /// x * sigmoid(x).
    #[serde(alias = "swish")]
    Silu,
}

impl HiddenAct {
    /// The smooth function; None of ReLU, which needs no range.
    pub(crate) fn smooth(self) -> Option<Activation> {
        match self {
            HiddenAct::Gelu | HiddenAct::GeluNew => Some(Activation::Gelu),
            HiddenAct::Relu => None,
            HiddenAct::Silu => Some(Activation::Silu),
        }
    }
}

/// How positions attend to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Attention {
    /// Exactly as the model was trained.
    #[default]
    Softmax,
    /// Random feature attention (Peng et al., ICLR 2021): linear in the number of tokens.
    Rfa {
        /// D random projections, and so 2 D features. 64 is usual.
        features: usize,
        /// What the public projections are drawn from.
        seed: u64,
    },
}

/// Calibrated ranges of one layer's attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum AttentionRanges {
    /// Of [`Attention::Softmax`].
    Softmax {
        /// |score| is at most this, of masked positions too, before they are masked.
        bound: f64,
        /// What is taken off the score of a masked position.
        mask: f64,
    },
    /// Of [`Attention::Rfa`].
    Rfa {
        /// Root mean square of a query's or a key's entries.
        norm: NormSpec,
        /// Of each group of heads that share keys: normalised queries and keys are multiplied by the root of it, so that their
        /// product takes the place of the score.
        temperature: Vec<f64>,
        /// Smallest and largest denominator.
        sum: (f64, f64),
    },
}

/// Calibrated ranges of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerRanges {
    /// The attention's.
    pub attention: AttentionRanges,
    /// The norm before the attention (Llama) or after it.
    pub attention_norm: NormSpec,
    /// Input of the MLP's activation.
    pub activation: Range,
    /// The norm before the MLP (Llama) or after it.
    pub mlp_norm: NormSpec,
    /// The residual stream is kept divided by 2 to the power of this: some entries of a Llama's are too large for fixed point.
    #[serde(default)]
    pub stream: u32,
}

/// Architecture, attention and calibration; public.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LanguageConfig {
    /// Layout.
    pub family: Family,
    /// Rows of the word table.
    pub vocab_size: usize,
    /// Width of a word vector; only ALBERT's is not [`LanguageConfig::hidden_size`].
    pub embedding_size: usize,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// The MLP's activation.
    pub hidden_act: HiddenAct,
    /// Most tokens; rows of the position table, without those before [`LanguageConfig::position_offset`]. May be lowered: only
    /// the rows that are left are then part of the program.
    pub max_positions: usize,
    /// Row of the stored position table for the first token.
    pub position_offset: usize,
    /// Rows of the table of token types, the first of which all tokens have; 0: there is none.
    pub type_vocab_size: usize,
    /// Added to variances.
    pub norm_eps: f64,
    /// Base of the rotary positions' wavelengths.
    pub rope_theta: f64,
    /// Whether queries, keys, values and the attention's output have biases.
    pub attention_bias: bool,
    /// Whether the word table also gives the logits.
    pub tied: bool,
    /// Whether there is a masked-LM head.
    pub has_head: bool,
    /// Kind of attention.
    pub attention: Attention,
    /// The norm of the embeddings (unless Llama).
    pub embedding_norm: NormSpec,
    /// Of each layer, also where layers share their weights.
    pub layers: Vec<LayerRanges>,
    /// The norm after the last layer (Llama).
    pub final_norm: NormSpec,
    /// Input of the activation in the masked-LM head.
    pub head_activation: Range,
    /// The norm in the masked-LM head.
    pub head_norm: NormSpec,
    /// Whether weights are in the folded form: see [`super::fold`].
    #[serde(default)]
    pub folded: bool,
}

/// Bound of scores, before it is known.
const UNKNOWN: f64 = 1e9;
/// Depth of a mask while the scores' bound is unknown: far below any score, and no score loses its last bits beside it.
const DEEP: f64 = 1e4;
/// A masked position keeps at most exp(-12) = 6e-6 of the largest weight.
const MASKED: f64 = 12.0;
/// Widest range of an activation without a guard; beyond it a Fourier sum would need too many terms.
const PLAIN_RANGE: f64 = 12.0;
/// Where a guard sets in. SiLU is further from its asymptotes than GELU is: 3e-5 at 13.
const GUARDED: (f64, f64) = (8.0, 13.0);
/// Largest entry of a residual stream, and the most that it may be divided by to get there, as a power of two: fixed point has
/// room for 50 fractional bits and values below 2^12. The first token of a causal model may have entries of 100,000 (Sun et al.,
/// "Massive activations in large language models", COLM 2024).
const STREAM: (f64, u32) = (2048.0, 8);
/// The most that a stream may be divided by without being truncated: a product's result comes with 46 fractional bits.
const FREE: u32 = 4;

impl AttentionRanges {
    fn unknown(kind: Attention, groups: usize, eps: f64) -> Self {
        match kind {
            Attention::Softmax => AttentionRanges::Softmax {
                bound: UNKNOWN,
                mask: DEEP,
            },
            Attention::Rfa { .. } => AttentionRanges::Rfa {
                norm: unknown_norm(NormKind::Rms, eps),
                temperature: vec![1.0; groups],
                sum: (1e-9, 1e9),
            },
        }
    }

    /// Whether scores are to be noted before they are masked.
    pub(crate) fn is_unknown(&self) -> bool {
        matches!(self, AttentionRanges::Softmax { bound, .. } if *bound >= UNKNOWN)
    }
}

fn unknown_norm(kind: NormKind, eps: f64) -> NormSpec {
    NormSpec {
        kind,
        eps,
        sigma: (1e-9, 1e9),
    }
}

impl LanguageConfig {
    /// With ranges that hold anything: for float interpreters, until they are calibrated. What `self` has as ranges is
    /// replaced.
    pub fn with_attention(mut self, attention: Attention) -> Self {
        self.attention = attention;
        let kind = self.norm_kind();
        let norm = unknown_norm(kind, self.norm_eps);
        let layer = LayerRanges {
            attention: AttentionRanges::unknown(attention, self.num_key_value_heads, self.norm_eps),
            attention_norm: norm,
            activation: Range::Exact,
            mlp_norm: norm,
            stream: 0,
        };
        self.embedding_norm = norm;
        self.layers = vec![layer; self.num_hidden_layers];
        self.final_norm = norm;
        self.head_activation = Range::Exact;
        self.head_norm = norm;
        self
    }

    fn norm_kind(&self) -> NormKind {
        match self.family {
            Family::Llama => NormKind::Rms,
            _ => NormKind::Layer,
        }
    }

    /// Refuses what no model has, and sizes that would only exhaust memory.
    pub fn check(&self) -> Result<()> {
        let refuse = |detail: String| Err(Error::Config(detail));
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("embedding_size", self.embedding_size, 1 << 16),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 12),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("max_positions", self.max_positions, 1 << 24),
        ];
        for (name, value, most) in sizes {
            if !(1..=most).contains(&value) {
                return refuse(format!("{name} is {value}; 1 to {most} is possible"));
            }
        }
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        let llama = self.family == Family::Llama;
        if heads % groups != 0 || (!llama && heads != groups) {
            return refuse(format!(
                "{heads} heads of queries for {groups} of keys and values"
            ));
        }
        if !llama && heads * self.head_dim != self.hidden_size {
            return refuse(format!(
                "{heads} heads of width {} in a hidden state of {}",
                self.head_dim, self.hidden_size
            ));
        }
        if llama && !self.head_dim.is_multiple_of(2) {
            return refuse(format!(
                "rotary positions in a head of odd width {}",
                self.head_dim
            ));
        }
        if self.family != Family::Albert && self.embedding_size != self.hidden_size {
            return refuse(format!(
                "word vectors of width {} in a hidden state of {}",
                self.embedding_size, self.hidden_size
            ));
        }
        let finite = |v: f64| v.is_finite() && v > 0.0;
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) || (llama && !finite(self.rope_theta)) {
            return refuse(format!(
                "norm_eps {} and rope_theta {}",
                self.norm_eps, self.rope_theta
            ));
        }
        if self.layers.len() != self.num_hidden_layers {
            return refuse(format!(
                "ranges of {} layers of {}",
                self.layers.len(),
                self.num_hidden_layers
            ));
        }
        if let Attention::Rfa { features, .. } = self.attention
            && !(1..=1 << 12).contains(&features)
        {
            return refuse(format!("{features} random features"));
        }
        for layer in &self.layers {
            if layer.stream > STREAM.1 || (layer.stream > 0 && !llama) {
                return refuse(format!("a stream divided by 2^{}", layer.stream));
            }
            match (&layer.attention, self.attention) {
                (AttentionRanges::Softmax { .. }, Attention::Softmax) => {}
                (AttentionRanges::Rfa { temperature, .. }, Attention::Rfa { .. })
                    if temperature.len() == groups && temperature.iter().all(|&t| finite(t)) => {}
                _ => return refuse("ranges of another kind of attention".into()),
            }
        }
        Ok(())
    }

    /// The same in the folded form, which private runs take: see [`super::fold`].
    pub fn served(&self) -> Self {
        LanguageConfig {
            folded: true,
            ..self.clone()
        }
    }

    /// What the stream of layer `index` is multiplied by; that of the last layer is also the model's.
    pub(crate) fn stream(&self, index: usize) -> f64 {
        0.5f64.powi(self.layers[index].stream as i32)
    }

    /// Whether the stream has to be truncated where it becomes that of layer `index`.
    pub(crate) fn stream_is_cut(&self, index: usize) -> bool {
        let stream = |i: usize| self.layers[i].stream;
        stream(index) > FREE.max(index.checked_sub(1).map_or(0, stream))
    }

    /// Query heads for each head of keys and values.
    pub(crate) fn heads_per_group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Sets each range to a usual one, for a prediction of costs before there are texts to calibrate on: they depend on ranges
    /// a little.
    pub fn presume(&mut self) {
        let sigma = (0.25, 8.0);
        let activation = Range::Within(PLAIN_RANGE);
        for layer in &mut self.layers {
            match &mut layer.attention {
                AttentionRanges::Softmax { bound, mask } => (*bound, *mask) = masked(16.0),
                AttentionRanges::Rfa { norm, sum, .. } => {
                    norm.sigma = sigma;
                    *sum = (0.05, 64.0);
                }
            }
            layer.attention_norm.sigma = sigma;
            layer.mlp_norm.sigma = sigma;
            layer.activation = activation;
        }
        for norm in [
            &mut self.embedding_norm,
            &mut self.final_norm,
            &mut self.head_norm,
        ] {
            norm.sigma = sigma;
        }
        self.head_activation = activation;
    }

    /// Halves the temperatures of layers whose denominators came near zero; whether there are any.
    pub(crate) fn lower_temperatures(&mut self, seen: &[Site]) -> bool {
        let least = match self.attention {
            Attention::Softmax => return false,
            Attention::Rfa { features, .. } => super::attention::noise(features),
        };
        let sums = seen.iter().filter(|s| s.verb == Verb::Reciprocal);
        let mut lowered = false;
        for (layer, site) in self.layers.iter_mut().zip(sums) {
            if let AttentionRanges::Rfa { temperature, .. } = &mut layer.attention
                && site.range.is_none_or(|(low, _)| low < least)
            {
                temperature.iter_mut().for_each(|t| *t *= 0.5);
                lowered = true;
            }
        }
        lowered
    }

    /// Sets each range to what `seen` has, widened by `margin` on both sides. `self` must be unfolded, and not yet calibrated; what
    /// was seen are passes of `embed`, `forward` (or `hidden`) and, if there is a masked-LM head and it is to be used, `logits`,
    /// by [`veiltune_engine::Plain::recording`].
    pub fn calibrate(&mut self, seen: &[Site], margin: f64) -> Result<()> {
        if self.folded
            || self
                .layers
                .iter()
                .any(|l| matches!(&l.attention, AttentionRanges::Softmax { bound, .. } if *bound < UNKNOWN))
        {
            return Err(Error::Config(
                "calibration starts from a model that is neither calibrated nor folded".into(),
            ));
        }
        let mut seen = Seen {
            sites: seen.iter().peekable(),
            margin,
        };
        let guard = match self.hidden_act.smooth() {
            Some(Activation::Silu) => GUARDED.1,
            _ => GUARDED.0,
        };
        let smooth = self.hidden_act.smooth().is_some();
        let llama = self.family == Family::Llama;
        if !llama {
            seen.norm(&mut self.embedding_norm)?;
        }
        let mut largest = Vec::new();
        for layer in &mut self.layers {
            if llama {
                let before = seen.norm(&mut layer.attention_norm)?;
                seen.attention(&mut layer.attention)?;
                largest.push([before, seen.norm(&mut layer.mlp_norm)?]);
                if smooth {
                    seen.activation(&mut layer.activation, guard)?;
                }
            } else {
                seen.attention(&mut layer.attention)?;
                seen.norm(&mut layer.attention_norm)?;
                if smooth {
                    seen.activation(&mut layer.activation, guard)?;
                }
                seen.norm(&mut layer.mlp_norm)?;
            }
        }
        if llama {
            largest.push([seen.norm(&mut self.final_norm)?, 0.0]);
            let mut stream = 0;
            for (layer, around) in self.layers.iter_mut().zip(largest.windows(2)) {
                let largest = around[0][0].max(around[0][1]).max(around[1][0]);
                let wanted = (largest / STREAM.0).log2().ceil().max(0.0) as u32;
                // What was once large stays so for most layers; a change would cost a truncation.
                stream = stream.max(wanted.min(STREAM.1));
                layer.stream = stream;
            }
        }
        if self.has_head && seen.sites.peek().is_some() {
            if smooth {
                seen.activation(&mut self.head_activation, guard)?;
            }
            seen.norm(&mut self.head_norm)?;
        }
        match seen.sites.next() {
            None => Ok(()),
            Some(site) => Err(Error::Config(format!(
                "calibration met {:?} after the end of the model",
                site.verb
            ))),
        }
    }
}

/// Bound and mask of scores |s| <= bound: a masked one is [`MASKED`] below any other.
fn masked(bound: f64) -> (f64, f64) {
    (bound, 2.0 * bound + MASKED)
}

/// What calibration has yet to distribute.
struct Seen<'a> {
    sites: std::iter::Peekable<std::slice::Iter<'a, Site>>,
    margin: f64,
}

impl Seen<'_> {
    fn next(&mut self, verb: Verb) -> Result<Site> {
        match self.sites.next() {
            Some(site) if site.verb == verb => Ok(*site),
            found => Err(Error::Config(format!(
                "calibration met {:?} where the model has {verb:?}; run the model on some texts first",
                found.map(|s| s.verb)
            ))),
        }
    }

    fn range(&mut self, verb: Verb) -> Result<(f64, f64)> {
        match self.next(verb)?.range {
            Some((low, high)) if low > 0.0 && high.is_finite() => {
                // Where a token's massive activations take most of the room of a norm, the rest is for the margin.
                let most = match verb {
                    Verb::Normalize => (0.999 * NormSpec::RATIO * low / high).sqrt().max(1.0),
                    _ => f64::INFINITY,
                };
                let margin = self.margin.min(most);
                Ok((low / margin, high * margin))
            }
            range => Err(Error::Config(format!(
                "calibration saw the range {range:?} of {verb:?}, which must be positive"
            ))),
        }
    }

    /// And the largest entry, widened.
    fn norm(&mut self, spec: &mut NormSpec) -> Result<f64> {
        let largest = self.sites.peek().map_or(0.0, |s| s.input);
        spec.sigma = self.range(Verb::Normalize)?;
        Ok(largest * self.margin)
    }

    fn activation(&mut self, range: &mut Range, guard: f64) -> Result<()> {
        let bound = self.next(Verb::Activation)?.input * self.margin;
        *range = match bound <= PLAIN_RANGE {
            true => Range::Within(bound.max(0.25)),
            false => Range::Guarded(guard),
        };
        Ok(())
    }

    fn attention(&mut self, ranges: &mut AttentionRanges) -> Result<()> {
        match ranges {
            AttentionRanges::Softmax { bound, mask } => {
                let seen = self.next(Verb::Softmax)?.input;
                // Masked scores take as much room again.
                let most = 0.5 * (SoftmaxSpec::WIDE - MASKED);
                (*bound, *mask) = masked(seen * self.margin.min((most / seen).max(1.0)));
                // The masked scores of an uncalibrated model follow those before the mask.
                self.sites.next_if(|s| s.verb == Verb::Softmax);
            }
            AttentionRanges::Rfa { norm, sum, .. } => {
                self.norm(norm)?;
                *sum = self.range(Verb::Reciprocal)?;
            }
        }
        Ok(())
    }
}
