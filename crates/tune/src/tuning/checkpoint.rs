//! A run on disk: one file, replaced as a whole after each generation, that only its user may read.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use veiltune_hub::files;

use super::{Settings, State};
use crate::{Error, Result};

/// Goes up when a state means something else.
const VERSION: u32 = 1;
/// Largest checkpoint: beyond what 16,384 dimensions take.
const MAX_FILE: u64 = 1 << 33;

pub struct File {
    path: PathBuf,
    identity: String,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    identity: &'a str,
    settings: &'a Settings,
    state: &'a State,
}

/// What must fit before the state is looked at.
#[derive(Deserialize)]
struct Header {
    version: u32,
    identity: String,
    settings: Settings,
}

#[derive(Deserialize)]
struct Body {
    state: State,
}

impl File {
    /// With the state that is there, if any.
    pub fn open(
        path: &Path,
        identity: &str,
        settings: &Settings,
        dimension: usize,
    ) -> Result<(Self, Option<State>)> {
        let file = File {
            path: path.to_owned(),
            identity: identity.to_owned(),
        };
        if !path.exists() {
            return Ok((file, None));
        }
        let bytes = files::read(path, MAX_FILE)?;
        let header: Header = file.parse(&bytes)?;
        let comparable = |s: &Settings| Settings {
            budget: 0,
            patience: None,
            ..s.clone()
        };
        let differs = match &header {
            h if h.version != VERSION => Some("by another version"),
            h if h.identity != identity => {
                Some("of another model, task, selection of examples, or projection")
            }
            h if comparable(&h.settings) != comparable(settings) => Some("of a run with other settings"),
            _ => None,
        };
        if let Some(differs) = differs {
            return Err(file.refuse(format!(
                "the checkpoint is {differs}: go on as it began, or start in another folder"
            )));
        }
        let Body { state } = file.parse(&bytes)?;
        let points = state.train.iter().chain(&state.best).map(|b| &b.point);
        let sound = state.cma.dimension() == dimension
            && state.cma.population() == settings.population
            && points
                .clone()
                .all(|p| p.len() == dimension && p.iter().all(|x| x.is_finite()))
            && state.best.is_some() != state.history.is_empty()
            && (state.train.is_some() || state.cma.generation() == 0)
            && state.cma.generation() < u64::from(u32::MAX);
        if !sound {
            return Err(
                file.refuse("the checkpoint's parts do not fit together: start in another folder".into())
            );
        }
        Ok((file, Some(state)))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn write(&self, settings: &Settings, state: &State) -> Result<()> {
        let written = Written {
            version: VERSION,
            identity: &self.identity,
            settings,
            state,
        };
        let bytes = serde_json::to_vec(&written).map_err(|e| self.refuse(e.to_string()))?;
        Ok(files::write_private(&self.path, &bytes)?)
    }

    fn parse<'de, T: Deserialize<'de>>(&self, bytes: &'de [u8]) -> Result<T> {
        serde_json::from_slice(bytes).map_err(|e| self.refuse(format!("{e}: start in another folder")))
    }

    fn refuse(&self, detail: String) -> Error {
        Error::Checkpoint {
            file: self.path.clone(),
            detail,
        }
    }
}
