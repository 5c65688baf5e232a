//! Language models from a folder: safetensors in the layouts of the `transformers` library, or a GGUF file; and their tokenizer.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use veiltune_engine::{Backend, Error as EngineError, NormKind, NormSpec, Owner, Params, Plain, Range};
use veiltune_hub::{Array, Checkpoint, Gguf, Tokenizer, cache, files};

use super::config::{Attention, Family, HiddenAct, LanguageConfig};
use super::layout::{self, Format};
use super::{LanguageModel, fold};
use crate::load::inventory;
use crate::{Error, Result};

/// A model as it is stored.
pub struct LanguageCheckpoint {
    /// Architecture, with exact attention and nothing calibrated.
    pub config: LanguageConfig,
    /// What turns texts into word numbers.
    pub tokenizer: Tokenizer,
    weights: Weights,
    format: Format,
    /// Before the names of the body.
    prefix: &'static str,
    words: OnceLock<Vec<f32>>,
}

/// The word table may be secret.
impl fmt::Debug for LanguageCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let c = &self.config;
        write!(
            f,
            "LanguageCheckpoint({:?}, {} layers of width {})",
            c.family, c.num_hidden_layers, c.hidden_size
        )
    }
}

enum Weights {
    Safetensors(Checkpoint),
    Gguf(Gguf),
}

/// `config.json` of the model hub. Libraries leave out what has its default value.
#[derive(Deserialize)]
struct HubConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    embedding_size: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<HiddenAct>,
    type_vocab_size: Option<usize>,
    pad_token_id: Option<usize>,
    layer_norm_eps: Option<f64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<Rope>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
    num_hidden_groups: Option<usize>,
    inner_group_num: Option<usize>,
}

/// As newer libraries write it.
#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

impl HubConfig {
    /// The architecture, with the defaults of the `transformers` library; [`LanguageConfig::has_head`] is not yet known.
    fn resolve(self) -> Result<LanguageConfig> {
        let refuse = |detail: String| Err(Error::Config(detail));
        let Some(family) = Family::of_type(&self.model_type) else {
            return refuse(format!(
                "model_type {} is not supported; bert, roberta, xlm-roberta, camembert, albert and llama are",
                self.model_type
            ));
        };
        let llama = family == Family::Llama;
        if let Some(kind) = self.position_embedding_type.filter(|kind| kind != "absolute") {
            return refuse(format!("position_embedding_type {kind} is not supported"));
        }
        if self.is_decoder && !llama {
            return refuse("an encoder used as a decoder is not supported".into());
        }
        if self.num_hidden_groups.unwrap_or(1) != 1 || self.inner_group_num.unwrap_or(1) != 1 {
            return refuse("num_hidden_groups and inner_group_num other than 1 are not supported".into());
        }
        if llama && self.mlp_bias {
            return refuse("mlp_bias is not supported".into());
        }
        let rope = self.rope_parameters;
        let scaled = rope
            .as_ref()
            .and_then(|r| r.rope_type.as_deref())
            .is_some_and(|kind| kind != "default");
        if llama && (self.rope_scaling.is_some() || scaled) {
            return refuse("scaled rotary positions are not supported".into());
        }
        let theta = rope.and_then(|r| r.rope_theta).or(self.rope_theta);
        // The first rows of RoBERTa's position table are not for tokens.
        let position_offset = match family {
            Family::Roberta => self.pad_token_id.unwrap_or(1).saturating_add(1),
            _ => 0,
        };
        let (heads, eps) = match llama {
            true => (
                self.num_key_value_heads.unwrap_or(self.num_attention_heads),
                self.rms_norm_eps.unwrap_or(1e-6),
            ),
            false => (self.num_attention_heads, self.layer_norm_eps.unwrap_or(1e-12)),
        };
        Ok(architecture(LanguageConfig {
            family,
            vocab_size: self.vocab_size,
            embedding_size: match family {
                Family::Albert => self.embedding_size.unwrap_or(128),
                _ => self.hidden_size,
            },
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: heads,
            head_dim: self
                .head_dim
                .unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
            intermediate_size: self.intermediate_size,
            hidden_act: self.hidden_act.unwrap_or(match family {
                Family::Llama => HiddenAct::Silu,
                Family::Albert => HiddenAct::GeluNew,
                _ => HiddenAct::Gelu,
            }),
            max_positions: self.max_position_embeddings.saturating_sub(position_offset),
            position_offset,
            type_vocab_size: if llama {
                0
            } else {
                self.type_vocab_size.unwrap_or(2)
            },
            norm_eps: eps,
            rope_theta: theta.unwrap_or(10_000.0),
            attention_bias: !llama || self.attention_bias,
            tied: self.tie_word_embeddings.unwrap_or(!llama),
            ..blank()
        }))
    }
}

/// What [`LanguageConfig::with_attention`] and the weights fill in.
fn blank() -> LanguageConfig {
    let norm = NormSpec {
        kind: NormKind::Layer,
        eps: 0.0,
        sigma: (0.0, 0.0),
    };
    LanguageConfig {
        family: Family::Bert,
        vocab_size: 0,
        embedding_size: 0,
        hidden_size: 0,
        num_hidden_layers: 0,
        num_attention_heads: 0,
        num_key_value_heads: 0,
        head_dim: 0,
        intermediate_size: 0,
        hidden_act: HiddenAct::Gelu,
        max_positions: 0,
        position_offset: 0,
        type_vocab_size: 0,
        norm_eps: 0.0,
        rope_theta: 0.0,
        attention_bias: true,
        tied: true,
        has_head: false,
        attention: Attention::Softmax,
        embedding_norm: norm,
        layers: Vec::new(),
        final_norm: norm,
        head_activation: Range::Exact,
        head_norm: norm,
        folded: false,
    }
}

/// Ranges are made for layers of which there are not more than a model can have.
fn architecture(mut config: LanguageConfig) -> LanguageConfig {
    config.num_hidden_layers = config.num_hidden_layers.min(1 << 12);
    config.num_key_value_heads = config.num_key_value_heads.min(1 << 12);
    config.with_attention(Attention::Softmax)
}

/// A Llama's architecture in the words of a GGUF file.
fn described(gguf: &Gguf) -> Result<LanguageConfig> {
    let name = gguf.text("general.architecture")?;
    if name != "llama" {
        return Err(Error::Config(format!(
            "{}: architecture {name} is not supported; of GGUF files, llama is",
            gguf.file()
        )));
    }
    let size = |key: &str| gguf.size(&format!("llama.{key}"));
    let scaled = gguf
        .text("llama.rope.scaling.type")
        .is_ok_and(|kind| kind != "none");
    if scaled || gguf.contains("rope_freqs.weight") {
        return Err(Error::Config(format!(
            "{}: scaled rotary positions are not supported",
            gguf.file()
        )));
    }
    let (hidden_size, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let number = |key: &str, default: f64| gguf.number(&format!("llama.{key}")).unwrap_or(default);
    Ok(architecture(LanguageConfig {
        family: Family::Llama,
        vocab_size: gguf.texts("tokenizer.ggml.tokens")?.len(),
        embedding_size: hidden_size,
        hidden_size,
        num_hidden_layers: size("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: size("attention.head_count_kv").unwrap_or(heads),
        head_dim: size("attention.key_length").unwrap_or(hidden_size / heads.max(1)),
        intermediate_size: size("feed_forward_length")?,
        hidden_act: HiddenAct::Silu,
        max_positions: size("context_length")?,
        norm_eps: number("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta: number("rope.freq_base", 10_000.0),
        attention_bias: gguf.contains("blk.0.attn_q.bias"),
        tied: !gguf.contains("output.weight"),
        ..blank()
    }))
}

impl LanguageConfig {
    /// The architecture of a `config.json` of the model hub, with exact attention and nothing calibrated. Whether there is a masked-LM
    /// head is a matter of the weights: `has_head`.
    pub fn from_hub(file: &str, json: &[u8], has_head: bool) -> Result<Self> {
        let hub: HubConfig = files::parse_json(file, json)?;
        let config = LanguageConfig {
            has_head,
            ..hub.resolve()?
        };
        config.check()?;
        Ok(config)
    }

    /// A published architecture by its usual name, with a masked-LM head: bert-base, bert-large, roberta-base or roberta-large.
    /// For measurements with random weights.
    pub fn preset(name: &str) -> Result<Self> {
        let (family, size) = name.split_once('-').unwrap_or((name, ""));
        let sized = |hidden_size, num_hidden_layers, num_attention_heads| LanguageConfig {
            embedding_size: hidden_size,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: num_attention_heads,
            head_dim: 64,
            intermediate_size: 4 * hidden_size,
            max_positions: 512,
            has_head: true,
            ..blank()
        };
        let config = match size {
            "base" => sized(768, 12, 12),
            "large" => sized(1024, 24, 16),
            _ => return Err(unknown_preset(name)),
        };
        Ok(architecture(match family {
            "bert" => LanguageConfig {
                vocab_size: 30522,
                type_vocab_size: 2,
                norm_eps: 1e-12,
                ..config
            },
            "roberta" => LanguageConfig {
                family: Family::Roberta,
                vocab_size: 50265,
                position_offset: 2,
                type_vocab_size: 1,
                norm_eps: 1e-5,
                ..config
            },
            _ => return Err(unknown_preset(name)),
        }))
    }
}

fn unknown_preset(name: &str) -> Error {
    Error::Config(format!(
        "no architecture {name:?}; there are bert-base, bert-large, roberta-base and roberta-large"
    ))
}

impl LanguageCheckpoint {
    /// Reads a folder: `config.json` with `model.safetensors` (or its parts, as `model.safetensors.index.json` lists them), or one
    /// GGUF file; and the tokenizer, by default that of the GGUF file.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = dir.join("config.json");
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        if index.exists() || single.exists() {
            let hub: HubConfig = files::read_json(&config)?;
            let path = if index.exists() { index } else { single };
            let weights = Weights::Safetensors(Checkpoint::open(&path)?);
            return Self::new(hub.resolve()?, Tokenizer::open(dir)?, weights, Format::Hub);
        }
        let gguf = Gguf::open(&only_gguf(dir)?)?;
        let config = described(&gguf)?;
        let tokenizer = match dir.join("tokenizer.json").exists() {
            true => Tokenizer::open(dir)?,
            false => Tokenizer::from_gguf(&gguf)?,
        };
        Self::new(config, tokenizer, Weights::Gguf(gguf), Format::Gguf)
    }

    /// As [`LanguageCheckpoint::open`], in the folder `name` or, if there is none, in the model hub's cache, as `owner/name` or
    /// `owner/name@revision`; what is not there is downloaded.
    pub fn find(name: &str) -> Result<Self> {
        Self::open(&cache::locate(name)?)
    }

    /// From embedded content in the layout of the `transformers` library.
    pub fn from_bytes(config: &[u8], tokenizer: &[u8], weights: &'static [u8]) -> Result<Self> {
        let hub: HubConfig = files::parse_json("config.json", config)?;
        Self::new(
            hub.resolve()?,
            Tokenizer::from_json("tokenizer.json", tokenizer)?,
            Weights::Safetensors(Checkpoint::from_bytes("model.safetensors", weights)?),
            Format::Hub,
        )
    }

    fn new(config: LanguageConfig, tokenizer: Tokenizer, weights: Weights, format: Format) -> Result<Self> {
        let usual = layout::prefix(config.family, format);
        let mut checkpoint = LanguageCheckpoint {
            config,
            tokenizer,
            weights,
            format,
            prefix: usual,
            words: OnceLock::new(),
        };
        if !checkpoint.has(layout::WORDS) {
            checkpoint.prefix = "";
        }
        if !checkpoint.has(layout::WORDS) {
            let family = checkpoint.config.family;
            return Err(Error::Config(format!(
                "there is no word table under the name that {family:?} models have for it ({}): the weights are incomplete, or of \
                 another family than the configuration says",
                layout::stored(family, format, layout::WORDS).map_or_else(String::new, |(name, _)| name)
            )));
        }
        let has_head = checkpoint.has("head.dense.weight");
        checkpoint.config.has_head = has_head;
        checkpoint.config.check()?;
        if checkpoint.tokenizer.len() > checkpoint.config.vocab_size {
            return Err(Error::Config(format!(
                "the tokenizer has {} words, the model {}",
                checkpoint.tokenizer.len(),
                checkpoint.config.vocab_size
            )));
        }
        Ok(checkpoint)
    }

    /// The model on some interpreter: `config` is [`LanguageCheckpoint::config`], with other attention, calibrated or folded.
    pub fn load<B: Backend>(&self, b: &B, owner: Owner, config: &LanguageConfig) -> Result<LanguageModel<B>> {
        let params = Params::new(|name, dims: &[usize]| {
            let array = self
                .parameter(config, name, dims)
                .map_err(|e| EngineError::File(e.to_string()))?;
            b.weight(owner, dims, Some(&array.values))
        });
        LanguageModel::load(&params, config)
    }

    /// A parameter of [`LanguageModel`] by its name there, in the form that `config` has.
    pub fn parameter(&self, config: &LanguageConfig, name: &str, dims: &[usize]) -> Result<Array> {
        fold::parameter(config, name, dims, &|name, dims| {
            Ok(Array {
                dims: dims.to_vec(),
                values: self.stored(name, dims)?,
            })
        })
    }

    /// Names and shapes of the parameters of [`LanguageModel`] in the form that `config` has, in the order in which they are
    /// asked for.
    pub fn inventory(config: &LanguageConfig) -> Result<Vec<(String, Vec<usize>)>> {
        inventory(&Plain::new(), |p| LanguageModel::load(p, config))
    }

    /// The whole word table, `[vocab_size, embedding_size]`; read once.
    pub fn words(&self) -> Result<&[f32]> {
        if let Some(words) = self.words.get() {
            return Ok(words);
        }
        let dims = [self.config.vocab_size, self.config.embedding_size];
        let words = self.stored(layout::WORDS, &dims)?;
        Ok(self.words.get_or_init(|| words))
    }

    /// Rows of the word table, `[ids, embedding_size]`: what a model reads.
    pub fn embeddings(&self, ids: &[u32]) -> Result<Vec<f32>> {
        rows(self.words()?, self.config.embedding_size, ids)
    }

    /// Rows of the table that gives logits, `[ids, embedding_size]`: the word table, or one of its own.
    pub fn label_rows(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let c = &self.config;
        match c.tied {
            true => self.embeddings(ids),
            false => {
                let table = self.stored(layout::LABELS, &[c.vocab_size, c.embedding_size])?;
                rows(&table, c.embedding_size, ids)
            }
        }
    }

    /// What is added to the logits of these words; None: the model adds nothing.
    pub fn label_bias(&self, ids: &[u32]) -> Result<Option<Vec<f32>>> {
        match self.config.has_head {
            true => {
                let bias = self.stored(layout::LABEL_BIAS, &[self.config.vocab_size])?;
                rows(&bias, 1, ids).map(Some)
            }
            false => Ok(None),
        }
    }

    /// What the second text of a pair has on top of what [`LanguageModel`] adds to every word, `[embedding_size]`; None: the model
    /// does not tell two texts apart by a type.
    pub fn second_type(&self) -> Result<Option<Vec<f32>>> {
        let c = &self.config;
        if c.type_vocab_size < 2 {
            return Ok(None);
        }
        let types = self.stored(layout::TYPES, &[c.type_vocab_size, c.embedding_size])?;
        let (first, others) = types.split_at(c.embedding_size);
        Ok(Some(others.iter().zip(first).map(|(b, a)| b - a).collect()))
    }

    /// A hash of all parameters and the word table, which tells one model from another.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut add = |name: &str, values: &[f32]| {
            hash.update(format!("{name} {}\n", values.len()));
            for chunk in values.chunks(1 << 14) {
                let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                hash.update(&bytes);
            }
        };
        let mut shapes = Self::inventory(&self.config)?;
        shapes.sort();
        for (name, dims) in shapes {
            add(&name, &self.stored(&name, &dims)?);
        }
        add(layout::WORDS, self.words()?);
        Ok(hash.finalize().into())
    }

    /// A parameter of the unfolded form.
    fn stored(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        if name == layout::POSITIONS {
            return self.positions(dims);
        }
        // A norm's gain is a row of a matrix in the program.
        let dims = match dims {
            [1, width] if name.ends_with("norm.weight") => &[*width],
            _ => dims,
        };
        let unknown = || Error::Config(format!("the family has no parameter {name}"));
        let (file_name, body) = layout::stored(self.config.family, self.format, name).ok_or_else(unknown)?;
        let prefix = if body { self.prefix } else { "" };
        let values = self.weights.tensor(&format!("{prefix}{file_name}"), dims)?;
        let heads = match name.rsplit_once(".attention.").map(|(_, part)| part) {
            Some("query.weight" | "query.bias") => self.config.num_attention_heads,
            Some("key.weight" | "key.bias") => self.config.num_key_value_heads,
            _ => return Ok(values),
        };
        Ok(match self.format {
            Format::Hub => values,
            Format::Gguf => halves(&values, heads, self.config.head_dim),
        })
    }

    /// Position vectors, with that of the first token type.
    fn positions(&self, dims: &[usize]) -> Result<Vec<f32>> {
        let (c, prefix) = (&self.config, self.prefix);
        let name = |name| {
            let stored = layout::stored(c.family, self.format, name);
            stored.map(|(name, _)| format!("{prefix}{name}"))
        };
        let (Some(positions), Some(types), &[wanted, width]) =
            (name(layout::POSITIONS), name(layout::TYPES), dims)
        else {
            return Err(Error::Config("the family has no position vectors".into()));
        };
        let table = self
            .weights
            .tensor(&positions, &[c.max_positions + c.position_offset, width])?;
        if wanted > c.max_positions {
            return Err(Error::Config(format!(
                "{wanted} positions; the model has {}",
                c.max_positions
            )));
        }
        let start = c.position_offset * width;
        let mut values = table[start..start + wanted * width].to_vec();
        if c.type_vocab_size > 0 {
            let types = self.weights.tensor(&types, &[c.type_vocab_size, width])?;
            for row in values.chunks_mut(width) {
                row.iter_mut().zip(&types).for_each(|(v, t)| *v += t);
            }
        }
        Ok(values)
    }

    fn has(&self, name: &str) -> bool {
        layout::stored(self.config.family, self.format, name).is_some_and(|(name, body)| {
            let prefix = if body { self.prefix } else { "" };
            self.weights.contains(&format!("{prefix}{name}"))
        })
    }
}

impl Weights {
    fn contains(&self, name: &str) -> bool {
        match self {
            Weights::Safetensors(file) => file.contains(name),
            Weights::Gguf(file) => file.contains(name),
        }
    }

    /// Also by the names that norms had in old checkpoints.
    fn tensor(&self, name: &str, dims: &[usize]) -> veiltune_hub::Result<Vec<f32>> {
        match self {
            Weights::Safetensors(file) => {
                let old = match name.rsplit_once('.') {
                    Some((norm, "weight")) => format!("{norm}.gamma"),
                    Some((norm, "bias")) => format!("{norm}.beta"),
                    _ => String::new(),
                };
                let name = if !file.contains(name) && file.contains(&old) {
                    &old
                } else {
                    name
                };
                file.tensor(name, dims)
            }
            Weights::Gguf(file) => file.tensor(name, dims),
        }
    }
}

fn rows(table: &[f32], width: usize, ids: &[u32]) -> Result<Vec<f32>> {
    let mut out = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        let row = (id as usize)
            .checked_mul(width)
            .and_then(|start| table.get(start..start + width));
        out.extend_from_slice(row.ok_or_else(|| Error::Config(format!("there is no word {id}")))?);
    }
    Ok(out)
}

/// Rows of each head that GGUF stores as the pairs that are rotated together, as the two halves that `transformers` has.
fn halves(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let columns = values.len() / (heads * width);
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks(width * columns) {
        for half in 0..2 {
            for pair in 0..width / 2 {
                let row = 2 * pair + half;
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

/// The one GGUF file in a folder.
fn only_gguf(dir: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(dir).map_err(|source| veiltune_hub::Error::Io {
        path: dir.to_owned(),
        source,
    })?;
    let mut found = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    match (found.next(), found.next()) {
        (Some(path), None) => Ok(path),
        (None, _) => Err(Error::Config(format!(
            "{}: neither model.safetensors nor a .gguf file is there",
            dir.display()
        ))),
        (Some(_), Some(_)) => Err(Error::Config(format!(
            "{}: several .gguf files are there; leave one",
            dir.display()
        ))),
    }
}
