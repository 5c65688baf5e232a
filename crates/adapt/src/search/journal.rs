//! The file that a search can go on from: a line that says which search it is, then a line for each trial, all JSON.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Goal, Method, Settings, Space, Trial};
use crate::{Error, Result};

const FORMAT: &str = "veiltune search 1";
/// Bytes a journal may have; a trial takes about 150.
const MOST: u64 = 1 << 26;

/// What two searches must share for one to go on from the other's journal.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    format: String,
    method: Method,
    space: Space,
    goal: Goal,
    epochs: usize,
    seed: u64,
    fingerprint: String,
}

impl Header {
    fn new(settings: &Settings) -> Self {
        Header {
            format: FORMAT.into(),
            method: settings.method,
            space: settings.space.clone(),
            goal: settings.goal,
            epochs: settings.epochs,
            seed: settings.seed,
            fingerprint: settings.fingerprint.clone(),
        }
    }

    /// What differs, in words.
    fn differences(&self, other: &Header) -> String {
        let all = [
            ("format", self.format == other.format),
            ("method", self.method == other.method),
            ("space", self.space == other.space),
            ("goal", self.goal == other.goal),
            ("number of epochs", self.epochs == other.epochs),
            ("seed", self.seed == other.seed),
            ("data, backbone or network", self.fingerprint == other.fingerprint),
        ];
        let differing: Vec<_> = all.iter().filter(|d| !d.1).map(|d| d.0).collect();
        differing.join(", ")
    }
}

/// An open journal. No other process can open it meanwhile.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens or creates it; the trials in it come along. What an interrupted write left at the end is cut off.
    pub fn open(path: &Path, settings: &Settings) -> Result<(Self, Vec<Trial>)> {
        let failed = |e| io_error(path, e);
        let corrupt = |detail: String| {
            Error::File(veiltune_hub::Error::Corrupt {
                file: path.display().to_string(),
                detail,
            })
        };
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(corrupt("another search is writing to this journal".into()));
            }
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        let mut bytes = Vec::new();
        (&mut file)
            .take(MOST + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        if bytes.len() as u64 > MOST {
            return Err(corrupt("too large for a search journal".into()));
        }

        let header = Header::new(settings);
        let mut lines = bytes.split_inclusive(|&b| b == b'\n');
        let first = lines.next().unwrap_or_default();
        let mut journal = Journal {
            path: path.to_owned(),
            file,
        };
        if !first.ends_with(b"\n") {
            // Only a header of this very search that was cut short may be written over.
            if !line(&header)?.starts_with(first) {
                return Err(corrupt("not a search journal".into()));
            }
            journal.cut(0)?;
            journal.append(&header)?;
            journal.sync_folder();
            return Ok((journal, Vec::new()));
        }
        let found: Header =
            serde_json::from_slice(first).map_err(|e| corrupt(format!("not a search journal: {e}")))?;
        if found != header {
            return Err(corrupt(format!(
                "the journal of another search (other {}); give this one a file of its own",
                found.differences(&header)
            )));
        }
        let (mut trials, mut valid) = (Vec::new(), first.len());
        let mut lines = lines.enumerate().peekable();
        while let Some((i, text)) = lines.next() {
            let complete = text.ends_with(b"\n");
            match serde_json::from_slice(text) {
                Ok(trial) if complete => trials.push(trial),
                Err(e) if lines.peek().is_some() => {
                    return Err(corrupt(format!("trial {}: {e}", i + 1)));
                }
                _ => break,
            }
            valid += text.len();
        }
        journal.cut(valid as u64)?;
        Ok((journal, trials))
    }

    /// Adds a line, which is on the disk when this returns.
    pub fn push(&mut self, trial: &Trial) -> Result<()> {
        self.append(trial)
    }

    /// The error for a journal that does not fit the search it says it is of.
    pub fn mismatch(&self, detail: String) -> Error {
        Error::File(veiltune_hub::Error::Corrupt {
            file: self.path.display().to_string(),
            detail,
        })
    }

    fn append(&mut self, value: &impl Serialize) -> Result<()> {
        let bytes = line(value)?;
        self.file
            .write_all(&bytes)
            .and_then(|()| self.file.sync_data())
            .map_err(|e| io_error(&self.path, e))
    }

    fn cut(&mut self, length: u64) -> Result<()> {
        self.file
            .set_len(length)
            .and_then(|()| self.file.seek(SeekFrom::Start(length)))
            .map_err(|e| io_error(&self.path, e))?;
        Ok(())
    }

    /// Makes the new file's name durable where the system can; elsewhere there is nothing more to do.
    fn sync_folder(&self) {
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            let _ = folder.sync_all();
        }
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>> {
    let text = serde_json::to_string(value).map_err(|e| Error::Settings(e.to_string()))?;
    Ok((text + "\n").into_bytes())
}

fn io_error(path: &Path, source: io::Error) -> Error {
    Error::File(veiltune_hub::Error::Io {
        path: path.to_owned(),
        source,
    })
}
