//! Names of parameters in checkpoints.

use super::config::Family;

/// Where a parameter is in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Names of the `transformers` library; a prefix may stand before those of the body.
    Hub,
    /// Names of GGUF files, Llama's alone.
    Gguf,
}

/// Words, positions, types.
pub(crate) const WORDS: &str = "embeddings.words";
pub(crate) const POSITIONS: &str = "embeddings.positions";
pub(crate) const TYPES: &str = "embeddings.types";
/// The table that gives logits, where it is not that of the words, and what is added to them.
pub(crate) const LABELS: &str = "head.words";
pub(crate) const LABEL_BIAS: &str = "head.bias";

/// Ours, then BERT's, RoBERTa's, ALBERT's, Llama's, GGUF's; "" where a family has none.
const TABLE: [(&str, [&str; 5]); 21] = [
    (
        WORDS,
        [
            "embeddings.word_embeddings.weight",
            "embeddings.word_embeddings.weight",
            "embeddings.word_embeddings.weight",
            "embed_tokens.weight",
            "token_embd.weight",
        ],
    ),
    (
        POSITIONS,
        [
            "embeddings.position_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "",
            "",
        ],
    ),
    (
        TYPES,
        [
            "embeddings.token_type_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "",
            "",
        ],
    ),
    (
        "embeddings.norm",
        [
            "embeddings.LayerNorm",
            "embeddings.LayerNorm",
            "embeddings.LayerNorm",
            "",
            "",
        ],
    ),
    (
        "embeddings.mapping",
        ["", "", "encoder.embedding_hidden_mapping_in", "", ""],
    ),
    ("final_norm", ["", "", "", "norm", "output_norm"]),
    (
        "head.dense",
        [
            "cls.predictions.transform.dense",
            "lm_head.dense",
            "predictions.dense",
            "",
            "",
        ],
    ),
    (
        "head.norm",
        [
            "cls.predictions.transform.LayerNorm",
            "lm_head.layer_norm",
            "predictions.LayerNorm",
            "",
            "",
        ],
    ),
    (
        LABEL_BIAS,
        ["cls.predictions.bias", "lm_head.bias", "predictions.bias", "", ""],
    ),
    (
        LABELS,
        [
            "cls.predictions.decoder.weight",
            "lm_head.decoder.weight",
            "predictions.decoder.weight",
            "lm_head.weight",
            "output.weight",
        ],
    ),
    // Within a layer.
    (
        "attention.query",
        [
            "attention.self.query",
            "attention.self.query",
            "attention.query",
            "self_attn.q_proj",
            "attn_q",
        ],
    ),
    (
        "attention.key",
        [
            "attention.self.key",
            "attention.self.key",
            "attention.key",
            "self_attn.k_proj",
            "attn_k",
        ],
    ),
    (
        "attention.value",
        [
            "attention.self.value",
            "attention.self.value",
            "attention.value",
            "self_attn.v_proj",
            "attn_v",
        ],
    ),
    (
        "attention.output",
        [
            "attention.output.dense",
            "attention.output.dense",
            "attention.dense",
            "self_attn.o_proj",
            "attn_output",
        ],
    ),
    (
        "attention_norm",
        [
            "attention.output.LayerNorm",
            "attention.output.LayerNorm",
            "attention.LayerNorm",
            "input_layernorm",
            "attn_norm",
        ],
    ),
    ("mlp.gate", ["", "", "", "mlp.gate_proj", "ffn_gate"]),
    (
        "mlp.up",
        [
            "intermediate.dense",
            "intermediate.dense",
            "ffn",
            "mlp.up_proj",
            "ffn_up",
        ],
    ),
    (
        "mlp.down",
        [
            "output.dense",
            "output.dense",
            "ffn_output",
            "mlp.down_proj",
            "ffn_down",
        ],
    ),
    (
        "mlp_norm",
        [
            "output.LayerNorm",
            "output.LayerNorm",
            "full_layer_layer_norm",
            "post_attention_layernorm",
            "ffn_norm",
        ],
    ),
    // Before a layer's names.
    (
        "layers",
        [
            "encoder.layer",
            "encoder.layer",
            "encoder.albert_layer_groups.0.albert_layers",
            "layers",
            "blk",
        ],
    ),
    // What may stand before the names of the body.
    ("prefix", ["bert.", "roberta.", "albert.", "model.", ""]),
];

fn look_up(family: Family, format: Format, name: &str) -> Option<&'static str> {
    let column = match (family, format) {
        (Family::Bert, _) => 0,
        (Family::Roberta, _) => 1,
        (Family::Albert, _) => 2,
        (Family::Llama, Format::Hub) => 3,
        (Family::Llama, Format::Gguf) => 4,
    };
    let (_, names) = TABLE.iter().find(|(ours, _)| *ours == name)?;
    Some(names[column]).filter(|n| !n.is_empty())
}

/// What stands before the names of the body in most checkpoints.
pub(crate) fn prefix(family: Family, format: Format) -> &'static str {
    look_up(family, format, "prefix").unwrap_or_default()
}

/// The name in a checkpoint, without the prefix, of one of ours; and whether it is of the body, which has the prefix. None: the
/// family has no such parameter.
pub(crate) fn stored(family: Family, format: Format, name: &str) -> Option<(String, bool)> {
    if let Some(whole) = look_up(family, format, name) {
        return Some((whole.to_owned(), !name.starts_with("head.")));
    }
    let (layer, part) = name.rsplit_once('.')?;
    match layer.strip_prefix("layers.") {
        None => {
            let layer = look_up(family, format, layer)?;
            Some((format!("{layer}.{part}"), !name.starts_with("head.")))
        }
        Some(rest) => {
            let (index, layer) = rest.split_once('.')?;
            // One layer's weights for all.
            let index = if family == Family::Albert { "0" } else { index };
            let (layers, layer) = (
                look_up(family, format, "layers")?,
                look_up(family, format, layer)?,
            );
            Some((format!("{layers}.{index}.{layer}.{part}"), true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_checkpoints() {
        for (family, format, ours, theirs, body) in [
            (
                Family::Bert,
                Format::Hub,
                "layers.3.attention_norm.bias",
                "encoder.layer.3.attention.output.LayerNorm.bias",
                true,
            ),
            (
                Family::Albert,
                Format::Hub,
                "layers.1.attention.output.weight",
                "encoder.albert_layer_groups.0.albert_layers.0.attention.dense.weight",
                true,
            ),
            (
                Family::Roberta,
                Format::Hub,
                "head.dense.weight",
                "lm_head.dense.weight",
                false,
            ),
            (
                Family::Llama,
                Format::Gguf,
                "layers.29.mlp.gate.weight",
                "blk.29.ffn_gate.weight",
                true,
            ),
            (
                Family::Llama,
                Format::Hub,
                "final_norm.weight",
                "norm.weight",
                true,
            ),
        ] {
            assert_eq!(
                stored(family, format, ours),
                Some((theirs.to_owned(), body)),
                "{ours}"
            );
        }
        assert_eq!(
            stored(Family::Bert, Format::Hub, "layers.0.mlp.gate.weight"),
            None
        );
        assert_eq!(stored(Family::Llama, Format::Hub, POSITIONS), None);
    }
}
