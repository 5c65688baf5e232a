//! Models of the hub: found in the cache that its tools share, or downloaded into it.
//!
//! Read from the environment, as those tools do: `HF_HUB_CACHE`, `HF_HOME` and `XDG_CACHE_HOME` for where the cache is;
//! `HF_ENDPOINT`, a mirror's address in place of the hub's own; `HF_TOKEN`, or the file `HF_TOKEN_PATH` or
//! `$HF_HOME/token`, for models that need one; `HF_HUB_OFFLINE` (1, on, yes, true) to stay off the network.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::{Agent, Proxy};

use crate::download::{Remote, agent};
use crate::safetensors::{self, MAX_CHECKPOINT};
use crate::{Error, Result, files};

/// The public hub.
const HUB: &str = "https://huggingface.co";
/// The architecture.
const CONFIG: &str = "config.json";
/// The weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// The list of the files that the weights are in.
const INDEX: &str = "model.safetensors.index.json";
/// Largest file but those of weights, bytes.
const MAX_SMALL: u64 = 1 << 22;
/// Longest reference, and longest token, bytes.
const MAX_REFERENCE: u64 = 1 << 10;

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file.
    pub file: &'a str,
    /// Bytes that are there.
    pub done: u64,
    /// Bytes of the whole.
    pub total: u64,
}

/// As [`fetch`], in silence.
pub fn locate(name: &str) -> Result<PathBuf> {
    fetch(name, &mut |_| {})
}

/// The folder of a model: `name` itself if it is one, otherwise the snapshot of the model `owner/name`, or
/// `owner/name@revision`, of the model hub.
///
/// A snapshot in the cache with configuration and weights is taken as it is, without asking whether there is a newer one.
/// What is missing is downloaded: `config.json`, `preprocessor_config.json` and the tokenizer's files if there are
/// any, and `model.safetensors` or the files of `model.safetensors.index.json`. `progress` is called as bytes arrive.
/// After an interruption the next call continues; no part of a file is ever taken for the whole.
pub fn fetch(name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    let var = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    Settings::new(var).fetch(name, progress)
}

/// What the environment says.
struct Settings {
    cache: Option<PathBuf>,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    /// Between two attempts to download.
    pause: Duration,
    agent: Agent,
}

impl Settings {
    fn new(var: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let text = |key: &str| Some(var(key)?.to_string_lossy().trim().to_owned()).filter(|t| !t.is_empty());
        let home = var("HF_HOME").or_else(|| {
            let cache = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")))?;
            Some(cache.join("huggingface"))
        });
        let token_file = var("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")));
        let stored = || {
            let bytes = files::read(&token_file?, MAX_REFERENCE).ok()?;
            Some(String::from_utf8(bytes).ok()?.trim().to_owned()).filter(|t| !t.is_empty())
        };
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
        Settings {
            endpoint: text("HF_ENDPOINT")
                .unwrap_or_else(|| HUB.to_owned())
                .trim_end_matches('/')
                .to_owned(),
            token: text("HF_TOKEN").or_else(stored),
            offline: ["1", "on", "yes", "true"].contains(&&*offline),
            pause: Duration::from_secs(1),
            agent: agent(Proxy::try_from_env()),
            cache: var("HF_HUB_CACHE").or_else(|| Some(home?.join("hub"))),
        }
    }

    fn fetch(&self, name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        let folder = Path::new(name);
        if folder.is_dir() {
            return Ok(folder.to_owned());
        }
        let (id, revision) = parse(name)?;
        let absent = |what: &str, advice: &str| Error::Hub {
            model: name.to_owned(),
            detail: format!("{what}; {advice}"),
        };
        let Some(cache) = &self.cache else {
            let advice = "set HF_HUB_CACHE, or give a folder";
            return Err(absent(
                "where the model hub's cache is, is unknown without a home folder",
                advice,
            ));
        };
        let folder = cache.join(format!("models--{}", id.replace('/', "--")));
        let what = match snapshot(&folder, revision)? {
            Some(snapshot) => match missing(&snapshot)? {
                None => return Ok(snapshot),
                Some(file) => format!("{file} is missing in {}", snapshot.display()),
            },
            None => format!("not in the model hub's cache {}", cache.display()),
        };
        match self.offline {
            true => Err(absent(&what, "HF_HUB_OFFLINE forbids to download it")),
            false => {
                let remote = Remote {
                    id,
                    model: name,
                    endpoint: &self.endpoint,
                    token: self.token.as_deref(),
                    folder,
                    pause: self.pause,
                    agent: &self.agent,
                };
                download(&remote, revision, progress)
            }
        }
    }
}

/// The model `owner/name`, and the branch, tag or commit.
fn parse(name: &str) -> Result<(&str, &str)> {
    let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() == 2 && parts.iter().chain([&revision]).all(|p| plain(p)) {
        return Ok((id, revision));
    }
    let detail = "neither a folder nor a model id of the form owner/name";
    Err(Error::corrupt(name, detail))
}

/// The snapshot of a revision, whole or not.
fn snapshot(folder: &Path, revision: &str) -> Result<Option<PathBuf>> {
    // A branch or tag is a file with the commit's name; a commit is its own.
    let reference = folder.join("refs").join(revision);
    let commit = match reference.is_file() {
        true => String::from_utf8_lossy(&files::read(&reference, MAX_REFERENCE)?)
            .trim()
            .to_owned(),
        false => revision.to_owned(),
    };
    let snapshot = folder.join("snapshots").join(&commit);
    Ok((plain(&commit) && snapshot.is_dir()).then_some(snapshot))
}

/// A file that a snapshot lacks to be whole.
fn missing(snapshot: &Path) -> Result<Option<String>> {
    let absent = |file: &&str| !snapshot.join(file).is_file();
    if absent(&CONFIG) {
        return Ok(Some(CONFIG.to_owned()));
    }
    if absent(&INDEX) {
        return Ok(Some(WEIGHTS).filter(absent).map(String::from));
    }
    let parts = safetensors::parts(&snapshot.join(INDEX))?;
    Ok(parts.into_iter().find(|part| absent(&part.as_str())))
}

/// Fetches what is not there yet, all of one commit; the weights last, and then the reference to the commit.
fn download(remote: &Remote, revision: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    let none = |file: &str| Error::Hub {
        model: remote.model.to_owned(),
        detail: format!("the model hub has no {file} of it"),
    };
    let config = remote.meta(revision, CONFIG)?.ok_or_else(|| none(CONFIG))?;
    let commit = config.commit.clone();
    let snapshot = remote.folder.join("snapshots").join(&commit);
    remote.get(CONFIG, &config, MAX_SMALL, progress)?;
    let tokenizer = crate::tokenizer::FILES.map(|name| (name, crate::tokenizer::MAX_FILE));
    for (name, most) in [(crate::processor::FILE, MAX_SMALL)].into_iter().chain(tokenizer) {
        let Some(meta) = remote.meta(&commit, name)? else {
            continue;
        };
        remote.get(name, &meta, most, progress)?;
    }
    if let Some(meta) = remote.meta(&commit, WEIGHTS)? {
        remote.get(WEIGHTS, &meta, MAX_CHECKPOINT, progress)?;
    } else {
        let neither = || none(&format!("{WEIGHTS} or {INDEX}"));
        let meta = remote.meta(&commit, INDEX)?.ok_or_else(neither)?;
        let index = remote.get(INDEX, &meta, MAX_SMALL, progress)?;
        for part in safetensors::parts(&index)? {
            if !plain(&part) {
                return Err(none(&format!("file that could be called {part:?}")));
            }
            let meta = remote.meta(&commit, &part)?.ok_or_else(|| none(&part))?;
            remote.get(&part, &meta, MAX_CHECKPOINT, progress)?;
        }
    }
    if revision != commit {
        files::write_atomic(&remote.folder.join("refs").join(revision), commit.as_bytes())?;
    }
    Ok(snapshot)
}

/// Whether `part` is one component of a path that leads nowhere else.
pub(crate) fn plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

#[cfg(test)]
mod tests;
