//! LoRA artefacts as the PEFT library has them, of image classifiers of the transformers library.
//!
//! Ours are written with PEFT's names, so that it can read them; and those that it wrote can be taken over. They lack what a
//! private program needs besides: the architecture, which the backbone has, names of the classes, and calibrated ranges.
//!
//! The names are those of modules, which the transformers library has changed (5.9 those of ViT and DeiT, 5.18 those of DINOv2).
//! Written are the present ones; read are both.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use veiltune_hub::{AdapterConfig, Array, Checkpoint, Tensors, adapter, files};

use crate::attention::AttentionKind;
use crate::encoder::{EncoderConfig, Tuning};
use crate::layout::Layout;
use crate::{Backbone, Classifier, Error, Method, Result};

/// Before every name.
const ROOT: &str = "base_model.model.";
/// Within the name of a module that is trained whole, in some files.
const WHOLE: [&str; 2] = ["modules_to_save.default.", "modules_to_save."];
/// The head.
const CLASSIFIER: &str = "classifier";
/// In place of the safetensors file in old artefacts.
const PICKLE: &str = "adapter_model.bin";

/// Whose names of modules.
#[derive(Clone, Copy, PartialEq)]
enum Naming {
    Present,
    Earlier,
}

/// The name in an artefact of the provider's parameter `name`.
fn stored_name(c: &EncoderConfig, name: &str, naming: Naming) -> String {
    let tower = match c.variant.layout {
        Layout::Vit if c.variant.distilled => "deit",
        Layout::Vit => "vit",
        Layout::Dinov2 => "dinov2",
        Layout::Clip => "vision_model",
    };
    match name.split_once('.') {
        Some(("head", part)) => format!("{ROOT}{CLASSIFIER}.{part}"),
        Some(("norm", part)) => format!("{ROOT}{tower}.{}.{part}", c.variant.layout.final_norm()),
        _ if naming == Naming::Earlier => format!("{ROOT}{tower}.{name}"),
        _ => format!("{ROOT}{tower}.{}", c.variant.layout.module_name(name)),
    }
}

/// What PEFT needs of a configuration to find the modules that are changed and, the norm and the head, trained whole.
pub(crate) fn fields(c: &EncoderConfig) -> [(&'static str, Value); 3] {
    let whole = [c.variant.layout.final_norm(), CLASSIFIER];
    [
        ("target_modules", c.target_modules().into()),
        ("modules_to_save", whole.to_vec().into()),
        ("bias", "none".into()),
    ]
}

/// With the names of an artefact.
pub(crate) fn store(c: &EncoderConfig, weights: &Tensors) -> Tensors {
    let renamed = weights
        .iter()
        .map(|(name, array)| (stored_name(c, name, Naming::Present), array.clone()));
    renamed.collect()
}

/// With the names of [`crate::Vit`], as artefacts of earlier releases have them, too.
pub(crate) fn restore(c: &EncoderConfig, stored: Tensors) -> Result<Tensors> {
    let mut out = Tensors::new();
    let mut ours = BTreeMap::new();
    for (name, _) in private(c)? {
        for naming in [Naming::Earlier, Naming::Present] {
            ours.insert(stored_name(c, &name, naming), name.clone());
        }
    }
    for (name, array) in stored {
        let name = ours.get(&name).cloned().unwrap_or(name);
        out.insert(name, array);
    }
    Ok(out)
}

/// Names and shapes of the provider's parameters.
fn private(c: &EncoderConfig) -> Result<Vec<(String, Vec<usize>)>> {
    let all = c.inventory()?;
    Ok(all.into_iter().filter(|(name, _)| c.is_private(name)).collect())
}

/// `adapter_config.json` as PEFT writes it, as far as it matters here.
#[derive(Deserialize)]
struct Foreign {
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    target_modules: Targets,
    bias: Option<String>,
    use_dora: Option<bool>,
    /// The change is scaled by `lora_alpha / sqrt(r)`.
    use_rslora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    layers_to_transform: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Targets {
    List(Vec<String>),
    One(String),
}

impl Foreign {
    fn check(&self) -> Result<()> {
        let some = |map: &Option<Map<String, Value>>| map.as_ref().is_some_and(|m| !m.is_empty());
        let refused = [
            (self.use_dora == Some(true), "use_dora"),
            (
                self.bias.as_deref().is_some_and(|b| b != "none"),
                "a trained bias",
            ),
            (
                some(&self.rank_pattern) || some(&self.alpha_pattern),
                "rank_pattern or alpha_pattern",
            ),
            (self.layers_to_transform.is_some(), "layers_to_transform"),
        ];
        match refused.iter().find(|(is, _)| *is) {
            Some((_, what)) => Err(Error::Config(format!("LoRA with {what} is not supported"))),
            None => Ok(()),
        }
    }
}

/// The LoRA in `dir` that PEFT wrote for a ViT or DeiT classifier on `backbone`: changes of queries, keys and values, and the
/// head that was trained with them (`modules_to_save`). The norm before it is the backbone's unless it was trained too.
/// `labels` are the classes in the order of the head's outputs; None numbers them as the transformers library does. The
/// ranges are yet to be calibrated.
///
/// # Errors
/// If it changes anything else, lacks anything, or was made for another architecture; tensors and modules are named.
pub fn import(dir: &Path, backbone: &Backbone, labels: Option<Vec<String>>) -> Result<Classifier> {
    let refuse = |detail: String| Err(Error::Config(detail));
    let path = dir.join(adapter::CONFIG_FILE);
    let config: Value = files::read_json(&path)?;
    match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => return refuse(format!("peft_type {other:?} is not imported; \"LORA\" is")),
    }
    let foreign: Foreign = serde_json::from_value(config)
        .map_err(|e| Error::Config(format!("{}: {e}", adapter::CONFIG_FILE)))?;
    foreign.check()?;
    let layout = backbone.variant.layout;
    if layout != Layout::Vit || !backbone.variant.final_norm {
        // The transformers library gives the heads of the others means over patches.
        return refuse(
            "only LoRA of ViT and DeiT classifiers is imported; their heads read the class token alone"
                .into(),
        );
    }
    let targets = match foreign.target_modules {
        Targets::List(names) => names,
        Targets::One(pattern) => {
            return refuse(format!(
                "target_modules is the pattern {pattern:?}; a list of names is needed"
            ));
        }
    };
    if !dir.join(adapter::MODEL_FILE).exists() && dir.join(PICKLE).exists() {
        return refuse(format!("{PICKLE} is a pickle; save the adapter as safetensors"));
    }

    let (mut found, mut naming) = (Tensors::new(), Naming::Present);
    for (name, array) in Checkpoint::open(&dir.join(adapter::MODEL_FILE))?.arrays()? {
        let name = ours(&name, layout);
        let in_checkpoints = layout.checkpoint_name(&name);
        if in_checkpoints == name && layout.module_name(&name) != name {
            naming = Naming::Earlier;
        }
        found.insert(in_checkpoints, array);
    }
    let classes = found.get("head.weight").and_then(|w| w.dims.first().copied());
    let Some(classes) = classes else {
        return refuse(format!(
            "there is no {CLASSIFIER}; train with modules_to_save=[\"{CLASSIFIER}\"]"
        ));
    };
    let labels = match labels {
        Some(labels) if labels.len() != classes => {
            return refuse(format!("{} labels for {classes} classes", labels.len()));
        }
        Some(labels) => labels,
        None if classes > MAX_CLASSES => return refuse(format!("{classes} classes")),
        None => (0..classes).map(|i| format!("LABEL_{i}")).collect(),
    };
    let rank = foreign.r as f64;
    let tuning = Tuning::Lora {
        r: foreign.r,
        lora_alpha: foreign.lora_alpha
            * if foreign.use_rslora == Some(true) {
                rank.sqrt()
            } else {
                1.0
            },
        target_modules: targets,
    };
    let (vit, layers) = (&backbone.config, backbone.config.num_hidden_layers);
    let config = EncoderConfig::new(
        tuning,
        vit,
        backbone.variant,
        layers,
        AttentionKind::Softmax,
        labels,
    );
    config.check()?;
    let weights = complete(&config, found, naming, backbone)?;
    let fingerprint = backbone.fingerprint()?;
    Ok(Classifier {
        config: AdapterConfig {
            base_model_name_or_path: foreign.base_model_name_or_path.unwrap_or_default(),
            base_model_sha256: Some(fingerprint.iter().map(|b| format!("{b:02x}")).collect()),
            text: None,
            method: Method::Encoder(config),
        },
        weights,
    })
}

/// More classes than any head has, before anything is allocated for them.
const MAX_CLASSES: usize = 1 << 16;

/// Our name of a tensor of a PEFT artefact, except that of a projection.
fn ours(stored: &str, layout: Layout) -> String {
    let mut name = stored.strip_prefix(ROOT).unwrap_or(stored).to_owned();
    for infix in WHOLE {
        name = name.replace(infix, "");
    }
    let prefixes = layout.prefixes().iter().filter(|p| !p.is_empty());
    let bare = prefixes
        .filter_map(|p| name.strip_prefix(p))
        .next()
        .unwrap_or(&name);
    for (module, ours) in [(layout.final_norm(), "norm"), (CLASSIFIER, "head")] {
        if let Some(part) = bare.strip_prefix(module).and_then(|rest| rest.strip_prefix('.')) {
            return format!("{ours}.{part}");
        }
    }
    bare.to_owned()
}

/// All of the provider's parameters, each of its right shape, and nothing else.
fn complete(c: &EncoderConfig, mut found: Tensors, naming: Naming, backbone: &Backbone) -> Result<Tensors> {
    let mut out = Tensors::new();
    let stored_name = |name: &str| stored_name(c, name, naming);
    for (name, dims) in private(c)? {
        let array: Array = match (found.remove(&name), name.strip_prefix("norm.")) {
            (Some(array), _) => array,
            (None, Some(part)) => {
                backbone.parameter(&format!("{}.{part}", c.variant.layout.final_norm()), &dims)?
            }
            (None, None) => return Err(Error::Config(format!("no tensor {}", stored_name(&name)))),
        };
        if array.dims != dims {
            let (stored, got) = (stored_name(&name), array.dims);
            return Err(Error::Config(format!(
                "tensor {stored} is {got:?}, not {dims:?}: it is for another backbone or rank"
            )));
        }
        out.insert(name, array);
    }
    match found.keys().next() {
        None => Ok(out),
        Some(name) => Err(Error::Config(format!(
            "{name} has no place here: only the query, key and value projections that target_modules names are changed"
        ))),
    }
}
