//! What a run works on: pictures or texts, the public backbone, the private adapter. Embedded, or from the user's files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use veiltune_hub::{AdapterConfig, TextForm, adapter, files};
use veiltune_nn::language::Family;
use veiltune_nn::load::{Backbone, Classifier};
use veiltune_nn::text::Words;
use veiltune_nn::{Method, TextEncoder};

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

/// What is classified in a run, in order.
pub enum Items {
    /// The pictures in this executable.
    Embedded,
    /// Files of pictures.
    Files(Vec<PathBuf>),
    /// Texts.
    Texts(Vec<Line>),
}

/// A text, or a pair, of a file. Not for debug prints.
pub struct Line {
    /// Number of its line, from 1.
    pub number: usize,
    /// The text, or the first of a pair.
    pub first: String,
    /// The second of a pair.
    pub second: Option<String>,
}

/// One of [`Items`], read.
pub enum Item {
    /// A picture, scaled and normalised.
    Pixels(Vec<f32>),
    /// A text.
    Words(Words),
}

/// Longest file of texts, bytes.
const MAX_TEXTS: u64 = 1 << 28;

/// The texts in `file`: one a line, or a pair with a tab between. Lines without text are left out.
pub fn lines(file: &Path, pairs: bool) -> Result<Vec<Line>> {
    let bad = |detail: &str| Error::Input(format!("{}: {detail}", file.display()));
    let bytes =
        files::read(file, MAX_TEXTS).map_err(|e| Error::Input(format!("{e}; give a text file to --text")))?;
    let content = String::from_utf8(bytes).map_err(|_| bad("not UTF-8; convert the file"))?;
    let content = content.strip_prefix('\u{feff}').unwrap_or(&content);
    let filled = content
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let line = |(i, line): (usize, &str)| {
        let number = i + 1;
        let (first, second) = match (pairs, line.split_once('\t')) {
            (false, _) => (line, None),
            (true, Some((first, second))) => (first, Some(second.to_owned())),
            (true, None) => {
                let detail = format!("line {number}: pairs of texts are wanted; put a tab between them");
                return Err(bad(&detail));
            }
        };
        Ok(Line {
            number,
            first: first.to_owned(),
            second,
        })
    };
    let lines = filled.map(line).collect::<Result<Vec<_>>>()?;
    match lines.is_empty() {
        true => Err(bad("there are no texts")),
        false => Ok(lines),
    }
}

impl Items {
    /// From the command line: files, and directories of which all PNG and JPEG files are taken. None given: the embedded ones.
    /// With a file of `texts` those, for an adapter that reads them in this form.
    pub fn find(given: &[PathBuf], texts: Option<&Path>, form: Option<TextForm>) -> Result<Items> {
        if let Some(file) = texts {
            return Ok(Items::Texts(lines(file, form.is_some_and(|form| form.pairs))?));
        }
        if given.is_empty() {
            return Ok(Items::Embedded);
        }
        let mut found = Vec::new();
        for path in given {
            if path.is_dir() {
                found.extend(in_directory(path)?);
            } else {
                found.push(path.clone());
            }
        }
        Ok(Items::Files(found))
    }

    /// The files of pictures; None for the embedded ones, and of texts.
    pub fn files(&self) -> Option<&[PathBuf]> {
        match self {
            Items::Embedded | Items::Texts(_) => None,
            Items::Files(paths) => Some(paths),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Items::Embedded => PICTURES.len(),
            Items::Files(paths) => paths.len(),
            Items::Texts(lines) => lines.len(),
        }
    }

    /// File name of picture `i`, or the number of the text's line.
    pub fn name(&self, i: usize) -> String {
        match self {
            Items::Embedded => PICTURES[i].0.into(),
            Items::Texts(lines) => format!("line {}", lines[i].number),
            Items::Files(paths) => paths[i]
                .file_name()
                .unwrap_or(paths[i].as_os_str())
                .to_string_lossy()
                .into(),
        }
    }

    /// Number `i` as it is to be prepared.
    pub fn load(&self, i: usize, preparation: &Preparation) -> Result<Item> {
        let read = match (self, preparation) {
            (Items::Texts(lines), Preparation::Texts { encoder, .. }) => {
                let line = &lines[i];
                return encoder
                    .words(&line.first, line.second.as_deref())
                    .map(Item::Words)
                    .map_err(|e| {
                        Error::Input(format!("line {}: {e}; change it, or remove it", line.number))
                    });
            }
            (Items::Texts(_), _) => {
                return Err(Error::Input(
                    "the adapter is for pictures, not for texts; give PNG or JPEG files".into(),
                ));
            }
            (_, Preparation::Texts { .. }) => {
                return Err(Error::Input(
                    "the adapter is for texts, not for pictures; give a file of texts to --text".into(),
                ));
            }
            (Items::Embedded, _) => preparation.decode(PICTURES[i].0, PICTURES[i].1),
            (Items::Files(paths), _) => preparation.picture(&paths[i]),
        };
        read.map(Item::Pixels)
            .map_err(|e| Error::Input(format!("{e}; give readable PNG or JPEG files")))
    }

    /// Texts of which something does not fit.
    pub fn cut(&self, preparation: &Preparation) -> usize {
        let words = |i| match self.load(i, preparation) {
            Ok(Item::Words(words)) => words.cut,
            _ => 0,
        };
        (0..self.len()).into_par_iter().filter(|&i| words(i) > 0).count()
    }

    /// Reads all of them, before anything is promised to anybody; the error of the first that cannot be used, which names it.
    /// With `skip` those are left out instead, and `skipped` hears of each.
    pub fn check(
        self,
        preparation: &Preparation,
        skip: bool,
        mut skipped: impl FnMut(Error),
    ) -> Result<Items> {
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
        let Items::Files(paths) = self else {
            return Ok(self);
        };
        let mut kept = Vec::with_capacity(paths.len());
        for (path, read) in paths.into_iter().zip(read) {
            match read {
                Ok(()) => kept.push(path),
                Err(e) => skipped(e),
            }
        }
        Ok(Items::Files(kept))
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
    let Some(name) = name else {
        return Backbone::from_bytes(asset!("config.json"), &asset!("backbone.safetensors")[..])
            .map_err(|e| bad_weights(e, None, "--backbone"));
    };
    let (folder, kind) = folder(name)?;
    match kind.and_then(|kind| Family::of_type(&kind)) {
        Some(_) => Err(Error::Input(format!(
            "{name} is a language model, which sees no pictures; give a vision transformer to --backbone, or texts to --data (.tsv or .txt)"
        ))),
        None => Backbone::open(&folder).map_err(|e| bad_weights(e, Some(Path::new(name)), "--backbone")),
    }
}

/// The text encoder that is meant: a folder (`config.json`, the tokenizer and `model.safetensors`), or a model of the hub.
pub fn encoder(name: Option<&str>, form: TextForm) -> Result<TextEncoder> {
    let name = name.ok_or_else(|| {
        Error::Input("texts need a text encoder, none of which is embedded; give one to --backbone".into())
    })?;
    let (folder, kind) = folder(name)?;
    match kind {
        Some(kind) if Family::of_type(&kind).is_none() => Err(Error::Input(format!(
            "{name} is a {kind}, which reads no texts; give a BERT, RoBERTa, ALBERT or MiniLM to --backbone, or pictures"
        ))),
        _ => {
            TextEncoder::open(&folder, form).map_err(|e| bad_weights(e, Some(Path::new(name)), "--backbone"))
        }
    }
}

/// The folder of a model, downloaded if need be, and what its configuration calls it.
fn folder(name: &str) -> Result<(PathBuf, Option<String>)> {
    let (bar, mut said) = (Bar::new("download"), false);
    let folder = veiltune_hub::fetch(name, &mut |p| {
        if !std::mem::replace(&mut said, true) {
            bar.say(&format!("downloading {name}"));
        }
        bar.at(p.done as usize, p.total as usize, p.file);
    })
    .map_err(|e| bad_weights(e, Some(Path::new(name)), "--backbone"))?;
    // What is wrong with a file, whoever opens the model says.
    let config: Option<serde_json::Value> = files::read_json(&folder.join("config.json")).ok();
    let kind = config.and_then(|c| Some(c.get("model_type")?.as_str()?.to_owned()));
    Ok((folder, kind))
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

/// An address as `--listen`, `--provider` and `--dealer` take it.
pub fn address(text: &str) -> std::result::Result<String, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let is_bracketed = host.starts_with('[') && host.ends_with(']');
    match port.parse::<u16>() {
        Ok(_) if !host.is_empty() && (is_bracketed || !host.contains(':')) => Ok(text.to_owned()),
        _ => Err("give HOST:PORT with a port of at most 65535, as in 192.168.0.7:7001, dealer.example.org:7001 or [::1]:7001".into()),
    }
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
        let found = Items::find(&[dir.path().into()], None, None).unwrap();
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
        let classes = Items::Embedded.true_classes(method.labels()).unwrap();
        let each_twice = (0..10).flat_map(|c| [Some(c), Some(c)]).collect::<Vec<_>>();
        assert_eq!(classes, each_twice);
    }
}
