//! Adapter artefacts in the PEFT layout: `adapter_config.json` beside `adapter_model.safetensors`.

use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::safetensors::{self, Checkpoint, Precision, Tensors};
use crate::{Result, files};

/// Name of the configuration within an artefact.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights within an artefact.
pub const MODEL_FILE: &str = "adapter_model.safetensors";

/// What every adapter configuration has in common; `C` is the method's own part, in the same JSON object, which says in
/// `peft_type` which method it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig<C> {
    /// Which backbone it was trained on.
    pub base_model_name_or_path: String,
    /// Hash of that backbone's parameters, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_sha256: Option<String>,
    /// How texts reach the backbone; None: it sees pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextForm>,
    /// The method's own configuration.
    #[serde(flatten)]
    pub method: C,
}

/// How an encoder reads texts: what an adapter for texts is trained for besides its backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextForm {
    /// Most tokens of a text, special ones included; longer texts are cut.
    pub tokens: usize,
    /// What stands for the whole text.
    pub pooling: Pooling,
    /// Whether examples are pairs of texts.
    #[serde(default)]
    pub pairs: bool,
}

/// What stands for a whole text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The mean of its tokens' states, as in sentence encoders.
    Mean,
    /// The state of the token that begins it.
    Class,
}

impl<C: DeserializeOwned> AdapterConfig<C> {
    /// Parses a configuration; `file` is its name in errors.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        files::parse_json(file, bytes)
    }

    /// Reads the configuration at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&path.to_string_lossy(), &files::read(path, MAX_CONFIG)?)
    }
}

/// Longest configuration, bytes.
const MAX_CONFIG: u64 = 1 << 22;

/// Reads an artefact.
pub fn read<C: DeserializeOwned>(dir: &Path) -> Result<(AdapterConfig<C>, Checkpoint)> {
    Ok((
        AdapterConfig::open(&dir.join(CONFIG_FILE))?,
        Checkpoint::open(&dir.join(MODEL_FILE))?,
    ))
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
    fn an_artefact_reads_back() {
        #[cfg(unix)]
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let config = AdapterConfig {
            base_model_name_or_path: "tiny".into(),
            base_model_sha256: Some("00ff".into()),
            text: Some(TextForm {
                tokens: 16,
                pooling: Pooling::Mean,
                pairs: false,
            }),
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
        // Weights are their user's alone, the configuration is for everybody.
        #[cfg(unix)]
        for (name, others) in [(MODEL_FILE, 0), (CONFIG_FILE, 0o044)] {
            let mode = std::fs::metadata(dir.path().join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o077, others, "{name}");
        }
        let (back, weights) = read(dir.path()).unwrap();
        assert_eq!((back, weights.arrays().unwrap()), (config, tensors));
        std::fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
        let error = read::<serde_json::Value>(dir.path()).unwrap_err().to_string();
        assert!(error.contains("base_model_name_or_path"), "{error}");
    }
}
