//! Public backbones from a folder: the project's own, and the model hub's ViT, DeiT, DINOv2 and CLIP vision towers.

use std::borrow::Cow;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use veiltune_engine::{Backend, Error as EngineError, Owner, Params, Plain};
use veiltune_hub::{Array, Checkpoint, Fit, Preprocess, cache, files, processor};

use crate::layout::{Layout, Variant};
use crate::load::inventory;
use crate::vit::HiddenAct;
use crate::{Error, Result, Vit, VitConfig};

/// A public backbone: its architecture, how it wants its input, and its weights.
#[derive(Debug)]
pub struct Backbone {
    /// Architecture, for the input that `preprocess` gives.
    pub config: VitConfig,
    /// How pictures are prepared, given that they are scaled as `fit` says; [`Backbone::picture`] does both.
    pub preprocess: Preprocess,
    /// How they are scaled before.
    pub fit: Fit,
    /// Names and optional parts.
    pub variant: Variant,
    /// Weights.
    pub weights: Checkpoint,
    /// Before every name; empty, or with a dot at its end.
    prefix: &'static str,
}

/// `config.json` of the project's own backbones: the architecture's fields and the preparation of pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackboneConfig {
    /// Architecture.
    #[serde(flatten)]
    pub vit: VitConfig,
    /// By default: scaled to the input size, mean and deviation 0.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preprocess: Option<Preprocess>,
}

/// The type of a CLIP vision tower.
const VISION: &str = "clip_vision_model";

/// `config.json` of the model hub, known by its `model_type`. Libraries leave out what has its default value.
#[derive(Deserialize)]
struct HubConfig {
    /// Always there, except sometimes within `vision_config`.
    #[serde(default = "vision")]
    model_type: String,
    #[serde(default = "n::<768>")]
    hidden_size: usize,
    #[serde(default = "n::<12>")]
    num_hidden_layers: usize,
    #[serde(default = "n::<12>")]
    num_attention_heads: usize,
    #[serde(default = "n::<3072>")]
    intermediate_size: usize,
    /// In place of `intermediate_size` in DINOv2.
    #[serde(default = "four")]
    mlp_ratio: f64,
    hidden_act: Option<HiddenAct>,
    #[serde(default = "n::<224>")]
    image_size: usize,
    patch_size: Option<usize>,
    #[serde(default = "n::<3>")]
    num_channels: usize,
    layer_norm_eps: Option<f64>,
    qkv_bias: Option<bool>,
    #[serde(default)]
    use_swiglu_ffn: bool,
    /// In a file for a whole CLIP model.
    vision_config: Option<Box<HubConfig>>,
}

fn vision() -> String {
    VISION.to_owned()
}

fn n<const N: usize>() -> usize {
    N
}

fn four() -> f64 {
    4.0
}

impl HubConfig {
    /// The layout and the architecture, with the defaults of the `transformers` library.
    fn resolve(self) -> Result<(Layout, VitConfig)> {
        let (layout, patch, eps, act, mlp) = match (self.model_type.as_str(), self.vision_config) {
            ("clip", Some(vision)) if vision.model_type == VISION => return vision.resolve(),
            ("clip", _) => return Err(Error::Config("clip without a vision_config".into())),
            ("vit" | "deit", _) => (Layout::Vit, 16, 1e-12, HiddenAct::Gelu, self.intermediate_size),
            ("dinov2", _) if self.use_swiglu_ffn => {
                return Err(Error::Config(
                    "dinov2 with use_swiglu_ffn is not supported".into(),
                ));
            }
            ("dinov2", _) => {
                let width = self.hidden_size as f64 * self.mlp_ratio;
                (Layout::Dinov2, 14, 1e-6, HiddenAct::Gelu, width as usize)
            }
            (VISION, _) => (
                Layout::Clip,
                32,
                1e-5,
                HiddenAct::QuickGelu,
                self.intermediate_size,
            ),
            (other, _) => {
                return Err(Error::Config(format!(
                    "model_type {other} is not supported; vit, deit, dinov2, clip and clip_vision_model are"
                )));
            }
        };
        let config = VitConfig {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: mlp,
            hidden_act: self.hidden_act.unwrap_or(act),
            image_size: self.image_size,
            patch_size: self.patch_size.unwrap_or(patch),
            num_channels: self.num_channels,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(eps),
            qkv_bias: self.qkv_bias.unwrap_or(true),
            layer_scale: layout == Layout::Dinov2,
        };
        Ok((layout, config))
    }
}

impl Backbone {
    /// Reads `config.json`, `preprocessor_config.json` and `model.safetensors` (or its parts, as
    /// `model.safetensors.index.json` lists them) in `dir`; of a backbone of the project's own, `config.json` and
    /// `backbone.safetensors`.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = files::read_json(&dir.join("config.json"))?;
        let path = dir.join(processor::FILE);
        let processor = path
            .exists()
            .then(|| files::read(&path, MAX_PROCESSOR))
            .transpose()?;
        let weights = ["backbone.safetensors", "model.safetensors.index.json"]
            .map(|name| dir.join(name))
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| dir.join("model.safetensors"));
        let processor = processor.map(|bytes| (path.to_string_lossy().into_owned(), bytes));
        Self::new(config, processor, Checkpoint::open(&weights)?)
    }

    /// As [`Backbone::open`], in the folder `name` or, if there is none, in the model hub's cache, as
    /// `owner/name` or `owner/name@revision`; what is not there is downloaded.
    pub fn find(name: &str) -> Result<Self> {
        Self::open(&cache::locate(name)?)
    }

    /// From embedded content; without a `preprocessor_config.json`, so not for every model of the hub.
    pub fn from_bytes(config: &[u8], weights: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let config = files::parse_json("config.json", config)?;
        Self::new(
            config,
            None,
            Checkpoint::from_bytes("backbone.safetensors", weights)?,
        )
    }

    fn new(
        config: serde_json::Value,
        processor: Option<(String, Vec<u8>)>,
        weights: Checkpoint,
    ) -> Result<Self> {
        let malformed = |e: serde_json::Error| Error::Config(format!("config.json: {e}"));
        let (layout, mut config, ours) = if config.get("model_type").is_some() {
            let hub: HubConfig = serde_json::from_value(config).map_err(malformed)?;
            let (layout, config) = hub.resolve()?;
            (layout, config, None)
        } else {
            let ours: BackboneConfig = serde_json::from_value(config).map_err(malformed)?;
            (Layout::Vit, ours.vit, ours.preprocess)
        };
        config.check_sizes()?;
        let (preprocess, fit) = match (ours, processor) {
            (Some(p), _) => (p.clone(), p.fit()),
            (None, Some((file, bytes))) => processor::parse(&file, &bytes, layout == Layout::Clip)?,
            (None, None) if layout == Layout::Vit => {
                let halves = vec![0.5; config.num_channels];
                let p = Preprocess {
                    size: config.image_size,
                    centre_crop: false,
                    image_mean: halves.clone(),
                    image_std: halves,
                };
                (p.clone(), p.fit())
            }
            (None, None) => return Err(Error::Config(format!("no {} is there", processor::FILE))),
        };
        if layout == Layout::Dinov2 {
            // Trained at one size, used at another: its positions are interpolated.
            config.image_size = preprocess.size;
        }
        config.check()?;
        if preprocess.size != config.image_size || preprocess.image_mean.len() != config.num_channels {
            return Err(Error::Config(
                "pictures are prepared for another input than the backbone's".into(),
            ));
        }
        let names = layout.names();
        let prefixes = layout.prefixes();
        let has = |prefix: &str, name: &str| weights.contains(&format!("{prefix}{name}"));
        let prefix = prefixes
            .iter()
            .find(|p| has(p, names.class))
            .unwrap_or(&prefixes[0]);
        let variant = Variant {
            layout,
            distilled: has(prefix, names.distillation),
            final_norm: has(prefix, &format!("{}.weight", names.final_norm)),
        };
        Ok(Backbone {
            config,
            preprocess,
            fit,
            variant,
            weights,
            prefix,
        })
    }

    /// Tokens of a hidden state: the class token, a distillation token if there is one, and the patches.
    pub fn tokens(&self) -> usize {
        self.config.tokens() + usize::from(self.variant.distilled)
    }

    /// A picture as the backbone wants it, `[channels, size, size]`, from a PNG or JPEG file.
    pub fn picture(&self, path: &Path) -> Result<Vec<f32>> {
        Ok(self.preprocess.load_fitted(path, self.fit)?)
    }

    /// As [`Backbone::picture`], from a file's content; `file` is its name in errors.
    pub fn decode(&self, file: &str, bytes: &[u8]) -> Result<Vec<f32>> {
        Ok(self.preprocess.decode_fitted(file, bytes, self.fit)?)
    }

    /// The encoder on some interpreter; its weights are public.
    pub fn load<B: Backend>(&self, b: &B) -> Result<Vit<B>> {
        let params = Params::new(move |name, dims: &[usize]| {
            let array = self
                .parameter(name, dims)
                .map_err(|e| EngineError::File(e.to_string()))?;
            b.weight(Owner::Public, dims, Some(&array.values))
        });
        Vit::load_variant(&params, &self.config, self.variant)
    }

    /// A parameter by its name in [`Vit`], which has no prefix.
    pub fn parameter(&self, name: &str, dims: &[usize]) -> Result<Array> {
        let stored = format!("{}{name}", self.prefix);
        let values = match name == self.variant.layout.names().positions {
            true => self.positions(&stored, dims)?,
            false => self.weights.tensor(&stored, dims)?,
        };
        Ok(Array {
            dims: dims.to_vec(),
            values,
        })
    }

    /// A hash of all of the encoder's parameters, which tells one backbone from another.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let b = Plain::new();
        let mut shapes = inventory(&b, |p| Vit::load_variant(p, &self.config, self.variant))?;
        shapes.sort();
        let mut hash = Sha256::new();
        for (name, dims) in shapes {
            hash.update(format!("{name} {dims:?}\n"));
            for chunk in self.parameter(&name, &dims)?.values.chunks(1 << 14) {
                let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                hash.update(&bytes);
            }
        }
        Ok(hash.finalize().into())
    }

    /// Position embeddings for the input's size. Those of DINOv2 are for its training size: they are taken from a
    /// tensor that was made for this size, if there is one, and interpolated otherwise.
    fn positions(&self, name: &str, dims: &[usize]) -> veiltune_hub::Result<Vec<f32>> {
        if self.variant.layout != Layout::Dinov2 {
            return self.weights.tensor(name, dims);
        }
        let fitting = format!("{name}_{}", self.config.image_size);
        if self.weights.contains(&fitting) {
            return self.weights.tensor(&fitting, dims);
        }
        let stored = self.weights.array(name)?;
        let side = self.config.image_size / self.config.patch_size;
        match (grid(&stored), dims) {
            (Some(old), &[_, _, d]) if stored.dims[2] == d && old != side => {
                let (class, patches) = stored.values.split_at(d);
                Ok([class, &interpolate(patches, old, side, d)].concat())
            }
            _ => self.weights.tensor(name, dims),
        }
    }
}

/// Longest `preprocessor_config.json`, bytes.
const MAX_PROCESSOR: u64 = 1 << 20;

/// Side of the square grid in positions `[1, 1 + side^2, d]`.
fn grid(positions: &Array) -> Option<usize> {
    let &[1, tokens, _] = &positions.dims[..] else {
        return None;
    };
    let patches = tokens.checked_sub(1)?;
    let side = patches.isqrt();
    (side > 0 && side * side == patches).then_some(side)
}

/// Bicubic interpolation of a square grid of vectors, as PyTorch does it: convolution with a = -0.75, corners not
/// aligned, edges repeated, and no smoothing where the grid becomes smaller.
fn interpolate(values: &[f32], old: usize, new: usize, d: usize) -> Vec<f32> {
    let taps: Vec<[(usize, f32); 4]> = (0..new).map(|i| bicubic(i, old, new)).collect();
    // Rows first, then columns.
    let mut rows = vec![0.0; new * old * d];
    for (row, taps) in rows.chunks_exact_mut(old * d).zip(&taps) {
        for &(from, weight) in taps {
            accumulate(row, &values[from * old * d..][..old * d], weight);
        }
    }
    let mut out = vec![0.0; new * new * d];
    for (row, source) in out.chunks_exact_mut(new * d).zip(rows.chunks_exact(old * d)) {
        for (cell, taps) in row.chunks_exact_mut(d).zip(&taps) {
            for &(from, weight) in taps {
                accumulate(cell, &source[from * d..][..d], weight);
            }
        }
    }
    out
}

fn accumulate(sum: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += weight * value;
    }
}

/// The four cells around cell `i` of the new grid, and their weights.
fn bicubic(i: usize, old: usize, new: usize) -> [(usize, f32); 4] {
    const A: f64 = -0.75;
    let at = (i as f64 + 0.5) * old as f64 / new as f64 - 0.5;
    let (cell, part) = (at.floor(), at - at.floor());
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let weights = [far(part + 1.0), near(part), near(1.0 - part), far(2.0 - part)];
    std::array::from_fn(|k| {
        let from = (cell + k as f64 - 1.0).clamp(0.0, (old - 1) as f64);
        (from as usize, weights[k] as f32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpolation_keeps_constants_and_what_lies_on_the_grid() {
        assert!(
            interpolate(&[2.0; 9 * 2], 3, 5, 2)
                .iter()
                .all(|v| (v - 2.0).abs() < 1e-6)
        );
        let values: Vec<f32> = (0..9).map(|v| (v * v) as f32).collect();
        assert_eq!(interpolate(&values, 3, 3, 1), values);
        // Every third cell of nine lies on one of three.
        let fine = interpolate(&values, 3, 9, 1);
        for (i, v) in values.iter().enumerate() {
            assert!((fine[(i / 3 * 3 + 1) * 9 + i % 3 * 3 + 1] - v).abs() < 1e-5);
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let refusal = |json: &str| {
            Backbone::from_bytes(json.as_bytes(), EMPTY)
                .unwrap_err()
                .to_string()
        };
        let bert = refusal(r#"{"model_type": "bert"}"#);
        for word in ["bert", "vit", "deit", "dinov2", "clip"] {
            assert!(bert.contains(word), "{bert}");
        }
        for (json, word) in [
            (
                r#"{"model_type": "dinov2", "use_swiglu_ffn": true}"#,
                "use_swiglu_ffn",
            ),
            (r#"{"model_type": "dinov2"}"#, "preprocessor_config.json"),
            (r#"{"model_type": "clip"}"#, "vision_config"),
            (r#"{"model_type": "vit", "hidden_act": "gelu_new"}"#, "gelu_new"),
            (
                r#"{"model_type": "clip", "vision_config": {"model_type": "clip"}}"#,
                "vision_config",
            ),
            (
                r#"{"model_type": "vit", "image_size": 4096, "patch_size": 1}"#,
                "tokens",
            ),
            (r#"{"model_type": "vit", "hidden_size": 0}"#, "zero or absurd"),
            (r#"{"model_type": "vit", "hidden_size": "wide"}"#, "config.json"),
            (
                r#"{"model_type": "dinov2", "mlp_ratio": 1e300}"#,
                "zero or absurd",
            ),
        ] {
            assert!(refusal(json).contains(word), "{json}: {}", refusal(json));
        }
    }

    /// A safetensors file with nothing in it.
    const EMPTY: &[u8] = b"\x08\0\0\0\0\0\0\0{}      ";

    #[test]
    fn defaults_are_those_of_the_library() {
        let vit = Backbone::from_bytes(br#"{"model_type": "vit"}"#, EMPTY).unwrap();
        assert_eq!(
            (vit.tokens(), vit.config.hidden_size, vit.config.layer_norm_eps),
            (197, 768, 1e-12)
        );
        let error = vit
            .load(&veiltune_engine::Plain::new())
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("embeddings.patch_embeddings.projection.weight"),
            "{error}"
        );
    }
}
