use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A model hub on the loopback, with one model `owner/tiny`.
struct Hub {
    /// With the port.
    address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Sends no more than so many bytes of a file's content at a time.
    cut: Option<usize>,
    /// Sends as many, and from then on nothing.
    dead_after: Option<usize>,
    /// Where large files are sent from, as on the real hub.
    storage: Option<String>,
    /// The content differs from what its tag says.
    damaged: bool,
    /// Parts are not given, only the whole.
    whole_only: bool,
    /// In place of the real one.
    tag: Option<String>,
    /// Method and path, then whether there was a token.
    seen: Vec<(String, bool)>,
}

impl Hub {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let files = files
            .iter()
            .map(|(name, bytes)| (name.to_string(), bytes.to_vec()));
        let state = Arc::new(Mutex::new(State {
            files: files.collect(),
            ..State::default()
        }));
        let shared = state.clone();
        // Ends with the process; a client that hangs up is no reason to stop.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &mut shared.lock().unwrap());
            }
        });
        Hub { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn seen(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    /// Settings for a cache, as if this were the only hub.
    fn settings(&self, cache: &Path) -> Settings {
        Settings {
            endpoint: format!("http://{}", self.address),
            token: Some("hf_secret".into()),
            ..offline(cache, false)
        }
    }
}

fn offline(cache: &Path, offline: bool) -> Settings {
    Settings {
        cache: Some(cache.to_owned()),
        endpoint: "http://127.0.0.1:1".into(),
        token: None,
        offline,
        pause: Duration::ZERO,
        agent: agent(None),
    }
}

/// Serves one request.
fn answer(stream: TcpStream, state: &mut State) -> std::io::Result<()> {
    let mut lines = BufReader::new(&stream).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(key.to_ascii_lowercase(), value.to_owned());
    }
    let (method, path) = request.split_once(' ').unwrap_or_default();
    let path = path.split(' ').next().unwrap_or_default();
    let token = headers
        .get("authorization")
        .is_some_and(|t| t == "Bearer hf_secret");
    state.seen.push((format!("{method} {path}"), token));
    let mut out = &stream;
    let head = |status: &str, more: String| format!("HTTP/1.1 {status}\r\nConnection: close\r\n{more}\r\n");
    let refuse =
        |status: &str, code: &str| head(status, format!("Content-Length: 0\r\nX-Error-Code: {code}\r\n"));
    if let Some(rest) = path.strip_prefix("/owner/old/") {
        let to = format!("Location: /owner/tiny/{rest}\r\nContent-Length: 0\r\n");
        return out.write_all(head("307 Temporary Redirect", to).as_bytes());
    }
    if path.starts_with("/owner/gated/") {
        return out.write_all(refuse("403 Forbidden", "GatedRepo").as_bytes());
    }
    let known = [
        format!("/owner/tiny/resolve/{COMMIT}/"),
        "/owner/tiny/resolve/main/".into(),
        "/storage/".into(),
    ];
    let Some(file) = known.iter().find_map(|k| path.strip_prefix(k.as_str())) else {
        return out.write_all(refuse("404 Not Found", "RepoNotFound").as_bytes());
    };
    let Some(bytes) = state.files.get(file) else {
        return out.write_all(refuse("404 Not Found", "EntryNotFound").as_bytes());
    };
    let large = file.ends_with(".safetensors");
    let tag = state.tag.clone().unwrap_or_else(|| {
        let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        digest[..if large { 64 } else { 40 }].to_owned()
    });
    let mut described = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{tag}\"\r\n");
    if let (Some(storage), true, false) = (&state.storage, large, path.starts_with("/storage/")) {
        described += &format!(
            "Location: http://{storage}/storage/{file}\r\nX-Linked-ETag: \"{tag}\"\r\nX-Linked-Size: {}\r\nContent-Length: 0\r\n",
            bytes.len()
        );
        return out
            .write_all(head("302 Found", described.replacen("ETag: \"", "ETag: \"other", 1)).as_bytes());
    }
    if method == "HEAD" {
        described += &format!("Content-Length: {}\r\n", bytes.len());
        return out.write_all(head("200 OK", described).as_bytes());
    }
    let mut body = bytes.clone();
    if state.damaged {
        body[0] ^= 1;
    }
    let from = headers.get("range").filter(|_| !state.whole_only);
    let from = from.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let status = match from {
        Some(from) => {
            described += &format!(
                "Content-Range: bytes {from}-{}/{}\r\n",
                body.len() - 1,
                body.len()
            );
            body.drain(..from);
            "206 Partial Content"
        }
        None => "200 OK",
    };
    described += &format!("Content-Length: {}\r\n", body.len());
    if let Some(left) = &mut state.dead_after {
        body.truncate(*left);
        *left -= body.len();
    }
    body.truncate(state.cut.unwrap_or(body.len()));
    out.write_all(head(status, described).as_bytes())?;
    out.write_all(&body)
}

fn weights() -> Vec<u8> {
    (0..700_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect()
}

/// The usual model: two small files and one large.
fn hub() -> Hub {
    Hub::new(&[
        ("config.json", b"{\"model_type\": \"vit\"}"),
        ("preprocessor_config.json", b"{}"),
        ("model.safetensors", &weights()),
        ("pytorch_model.bin", b"never asked for"),
    ])
}

fn quiet(settings: &Settings, name: &str) -> Result<PathBuf> {
    settings.fetch(name, &mut |_| {})
}

fn error(settings: &Settings, name: &str) -> String {
    let text = quiet(settings, name).unwrap_err().to_string();
    assert!(text.contains(name) && !text.contains("hf_secret"), "{text}");
    text
}

/// Names of blobs, sorted.
fn blobs(cache: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(cache.join("models--owner--tiny/blobs")).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_model_is_downloaded_once_into_the_shared_layout() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = hub.settings(cache.path());
    let mut heard = BTreeMap::new();
    let folder = settings.fetch("owner/tiny", &mut |p| {
        let old = heard.insert(p.file.to_owned(), (p.done, p.total));
        assert!(p.done <= p.total && old.is_none_or(|(done, _)| done <= p.done));
    });
    let folder = folder.unwrap();
    let model = cache.path().join("models--owner--tiny");
    assert_eq!(folder, model.join("snapshots").join(COMMIT));
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(
        std::fs::read(folder.join("preprocessor_config.json")).unwrap(),
        b"{}"
    );
    assert_eq!(std::fs::read(model.join("refs/main")).unwrap(), COMMIT.as_bytes());
    assert_eq!(blobs(cache.path()).len(), 3);
    #[cfg(unix)]
    {
        let link = std::fs::read_link(folder.join("config.json")).unwrap();
        assert!(link.starts_with("../../blobs"), "{link:?}");
    }
    assert_eq!(heard["model.safetensors"], (700_000, 700_000));
    let seen = hub.seen();
    assert!(
        seen.iter()
            .all(|(request, token)| *token && !request.contains("pytorch")),
        "{seen:?}"
    );

    // From now on neither the hub nor its address is needed.
    for settings in [
        settings,
        offline(cache.path(), false),
        offline(cache.path(), true),
    ] {
        assert_eq!(quiet(&settings, "owner/tiny").unwrap(), folder);
        assert_eq!(quiet(&settings, &format!("owner/tiny@{COMMIT}")).unwrap(), folder);
    }
    assert_eq!(hub.seen(), []);
}

#[test]
fn weights_in_parts_are_fetched_as_their_list_says() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let hub = Hub::new(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("model-3.safetensors", b"not listed"),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let folder = quiet(&hub.settings(cache.path()), "owner/tiny").unwrap();
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), b"two");
    assert!(!folder.join("model-3.safetensors").exists());

    // One part goes missing: the rest is kept.
    std::fs::remove_file(folder.join("model-1.safetensors")).unwrap();
    let text = error(&offline(cache.path(), true), "owner/tiny");
    assert!(
        text.contains("model-1.safetensors is missing") && text.contains("HF_HUB_OFFLINE"),
        "{text}"
    );
    hub.seen();
    assert_eq!(quiet(&hub.settings(cache.path()), "owner/tiny").unwrap(), folder);
    assert!(
        hub.seen().iter().all(|(request, _)| request.starts_with("HEAD")),
        "its content was still there"
    );

    let leads_out = br#"{"weight_map": {"a": "../../model.safetensors"}}"#;
    hub.set(|s| _ = s.files.insert(INDEX.into(), leads_out.to_vec()));
    let other = tempfile::tempdir().unwrap();
    let text = quiet(&hub.settings(other.path()), "owner/tiny")
        .unwrap_err()
        .to_string();
    assert!(text.contains("no file beside it"), "{text}");
}

#[test]
fn what_the_hub_does_not_have_is_said() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = hub.settings(cache.path());
    for (name, words) in [
        ("owner/none", "no such model"),
        ("owner/tiny@v2", "no such model or revision"),
        ("owner/gated", "HF_TOKEN"),
        ("tiny", "owner/name"),
        ("owner/../tiny", "owner/name"),
        ("owner/tiny@../main", "owner/name"),
    ] {
        let text = error(&settings, name);
        assert!(text.contains(words), "{text}");
    }
    for (file, words) in [
        ("model.safetensors", "no model.safetensors or"),
        ("config.json", "no config.json"),
    ] {
        hub.set(|s| _ = s.files.remove(file));
        let text = error(&settings, "owner/tiny");
        assert!(text.contains(words), "{text}");
    }
    assert!(!cache.path().join("models--owner--tiny/refs/main").exists());

    // Nobody listens.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = Settings {
        endpoint: format!("http://{gone}"),
        ..settings
    };
    assert!(error(&nobody, "owner/tiny").contains("cannot ask the model hub"));
}

#[test]
fn offline_nothing_is_asked() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = Settings {
        offline: true,
        ..hub.settings(cache.path())
    };
    assert!(error(&settings, "owner/tiny").contains("HF_HUB_OFFLINE"));
    assert_eq!(hub.seen(), []);
    let homeless = Settings {
        cache: None,
        ..settings
    };
    assert!(error(&homeless, "owner/tiny").contains("HF_HUB_CACHE"));
    let folder = cache.path().to_str().unwrap();
    assert_eq!(
        quiet(&homeless, folder).unwrap(),
        cache.path(),
        "a folder is itself"
    );
}

#[test]
fn a_broken_transfer_is_resumed_and_never_taken_for_whole() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = hub.settings(cache.path());
    hub.set(|s| s.dead_after = Some(300_000));
    let text = error(&settings, "owner/tiny");
    assert!(
        text.contains("model.safetensors breaks off after 299") && text.contains("of 700000"),
        "{text}"
    );
    assert!(blobs(cache.path()).iter().any(|b| b.ends_with(".incomplete")));
    assert!(error(&offline(cache.path(), true), "owner/tiny").contains("not in the model hub's cache"));
    let pinned = format!("owner/tiny@{COMMIT}");
    assert!(error(&offline(cache.path(), true), &pinned).contains("model.safetensors is missing"));

    // Later the line is back, but breaks off every 100 000 bytes.
    hub.set(|s| (s.dead_after, s.cut) = (None, Some(100_000)));
    let mut first = None;
    let folder = settings
        .fetch("owner/tiny", &mut |p| first = first.or(Some(p.done)))
        .unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    assert!(
        first.is_some_and(|done| done > 299_000),
        "it went on where it had ended: {first:?}"
    );
    assert!(!blobs(cache.path()).iter().any(|b| b.ends_with(".incomplete")));
}

#[test]
fn a_hub_that_gives_no_parts_is_asked_for_the_whole() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = hub.settings(cache.path());
    hub.set(|s| s.dead_after = Some(300_000));
    error(&settings, "owner/tiny");
    hub.set(|s| (s.dead_after, s.whole_only) = (None, true));
    let folder = quiet(&settings, "owner/tiny").unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
}

#[test]
fn several_at_once_fetch_one_copy() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.set(|s| s.cut = Some(50_000));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let folder = quiet(&hub.settings(cache.path()), "owner/tiny").unwrap();
                assert!(std::fs::read(folder.join("model.safetensors")).unwrap() == weights());
            });
        }
    });
    let weights = format!("GET /owner/tiny/resolve/{COMMIT}/model.safetensors");
    let pieces = hub
        .seen()
        .iter()
        .filter(|(request, _)| *request == weights)
        .count();
    assert_eq!(pieces, 14, "700 000 bytes, 50 000 at a time");
    assert_eq!(blobs(cache.path()).len(), 3);
}

#[test]
fn a_hub_that_never_gives_it_all_is_given_up() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.set(|s| (s.cut, s.whole_only) = (Some(100_000), true));
    let text = error(&hub.settings(cache.path()), "owner/tiny");
    assert!(text.contains("breaks off after 100000"), "{text}");
}

#[test]
fn damage_on_the_way_is_found() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let settings = hub.settings(cache.path());
    hub.set(|s| s.damaged = true);
    assert!(error(&settings, "owner/tiny").contains("model.safetensors arrived damaged"));
    assert!(
        !blobs(cache.path()).iter().any(|b| b.len() >= 64),
        "nothing of it stays"
    );
    hub.set(|s| s.damaged = false);
    assert!(quiet(&settings, "owner/tiny").is_ok());
}

#[test]
fn names_from_the_hub_lead_nowhere_else() {
    for tag in ["../../../../evil", "..", ".hidden", "a/b", "", &"a".repeat(200)] {
        let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
        hub.set(|s| s.tag = Some(tag.to_owned()));
        let text = error(&hub.settings(cache.path()), "owner/tiny");
        assert!(text.contains("not a model hub's answer"), "{text}");
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    }
}

#[test]
fn the_token_stays_with_the_hub() {
    let (hub, storage, cache) = (hub(), hub(), tempfile::tempdir().unwrap());
    // The same machine by another name is another host.
    let (_, port) = storage.address.split_once(':').unwrap();
    storage.set(|s| s.cut = Some(200_000));
    hub.set(|s| s.storage = Some(format!("localhost:{port}")));
    let folder = quiet(&hub.settings(cache.path()), "owner/tiny").unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    let asked = ("GET /storage/model.safetensors".to_owned(), false);
    assert_eq!(
        storage.seen(),
        [asked.clone(), asked.clone(), asked.clone(), asked]
    );
    assert!(hub.seen().iter().all(|(_, token)| *token));
}

#[test]
fn a_renamed_model_is_followed() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let folder = quiet(&hub.settings(cache.path()), "owner/old").unwrap();
    assert!(folder.starts_with(cache.path().join("models--owner--old")));
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    let (asked, token) = hub.seen().pop().unwrap();
    assert_eq!(
        (asked, token),
        (
            format!("GET /owner/tiny/resolve/{COMMIT}/model.safetensors"),
            true
        )
    );
}

#[test]
fn what_other_tools_left_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("models--google--vit-tiny");
    let snapshot = model.join("snapshots/0a1b");
    for (file, text) in [
        ("snapshots/0a1b/config.json", "{}"),
        ("snapshots/0a1b/model.safetensors", ""),
        ("refs/main", "0a1b\n"),
    ] {
        files::write_atomic(&model.join(file), text.as_bytes()).unwrap();
    }
    let settings = offline(dir.path(), true);
    assert_eq!(quiet(&settings, "google/vit-tiny").unwrap(), snapshot);
    assert_eq!(quiet(&settings, "google/vit-tiny@0a1b").unwrap(), snapshot);
    assert!(error(&settings, "google/vit-tiny@v2").contains("not in the model hub's cache"));
    files::write_atomic(&model.join("refs/main"), b"../../elsewhere").unwrap();
    assert!(error(&settings, "google/vit-tiny").contains("cache"));
}

#[test]
fn settings_are_where_the_hubs_tools_have_them() {
    let with = |set: &[(&str, &str)]| {
        let set = set.to_vec();
        Settings::new(move |key| set.iter().find(|(k, _)| *k == key).map(|(_, v)| v.into()))
    };
    let home = ("HOME", "/h");
    for (set, cache) in [
        (&[home][..], Some("/h/.cache/huggingface/hub")),
        (&[home, ("XDG_CACHE_HOME", "/x")], Some("/x/huggingface/hub")),
        (&[home, ("HF_HOME", "/f")], Some("/f/hub")),
        (&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")], Some("/c")),
        (&[], None),
    ] {
        assert_eq!(with(set).cache, cache.map(PathBuf::from));
    }
    assert_eq!(with(&[("HF_ENDPOINT", "http://hub/")]).endpoint, "http://hub");
    assert!(with(&[]).endpoint.starts_with("https://"));
    for (value, expected) in [
        ("1", true),
        ("TRUE", true),
        ("Yes", true),
        ("0", false),
        ("no", false),
    ] {
        assert_eq!(with(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
    }
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    assert_eq!(with(&[("HF_HOME", folder)]).token, None);
    files::write_atomic(&dir.path().join("token"), b"stored\n").unwrap();
    assert_eq!(with(&[("HF_HOME", folder)]).token.as_deref(), Some("stored"));
    assert_eq!(
        with(&[("HF_HOME", folder), ("HF_TOKEN", " given ")])
            .token
            .as_deref(),
        Some("given")
    );
}
