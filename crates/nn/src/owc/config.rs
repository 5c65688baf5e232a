//! What is public about an adapter: its architecture and its calibration.

use serde::{Deserialize, Serialize};
use veiltune_engine::{NormKind, NormSpec};

use crate::attention::{AttentionKind, AttentionSpec};
use crate::method::{Calibrated, Read, Tokens};
use crate::{Error, Result};

/// Which norm stands in the adapters and before the head; training and serving share the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormChoice {
    /// LayerNorm, as in the paper: a protocol at each place.
    #[default]
    Layer,
    /// BatchNorm of each feature: part of the neighbouring layers when served.
    Batch,
}

/// What an adapter does between its projections down to the rank and up again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Branch {
    /// A transformer block, as in the paper.
    #[default]
    Transformer,
    /// Nothing: LoRA, forced into one-way communication.
    Linear,
    /// ReLU: AdaptFormer, forced into one-way communication.
    Relu,
}

/// What is chosen before anything is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Design {
    /// Attention heads h; they divide the rank.
    pub heads: usize,
    /// Width r within an adapter.
    pub rank: usize,
    /// Adapters s.
    pub scope: usize,
    /// Factor of each adapter's output.
    pub scale: f64,
    /// Norms.
    pub norm: NormChoice,
    /// Kind of adapter.
    pub branch: Branch,
    /// Its attention, if it has any.
    pub attention: AttentionKind,
}

impl Design {
    /// The paper's, with (h, r, s).
    pub fn new(heads: usize, rank: usize, scope: usize) -> Self {
        Design {
            heads,
            rank,
            scope,
            scale: 0.5,
            norm: NormChoice::default(),
            branch: Branch::default(),
            attention: AttentionKind::default(),
        }
    }
}

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
    /// Factor of each adapter's output; in the folded form, where those have it, of the hidden states that they are added to.
    pub scale: f64,
    /// Which norms.
    #[serde(default)]
    pub norm: NormChoice,
    /// Kind of adapter.
    #[serde(default)]
    pub branch: Branch,
    /// Attention of each adapter, the first first; none: LinAtten in all of them, or a branch without attention.
    #[serde(default)]
    pub attention: Vec<AttentionSpec>,
    /// Calibrated norms of each adapter, the first first; none unless [`Branch::Transformer`] has [`NormChoice::Layer`].
    pub norms: Vec<AdapterNorms>,
    /// Calibrated final norm; unused by [`NormChoice::Batch`].
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

/// Holds anything; private interpreters refuse it.
const UNCALIBRATED: NormSpec = NormSpec {
    kind: NormKind::Layer,
    eps: 1e-6,
    sigma: (1e-3, 1e3),
};

/// The power of two, at most one, that brings a sigma to 16 or less: then what the norm gives has so few fractional bits that
/// a linear layer takes it as it is.
fn moderating(sigma: f64) -> f64 {
    (16.0 / sigma).log2().floor().min(0.0).exp2()
}

/// The RMSNorm that gives for `factor` times a centred x what `norm` gives for x.
fn of_scaled(norm: NormSpec, factor: f64) -> NormSpec {
    NormSpec {
        kind: NormKind::Rms,
        eps: norm.eps * factor * factor,
        sigma: (norm.sigma.0 * factor, norm.sigma.1 * factor),
    }
}

impl OwcConfig {
    /// Not yet calibrated, for a backbone of this width and number of tokens.
    pub fn new(design: &Design, hidden_size: usize, tokens: usize, labels: Vec<String>) -> Self {
        let Design {
            heads,
            rank,
            scope,
            scale,
            norm,
            branch,
            attention,
        } = *design;
        let block = branch == Branch::Transformer;
        let norms = AdapterNorms {
            attention: UNCALIBRATED,
            mlp: UNCALIBRATED,
        };
        OwcConfig {
            hidden_size,
            tokens,
            scope,
            rank,
            heads,
            scale,
            norm,
            branch,
            attention: vec![attention.uncalibrated(); if block { scope } else { 0 }],
            norms: vec![
                norms;
                if block && norm == NormChoice::Layer {
                    scope
                } else {
                    0
                }
            ],
            final_norm: UNCALIBRATED,
            labels,
            folded: false,
        }
    }

    /// Refuses what no model has.
    pub fn check(&self) -> Result<()> {
        let refuse = |detail: String| Err(Error::Config(detail));
        let sizes = [
            self.hidden_size,
            self.tokens,
            self.scope,
            self.rank,
            self.heads,
            self.labels.len(),
        ];
        if sizes.iter().any(|n| !(1..=1 << 16).contains(n)) {
            return refuse("a size of the adapter is zero or absurd".into());
        }
        if !self.rank.is_multiple_of(self.heads) {
            return refuse(format!(
                "rank {} is no multiple of {} heads",
                self.rank, self.heads
            ));
        }
        let block = self.branch == Branch::Transformer;
        let layer = self.norm == NormChoice::Layer;
        let wanted = if block && layer { self.scope } else { 0 };
        if self.norms.len() != wanted {
            return refuse(format!(
                "{} calibrated norms of adapters, not {wanted}",
                self.norms.len()
            ));
        }
        let wanted = if block { self.scope } else { 0 };
        if !self.attention.is_empty() && self.attention.len() != wanted {
            return refuse(format!(
                "attention of {} adapters, not {wanted}",
                self.attention.len()
            ));
        }
        let norms = self.norms.iter().flat_map(|n| [n.attention, n.mlp]);
        for norm in norms.chain(layer.then_some(self.final_norm)) {
            let NormSpec {
                eps,
                sigma: (low, high),
                ..
            } = norm;
            if !(eps > 0.0 && 0.0 < low && low < high && high.is_finite()) {
                return refuse(format!("norm with eps {eps} and sigma {low} ..= {high}"));
            }
        }
        for attention in &self.attention {
            let sound = match *attention {
                AttentionSpec::Softmax { bound } => bound > 0.0,
                AttentionSpec::TwoQuad { sum } | AttentionSpec::ReluSoftmax { sum } => {
                    0.0 < sum.0 && sum.0 < sum.1
                }
                AttentionSpec::LinAtten | AttentionSpec::Scaled => true,
            };
            if !sound {
                return refuse(format!("attention with the range {attention:?}"));
            }
        }
        if !self.scale.is_finite() {
            return refuse("scale is not finite".into());
        }
        Ok(())
    }

    /// The inputs of [`Owc::forward`](super::Owc::forward); `layers` is the number of the backbone's blocks.
    ///
    /// The folded form with LayerNorm sums the class token's states without their means.
    pub fn reads(&self, layers: usize) -> Result<Vec<Read>> {
        let start = layers
            .checked_sub(self.scope)
            .ok_or_else(|| Error::Config(format!("scope {} on a backbone of {layers} blocks", self.scope)))?;
        // Without attention, other tokens never reach the class token.
        let tokens = match self.branch {
            Branch::Transformer => Tokens::All,
            Branch::Linear | Branch::Relu => Tokens::Class,
        };
        let centred = self.folded && self.norm == NormChoice::Layer;
        let last = if centred { start } else { layers };
        let class = (last..=layers).map(|i| Read {
            centred,
            ..Read::hidden(i, Tokens::Class)
        });
        Ok((start..layers)
            .map(|i| Read::hidden(i, tokens))
            .chain(class)
            .collect())
    }

    /// The configuration of the folded form.
    pub fn served(&self) -> OwcConfig {
        if self.folded {
            return self.clone();
        }
        let mut served = self.clone();
        (served.folded, served.scale) = (true, self.final_factor());
        served.final_norm = of_scaled(self.final_norm, self.final_factor());
        for (i, norms) in served.norms.iter_mut().enumerate() {
            let factor = self.stream_factor(i);
            norms.attention = of_scaled(norms.attention, factor);
            norms.mlp = of_scaled(norms.mlp, factor);
        }
        served
    }

    /// What the folded stream of adapter `index` is multiplied by.
    pub(super) fn stream_factor(&self, index: usize) -> f64 {
        self.norms
            .get(index)
            .map_or(1.0, |n| moderating(n.attention.sigma.1.max(n.mlp.sigma.1)))
    }

    /// What the input of the folded final norm is multiplied by.
    pub(super) fn final_factor(&self) -> f64 {
        match self.norm {
            NormChoice::Layer => moderating(self.final_norm.sigma.1),
            NormChoice::Batch => 1.0,
        }
    }

    /// The calibrated ranges in the order of a forward pass.
    pub(crate) fn calibrated(&mut self) -> Vec<Calibrated<'_>> {
        let mut all = Vec::new();
        let mut norms = self.norms.iter_mut();
        let mut attention = self.attention.iter_mut();
        for _ in 0..self.scope {
            let norms = norms.next();
            let (first, second) = norms.map(|n| (&mut n.attention, &mut n.mlp)).unzip();
            all.extend(first.map(Calibrated::Norm));
            all.extend(attention.next().and_then(|a| a.calibrated()));
            all.extend(second.map(Calibrated::Norm));
        }
        if self.norm == NormChoice::Layer {
            all.push(Calibrated::Norm(&mut self.final_norm));
        }
        all
    }

    /// The names of the batch norms in program order, which is the order of
    /// [`Plain::statistics`](veiltune_engine::Plain::statistics): `NAME.running_mean` and `NAME.running_var` are the parameters
    /// that a trainer follows those statistics with. Neither has a gradient.
    pub fn batch_norms(&self) -> Vec<String> {
        if self.norm == NormChoice::Layer {
            return Vec::new();
        }
        let adapters = match self.branch {
            Branch::Transformer => self.scope,
            Branch::Linear | Branch::Relu => 0,
        };
        let inner = (0..adapters).flat_map(|i| [1, 2].map(|n| format!("adapters.{i}.block.norm{n}")));
        inner.chain(["norm".to_owned()]).collect()
    }

    /// Attention of adapter `index`.
    pub fn attention_of(&self, index: usize) -> AttentionSpec {
        self.attention
            .get(index)
            .copied()
            .unwrap_or(AttentionSpec::LinAtten)
    }

    /// Width of the folded stream within an adapter: its mean is apart where its norms want none.
    pub(crate) fn stream(&self) -> usize {
        self.rank + usize::from(!self.norms.is_empty())
    }
}
