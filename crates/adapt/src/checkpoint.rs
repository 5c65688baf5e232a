//! What an interrupted training run goes on from: `training.json`, and the parameters in the file that it names.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use veiltune_hub::{Array, Checkpoint as Weights, Precision, Tensors, files, safetensors};

use crate::train::{Epoch, Start, Task};
use crate::{Error, Result};

/// Prefix of a parameter.
pub const VALUE: &str = "value.";
/// Prefixes of the optimiser's moments.
pub const MOMENTS: [&str; 2] = ["moment1.", "moment2."];
/// Prefix of a parameter after the best epoch, where that is not the last one.
pub const KEPT: &str = "kept.";
/// Says what there is to go on from.
pub const STATE_FILE: &str = "training.json";

/// State after the start, or some whole epochs; the parameters are beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Of all that the run depends on.
    pub run: String,
    /// File of the parameters.
    pub tensors: String,
    /// Steps done.
    pub steps: i32,
    /// Seconds spent.
    pub seconds: f64,
    /// What training began with.
    pub start: Option<Start>,
    /// The epochs done.
    pub curve: Vec<Epoch>,
}

impl Checkpoint {
    /// Of a run that has not begun.
    pub fn new(task: &Task) -> Result<Self> {
        let mut digest = Sha256::new();
        let json = |e: serde_json::Error| Error::Settings(e.to_string());
        digest.update(serde_json::to_vec(task.method).map_err(json)?);
        digest.update(serde_json::to_vec(task.settings).map_err(json)?);
        for pictures in [task.train, task.validation] {
            digest.update(pictures.states.digest());
            digest.update((pictures.states.views() as u64).to_le_bytes());
            digest.update((pictures.which.len() as u64).to_le_bytes());
            let which = pictures.which.iter();
            which.for_each(|&i| digest.update((i as u64).to_le_bytes()));
        }
        Ok(Checkpoint {
            run: crate::cache::hex(&digest.finalize()[..16]),
            tensors: String::new(),
            steps: 0,
            seconds: 0.0,
            start: None,
            curve: Vec::new(),
        })
    }
}

/// The state in `dir`, if there is one; that of another run than `fresh` is an error.
pub fn read(dir: &Path, fresh: &Checkpoint) -> Result<Option<(Checkpoint, Tensors)>> {
    let path = dir.join(STATE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let done: Checkpoint = files::read_json(&path)?;
    if done.run != fresh.run {
        return Err(Error::Settings(format!(
            "{}: belongs to a run with other settings, another method or other pictures; give another folder, or remove that one",
            path.display()
        )));
    }
    if done.tensors.contains(['/', '\\']) {
        return Err(Error::Settings(format!(
            "{}: {:?} is no file beside it",
            path.display(),
            done.tensors
        )));
    }
    let tensors = Weights::open(&dir.join(&done.tensors))?.arrays()?;
    Ok(Some((done, tensors)))
}

/// Writes the state; at any moment the old or the new one is there, whole.
pub fn write(dir: &Path, done: &Checkpoint, tensors: &Tensors) -> Result<()> {
    let name = |epoch: usize| format!("training-{epoch}.safetensors");
    let epoch = done.curve.len();
    let done = Checkpoint {
        tensors: name(epoch),
        ..done.clone()
    };
    safetensors::write(&dir.join(&done.tensors), tensors, Precision::F32).map_err(full)?;
    files::write_json(&dir.join(STATE_FILE), &done).map_err(full)?;
    // Nothing refers to the one before any more.
    let Some(before) = epoch.checked_sub(1) else {
        return Ok(());
    };
    let old = dir.join(name(before));
    match fs::remove_file(&old) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&old)(e)),
        _ => Ok(()),
    }
}

/// An error of writing, a full disk told apart.
fn full(e: veiltune_hub::Error) -> Error {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    match e {
        veiltune_hub::Error::Io { path, source } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
            Error::DiskFull(path)
        }
        e => Error::File(e),
    }
}

/// An array of a state.
pub fn find<'a>(tensors: &'a Tensors, prefix: &str, name: &str) -> Result<&'a Array> {
    let found = tensors.get(&format!("{prefix}{name}"));
    found.ok_or_else(|| Error::Settings(format!("the saved state lacks {prefix}{name}")))
}
