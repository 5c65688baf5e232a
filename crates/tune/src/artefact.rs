//! The tuned prompt as an artefact in PEFT's prompt-tuning layout: `adapter_config.json` beside
//! `adapter_model.safetensors`, which holds `prompt_embeddings`, `[tokens, hidden]`.
//!
//! What PEFT does not know (how the prompt is joined, the task, the attention that it was tuned with) stands under the key
//! `veiltune`. PEFT concatenates: what was tuned to be added, the default, is an offset to other embeddings and serves here
//! alone.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use veiltune_hub::{AdapterConfig, Array, Precision, Tensors, adapter};

use crate::{Error, Family, Prompt, Result, Slot, Task};

/// PEFT's name for the method.
const PEFT_TYPE: &str = "PROMPT_TUNING";
/// PEFT's name for the tensor.
const TENSOR: &str = "prompt_embeddings";
/// Most tokens of a prompt, and widest token.
const MAX_SIZES: [usize; 2] = [1 << 13, 1 << 17];

/// How a prompt meets the text's embeddings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Added to the embeddings of these tokens, which stand at its place.
    Add {
        /// As many as the prompt has.
        tokens: Vec<u32>,
    },
    /// Stands there itself.
    Concatenate,
}

/// A tuned prompt and all that using it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Artefact {
    /// Which model it was tuned on.
    pub base_model: String,
    /// Hash of that model's parameters, in hexadecimal.
    pub base_model_sha256: Option<String>,
    /// `[tokens, hidden]`; for [`Mode::Add`], the offset that is added.
    pub prompt: Prompt,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// How it is joined.
    pub mode: Mode,
    /// Template and verbalizer.
    pub task: Task,
    /// Which of the task's templates.
    pub family: Family,
    /// The attention that it was tuned with, in the words of whoever runs the model.
    pub attention: Value,
}

/// PEFT's part of the configuration, and ours.
#[derive(Serialize, Deserialize)]
struct Method {
    peft_type: String,
    task_type: Option<String>,
    inference_mode: bool,
    num_virtual_tokens: usize,
    token_dim: usize,
    num_transformer_submodules: usize,
    prompt_tuning_init: String,
    veiltune: Ours,
}

#[derive(Serialize, Deserialize)]
struct Ours {
    mode: Mode,
    family: Family,
    attention: Value,
    task: Task,
}

impl Artefact {
    /// Width of a token.
    pub fn hidden(&self) -> usize {
        self.prompt.0.len() / self.tokens
    }

    /// What stands in the template where the prompt goes.
    pub fn slot(&self) -> Slot {
        match &self.mode {
            Mode::Add { tokens } => Slot::Add(tokens.clone()),
            Mode::Concatenate => Slot::Concatenate(self.tokens),
        }
    }

    /// Writes the artefact to the folder `dir`, which only its user may enter if it is new; each file atomically, the
    /// configuration last.
    ///
    /// # Errors
    /// If the sizes do not fit together, or the files cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        if let Some(detail) = self.unfit() {
            return Err(Error::Settings(detail));
        }
        let config = AdapterConfig {
            base_model_name_or_path: self.base_model.clone(),
            base_model_sha256: self.base_model_sha256.clone(),
            text: None,
            method: Method {
                peft_type: PEFT_TYPE.into(),
                // PEFT has no name for masked language modelling.
                task_type: (self.family == Family::Causal).then(|| "CAUSAL_LM".into()),
                inference_mode: true,
                num_virtual_tokens: self.tokens,
                token_dim: self.hidden(),
                num_transformer_submodules: 1,
                prompt_tuning_init: "RANDOM".into(),
                veiltune: Ours {
                    mode: self.mode.clone(),
                    family: self.family,
                    attention: self.attention.clone(),
                    task: self.task.clone(),
                },
            },
        };
        let prompt = Array {
            dims: vec![self.tokens, self.hidden()],
            values: self.prompt.0.clone(),
        };
        let tensors = Tensors::from([(TENSOR.to_owned(), prompt)]);
        Ok(adapter::write(dir, &config, &tensors, Precision::F32)?)
    }

    /// Reads an artefact.
    ///
    /// # Errors
    /// Naming the file, if it is another method's, its parts do not fit together, or it cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let refuse = |detail: String| Error::Checkpoint {
            file: dir.join(adapter::CONFIG_FILE),
            detail,
        };
        let (config, checkpoint) = adapter::read::<Value>(dir)?;
        // Looked at first: another method's configuration lacks what the rest reads.
        let peft_type = config.method["peft_type"].as_str().unwrap_or("nothing");
        if peft_type != PEFT_TYPE {
            return Err(refuse(format!(
                "an adapter of type {peft_type}, not {PEFT_TYPE}: this takes tuned prompts"
            )));
        }
        if config.method["veiltune"].is_null() {
            return Err(refuse(
                "no key \"veiltune\": a prompt of another program, without template and words".into(),
            ));
        }
        let method: Method = serde_json::from_value(config.method).map_err(|e| refuse(e.to_string()))?;
        let sizes = [method.num_virtual_tokens, method.token_dim];
        if sizes
            .iter()
            .zip(MAX_SIZES)
            .any(|(size, most)| !(1..=most).contains(size))
        {
            return Err(refuse(format!("a prompt of {} tokens of {}", sizes[0], sizes[1])));
        }
        let artefact = Artefact {
            base_model: config.base_model_name_or_path,
            base_model_sha256: config.base_model_sha256,
            prompt: Prompt(checkpoint.tensor(TENSOR, &sizes)?),
            tokens: method.num_virtual_tokens,
            mode: method.veiltune.mode,
            task: method.veiltune.task,
            family: method.veiltune.family,
            attention: method.veiltune.attention,
        };
        match artefact.unfit() {
            Some(detail) => Err(refuse(detail)),
            None => Ok(artefact),
        }
    }

    fn unfit(&self) -> Option<String> {
        let values = self.prompt.0.len();
        if self.tokens == 0 || values == 0 || !values.is_multiple_of(self.tokens) {
            return Some(format!("a prompt of {} tokens with {values} values", self.tokens));
        }
        match &self.mode {
            Mode::Add { tokens } if tokens.len() != self.tokens => Some(format!(
                "a prompt of {} tokens to be added to {}",
                self.tokens,
                tokens.len()
            )),
            _ => self.task.template(self.family).err().map(|e| e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Artefact {
        Artefact {
            base_model: "tiny/model".into(),
            base_model_sha256: Some("00ff".into()),
            prompt: Prompt((0..6).map(|i| i as f32 / 7.0).collect()),
            tokens: 2,
            mode: Mode::Add { tokens: vec![8, 9] },
            task: Task::built_in("mrpc").unwrap(),
            family: Family::Causal,
            attention: serde_json::json!({"rfa": {"features": 64}}),
        }
    }

    #[test]
    fn an_artefact_reads_back_and_looks_like_pefts() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("prompt");
        let mut artefact = sample();
        artefact.write(&dir).unwrap();
        assert_eq!(Artefact::read(&dir).unwrap(), artefact);
        assert_eq!(artefact.slot(), Slot::Add(vec![8, 9]));
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(config["peft_type"], "PROMPT_TUNING");
        assert_eq!(config["task_type"], "CAUSAL_LM");
        assert_eq!(
            (&config["num_virtual_tokens"], &config["token_dim"]),
            (&2.into(), &3.into())
        );
        let weights = veiltune_hub::Checkpoint::open(&dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(weights.names(), ["prompt_embeddings"]);

        artefact.mode = Mode::Concatenate;
        artefact.family = Family::Masked;
        artefact.write(&dir).unwrap();
        assert_eq!(Artefact::read(&dir).unwrap(), artefact);
        assert_eq!(artefact.slot(), Slot::Concatenate(2));
        assert!(
            !format!("{artefact:?}").contains("0.14"),
            "the prompt is not shown"
        );
    }

    #[test]
    fn what_does_not_fit_is_neither_written_nor_read() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |change: &dyn Fn(&mut Artefact)| {
            let mut artefact = sample();
            change(&mut artefact);
            artefact.write(dir.path()).unwrap_err().to_string()
        };
        assert!(refused(&|a| a.tokens = 0).contains("0 tokens"));
        assert!(refused(&|a| a.tokens = 4).contains("4 tokens with 6 values"));
        assert!(refused(&|a| a.mode = Mode::Add { tokens: vec![1] }).contains("added to 1"));

        sample().write(dir.path()).unwrap();
        let path = dir.path().join("adapter_config.json");
        let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let read = |key: &str, value: Value| {
            let mut config = good.clone();
            config[key] = value;
            std::fs::write(&path, config.to_string()).unwrap();
            let error = Artefact::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("adapter_"), "{error}");
            error
        };
        assert!(read("peft_type", "LORA".into()).contains("type LORA, not PROMPT_TUNING"));
        assert!(read("veiltune", Value::Null).contains("another program"));
        assert!(read("num_virtual_tokens", 3.into()).contains("shape"));
        assert!(read("num_virtual_tokens", u64::MAX.into()).contains("prompt of"));
        assert!(read("token_dim", 0.into()).contains("tokens of 0"));
    }
}
