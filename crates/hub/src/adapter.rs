//! Adapter artefacts in the PEFT layout: `adapter_config.json` beside `adapter_model.safetensors`.

use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::safetensors::{self, Checkpoint, Precision, Tensors};
use crate::{Error, Result, files};

/// Name of the configuration within an artefact.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights within an artefact.
pub const MODEL_FILE: &str = "adapter_model.safetensors";

/// What every adapter configuration has in common; `C` is the method's own part, in the same JSON object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig<C> {
    /// The method.
    pub peft_type: String,
    /// Which backbone it was trained on.
    pub base_model_name_or_path: String,
    /// The method's own configuration.
    #[serde(flatten)]
    pub method: C,
}

impl<C: DeserializeOwned> AdapterConfig<C> {
    /// Parses a configuration; another method than `peft_type` is an error.
    pub fn parse(file: &str, bytes: &[u8], peft_type: &str) -> Result<Self> {
        // The method first: another one's fields would only give a confusing error.
        #[derive(Deserialize)]
        struct Method {
            peft_type: String,
        }
        let found = files::parse_json::<Method>(file, bytes)?.peft_type;
        if found != peft_type {
            return Err(Error::corrupt(
                file,
                format!("peft_type is {found:?}, not {peft_type:?}"),
            ));
        }
        files::parse_json(file, bytes)
    }
}

/// Reads an artefact of the method `peft_type`.
pub fn read<C: DeserializeOwned>(dir: &Path, peft_type: &str) -> Result<(AdapterConfig<C>, Checkpoint)> {
    let path = dir.join(CONFIG_FILE);
    let config = AdapterConfig::parse(&path.to_string_lossy(), &files::read(&path, 1 << 22)?, peft_type)?;
    Ok((config, Checkpoint::open(&dir.join(MODEL_FILE))?))
}

/// Writes an artefact, each file atomically, the configuration last.
pub fn write<C: Serialize>(
    dir: &Path,
    config: &AdapterConfig<C>,
    tensors: &Tensors,
    precision: Precision,
) -> Result<()> {
    safetensors::write(&dir.join(MODEL_FILE), tensors, precision)?;
    files::write_json(&dir.join(CONFIG_FILE), config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Array;

    #[test]
    fn an_artefact_reads_back_and_another_method_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = AdapterConfig {
            peft_type: "ONE".into(),
            base_model_name_or_path: "tiny".into(),
            method: std::collections::BTreeMap::from([("rank".to_owned(), 4)]),
        };
        let tensors = Tensors::from([(
            "w".to_owned(),
            Array {
                dims: vec![2],
                values: vec![1.0, 2.0],
            },
        )]);
        write(dir.path(), &config, &tensors, Precision::F32).unwrap();
        let (back, weights) = read(dir.path(), "ONE").unwrap();
        assert_eq!((back, weights.arrays().unwrap()), (config, tensors));
        let other = read::<serde_json::Value>(dir.path(), "TWO")
            .unwrap_err()
            .to_string();
        assert!(other.contains("\"ONE\", not \"TWO\""), "{other}");
    }
}
