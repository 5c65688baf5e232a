//! What a run works on: pictures, the public backbone, the private adapter. Embedded, or from the user's files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use veiltune_hub::{AdapterConfig, files};
use veiltune_nn::load::{Backbone, Classifier};
use veiltune_nn::{OwcConfig, owc};

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

    /// Picture `i` as the backbone wants it.
    pub fn load(&self, i: usize, backbone: &Backbone) -> Result<Vec<f32>> {
        let read = match self {
            Pictures::Embedded => backbone.decode(PICTURES[i].0, PICTURES[i].1),
            Pictures::Files(paths) => backbone.picture(&paths[i]),
        };
        read.map_err(|e| Error::Input(format!("{e}; give readable PNG or JPEG files")))
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

/// The backbone in `dir` (`config.json` and `model.safetensors` or `backbone.safetensors`), or the embedded one.
pub fn backbone(dir: Option<&Path>) -> Result<Backbone> {
    match dir {
        Some(dir) => Backbone::open(dir),
        None => Backbone::from_bytes(asset!("config.json"), &asset!("backbone.safetensors")[..]),
    }
    .map_err(|e| bad_weights(e, dir, "--backbone"))
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

/// What is public of an adapter, from its `adapter_config.json` alone, or of the embedded one.
pub fn adapter_config(file: Option<&Path>) -> Result<OwcConfig> {
    let Some(file) = file else {
        return Ok(classifier(None)?.config);
    };
    let read = || -> veiltune_nn::Result<OwcConfig> {
        let bytes = files::read(file, MAX_CONFIG)?;
        let parsed = AdapterConfig::<OwcConfig>::parse(&file.to_string_lossy(), &bytes, owc::PEFT_TYPE)?;
        parsed.method.check()?;
        Ok(parsed.method)
    };
    let config = read().map_err(|e| {
        let detail = placed(e, &file.display().to_string());
        Error::Input(format!(
            "{detail}; give an adapter's adapter_config.json to --adapter-config"
        ))
    })?;
    // An adapter is served folded, whatever form its file is in.
    Ok(OwcConfig {
        folded: true,
        scale: if config.folded { config.scale } else { 1.0 },
        ..config
    })
}

/// Bytes of the longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 22;

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

/// Refuses an adapter that was not trained for this backbone.
pub fn check_fit(backbone: &Backbone, adapter: &OwcConfig) -> Result<()> {
    let b = &backbone.config;
    if (adapter.hidden_size, adapter.tokens) != (b.hidden_size, backbone.tokens())
        || adapter.scope > b.num_hidden_layers
    {
        return Err(Error::Input(format!(
            "the adapter is for a backbone of width {} with {} tokens and at least {} blocks, this one has width {}, {} tokens \
             and {} blocks; give the pair that was trained together to --backbone and --adapter",
            adapter.hidden_size,
            adapter.tokens,
            adapter.scope,
            b.hidden_size,
            backbone.tokens(),
            b.num_hidden_layers
        )));
    }
    Ok(())
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
    fn the_public_file_alone_gives_the_configuration_that_the_provider_serves() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo/adapter/adapter_config.json");
        let served = classifier(None).unwrap().config;
        assert_eq!(adapter_config(Some(&path)).unwrap(), served);
        assert_eq!(adapter_config(None).unwrap(), served);

        let dir = tempfile::tempdir().unwrap();
        let folded = dir.path().join("folded.json");
        let config = AdapterConfig {
            peft_type: owc::PEFT_TYPE.into(),
            base_model_name_or_path: String::new(),
            method: served.clone(),
        };
        files::write_json(&folded, &config).unwrap();
        assert_eq!(adapter_config(Some(&folded)).unwrap(), served);

        std::fs::write(&folded, "{}").unwrap();
        for path in [&folded, &dir.path().join("absent.json")] {
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
        let config = classifier(None).unwrap().config;
        check_fit(&backbone(None).unwrap(), &config).unwrap();
        let classes = Pictures::Embedded.true_classes(&config.labels).unwrap();
        let each_twice = (0..10).flat_map(|c| [Some(c), Some(c)]).collect::<Vec<_>>();
        assert_eq!(classes, each_twice);
    }
}
