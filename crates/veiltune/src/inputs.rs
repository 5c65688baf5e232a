//! What a run works on: pictures, the public backbone, the private adapter. Embedded, or from the user's files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use veiltune_hub::{AdapterConfig, adapter, files};
use veiltune_nn::Method;
use veiltune_nn::load::{Backbone, Classifier};

use crate::learn::Bar;
use crate::prepare::Preparation;
use crate::{Error, Result};

macro_rules! asset {
    ($($part:literal),+) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/demo/" $(, $part)+))
    };
}

macro_rules! pictures {
    ($($name:literal)*) => { &[$(($name, asset!("images/", $name) as &[u8])),*] };
}

/// Two test pictures of each class of Fashion-MNIST.
const PICTURES: &[(&str, &[u8])] = pictures!(
    "01_t-shirt-top.png" "02_t-shirt-top.png" "03_trouser.png" "04_trouser.png" "05_pullover.png"
    "06_pullover.png" "07_dress.png" "08_dress.png" "09_coat.png" "10_coat.png" "11_sandal.png" "12_sandal.png"
    "13_shirt.png" "14_shirt.png" "15_sneaker.png" "16_sneaker.png" "17_bag.png" "18_bag.png"
    "19_ankle-boot.png" "20_ankle-boot.png"
);

/// Name of the file, beside pictures, that states their true labels: an object from file name to label.
const LABELS_FILE: &str = "labels.json";

/// The pictures of a run, in order.
pub enum Pictures {
    /// Those in this executable.
    Embedded,
    /// Files.
    Files(Vec<PathBuf>),
}

impl Pictures {
    /// From the command line: files, and directories of which all PNG and JPEG files are taken. None given: the embedded ones.
    pub fn find(given: &[PathBuf]) -> Result<Pictures> {
        if given.is_empty() {
            return Ok(Pictures::Embedded);
        }
        let mut found = Vec::new();
        for path in given {
            if path.is_dir() {
                found.extend(in_directory(path)?);
            } else {
                found.push(path.clone());
            }
        }
        Ok(Pictures::Files(found))
    }

    /// The files; None for the embedded ones.
    pub fn files(&self) -> Option<&[PathBuf]> {
        match self {
            Pictures::Embedded => None,
            Pictures::Files(paths) => Some(paths),
        }
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.files().map_or(PICTURES.len(), <[_]>::len)
    }

    /// File name of picture `i`.
    pub fn name(&self, i: usize) -> String {
        match self {
            Pictures::Embedded => PICTURES[i].0.into(),
            Pictures::Files(paths) => paths[i]
                .file_name()
                .unwrap_or(paths[i].as_os_str())
                .to_string_lossy()
                .into(),
        }
    }

    /// Picture `i` as it is to be prepared.
    pub fn load(&self, i: usize, preparation: &Preparation) -> Result<Vec<f32>> {
        let read = match self {
            Pictures::Embedded => preparation.decode(PICTURES[i].0, PICTURES[i].1),
            Pictures::Files(paths) => preparation.picture(&paths[i]),
        };
        read.map_err(|e| Error::Input(format!("{e}; give readable PNG or JPEG files")))
    }

    /// Reads every picture, before anything is promised to anybody; the error of the first that cannot be used, which names it.
    /// With `skip` those are left out instead, and `skipped` hears of each.
    pub fn check(
        self,
        preparation: &Preparation,
        skip: bool,
        mut skipped: impl FnMut(Error),
    ) -> Result<Pictures> {
        let read = |i| self.load(i, preparation).map(drop);
        if !skip {
            return match (0..self.len())
                .into_par_iter()
                .map(read)
                .find_first(Result::is_err)
            {
                Some(Err(e)) => Err(e),
                _ => Ok(self),
            };
        }
        let read: Vec<Result<()>> = (0..self.len()).into_par_iter().map(read).collect();
        let Pictures::Files(paths) = self else {
            return Ok(self);
        };
        let mut kept = Vec::with_capacity(paths.len());
        for (path, read) in paths.into_iter().zip(read) {
            match read {
                Ok(()) => kept.push(path),
                Err(e) => skipped(e),
            }
        }
        Ok(Pictures::Files(kept))
    }

    /// The number of each picture's true class, where `labels.json` beside it or its own name (`NAME_label.png`) tells.
    pub fn true_classes(&self, labels: &[String]) -> Result<Vec<Option<usize>>> {
        let mut stated = BTreeMap::new();
        for dir in self.files().unwrap_or(&[]).iter().filter_map(|p| p.parent()) {
            let path = dir.join(LABELS_FILE);
            if !stated.contains_key(dir) && path.exists() {
                let of: BTreeMap<String, String> = files::read_json(&path).map_err(|e| {
                    Error::Input(format!("{e}; it should be an object from file name to label"))
                })?;
                stated.insert(dir, of);
            }
        }
        Ok((0..self.len())
            .map(|i| {
                let name = self.name(i);
                let dir = self.files().and_then(|paths| paths[i].parent());
                let label = dir
                    .and_then(|d| stated.get(d))
                    .and_then(|of| of.get(&name))
                    .cloned();
                let label = label.or_else(|| {
                    Some(
                        Path::new(&name)
                            .file_stem()?
                            .to_str()?
                            .split_once('_')?
                            .1
                            .to_owned(),
                    )
                })?;
                labels.iter().position(|l| slug(l) == slug(&label))
            })
            .collect())
    }
}

/// A label as it stands in file names.
fn slug(label: &str) -> String {
    label.to_lowercase().replace([' ', '/', '_'], "-")
}

fn in_directory(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| Error::Input(format!("{}: {e}; give a readable directory", dir.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or("")
            .to_lowercase();
        if matches!(&*extension, "png" | "jpg" | "jpeg") {
            found.push(path);
        }
    }
    if found.is_empty() {
        return Err(Error::Input(format!(
            "{}: no PNG or JPEG file in this directory",
            dir.display()
        )));
    }
    found.sort();
    Ok(found)
}

/// The backbone that is meant: a folder (`config.json` and `model.safetensors` or `backbone.safetensors`), a model of the hub,
/// which is downloaded if it is not on this machine, or the embedded one.
pub fn backbone(name: Option<&str>) -> Result<Backbone> {
    let found = |name: &str| {
        let (bar, mut said) = (Bar::new("download"), false);
        let folder = veiltune_hub::fetch(name, &mut |p| {
            if !std::mem::replace(&mut said, true) {
                bar.say(&format!("downloading {name}"));
            }
            bar.at(p.done as usize, p.total as usize, p.file);
        })?;
        Backbone::open(&folder)
    };
    match name {
        Some(name) => found(name),
        None => Backbone::from_bytes(asset!("config.json"), &asset!("backbone.safetensors")[..]),
    }
    .map_err(|e| bad_weights(e, name.map(Path::new), "--backbone"))
}

/// The adapter in `dir` (`adapter_config.json` and `adapter_model.safetensors`), or the embedded one.
pub fn classifier(dir: Option<&Path>) -> Result<Classifier> {
    match dir {
        Some(dir) => Classifier::open(dir),
        None => Classifier::from_bytes(
            asset!("adapter/adapter_config.json"),
            &asset!("adapter/adapter_model.safetensors")[..],
        ),
    }
    .map_err(|e| bad_weights(e, dir, "--adapter"))
}

/// What is public of an adapter, from its `adapter_config.json` or the directory that it is in, or of the embedded one.
pub fn adapter_config(path: Option<&Path>) -> Result<AdapterConfig<Method>> {
    let Some(path) = path else {
        return Ok(classifier(None)?.config);
    };
    let file = &match path.is_dir() {
        true => path.join(adapter::CONFIG_FILE),
        false => path.to_owned(),
    };
    let read = || -> veiltune_nn::Result<AdapterConfig<Method>> {
        let config = AdapterConfig::<Method>::open(file)?;
        config.method.check()?;
        Ok(config)
    };
    read().map_err(|e| {
        let detail = placed(e, &file.display().to_string());
        Error::Input(format!(
            "{detail}; give an adapter's adapter_config.json to --adapter-config"
        ))
    })
}

/// An error that names the directory and the option.
pub fn bad_weights(e: impl std::fmt::Display, dir: Option<&Path>, option: &str) -> Error {
    let place = dir.map_or("the embedded model".into(), |d| d.display().to_string());
    Error::Input(format!(
        "{}; give a complete, undamaged directory to {option}",
        placed(e, &place)
    ))
}

/// What is wrong, and where, which is said once.
fn placed(e: impl std::fmt::Display, place: &str) -> String {
    let detail = e.to_string();
    match detail.starts_with(place) {
        true => detail,
        false => format!("{place}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn true_labels_come_from_the_file_or_from_names() {
        let dir = tempfile::tempdir().unwrap();
        let labels: Vec<String> = ["T-shirt/top", "ankle boot"].map(String::from).into();
        for name in ["a.png", "b_ankle-boot.JPG", "c_t-shirt-top.png", "d.png", "e.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = Pictures::find(&[dir.path().into()]).unwrap();
        assert_eq!(found.len(), 4);
        assert_eq!(
            found.true_classes(&labels).unwrap(),
            [None, Some(1), Some(0), None]
        );
        std::fs::write(
            dir.path().join(LABELS_FILE),
            r#"{"a.png": "Ankle boot", "c_t-shirt-top.png": "ankle boot"}"#,
        )
        .unwrap();
        assert_eq!(
            found.true_classes(&labels).unwrap(),
            [Some(1), Some(1), Some(1), None]
        );
        std::fs::write(dir.path().join(LABELS_FILE), "[]").unwrap();
        assert!(
            found
                .true_classes(&labels)
                .unwrap_err()
                .to_string()
                .contains(LABELS_FILE)
        );
    }

    #[test]
    fn the_public_file_alone_gives_the_configuration_that_the_provider_has() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo/adapter/adapter_config.json");
        let served = classifier(None).unwrap().config;
        assert_eq!(adapter_config(Some(&path)).unwrap(), served);
        assert_eq!(adapter_config(None).unwrap(), served);

        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other.json");
        files::write_json(&other, &served).unwrap();
        assert_eq!(adapter_config(Some(&other)).unwrap(), served);

        std::fs::write(&other, "{}").unwrap();
        for path in [&other, &dir.path().join("absent.json")] {
            let e = adapter_config(Some(path)).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(
                e.to_string().contains(name) && e.to_string().contains("--adapter-config"),
                "{e}"
            );
        }
    }

    #[test]
    fn embedded_pictures_have_known_labels() {
        let method = classifier(None).unwrap().config.method;
        let classes = Pictures::Embedded.true_classes(method.labels()).unwrap();
        let each_twice = (0..10).flat_map(|c| [Some(c), Some(c)]).collect::<Vec<_>>();
        assert_eq!(classes, each_twice);
    }
}
