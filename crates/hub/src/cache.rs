//! The model hub's cache on this machine, where its tools put what they download. Nothing is fetched here.

use std::path::{Path, PathBuf};

use crate::{Error, Result, files};

/// The folder of a model: `name` itself if it is one, otherwise the cached snapshot of the model `owner/name`, or
/// `owner/name@revision`.
pub fn locate(name: &str) -> Result<PathBuf> {
    let root = root(|key| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from));
    locate_in(name, root.as_deref())
}

/// Where the cache is, by the variables that the hub's own tools read.
fn root(var: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let home = || {
        Some(
            var("XDG_CACHE_HOME")
                .or_else(|| Some(var("HOME")?.join(".cache")))?
                .join("huggingface"),
        )
    };
    var("HF_HUB_CACHE").or_else(|| Some(var("HF_HOME").or_else(home)?.join("hub")))
}

fn locate_in(name: &str, root: Option<&Path>) -> Result<PathBuf> {
    let folder = Path::new(name);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() != 2 || !parts.iter().chain([&revision]).all(|p| plain(p)) {
        return Err(Error::corrupt(
            name,
            "neither a folder nor a model id of the form owner/name",
        ));
    }
    let absent = |place: &str| {
        let advice = format!(
            "not in the model hub's cache {place}; download it with the hub's own tool, or give a folder"
        );
        Error::corrupt(name, advice)
    };
    let root = root.ok_or_else(|| absent("(no home folder is known)"))?;
    let model = root.join(format!("models--{}", parts.join("--")));
    // A branch or tag is a file with the commit's name; a commit is its own.
    let reference = model.join("refs").join(revision);
    let commit = match reference.is_file() {
        true => String::from_utf8_lossy(&files::read(&reference, MAX_REFERENCE)?)
            .trim()
            .to_owned(),
        false => revision.to_owned(),
    };
    let snapshot = model.join("snapshots").join(&commit);
    match plain(&commit) && snapshot.is_dir() {
        true => Ok(snapshot),
        false => Err(absent(&root.to_string_lossy())),
    }
}

/// Longest reference, bytes.
const MAX_REFERENCE: u64 = 1 << 10;

/// Whether `part` is one component of a path that leads nowhere else.
fn plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_by_folder_branch_and_commit() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--google--vit-tiny");
        let snapshot = model.join("snapshots/0a1b");
        std::fs::create_dir_all(&snapshot).unwrap();
        files::write_atomic(&model.join("refs/main"), b"0a1b\n").unwrap();
        let find = |name: &str| locate_in(name, Some(dir.path()));
        assert_eq!(find("google/vit-tiny").unwrap(), snapshot);
        assert_eq!(find("google/vit-tiny@0a1b").unwrap(), snapshot);
        assert_eq!(find(dir.path().to_str().unwrap()).unwrap(), dir.path());

        for (name, word) in [
            ("google/vit-huge", "cache"),
            ("google/vit-tiny@v2", "cache"),
            ("vit-tiny", "owner/name"),
            ("google/../vit", "owner/name"),
            ("google/vit-tiny@../..", "owner/name"),
        ] {
            let text = find(name).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(word), "{text}");
        }
        files::write_atomic(&model.join("refs/main"), b"../../elsewhere").unwrap();
        assert!(find("google/vit-tiny").is_err());
        assert!(locate_in("google/vit-tiny", None).is_err());
    }

    #[test]
    fn the_cache_is_where_the_hubs_tools_have_it() {
        let with = |set: &[(&str, &str)]| {
            let set = set.to_vec();
            root(move |key| set.iter().find(|(k, _)| *k == key).map(|(_, v)| v.into()))
        };
        let home = ("HOME", "/h");
        assert_eq!(with(&[home]), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "/x")]),
            Some("/x/huggingface/hub".into())
        );
        assert_eq!(with(&[home, ("HF_HOME", "/f")]), Some("/f/hub".into()));
        assert_eq!(
            with(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]),
            Some("/c".into())
        );
        assert_eq!(with(&[]), None);
    }
}
