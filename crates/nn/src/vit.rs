//! Vision transformer (Dosovitskiy et al., 2021), with the configuration of `google/vit-*` and the parameter names of
//! a [`Layout`](crate::layout::Layout).
//!
//! It serves as a public backbone, so its ranges are not calibrated: private interpreters refuse it.

use serde::{Deserialize, Serialize};
use veiltune_engine::{Backend, NormKind, NormSpec, Owner, Params, Range, Result};

use crate::attention::AttentionKind;
use crate::block::{Block, Parts};
use crate::layers::{Linear, Norm};
use crate::layout::{Names, Variant};
use crate::{Error, Result as ModelResult};

/// The fields of the model hub's `config.json` that matter; others are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VitConfig {
    /// Width d of the hidden states.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads a block.
    pub num_attention_heads: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Its activation.
    pub hidden_act: HiddenAct,
    /// Side of the square input, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// 3 for RGB, 1 for grey.
    #[serde(default = "three")]
    pub num_channels: usize,
    /// Added to the variance.
    #[serde(default = "tiny")]
    pub layer_norm_eps: f64,
    /// Whether query, key and value have a bias.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// Whether each branch is scaled, channel by channel, before it is added.
    #[serde(default)]
    pub layer_scale: bool,
}

fn three() -> usize {
    3
}

fn tiny() -> f64 {
    1e-12
}

fn yes() -> bool {
    true
}

/// Activation of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HiddenAct {
    /// With the exact error function.
    Gelu,
    /// x * sigmoid(1.702 x), an approximation of GELU that CLIP was trained with.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// max(x, 0).
    Relu,
}

impl VitConfig {
    /// Patches and the class token; a distilled model has one more.
    pub fn tokens(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }

    /// Numbers in one patch.
    pub fn patch_len(&self) -> usize {
        self.patch_size * self.patch_size * self.num_channels
    }

    /// Refuses what no model has.
    pub fn check(&self) -> ModelResult<()> {
        self.check_sizes()?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(Error::Config(
                "hidden_size is no multiple of num_attention_heads".into(),
            ));
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(Error::Config("image_size is no multiple of patch_size".into()));
        }
        if self.tokens() > 1 << 16 {
            return Err(Error::Config(format!("{} tokens are absurd", self.tokens())));
        }
        Ok(())
    }

    /// Refuses sizes that are zero or absurd.
    pub(crate) fn check_sizes(&self) -> ModelResult<()> {
        let sizes = [
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.image_size,
            self.patch_size,
            self.num_channels,
        ];
        if sizes.iter().any(|n| !(1..=1 << 16).contains(n)) {
            return Err(Error::Config(format!("a size of {self:?} is zero or absurd")));
        }
        Ok(())
    }
}

/// The encoder, without the classification head of the checkpoint.
pub struct Vit<B: Backend> {
    config: VitConfig,
    patch: Linear<B>,
    class: B::Weight,
    distillation: Option<B::Weight>,
    positions: B::Weight,
    pre_norm: Option<Norm<B>>,
    blocks: Vec<Block<B>>,
    final_norm: Option<Norm<B>>,
}

impl<B: Backend> Vit<B> {
    /// A plain ViT. `p` is at the level of `embeddings` and `encoder` (below `vit.` in a classification checkpoint).
    pub fn load(p: &Params<B>, config: &VitConfig) -> ModelResult<Self> {
        Self::load_variant(p, config, Variant::default())
    }

    /// With the names and parts of `variant`; `p` is at the level of `embeddings` and `encoder`.
    pub fn load_variant(p: &Params<B>, config: &VitConfig, variant: Variant) -> ModelResult<Self> {
        config.check()?;
        let (d, names) = (config.hidden_size, variant.layout.names());
        let spec = norm_spec(config);
        let norm = |name| Norm::load(&p.pp(name), d, spec, true);
        let ones = |count, dims: &[usize]| [&[1; 2][..count], dims].concat();
        let tokens = config.tokens() + usize::from(variant.distilled);
        let token = |name| p.get(name, &ones(names.leading.0, &[d]));
        Ok(Vit {
            patch: Linear::load(&p.pp(names.patch), config.patch_len(), d, names.patch_bias)?,
            class: token(names.class)?,
            distillation: variant.distilled.then(|| token(names.distillation)).transpose()?,
            positions: p.get(names.positions, &ones(names.leading.1, &[tokens, d]))?,
            pre_norm: names.pre_norm.map(norm).transpose()?,
            blocks: (0..config.num_hidden_layers)
                .map(|i| Block::load(&p.pp(names.blocks).pp(i), &parts(config, names)))
                .collect::<Result<_>>()?,
            final_norm: variant.final_norm.then(|| norm(names.final_norm)).transpose()?,
            config: config.clone(),
        })
    }

    /// All hidden states of `images [batch, channels, size, size]`: the embedding and then each block's output, each
    /// `[batch, tokens, d]`, the class token first.
    pub fn forward(&self, b: &B, images: &B::Tensor) -> Result<Vec<B::Tensor>> {
        self.forward_to(b, images, self.blocks.len())
    }

    /// As [`Vit::forward`], up to hidden state number `last`, 0 the embedding: later blocks are not run.
    pub fn forward_to(&self, b: &B, images: &B::Tensor, last: usize) -> Result<Vec<B::Tensor>> {
        let patches = self.patch.forward(b, &self.unfold(b, images)?)?;
        let batch = b.dims(&patches)[0];
        let mut tokens = vec![self.class_token(b, batch)?];
        if let Some(token) = &self.distillation {
            tokens.push(self.repeat(b, batch, token)?);
        }
        tokens.push(patches);
        let x = b.cat(&tokens.iter().collect::<Vec<_>>(), 1)?;
        let x = b.add_weight(&x, &self.positions)?;
        let x = match &self.pre_norm {
            Some(norm) => norm.forward(b, &x)?,
            None => x,
        };
        self.encode_to(b, x, last)
    }

    /// The class token `[batch, 1, d]` of the last hidden state, after the checkpoint's final norm if it has one: what
    /// its own classification head is given.
    pub fn features(&self, b: &B, hidden: &[B::Tensor]) -> Result<B::Tensor> {
        let last = hidden
            .last()
            .ok_or_else(|| veiltune_engine::Error::program("features", "no hidden state given"))?;
        let class = b.narrow(last, 1, 0, 1)?;
        match &self.final_norm {
            Some(norm) => norm.forward(b, &class),
            None => Ok(class),
        }
    }

    /// Hidden states of tokens that are already embedded.
    pub fn encode(&self, b: &B, x: B::Tensor) -> Result<Vec<B::Tensor>> {
        self.encode_to(b, x, self.blocks.len())
    }

    fn encode_to(&self, b: &B, x: B::Tensor, last: usize) -> Result<Vec<B::Tensor>> {
        let mut states = vec![x];
        for block in self.blocks.iter().take(last) {
            states.push(block.forward(b, states.last().expect("the embedding is there"))?);
        }
        Ok(states)
    }

    /// The patch embedding, for training on parts of a picture.
    pub fn patch(&self) -> &Linear<B> {
        &self.patch
    }

    /// Position embeddings `[1, tokens, d]`; `[tokens, d]` in CLIP.
    pub fn positions(&self) -> &B::Weight {
        &self.positions
    }

    /// The class token of each picture, `[batch, 1, d]`, without its position.
    pub fn class_token(&self, b: &B, batch: usize) -> Result<B::Tensor> {
        self.repeat(b, batch, &self.class)
    }

    fn repeat(&self, b: &B, batch: usize, token: &B::Weight) -> Result<B::Tensor> {
        let d = self.config.hidden_size;
        let zero = b.input(Owner::Public, &[batch, 1, d], Some(&vec![0.0; batch * d]))?;
        b.add_weight(&zero, token)
    }

    /// `[batch, c, size, size]` to patches `[batch, count, c * p * p]`: the convolution becomes a linear layer.
    pub fn unfold(&self, b: &B, images: &B::Tensor) -> Result<B::Tensor> {
        let (c, p, size) = (
            self.config.num_channels,
            self.config.patch_size,
            self.config.image_size,
        );
        let (dims, side) = (b.dims(images), size / p);
        if dims.len() != 4 || dims[1..] != [c, size, size] {
            let detail = format!("[batch, {c}, {size}, {size}] wanted, {dims:?} given");
            return Err(veiltune_engine::Error::program("patches", detail));
        }
        // [batch, c, row, y, column, x] to [batch, row, column, c, y, x]
        let x = b.reshape(images, &[dims[0], c, side, p, side, p])?;
        let x = b.transpose(&x, 1, 2)?;
        let x = b.transpose(&x, 3, 4)?;
        let x = b.transpose(&x, 2, 3)?;
        b.reshape(&x, &[dims[0], side * side, c * p * p])
    }
}

pub(crate) fn norm_spec(c: &VitConfig) -> NormSpec {
    NormSpec {
        kind: NormKind::Layer,
        eps: c.layer_norm_eps,
        sigma: (1e-9, 1e9),
    }
}

/// A block as the checkpoint has it, for float interpreters.
fn parts<'a>(config: &'a VitConfig, names: &'static Names) -> Parts<'a> {
    Parts {
        config,
        names,
        norms: [norm_spec(config); 2],
        attention: AttentionKind::Softmax.uncalibrated(),
        range: Range::Exact,
        folded: false,
        lora: None,
        adapter: None,
    }
}

#[cfg(test)]
mod tests {
    use veiltune_engine::Plain;

    use super::*;
    use crate::load::{inventory, params};
    use crate::testing::{noise, random, vit_config};

    #[test]
    fn names_and_shapes_are_those_of_the_model_hub() {
        let mut names = inventory(&Plain::new(), |p| Vit::load(&p.pp("vit"), &vit_config())).unwrap();
        names.sort();
        let find = |name: &str| {
            names
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, dims)| dims.as_slice())
        };
        assert_eq!(
            find("vit.embeddings.patch_embeddings.projection.weight"),
            Some(&[8, 16][..])
        );
        assert_eq!(find("vit.embeddings.position_embeddings"), Some(&[1, 5, 8][..]));
        assert_eq!(
            find("vit.encoder.layer.1.attention.attention.query.weight"),
            Some(&[8, 8][..])
        );
        assert_eq!(
            find("vit.encoder.layer.1.attention.output.dense.bias"),
            Some(&[8][..])
        );
        assert_eq!(
            find("vit.encoder.layer.0.intermediate.dense.weight"),
            Some(&[12, 8][..])
        );
        assert_eq!(find("vit.encoder.layer.0.layernorm_after.bias"), Some(&[8][..]));
        assert_eq!(names.len(), 4 + 2 * 16);
    }

    #[test]
    fn the_hubs_configuration_is_read_as_it_is() {
        let json = r#"{"architectures": ["ViTForImageClassification"], "hidden_act": "gelu", "hidden_size": 768,
            "image_size": 224, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "vit",
            "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16,
            "qkv_bias": true}"#;
        let config: VitConfig = serde_json::from_str(json).unwrap();
        config.check().unwrap();
        assert_eq!(
            (config.tokens(), config.patch_len(), config.layer_scale),
            (197, 768, false)
        );
        assert!(
            VitConfig {
                patch_size: 0,
                ..config.clone()
            }
            .check()
            .is_err()
        );
        assert!(
            VitConfig {
                num_attention_heads: 7,
                ..config.clone()
            }
            .check()
            .is_err()
        );
        assert!(
            VitConfig {
                patch_size: 15,
                ..config
            }
            .check()
            .is_err()
        );
    }

    #[test]
    fn patches_are_cut_as_a_convolution_cuts_them() {
        let (b, config) = (
            Plain::new(),
            VitConfig {
                num_channels: 2,
                ..vit_config()
            },
        );
        let tensors = random(|p| Vit::load(p, &config));
        let vit = Vit::load(&params(&b, Owner::Public, &tensors), &config).unwrap();
        let values: Vec<f32> = (0..128).map(|v| v as f32).collect();
        let image = b.input(Owner::Public, &[1, 2, 8, 8], Some(&values)).unwrap();
        let patches = vit
            .unfold(&b, &image)
            .unwrap()
            .squeeze(0)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        for (i, patch) in patches.iter().enumerate() {
            for (j, value) in patch.iter().enumerate() {
                let (channel, y, x) = (j / 16, i / 2 * 4 + j / 4 % 4, i % 2 * 4 + j % 4);
                assert_eq!(*value, (channel * 64 + y * 8 + x) as f32);
            }
        }
        assert!(vit.forward(&b, &noise(&[1, 1, 8, 8], 1)).is_err());
    }

    #[test]
    fn every_block_gives_a_state_and_pictures_do_not_mix() {
        let b = Plain::new();
        for (act, layer_scale) in [
            (HiddenAct::Gelu, true),
            (HiddenAct::QuickGelu, false),
            (HiddenAct::Relu, false),
        ] {
            let config = VitConfig {
                hidden_act: act,
                layer_scale,
                ..vit_config()
            };
            let tensors = random(|p| Vit::load(p, &config));
            let vit = Vit::load(&params(&b, Owner::Public, &tensors), &config).unwrap();
            let images = noise(&[3, 1, 8, 8], 2);
            let states = vit.forward(&b, &images).unwrap();
            assert_eq!(states.len(), 3);
            for last in 0..4 {
                let some = vit.forward_to(&b, &images, last).unwrap();
                assert_eq!(some.len(), 3.min(last + 1));
                for (some, all) in some.iter().zip(&states) {
                    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    assert_eq!(values(some), values(all));
                }
            }
            let alone = vit.forward(&b, &images.narrow(0, 1, 1).unwrap()).unwrap();
            for (all, alone) in states.iter().zip(alone) {
                assert_eq!(all.dims(), [3, 5, 8]);
                let apart = (all.narrow(0, 1, 1).unwrap() - alone)
                    .unwrap()
                    .abs()
                    .unwrap()
                    .max_all()
                    .unwrap();
                assert!(apart.to_scalar::<f32>().unwrap() < 1e-5);
            }
        }
    }
}
