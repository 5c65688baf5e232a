//! IDX files: grey pictures in one, their labels in another.

use std::path::{Path, PathBuf};

use super::records::Records;
use super::{Dataset, Item, Source, Split};
use crate::image::MAX_SIDE;
use crate::{Error, Result, idx};

/// In the name of a file with pictures.
const IMAGES: &str = "images-idx3-ubyte";
/// In its place in the name of the file with their labels.
const LABELS: &str = "labels-idx1-ubyte";

/// Whether there is a file with pictures.
pub(super) fn matches(files: &[PathBuf]) -> bool {
    files.iter().any(|f| name(f).contains(IMAGES))
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The classes are called by their labels: `0`, `1`, and so on up to the largest.
pub(super) fn open(folder: &Path, files: &[PathBuf], split: Split) -> Result<Dataset> {
    let words: &[&str] = match split {
        Split::Train => &["train"],
        Split::Test => &["t10k", "test"],
    };
    let of_split = |f: &&PathBuf| name(f).contains(IMAGES) && words.iter().any(|w| name(f).contains(w));
    // A plain file comes before its gzipped twin.
    let path = files.iter().find(of_split).ok_or_else(|| {
        let detail = format!("no *{}*{IMAGES} file", words.join("* or *"));
        Error::corrupt(folder.to_string_lossy(), detail)
    })?;
    let labels = idx::read(&labels(path), 1)?;
    let pictures = idx::read(path, 3)?;
    let &[count, height, width] = &pictures.dims[..] else {
        return Err(Error::corrupt(path.to_string_lossy(), "no pictures"));
    };
    if labels.dims != [count] {
        let detail = format!("{count} pictures, but {:?} labels", labels.dims);
        return Err(Error::corrupt(path.to_string_lossy(), detail));
    }
    if height.max(width) > MAX_SIDE as usize {
        let detail = format!("pictures of {width} x {height} pixels are too large");
        return Err(Error::corrupt(path.to_string_lossy(), detail));
    }
    let records = Records::new(path, pictures.values, 0, [1, height, width])?;
    let largest = labels.values.iter().copied().max().unwrap_or(0);
    let classes = (0..=largest).map(|label| label.to_string()).collect();
    let items = labels.values.iter().enumerate().map(|(record, &label)| Item {
        label: label.into(),
        file: 0,
        record,
    });
    Dataset::new(folder, classes, vec![Source::Records(records)], items.collect())
}

/// The file of labels that belongs to one of pictures; one may be gzipped and the other not.
fn labels(pictures: &Path) -> PathBuf {
    let name = name(pictures).replace(IMAGES, LABELS);
    let plain = pictures.with_file_name(name.trim_end_matches(".gz"));
    match plain.is_file() {
        true => plain,
        false => pictures.with_file_name(format!("{}.gz", name.trim_end_matches(".gz"))),
    }
}
