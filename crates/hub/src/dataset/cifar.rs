//! The binary files of CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning multiple layers of features from tiny images",
//! 2009).
//!
//! A record is one label byte in CIFAR-10, a coarse and a fine one in CIFAR-100, then 32 x 32 bytes of red, of green, of
//! blue. The length of the records tells the two formats apart.

use std::path::{Path, PathBuf};

use super::records::Records;
use super::{Dataset, Item, Source, Split};
use crate::{Error, Result, files};

/// Largest file, bytes.
const MAX_FILE: u64 = 1 << 30;
/// Largest list of names, bytes.
const MAX_NAMES: u64 = 1 << 16;
/// Side of a picture.
const SIDE: usize = 32;
/// Bytes of a picture.
const PIXELS: usize = 3 * SIDE * SIDE;

/// What the two formats differ in.
struct Format {
    title: &'static str,
    /// Bytes before the pixels; the last one is the label.
    header: usize,
    /// The file with the classes' names, in the order of the labels.
    names: &'static str,
    /// The names without that file.
    standard: &'static str,
}

const TEN: Format = Format {
    title: "CIFAR-10",
    header: 1,
    names: "batches.meta.txt",
    standard: "airplane automobile bird cat deer dog frog horse ship truck",
};
const HUNDRED: Format = Format {
    title: "CIFAR-100",
    header: 2,
    names: "fine_label_names.txt",
    standard: "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus \
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch \
        crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo \
        keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse \
        mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy \
        porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper \
        snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television \
        tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm",
};

/// Whether there is a file that by its name is one of these.
pub(super) fn matches(files: &[PathBuf]) -> bool {
    files
        .iter()
        .any(|f| is_of(f, Split::Train) || is_of(f, Split::Test))
}

/// The published names, and others that say what they are.
fn is_of(path: &Path, split: Split) -> bool {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase();
    let split = match split {
        Split::Train => name.contains("train") || name.starts_with("data_batch"),
        Split::Test => name.contains("test"),
    };
    split && name.ends_with(".bin")
}

/// All files of a split.
pub(super) fn open(folder: &Path, found: &[PathBuf], split: Split) -> Result<Dataset> {
    let of_split: Vec<&PathBuf> = found.iter().filter(|f| is_of(f, split)).collect();
    if of_split.is_empty() {
        let wanted = match split {
            Split::Train => "data_batch*.bin or *train*.bin",
            Split::Test => "*test*.bin",
        };
        return Err(Error::corrupt(
            folder.to_string_lossy(),
            format!("no {wanted} file"),
        ));
    }
    read(folder, &of_split)
}

/// One file, whatever its name.
pub(super) fn open_file(path: &Path) -> Result<Dataset> {
    read(path, &[&path.to_owned()])
}

/// `place` is what the user named.
fn read(place: &Path, paths: &[&PathBuf]) -> Result<Dataset> {
    let (mut sources, mut items) = (Vec::new(), Vec::new());
    let mut first: Option<(&Format, Vec<String>)> = None;
    for (file, &path) in paths.iter().enumerate() {
        let bytes = files::read(path, MAX_FILE)?;
        let format = format(path, &bytes)?;
        let (before, classes) = match &first {
            Some(first) => first,
            None => first.insert((format, names(path, format)?)),
        };
        if before.header != format.header {
            let detail = format!("{} records beside {} ones", format.title, before.title);
            return Err(Error::corrupt(path.to_string_lossy(), detail));
        }
        let records = Records::new(path, bytes, format.header, [3, SIDE, SIDE])?;
        for record in 0..records.len() {
            let label = records.header(record)[format.header - 1].into();
            if label >= classes.len() {
                let detail = format!(
                    "record {record} has label {label}, {} has {} classes",
                    format.title,
                    classes.len()
                );
                return Err(Error::corrupt(path.to_string_lossy(), detail));
            }
            items.push(Item { label, file, record });
        }
        sources.push(Source::Records(records));
    }
    let (_, classes) = first.unwrap_or((&TEN, Vec::new()));
    Dataset::new(place, classes, sources, items)
}

/// The format whose records fill the file. Where both do, as in a file of 3073 CIFAR-100 records, it is CIFAR-10 if all
/// its labels would be.
fn format(path: &Path, bytes: &[u8]) -> Result<&'static Format> {
    let fits = |format: &Format| !bytes.is_empty() && bytes.len().is_multiple_of(format.header + PIXELS);
    let labelled = || bytes.iter().step_by(1 + PIXELS).all(|&label| label < 10);
    match (fits(&TEN), fits(&HUNDRED)) {
        (true, false) => Ok(&TEN),
        (false, true) => Ok(&HUNDRED),
        (true, true) if labelled() => Ok(&TEN),
        (true, true) => Ok(&HUNDRED),
        (false, false) => Err(Error::corrupt(
            path.to_string_lossy(),
            format!(
                "{} bytes are neither CIFAR-10 records ({} each) nor CIFAR-100 records ({}): cut off, or no CIFAR file",
                bytes.len(),
                1 + PIXELS,
                2 + PIXELS
            ),
        )),
    }
}

/// The classes, from the list beside a file or as published.
fn names(path: &Path, format: &Format) -> Result<Vec<String>> {
    let standard: Vec<String> = format.standard.split_whitespace().map(String::from).collect();
    let list = path.with_file_name(format.names);
    if !list.is_file() {
        return Ok(standard);
    }
    let text = files::read(&list, MAX_NAMES)?;
    let text = String::from_utf8_lossy(&text);
    let names: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(String::from)
        .collect();
    if names.len() == standard.len() {
        return Ok(names);
    }
    let detail = format!(
        "{} names, {} has {} classes",
        names.len(),
        format.title,
        standard.len()
    );
    Err(Error::corrupt(list.to_string_lossy(), detail))
}
