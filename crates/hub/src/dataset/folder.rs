//! Pictures in a folder for each class.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Dataset, Item, Source, Split};
use crate::{Error, Result};

/// Endings of pictures.
const ENDINGS: [&str; 3] = ["png", "jpg", "jpeg"];
/// What file managers leave in folders.
const CLUTTER: [&str; 2] = ["Thumbs.db", "desktop.ini"];

/// What a folder holds, sorted by name.
struct Content {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

/// The files right in a folder, sorted by name.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    Ok(list(path)?.files)
}

/// Hidden files and clutter are passed over.
fn list(path: &Path) -> Result<Content> {
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') || CLUTTER.contains(&&*name) {
            continue;
        }
        match entry.path() {
            folder if folder.is_dir() => folders.push(folder),
            file => files.push(file),
        }
    }
    files.sort();
    folders.sort();
    Ok(Content { files, folders })
}

pub(super) fn open(path: &Path, split: Split) -> Result<Dataset> {
    let root = &root(path, split)?;
    let folders = list(root)?.folders;
    if folders.is_empty() {
        let detail = "holds no class folder, no CIFAR or IDX file";
        return Err(Error::corrupt(root.to_string_lossy(), detail));
    }
    let (mut classes, mut files, mut items) = (Vec::new(), Vec::new(), Vec::new());
    for (label, folder) in folders.iter().enumerate() {
        let refuse = |detail: &str| Err(Error::corrupt(folder.to_string_lossy(), detail));
        let Some(class) = folder.file_name().and_then(|n| n.to_str()) else {
            return refuse("the name of a class must be Unicode");
        };
        let content = list(folder)?;
        if let Some(inner) = content.folders.first() {
            let detail = "a folder within a class folder: pictures must lie right in their class's folder";
            return Err(Error::corrupt(inner.to_string_lossy(), detail));
        }
        if !content.files.iter().any(|f| is_picture(f)) {
            return refuse("a class folder without a .png, .jpg or .jpeg file");
        }
        classes.push(class.to_owned());
        // Other files are listed too: `verify` then names them instead of passing over a picture in another format.
        for path in content.files {
            // Of what is not even there, a link to nowhere for instance, `verify` says so.
            let bytes = fs::metadata(&path).map_or(0, |m| m.len());
            let file = files.len();
            files.push(Source::Picture { path, bytes });
            items.push(Item {
                label,
                file,
                record: 0,
            });
        }
    }
    Dataset::new(root, classes, files, items)
}

fn is_picture(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    ENDINGS.contains(&&*ending.to_ascii_lowercase())
}

/// Where the class folders of a split lie. A folder is a split's if it is called so and holds folders: there may be a
/// class of trains.
fn root(path: &Path, split: Split) -> Result<PathBuf> {
    let is_split = |name: &&str| list(&path.join(name)).is_ok_and(|c| !c.folders.is_empty());
    let find = |names: &[&'static str]| names.iter().copied().find(is_split);
    let (train, test) = (find(&["train"]), find(&["test", "val"]));
    match (split, train, test) {
        (_, None, None) => Ok(path.to_owned()),
        (Split::Train, Some(name), _) | (Split::Test, _, Some(name)) => Ok(path.join(name)),
        (Split::Train, None, Some(beside)) => {
            let detail = format!("has {beside}/ but no train/ with class folders");
            Err(Error::corrupt(path.to_string_lossy(), detail))
        }
        (Split::Test, Some(_), None) => {
            let detail = "has train/ but no test/ or val/ with class folders";
            Err(Error::corrupt(path.to_string_lossy(), detail))
        }
    }
}
