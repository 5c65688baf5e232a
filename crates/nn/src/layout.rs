//! How the checkpoints of vision transformers name their parameters, and the transformers library its modules.
//!
//! One encoder serves them all; they differ in names and in a few optional parts.

use serde::{Deserialize, Serialize};

/// A family of checkpoints, by its `model_type` in the model hub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `vit` and `deit`.
    #[default]
    Vit,
    /// `dinov2`.
    Dinov2,
    /// The vision tower of `clip`.
    Clip,
}

/// A layout, and which optional parts a checkpoint has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variant {
    /// Names.
    pub layout: Layout,
    /// A distillation token (DeiT) follows the class token.
    pub distilled: bool,
    /// The norm that follows the last block is there.
    pub final_norm: bool,
}

/// Dotted names; those of a block are relative to it.
pub(crate) struct Names {
    pub patch: &'static str,
    /// Whether the patch embedding has a bias.
    pub patch_bias: bool,
    pub class: &'static str,
    pub distillation: &'static str,
    pub positions: &'static str,
    /// Leading dimensions of 1 of the class token, and of the positions.
    pub leading: (usize, usize),
    /// Norm of the embedded tokens, before the first block.
    pub pre_norm: Option<&'static str>,
    pub blocks: &'static str,
    pub norm1: &'static str,
    pub qkv: [&'static str; 3],
    pub out: &'static str,
    pub scale1: &'static str,
    pub norm2: &'static str,
    pub fc1: &'static str,
    pub fc2: &'static str,
    pub scale2: &'static str,
    pub final_norm: &'static str,
}

const VIT: Names = Names {
    patch: "embeddings.patch_embeddings.projection",
    patch_bias: true,
    class: "embeddings.cls_token",
    distillation: "embeddings.distillation_token",
    positions: "embeddings.position_embeddings",
    leading: (2, 1),
    pre_norm: None,
    blocks: "encoder.layer",
    norm1: "layernorm_before",
    qkv: [
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ],
    out: "attention.output.dense",
    scale1: "layer_scale1.lambda1",
    norm2: "layernorm_after",
    fc1: "intermediate.dense",
    fc2: "output.dense",
    scale2: "layer_scale2.lambda1",
    final_norm: "layernorm",
};

const DINOV2: Names = Names {
    norm1: "norm1",
    norm2: "norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    ..VIT
};

const CLIP: Names = Names {
    patch: "embeddings.patch_embedding",
    patch_bias: false,
    class: "embeddings.class_embedding",
    positions: "embeddings.position_embedding.weight",
    leading: (0, 0),
    // Misspelt in every checkpoint.
    pre_norm: Some("pre_layrnorm"),
    blocks: "encoder.layers",
    norm1: "layer_norm1",
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    out: "self_attn.out_proj",
    norm2: "layer_norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    final_norm: "post_layernorm",
    ..VIT
};

/// Where blocks are, and within one the projections to queries, keys and values.
struct Places {
    blocks: &'static str,
    qkv: [&'static str; 3],
}

/// The modules of the transformers library from 5.9 on; DINOv2 from 5.18 on. Its checkpoints have kept their names.
const MODULES: [&str; 3] = ["attention.q_proj", "attention.k_proj", "attention.v_proj"];

impl Places {
    /// `name`, where it begins with something that has a place here, with its place among `others` instead.
    fn rename(&self, name: &str, others: &Places) -> Option<String> {
        let rest = name.strip_prefix(self.blocks)?.strip_prefix('.')?;
        let (number, rest) = rest.split_once('.')?;
        let mut pairs = self.qkv.iter().zip(others.qkv);
        let rest = pairs.find_map(|(qkv, other)| Some((other, rest.strip_prefix(qkv)?)));
        let (other, part) = rest.filter(|(_, part)| part.is_empty() || part.starts_with('.'))?;
        Some(format!("{}.{number}.{other}{part}", others.blocks))
    }
}

impl Layout {
    pub(crate) fn names(self) -> &'static Names {
        match self {
            Layout::Vit => &VIT,
            Layout::Dinov2 => &DINOV2,
            Layout::Clip => &CLIP,
        }
    }

    fn places(self) -> Places {
        Places {
            blocks: self.names().blocks,
            qkv: self.names().qkv,
        }
    }

    /// Those of the transformers library's modules.
    fn modules(self) -> Places {
        match self {
            Layout::Vit => Places {
                blocks: "layers",
                qkv: MODULES,
            },
            Layout::Dinov2 => Places {
                qkv: MODULES,
                ..self.places()
            },
            Layout::Clip => self.places(),
        }
    }

    /// Names within a block of the projections to queries, keys and values, in the transformers library.
    pub fn projections(self) -> [&'static str; 3] {
        self.modules().qkv
    }

    /// The same in its earlier versions and in checkpoints.
    pub(crate) fn earlier_projections(self) -> [&'static str; 3] {
        self.places().qkv
    }

    /// The name in the transformers library of what in a checkpoint is `name`, as far as it is of a block's projections.
    pub(crate) fn module_name(self, name: &str) -> String {
        let renamed = self.places().rename(name, &self.modules());
        renamed.unwrap_or_else(|| name.to_owned())
    }

    /// The other way.
    pub(crate) fn checkpoint_name(self, name: &str) -> String {
        let renamed = self.modules().rename(name, &self.places());
        renamed.unwrap_or_else(|| name.to_owned())
    }

    /// Name of the norm that follows the last block, where a checkpoint has one.
    pub fn final_norm(self) -> &'static str {
        self.names().final_norm
    }

    /// What may stand before every name, the most frequent first.
    pub(crate) fn prefixes(self) -> &'static [&'static str] {
        match self {
            Layout::Vit => &["", "vit.", "deit."],
            Layout::Dinov2 => &["", "dinov2."],
            Layout::Clip => &["vision_model.", "", "clip.vision_model."],
        }
    }
}
