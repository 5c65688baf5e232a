//! Files of the model hub, into the cache that its tools share.
//!
//! A file is `blobs/<entity tag>`, with links to it at `snapshots/<commit>/<name>`. While it is fetched it is called
//! `<entity tag>.incomplete`; it gets its name when it has the announced size and, where the tag is one, the announced
//! SHA-256. A transfer that breaks off is resumed where it ended, in the same run or in a later one.
//!
//! The hub's answers are not trusted with paths or sizes, and the token is sent to no other host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body, Proxy};

use crate::cache::{Progress, plain};
use crate::{Error, Result};

/// Connecting, or waiting for the next bytes, takes no longer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 3;
/// Most redirections.
const MAX_REDIRECTS: u32 = 5;
/// Bytes between two calls of a progress function.
const CHUNK: usize = 1 << 18;

/// The hub, asked for the files of one model.
pub(crate) struct Remote<'a> {
    /// `owner/name`.
    pub id: &'a str,
    /// `owner/name@revision`, for errors.
    pub model: &'a str,
    /// Where the hub is, without a slash at its end.
    pub endpoint: &'a str,
    pub token: Option<&'a str>,
    /// The model's folder in the cache.
    pub folder: PathBuf,
    /// Between two attempts.
    pub pause: Duration,
    pub agent: &'a Agent,
}

/// What the hub says of a file.
pub(crate) struct Meta {
    /// The commit it is of.
    pub commit: String,
    /// Name of its content.
    tag: String,
    size: u64,
}

/// Why a transfer ended early.
enum Broken {
    /// The network did; more may come in another attempt.
    Network(String),
    /// For good.
    Final(Error),
}

/// Speaks to the hub, through a proxy if there is one.
pub(crate) fn agent(proxy: Option<Proxy>) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(MAX_REDIRECTS)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .timeout_per_read(Some(TIMEOUT))
        .user_agent(concat!("veiltune/", env!("CARGO_PKG_VERSION")))
        .proxy(proxy);
    config.build().into()
}

impl Remote<'_> {
    fn refuse(&self, detail: impl Into<String>) -> Error {
        Error::Hub {
            model: self.model.to_owned(),
            detail: detail.into(),
        }
    }

    fn url(&self, revision: &str, file: &str) -> String {
        format!("{}/{}/resolve/{revision}/{file}", self.endpoint, self.id)
    }

    /// The headers of a file; nothing if the model has no such file.
    pub fn meta(&self, revision: &str, file: &str) -> Result<Option<Meta>> {
        let response = self.head(self.url(revision, file), file)?;
        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
        let status = response.status();
        match (status, header("x-error-code").as_deref()) {
            (StatusCode::NOT_FOUND, None | Some("EntryNotFound")) => return Ok(None),
            (StatusCode::NOT_FOUND, _) => {
                return Err(self.refuse("the model hub has no such model or revision"));
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                let detail = "the model hub has no such model, or does not let you have it: set HF_TOKEN if you have access";
                return Err(self.refuse(detail));
            }
            _ if status.is_success() || status.is_redirection() => {}
            _ => return Err(self.refuse(format!("the model hub answers {status} to {file}"))),
        }
        let tag = header("x-linked-etag").or_else(|| header("etag"));
        let tag = tag.map(|t| t.trim_start_matches("W/").trim_matches('"').to_owned());
        // The length that comes with a redirection is its own.
        let size =
            header("x-linked-size").or_else(|| header("content-length").filter(|_| status.is_success()));
        match (header("x-repo-commit"), tag, size.and_then(|s| s.parse().ok())) {
            (Some(commit), Some(tag), Some(size)) if plain(&commit) && plain(&tag) && tag.len() <= 128 => {
                Ok(Some(Meta { commit, tag, size }))
            }
            _ => Err(self.refuse(format!(
                "what {} says of {file} is not a model hub's answer",
                self.endpoint
            ))),
        }
    }

    /// Follows redirections within the hub, as of a model that was renamed; not those to where its files are stored, whose
    /// headers tell less.
    fn head(&self, mut url: String, file: &str) -> Result<Response<Body>> {
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.head(&url).header("Accept-Encoding", "identity");
            if let Some(token) = self.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request
                .config()
                .max_redirects(0)
                .max_redirects_will_error(false)
                .build()
                .call()
                .map_err(|e| self.refuse(format!("cannot ask the model hub for {file}: {e}")))?;
            let to = response.headers().get("location").and_then(|l| l.to_str().ok());
            match to {
                Some(to)
                    if response.status().is_redirection() && to.starts_with('/') && !to.starts_with("//") =>
                {
                    url = format!("{}{to}", origin(self.endpoint));
                }
                _ => return Ok(response),
            }
        }
        Err(self.refuse(format!("the model hub redirects too often for {file}")))
    }

    /// Puts a file into the snapshot of its commit, of at most `limit` bytes, and gives its path.
    pub fn get(
        &self,
        file: &str,
        meta: &Meta,
        limit: u64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf> {
        if meta.size > limit {
            return Err(self.refuse(format!("{file} is larger than {limit} bytes")));
        }
        let blob = self.folder.join("blobs").join(&meta.tag);
        if !blob.is_file() {
            self.blob(file, meta, &blob, progress)?;
        }
        let entry = self.folder.join("snapshots").join(&meta.commit).join(file);
        if !entry.is_file() {
            enter(&blob, &entry).map_err(Error::io(&entry))?;
        }
        Ok(entry)
    }

    fn blob(&self, file: &str, meta: &Meta, blob: &Path, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let partial = &blob.with_file_name(format!("{}.incomplete", meta.tag));
        let io = |e| Error::io(partial)(e);
        fs::create_dir_all(self.folder.join("blobs")).map_err(io)?;
        let mut out = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(partial)
            .map_err(io)?;
        // Another process may be at it; then this one waits, and finds it done.
        out.lock().map_err(io)?;
        if blob.is_file() {
            // Not there, or opened for nothing, just after the other one had finished.
            let _ = fs::remove_file(partial);
            return Ok(());
        }
        let mut done = out.metadata().map_err(io)?.len();
        if done > meta.size {
            done = 0;
            out.set_len(0).map_err(io)?;
        }
        let (mut failures, mut most) = (0, done);
        while done < meta.size {
            let mut report = |done| {
                progress(Progress {
                    file,
                    done,
                    total: meta.size,
                })
            };
            let reason = match self.transfer(file, meta, &mut out, &mut done, &mut report) {
                Ok(()) => "the transfer ended early".to_owned(),
                Err(Broken::Network(reason)) => reason,
                Err(Broken::Final(e)) => return Err(e),
            };
            // Where only the whole is given, it begins anew each time: that is no progress.
            failures = if done > most { 0 } else { failures + 1 };
            most = most.max(done);
            if done < meta.size && failures == ATTEMPTS {
                let detail = format!(
                    "{file} breaks off after {done} of {} bytes: {reason}; the same command continues there",
                    meta.size
                );
                return Err(self.refuse(detail));
            }
            if failures > 0 {
                std::thread::sleep(self.pause * failures);
            }
        }
        out.sync_all().map_err(io)?;
        // The tag of a large file is the digest of its content.
        if meta.tag.len() == 64 && digest(partial).map_err(io)? != meta.tag.to_ascii_lowercase() {
            fs::remove_file(partial).map_err(io)?;
            return Err(self.refuse(format!("{file} arrived damaged, and was removed; try again")));
        }
        fs::rename(partial, blob).map_err(Error::io(blob))
    }

    /// Appends what is left of a file, or as much of it as comes; `done` is what is there.
    fn transfer(
        &self,
        file: &str,
        meta: &Meta,
        out: &mut File,
        done: &mut u64,
        report: &mut dyn FnMut(u64),
    ) -> std::result::Result<(), Broken> {
        let mut request = self
            .agent
            .get(self.url(&meta.commit, file))
            .header("Accept-Encoding", "identity");
        if let Some(token) = self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if *done > 0 {
            request = request.header("Range", format!("bytes={done}-"));
        }
        let response = request.call().map_err(|e| Broken::Network(e.to_string()))?;
        let disk = |e| {
            Broken::Final(self.refuse(format!(
                "{file} cannot be written to {}: {e}",
                self.folder.display()
            )))
        };
        let header = |name| response.headers().get(name).and_then(|h| h.to_str().ok());
        let differs = || Err(Broken::Network("it is not what was announced".into()));
        match response.status() {
            StatusCode::PARTIAL_CONTENT if *done > 0 => {
                let announced = format!("bytes {done}-{}/{}", meta.size - 1, meta.size);
                if header("content-range") != Some(&announced) {
                    return differs();
                }
            }
            // All of it, even where a part was asked for.
            StatusCode::OK => {
                if header("content-length").is_some_and(|n| n != meta.size.to_string()) {
                    return differs();
                }
                *done = 0;
                out.set_len(0).map_err(disk)?;
            }
            status => return Err(Broken::Network(format!("the model hub answers {status}"))),
        }
        let mut body = response.into_body().into_reader().take(meta.size - *done);
        let mut chunk = vec![0; CHUNK];
        loop {
            report(*done);
            match body.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    out.write_all(&chunk[..n]).map_err(disk)?;
                    *done += n as u64;
                }
                Err(e) => return Err(Broken::Network(e.to_string())),
            }
        }
    }
}

/// Scheme and host of an address.
fn origin(address: &str) -> &str {
    let host = address.find("://").map_or(0, |i| i + 3);
    let end = address[host..].find('/').map_or(address.len(), |i| host + i);
    &address[..end]
}

fn digest(path: &Path) -> io::Result<String> {
    let (mut file, mut digest) = (File::open(path)?, Sha256::new());
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(digest.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => digest.update(&chunk[..n]),
        }
    }
}

/// Makes `entry`, in a snapshot, stand for `blob`.
fn enter(blob: &Path, entry: &Path) -> io::Result<()> {
    if let Some(folder) = entry.parent() {
        fs::create_dir_all(folder)?;
    }
    // A link whose target is gone is still there.
    match fs::remove_file(entry) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    #[cfg(unix)]
    let entered = {
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        std::os::unix::fs::symlink(target, entry)
    };
    #[cfg(not(unix))]
    let entered = fs::hard_link(blob, entry);
    match entered {
        // Another process did it meanwhile.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}
