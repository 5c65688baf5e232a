//! The folded form, in which a model is run privately: the same function with fewer products of secrets.
//!
//! - The scale of scores is part of the queries' projection (unless random features, which are of normalised queries, make it
//!   play no part).
//! - Llama: a norm's gain is part of the projections that read it. The last norm keeps its gain: what follows are rows of a table.
//! - Encoders, whose norms are in the residual stream: gain and bias of a norm are part of the projections that read it; where the
//!   residual adds the same again, the gain is applied and the bias is part of the branch's own. The embeddings keep theirs, so that a
//!   prompt can be added to them; the last layer's are applied at the end. ALBERT's first layer reads the embeddings and the others a
//!   norm, so that their attention is `layers.0` and `layers.1`.

use veiltune_hub::Array;

use super::block::NORMS;
use super::config::{Attention, Family, LanguageConfig};
use crate::affine::Affine;
use crate::method::Fetch;
use crate::{Error, Result};

/// The parameter `name` of the form that `config` has; `stored` gives those of the unfolded form by the same names.
pub fn parameter(config: &LanguageConfig, name: &str, dims: &[usize], stored: Fetch) -> Result<Array> {
    let folding = Folding { config, stored };
    let layer = match config.folded {
        true => name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')),
        false => None,
    };
    let Some((index, part)) = layer else {
        return stored(name, dims);
    };
    let index: usize = index
        .parse()
        .map_err(|_| Error::Config(format!("no layer {index}")))?;
    let Some((map, which)) = part.rsplit_once('.') else {
        return stored(name, dims);
    };
    match folding.map(index, map, dims, which == "bias")? {
        Some(map) => Ok(Array {
            dims: dims.to_vec(),
            values: match which {
                "weight" => map.weight,
                _ => map.bias,
            }
            .into_iter()
            .map(|v| v as f32)
            .collect(),
        }),
        None => stored(name, dims),
    }
}

struct Folding<'a> {
    config: &'a LanguageConfig,
    stored: Fetch<'a>,
}

impl Folding<'_> {
    /// The linear layer `name` of layer `index`; None: it is none, or is not changed. `dims` are those of its bias, if `bias`.
    fn map(&self, index: usize, name: &str, dims: &[usize], bias: bool) -> Result<Option<Affine>> {
        let c = self.config;
        let llama = c.family == Family::Llama;
        let before = index.checked_sub(1).map(|i| (i, NORMS[1]));
        let (read, added) = match (name, llama) {
            ("attention.query" | "attention.key" | "attention.value", true) => {
                (Some((index, NORMS[0])), None)
            }
            ("mlp.gate" | "mlp.up", true) => (Some((index, NORMS[1])), None),
            ("attention.query" | "attention.key" | "attention.value", false) => (before, None),
            ("attention.output", false) => (None, before),
            ("mlp.up", false) => (Some((index, NORMS[0])), None),
            ("mlp.down", false) => (None, Some((index, NORMS[0]))),
            _ => return Ok(None),
        };
        let (d, q, mlp) = (
            c.hidden_size,
            c.num_attention_heads * c.head_dim,
            c.intermediate_size,
        );
        let inputs = match name {
            "attention.output" => q,
            "mlp.down" => mlp,
            _ => d,
        };
        let get = |part: &str, dims: &[usize]| (self.stored)(&format!("layers.{index}.{name}.{part}"), dims);
        // The bias of what is not read through a norm needs no weight.
        let weight = match bias && read.is_none() {
            false => get("weight", &[dims[0], inputs])?,
            true => Array {
                dims: vec![dims[0], 0],
                values: Vec::new(),
            },
        };
        let has_bias = match name.starts_with("attention") {
            true => c.attention_bias,
            false => !llama,
        };
        let offset = match has_bias {
            true => get("bias", &dims[..1])?,
            false => Array {
                dims: dims[..1].to_vec(),
                values: vec![0.0; dims[0]],
            },
        };
        let mut map = Affine::new(&weight, Some(&offset));
        if let Some((index, norm)) = read {
            let (gain, shift) = self.norm(index, norm)?;
            map = map.after(&gain, &shift);
        }
        if let Some((index, norm)) = added {
            let (_, shift) = self.norm(index, norm)?;
            map.bias
                .iter_mut()
                .zip(&shift.values)
                .for_each(|(b, s)| *b += f64::from(*s));
        }
        if name == "attention.query" && c.attention == Attention::Softmax {
            map = map.scaled((c.head_dim as f64).powf(-0.5));
        }
        Ok(Some(map))
    }

    /// Gain and bias.
    fn norm(&self, index: usize, name: &str) -> Result<(Array, Array)> {
        let dims = [self.config.hidden_size];
        let get = |part: &str| (self.stored)(&format!("layers.{index}.{name}.{part}"), &dims);
        let shift = match self.config.family {
            Family::Llama => Array {
                dims: dims.to_vec(),
                values: vec![0.0; dims[0]],
            },
            _ => get("bias")?,
        };
        Ok((get("weight")?, shift))
    }
}
