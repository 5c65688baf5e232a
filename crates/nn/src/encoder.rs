//! Blocks of a vision transformer as private programs: the methods that one-way adapters are compared with.
//!
//! - two-way LoRA and AdaptFormer: the adapters feed back into the backbone, so that all of it runs privately, with
//!   public weights where the method leaves them as they are;
//! - the last k layers fine-tuned: private from there on;
//! - MPCViT (Zeng et al., ICCV 2023): a whole small model of the provider's own, with cheaper attention.
//!
//! The head is preceded by a norm of the provider's own. Only the class token reaches it: the last block's output is
//! computed for that token alone. The first private norm is applied to what the client knows, and so in the clear.
//!
//! A model is trained in the plain form and served in the folded one: the affine part of each norm, and the scales of scores,
//! branches and QuickGELU are part of the neighbouring linear layers, low-rank changes are added to the weights that they
//! change, and what writes into the residual stream has its mean removed, so that a LayerNorm becomes the cheaper RMSNorm.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use veiltune_engine::{Backend, NormKind, NormSpec, Owner, Params, Plain, Range, Result};
use veiltune_hub::{Array, Preprocess, Tensors};

use crate::affine::Affine;
use crate::attention::{AttentionKind, AttentionSpec};
use crate::block::{ADAPTER, Block, Parts, QUICK};
use crate::layers::{Linear, Norm, rank3};
use crate::layout::{Names, Variant};
use crate::load::inventory;
use crate::method::{Calibrated, Fetch, Read, State, Tokens};
use crate::vit::{HiddenAct, norm_spec};
use crate::{Error, Result as ModelResult, VitConfig};

/// The methods, by their names in an artefact.
pub const PEFT_TYPES: [&str; 4] = ["LORA", "ADAPTFORMER", "LAST_LAYERS", "MPCVIT"];

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "peft_type")]
pub enum Tuning {
    /// Low-rank changes of attention projections (Hu et al., ICLR 2022), with the fields of the PEFT library.
    #[serde(rename = "LORA")]
    Lora {
        /// Rank.
        r: usize,
        /// The change is scaled by `lora_alpha / r`.
        lora_alpha: f64,
        /// The layout's names of projections, or their last parts: q_proj, v_proj, or query, value as before transformers 5.9.
        target_modules: Vec<String>,
    },
    /// A bottleneck beside each MLP (Chen et al., NeurIPS 2022).
    #[serde(rename = "ADAPTFORMER")]
    AdaptFormer {
        /// Width.
        bottleneck: usize,
        /// Factor of its output.
        scale: f64,
    },
    /// The private blocks themselves.
    #[serde(rename = "LAST_LAYERS")]
    LastLayers,
    /// Everything, from the patches on.
    #[serde(rename = "MPCVIT")]
    MpcVit {
        /// How the client prepares pictures.
        preprocess: Preprocess,
    },
}

impl Tuning {
    pub(crate) fn peft_type(&self) -> &'static str {
        match self {
            Tuning::Lora { .. } => PEFT_TYPES[0],
            Tuning::AdaptFormer { .. } => PEFT_TYPES[1],
            Tuning::LastLayers => PEFT_TYPES[2],
            Tuning::MpcVit { .. } => PEFT_TYPES[3],
        }
    }

    pub(crate) fn has_public_blocks(&self) -> bool {
        matches!(self, Tuning::Lora { .. } | Tuning::AdaptFormer { .. })
    }
}

/// Architecture and calibration; public.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    /// Method.
    #[serde(flatten)]
    pub tuning: Tuning,
    /// Architecture of the whole encoder.
    pub vit: VitConfig,
    /// Names of its parameters, and its optional parts.
    pub variant: Variant,
    /// The private blocks, the last ones of the encoder, first to last.
    pub blocks: Vec<BlockRanges>,
    /// The norm before the head.
    pub final_norm: NormSpec,
    /// Names of the classes.
    pub labels: Vec<String>,
    /// Whether the weights are in the folded form.
    #[serde(default)]
    pub folded: bool,
}

/// A private block's attention, and its calibrated ranges.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockRanges {
    /// Before the attention.
    pub norm1: NormSpec,
    /// Weights of the attention.
    pub attention: AttentionSpec,
    /// Before the MLP.
    pub norm2: NormSpec,
    /// Input of the MLP's activation.
    pub activation: Range,
}

impl EncoderConfig {
    /// Not yet calibrated. `layers` are the private blocks: all of them for LoRA, AdaptFormer and MPCViT.
    pub fn new(
        tuning: Tuning,
        vit: &VitConfig,
        variant: Variant,
        layers: usize,
        attention: AttentionKind,
        labels: Vec<String>,
    ) -> EncoderConfig {
        let norm = norm_spec(vit);
        let block = BlockRanges {
            norm1: norm,
            attention: attention.uncalibrated(),
            norm2: norm,
            activation: Range::Exact,
        };
        EncoderConfig {
            tuning,
            vit: vit.clone(),
            variant,
            blocks: vec![block; layers],
            final_norm: norm,
            labels,
            folded: false,
        }
    }

    /// MPCViT's model for CIFAR: 7 blocks of width 256 with 4 heads on 8 x 8 patches of 4 x 4 pixels; `attention` of each
    /// block, or of all of them if it is one.
    pub fn mpcvit(
        preprocess: Preprocess,
        attention: &[AttentionKind],
        labels: Vec<String>,
    ) -> ModelResult<Self> {
        let vit = VitConfig {
            hidden_size: 256,
            num_hidden_layers: 7,
            num_attention_heads: 4,
            intermediate_size: 512,
            hidden_act: HiddenAct::Gelu,
            image_size: preprocess.size,
            patch_size: 4,
            num_channels: preprocess.image_mean.len(),
            layer_norm_eps: 1e-6,
            qkv_bias: false,
            layer_scale: false,
        };
        vit.check()?;
        let layers = vit.num_hidden_layers;
        let mut config = Self::new(
            Tuning::MpcVit { preprocess },
            &vit,
            Variant::default(),
            layers,
            AttentionKind::Softmax,
            labels,
        );
        if attention.len() != 1 && attention.len() != layers {
            return Err(Error::Config(format!(
                "{} kinds of attention for {layers} blocks; give one or one a block",
                attention.len()
            )));
        }
        for (block, kind) in config.blocks.iter_mut().zip(attention.iter().cycle()) {
            block.attention = kind.uncalibrated();
        }
        Ok(config)
    }

    fn reads_pixels(&self) -> bool {
        matches!(self.tuning, Tuning::MpcVit { .. })
    }

    /// Number of the first private block.
    fn first(&self) -> usize {
        self.vit.num_hidden_layers - self.blocks.len()
    }

    fn names(&self) -> &'static Names {
        self.variant.layout.names()
    }

    pub(crate) fn check(&self) -> ModelResult<()> {
        self.vit.check()?;
        let refuse = |detail: String| Err(Error::Config(detail));
        let all = self.vit.num_hidden_layers;
        match self.blocks.len() {
            0 => return refuse("no block is private".into()),
            n if n > all => return refuse(format!("{n} private blocks of {all}")),
            n if n < all && self.tuning != Tuning::LastLayers => {
                return refuse(format!(
                    "{} runs all {all} blocks privately, not {n}",
                    self.tuning.peft_type()
                ));
            }
            _ => {}
        }
        match &self.tuning {
            Tuning::Lora { r, lora_alpha, .. } => {
                if !(1..=1 << 16).contains(r) || !lora_alpha.is_finite() {
                    return refuse(format!("LoRA of rank {r} and alpha {lora_alpha}"));
                }
                self.targets()?;
            }
            Tuning::AdaptFormer { bottleneck, scale } => {
                if !(1..=1 << 16).contains(bottleneck) || !scale.is_finite() {
                    return refuse(format!("AdaptFormer of width {bottleneck} and scale {scale}"));
                }
            }
            Tuning::MpcVit { preprocess } => {
                if preprocess.size != self.vit.image_size
                    || preprocess.image_mean.len() != self.vit.num_channels
                    || preprocess.image_std.len() != self.vit.num_channels
                {
                    return refuse("pictures are prepared for another input than the model's".into());
                }
            }
            Tuning::LastLayers => {}
        }
        if self.reads_pixels() && (self.variant != Variant::default()) {
            return refuse("MPCVIT has the plain layout".into());
        }
        if self.blocks.iter().any(|b| b.attention == AttentionSpec::LinAtten) {
            return refuse("LinAtten is an adapter's attention; blocks take the other kinds".into());
        }
        if !(1..=1 << 16).contains(&self.labels.len()) {
            return refuse(format!("{} classes", self.labels.len()));
        }
        Ok(())
    }

    /// The projections with a low-rank change, as the transformers library names them within their parents.
    pub(crate) fn target_modules(&self) -> Vec<&'static str> {
        let names = self.variant.layout.projections().into_iter();
        let which = self.targets().unwrap_or_default();
        let changed = names.zip(which).filter(|(_, changed)| *changed);
        changed.map(|(name, _)| last_part(name)).collect()
    }

    /// Which of query, key and value have a low-rank change.
    fn targets(&self) -> ModelResult<[bool; 3]> {
        let Tuning::Lora { target_modules, .. } = &self.tuning else {
            return Ok([false; 3]);
        };
        let layout = self.variant.layout;
        let names = layout.projections();
        let mut which = [false; 3];
        for module in target_modules {
            let is = |name: &&str| *name == module || name.ends_with(&format!(".{module}"));
            let mut either = [names, layout.earlier_projections()].into_iter();
            match either.find_map(|names| names.iter().position(is)) {
                Some(i) => which[i] = true,
                None => {
                    return Err(Error::Config(format!(
                        "target module {module:?} is not supported; {} are",
                        names.map(last_part).join(", ")
                    )));
                }
            }
        }
        match which.contains(&true) {
            true => Ok(which),
            false => Err(Error::Config("no target modules".into())),
        }
    }

    /// Whether residual streams lose their means in the folded form. AdaptFormer reads the stream itself.
    fn centring(&self) -> bool {
        !matches!(self.tuning, Tuning::AdaptFormer { .. })
    }

    pub(crate) fn reads(&self, layers: usize) -> ModelResult<Vec<Read>> {
        if self.reads_pixels() {
            return Ok(vec![Read {
                state: State::Patches,
                ..Read::hidden(0, Tokens::All)
            }]);
        }
        if layers != self.vit.num_hidden_layers {
            return Err(Error::Config(format!(
                "made for a backbone of {} blocks, this one has {layers}",
                self.vit.num_hidden_layers
            )));
        }
        // A single block needs the residual at the class token alone.
        let tokens = match self.blocks.len() {
            1 => Tokens::Class,
            _ => Tokens::All,
        };
        let residual = Read {
            centred: self.folded && self.centring(),
            ..Read::hidden(self.first(), tokens)
        };
        let normalised = Read {
            norm: Some(NormSpec {
                kind: NormKind::Layer,
                ..self.blocks[0].norm1
            }),
            ..Read::hidden(self.first(), Tokens::All)
        };
        Ok(vec![residual, normalised])
    }

    /// Tokens and width of a state.
    pub(crate) fn state_shape(&self, state: State) -> (usize, usize) {
        match state {
            State::Patches => (self.vit.tokens() - 1, self.vit.patch_len()),
            State::Hidden(_) => (
                self.vit.tokens() + usize::from(self.variant.distilled),
                self.vit.hidden_size,
            ),
        }
    }

    pub(crate) fn served(&self) -> EncoderConfig {
        let mut served = self.clone();
        served.folded = true;
        if served.centring() {
            let norms = served
                .blocks
                .iter_mut()
                .flat_map(|b| [&mut b.norm1, &mut b.norm2]);
            for norm in norms.chain([&mut served.final_norm]) {
                norm.kind = NormKind::Rms;
            }
        }
        served
    }

    pub(crate) fn calibrated(&mut self) -> Vec<Calibrated<'_>> {
        let has_range = self.vit.hidden_act != HiddenAct::Relu;
        let in_the_clear = usize::from(!self.reads_pixels());
        let mut all = Vec::new();
        for (i, block) in self.blocks.iter_mut().enumerate() {
            if i >= in_the_clear {
                all.push(Calibrated::Norm(&mut block.norm1));
            }
            all.extend(block.attention.calibrated());
            all.push(Calibrated::Norm(&mut block.norm2));
            if has_range {
                all.push(Calibrated::Activation(&mut block.activation));
            }
        }
        all.push(Calibrated::Norm(&mut self.final_norm));
        all
    }

    /// Whether a parameter is the provider's.
    pub(crate) fn is_private(&self, name: &str) -> bool {
        if name.starts_with("norm.") || name.starts_with("head.") || !self.tuning.has_public_blocks() {
            return true;
        }
        match (&self.tuning, self.folded) {
            (Tuning::Lora { .. }, false) => name.contains(".lora_"),
            (Tuning::Lora { .. }, true) => {
                let changed = self.targets().unwrap_or_default();
                let mut names = self.names().qkv.iter().zip(changed);
                names.any(|(qkv, changed)| changed && name.contains(&format!(".{qkv}.")))
            }
            _ => name.contains(&format!(".{ADAPTER}.")),
        }
    }

    fn parts<'a>(&'a self, block: &BlockRanges) -> ModelResult<Parts<'a>> {
        let targets = self.targets()?;
        Ok(Parts {
            config: &self.vit,
            names: self.names(),
            norms: [block.norm1, block.norm2],
            attention: block.attention,
            range: block.activation,
            folded: self.folded,
            lora: match self.tuning {
                Tuning::Lora { r, lora_alpha, .. } => Some((r, lora_alpha / r as f64, targets)),
                _ => None,
            },
            adapter: match self.tuning {
                Tuning::AdaptFormer { bottleneck, scale } => Some((bottleneck, scale)),
                _ => None,
            },
        })
    }

    /// Names and shapes of all parameters of this form.
    pub(crate) fn inventory(&self) -> ModelResult<BTreeMap<String, Vec<usize>>> {
        let all = inventory(&Plain::new(), |p| Encoder::load(p, p, self))?;
        Ok(all.into_iter().collect())
    }

    pub(crate) fn fold_private(&self, trained: &Tensors, backbone: Fetch) -> ModelResult<Tensors> {
        self.fold(Some(trained), backbone)
    }

    pub(crate) fn fold_public(&self, backbone: Fetch) -> ModelResult<Tensors> {
        self.fold(None, backbone)
    }

    /// The parameters of the served form that are the provider's, given the trained ones, or those that are public.
    fn fold(&self, trained: Option<&Tensors>, backbone: Fetch) -> ModelResult<Tensors> {
        if self.folded {
            return Err(Error::Config("the parameters are already folded".into()));
        }
        let served = self.served();
        let folding = Folding {
            config: self,
            trained,
            backbone,
            targets: self.targets()?,
        };
        let mut out = Tensors::new();
        for (name, dims) in served.inventory()? {
            if served.is_private(&name) == trained.is_some() && !out.contains_key(&name) {
                folding.layer(&name, &dims, &mut out)?;
            }
        }
        Ok(out)
    }
}

/// Of a dotted name.
pub(crate) fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

impl AttentionSpec {
    pub(crate) fn calibrated(&mut self) -> Option<Calibrated<'_>> {
        match self {
            AttentionSpec::Softmax { bound } => Some(Calibrated::Softmax(bound)),
            AttentionSpec::TwoQuad { sum } | AttentionSpec::ReluSoftmax { sum } => {
                Some(Calibrated::Reciprocal(sum))
            }
            AttentionSpec::LinAtten | AttentionSpec::Scaled => None,
        }
    }
}

/// Private blocks, norm and head.
pub struct Encoder<B: Backend> {
    embedding: Option<Embedding<B>>,
    blocks: Vec<Block<B>>,
    norm: Norm<B>,
    head: Linear<B>,
}

/// Patches to tokens, for a model that is private from the pixels on.
struct Embedding<B: Backend> {
    patch: Linear<B>,
    class: B::Weight,
    positions: B::Weight,
    width: usize,
}

impl<B: Backend> Encoder<B> {
    /// In the form that `config.folded` says. Blocks have the names of [`crate::Vit`], numbered as in the backbone; besides
    /// them there are `norm` and `head`.
    pub fn load(private: &Params<B>, public: &Params<B>, config: &EncoderConfig) -> ModelResult<Self> {
        config.check()?;
        let p = &Params::new(|name, dims| match config.is_private(name) {
            true => private.get(name, dims),
            false => public.get(name, dims),
        });
        let (d, names) = (config.vit.hidden_size, config.names());
        let embedding = config
            .reads_pixels()
            .then(|| Embedding::load(p, config))
            .transpose()?;
        let blocks = config.blocks.iter().enumerate().map(|(i, block)| {
            let p = p.pp(names.blocks).pp(config.first() + i);
            Ok(Block::load(&p, &config.parts(block)?)?)
        });
        Ok(Encoder {
            embedding,
            blocks: blocks.collect::<ModelResult<_>>()?,
            norm: Norm::load(&p.pp("norm"), d, config.final_norm, !config.folded)?,
            head: Linear::load(&p.pp("head"), d, config.labels.len(), true)?,
        })
    }

    /// Logits `[batch, classes]` from the inputs that [`crate::Method::reads`] names.
    pub fn forward(&self, b: &B, inputs: &[B::Tensor]) -> Result<B::Tensor> {
        let count = self.blocks.len();
        let (mut x, start) = match (&self.embedding, inputs) {
            (Some(embedding), [patches]) => {
                b.layer("embedding");
                (embedding.forward(b, patches)?, 0)
            }
            (None, [x, normalised]) => {
                b.layer("block 0");
                let x = self.blocks[0].forward_normalised(b, x, normalised, count == 1)?;
                (x, 1)
            }
            (embedding, _) => {
                let wanted = 2 - usize::from(embedding.is_some());
                let detail = format!("{wanted} inputs wanted, {} given", inputs.len());
                return Err(veiltune_engine::Error::program("encoder", detail));
            }
        };
        for (i, block) in self.blocks.iter().enumerate().skip(start) {
            b.layer(&format!("block {i}"));
            x = match i + 1 == count {
                true => block.forward_class(b, &x)?,
                false => block.forward(b, &x)?,
            };
        }
        b.layer("head");
        let logits = self.head.forward(b, &self.norm.forward(b, &x)?)?;
        let (batch, _, classes) = rank3(b, &logits)?;
        b.reshape(&logits, &[batch, classes])
    }
}

impl<B: Backend> Embedding<B> {
    fn load(p: &Params<B>, c: &EncoderConfig) -> Result<Self> {
        let (d, names) = (c.vit.hidden_size, c.names());
        Ok(Embedding {
            patch: Linear::load(&p.pp(names.patch), c.vit.patch_len(), d, true)?,
            class: p.get(names.class, &[1, 1, d])?,
            positions: p.get(names.positions, &[1, c.vit.tokens(), d])?,
            width: d,
        })
    }

    fn forward(&self, b: &B, patches: &B::Tensor) -> Result<B::Tensor> {
        let patches = self.patch.forward(b, patches)?;
        let batch = b.dims(&patches)[0];
        let zero = vec![0.0; batch * self.width];
        let zero = b.input(Owner::Public, &[batch, 1, self.width], Some(&zero))?;
        let class = b.add_weight(&zero, &self.class)?;
        b.add_weight(&b.cat(&[&class, &patches], 1)?, &self.positions)
    }
}

/// From trained parameters to those of the served form.
struct Folding<'a> {
    config: &'a EncoderConfig,
    trained: Option<&'a Tensors>,
    backbone: Fetch<'a>,
    targets: [bool; 3],
}

impl Folding<'_> {
    fn get(&self, name: &str, dims: &[usize]) -> ModelResult<Array> {
        if !self.config.is_private(name) {
            return (self.backbone)(name, dims);
        }
        let array = self.trained.and_then(|t| t.get(name));
        let array = array.ok_or_else(|| Error::Config(format!("no tensor {name}")))?;
        if array.dims != dims || array.values.len() != dims.iter().product::<usize>() {
            return Err(Error::Config(format!(
                "tensor {name} is {:?}, not {dims:?}",
                array.dims
            )));
        }
        Ok(array.clone())
    }

    fn map(&self, name: &str, dims: &[usize], bias: bool) -> ModelResult<Affine> {
        let weight = self.get(&format!("{name}.weight"), dims)?;
        let bias = bias
            .then(|| self.get(&format!("{name}.bias"), &dims[..1]))
            .transpose()?;
        Ok(Affine::new(&weight, bias.as_ref()))
    }

    /// `map` of what the norm called `norm` gives.
    fn after(&self, map: Affine, norm: &str) -> ModelResult<Affine> {
        let get = |part| self.get(&format!("{norm}.{part}"), &[self.config.vit.hidden_size]);
        Ok(map.after(&get("weight")?, &get("bias")?))
    }

    /// What is added to the residual stream.
    fn for_stream(&self, map: Affine) -> Affine {
        match self.config.centring() {
            true => map.centred(),
            false => map,
        }
    }

    /// The parameter of the served form called `name`, and the other one of its layer.
    fn layer(&self, name: &str, dims: &[usize], out: &mut Tensors) -> ModelResult<()> {
        let (c, names) = (self.config, self.config.names());
        let (d, mlp) = (c.vit.hidden_size, c.vit.intermediate_size);
        let quick = c.vit.hidden_act == HiddenAct::QuickGelu;
        if name == names.class || name == names.positions {
            // Rows that are added to the stream: each is a map of nothing but its bias.
            let array = self.get(name, dims)?;
            let mut values = array.values;
            for row in values.chunks_mut(d) {
                let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / d as f64;
                row.iter_mut().for_each(|v| *v = (f64::from(*v) - mean) as f32);
            }
            out.insert(
                name.to_owned(),
                Array {
                    dims: array.dims,
                    values,
                },
            );
            return Ok(());
        }
        let layer = name.rsplit_once('.').map_or(name, |(layer, _)| layer);
        let map = match layer.strip_prefix(&format!("{}.", names.blocks)) {
            None if layer == "head" => self.after(self.map(layer, &[c.labels.len(), d], true)?, "norm")?,
            None => self.for_stream(self.map(layer, &[d, c.vit.patch_len()], true)?),
            Some(rest) => {
                let (index, part) = rest.split_once('.').unwrap_or((rest, ""));
                let at = |name: &str| format!("{}.{index}.{name}", names.blocks);
                let scaled = |map: Affine, scale: &str| -> ModelResult<Affine> {
                    Ok(match c.vit.layer_scale {
                        true => map.scaled_each(&self.get(&at(scale), &[d])?),
                        false => map,
                    })
                };
                if let Some(i) = names.qkv.iter().position(|n| *n == part) {
                    let mut map = self.map(layer, &[d, d], c.vit.qkv_bias)?;
                    if let (Tuning::Lora { r, lora_alpha, .. }, true) = (&c.tuning, self.targets[i]) {
                        let a = self.get(&format!("{layer}.lora_A.weight"), &[*r, d])?;
                        let b = self.get(&format!("{layer}.lora_B.weight"), &[d, *r])?;
                        map = map.changed(&a, &b, lora_alpha / *r as f64);
                    }
                    let map = self.after(map, &at(names.norm1))?;
                    match i {
                        0 => map.scaled(((d / c.vit.num_attention_heads) as f64).powf(-0.5)),
                        _ => map,
                    }
                } else if part == names.out {
                    self.for_stream(scaled(self.map(layer, &[d, d], true)?, names.scale1)?)
                } else if part == names.fc1 {
                    let map = self.after(self.map(layer, &[mlp, d], true)?, &at(names.norm2))?;
                    if quick { map.scaled(QUICK) } else { map }
                } else if part == names.fc2 {
                    let map = self.map(layer, &[d, mlp], true)?;
                    let map = if quick { map.of_scaled(1.0 / QUICK) } else { map };
                    self.for_stream(scaled(map, names.scale2)?)
                } else {
                    // AdaptFormer's; the stream is not centred there.
                    let Tuning::AdaptFormer { bottleneck, scale } = c.tuning else {
                        return Err(Error::Config(format!("no rule folds {name}")));
                    };
                    match part.ends_with("up") {
                        true => self.map(layer, &[d, bottleneck], true)?.scaled(scale),
                        false => self.map(layer, &[bottleneck, d], true)?,
                    }
                }
            }
        };
        map.store(out, layer);
        Ok(())
    }
}
