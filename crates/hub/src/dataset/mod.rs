//! Labelled pictures, from folders or from the binary files that data sets are published in.
//!
//! What is opened is told by what lies there:
//!
//! - a folder of class folders, `ROOT/<class>/*.png` (or `.jpg`, `.jpeg`), perhaps once more under `train/`, and `test/`
//!   or `val/`;
//! - CIFAR-10 and CIFAR-100 binary files, or a folder of them; records of 3073 and of 3074 bytes;
//! - a folder of IDX files (MNIST and its successors): `*train*` and `*t10k*` or `*test*`, each with
//!   `images-idx3-ubyte` and `labels-idx1-ubyte`, gzipped or not.
//!
//! Where nothing tells training pictures from test pictures (a folder of class folders, one file), all of them are
//! read, whichever split is asked for.

mod cifar;
mod folder;
mod mnist;
mod records;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;

use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::{Error, Result};
use records::Records;

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For training, and for the validation pictures that are carved from it.
    Train,
    /// For the final figure alone.
    Test,
}

/// What to do about pictures that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBad {
    /// They are an error, which names the first ones.
    Fail,
    /// They are left out, and listed.
    Skip,
}

/// A picture that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// As [`Dataset::name`].
    pub name: String,
    /// Why: what reading it said.
    pub reason: String,
}

/// Labelled pictures. Cheap to clone and to cut: pictures are decoded when they are asked for, and binary files are
/// held in memory once.
#[derive(Clone)]
pub struct Dataset {
    /// What was opened, for errors.
    place: String,
    classes: Arc<[String]>,
    files: Arc<[Source]>,
    items: Vec<Item>,
}

/// One picture of a data set.
#[derive(Clone, Copy)]
struct Item {
    /// Index of its class.
    label: usize,
    /// Index of its source.
    file: usize,
    /// Index within its source.
    record: usize,
}

/// A file with pictures.
enum Source {
    /// One PNG or JPEG.
    Picture { path: PathBuf, bytes: u64 },
    /// Many raw pictures, in memory.
    Records(Records),
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (pictures, classes) = (self.len(), self.classes.len());
        write!(
            f,
            "Dataset({}: {pictures} pictures, {classes} classes)",
            self.place
        )
    }
}

impl Dataset {
    /// Opens `split` of what lies at `path`; the formats are described at the top of this module. No picture is decoded,
    /// so a damaged one is found by [`Dataset::verify`] only.
    ///
    /// An error names the file or folder and says what is wrong with it: no class, a class without pictures, a label
    /// beyond the classes, a file that ends within a record, a list of names of another length.
    pub fn open(path: &Path, split: Split) -> Result<Self> {
        if !path.is_dir() {
            return cifar::open_file(path);
        }
        let files = folder::files(path)?;
        if mnist::matches(&files) {
            mnist::open(path, &files, split)
        } else if cifar::matches(&files) {
            cifar::open(path, &files, split)
        } else {
            folder::open(path, split)
        }
    }

    /// Checks what all formats have in common.
    fn new(place: &Path, classes: Vec<String>, files: Vec<Source>, items: Vec<Item>) -> Result<Self> {
        let place = place.to_string_lossy().into_owned();
        let distinct: BTreeSet<&String> = classes.iter().collect();
        if distinct.len() != classes.len() {
            return Err(Error::corrupt(place, "two classes have the same name"));
        }
        if items.is_empty() {
            return Err(Error::corrupt(place, "holds no picture"));
        }
        Ok(Dataset {
            place,
            classes: classes.into(),
            files: files.into(),
            items,
        })
    }

    /// The classes' names; a picture's label is an index into them. Sorted where folders name them, otherwise in the
    /// order of the format's labels.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no picture; only a [`Dataset::subset`] may have none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The label of picture `i`, below the number of classes.
    ///
    /// # Panics
    /// If there is no picture `i`; so do [`Dataset::name`], [`Dataset::picture`] and [`Dataset::subset`].
    pub fn label(&self, i: usize) -> usize {
        self.items[i].label
    }

    /// What a user calls picture `i`: `cat/7.png`, or `train_10k.bin record 17`.
    pub fn name(&self, i: usize) -> String {
        let item = self.items[i];
        match &self.files[item.file] {
            Source::Picture { path, .. } => {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                format!("{}/{file}", self.classes[item.label])
            }
            Source::Records(records) => format!("{} record {}", records.name, item.record),
        }
    }

    /// Reads and decodes picture `i`, without its transparency. Bounded in bytes and pixels like
    /// [`Preprocess::load`](crate::Preprocess::load); an error names the file.
    pub fn picture(&self, i: usize) -> Result<RgbImage> {
        let item = self.items[i];
        match &self.files[item.file] {
            Source::Picture { path, .. } => Ok(crate::image::load(path)?.into_rgb8()),
            Source::Records(records) => Ok(records.picture(item.record)),
        }
    }

    /// Decodes every picture once, on all cores, and calls `progress` with the number of pictures done.
    ///
    /// Gives the pictures that can be read, and those that were left out, if `on_bad` says so. That a class has none
    /// left is an error either way.
    pub fn verify(&self, on_bad: OnBad, progress: &mut dyn FnMut(usize)) -> Result<(Dataset, Vec<Skipped>)> {
        let mut bad = self.unreadable(progress);
        // Threads finish in any order; the report is in the order of the pictures.
        bad.sort_by_key(|(i, _)| *i);
        if on_bad == OnBad::Fail {
            match bad.len() {
                0 => {}
                1 => return Err(bad.swap_remove(0).1),
                count => {
                    let names = bad.iter().take(MAX_NAMED).map(|(i, _)| self.name(*i));
                    let names = names.collect::<Vec<_>>().join(", ");
                    let more = if count > MAX_NAMED { ", ..." } else { "" };
                    let detail = format!(
                        "{count} pictures cannot be read: {names}{more}; the first: {}",
                        bad[0].1
                    );
                    return Err(Error::corrupt(&self.place, detail));
                }
            }
        }
        let left_out: BTreeSet<usize> = bad.iter().map(|(i, _)| *i).collect();
        let kept: Vec<usize> = (0..self.len()).filter(|i| !left_out.contains(i)).collect();
        let kept = self.subset(&kept);
        let (before, after) = (self.per_class(), kept.per_class());
        for (label, class) in self.classes.iter().enumerate() {
            if !before[label].is_empty() && after[label].is_empty() {
                let detail = format!("none of the pictures of class {class} can be read");
                return Err(Error::corrupt(&self.place, detail));
            }
        }
        let skipped = bad.into_iter().map(|(i, e)| Skipped {
            name: self.name(i),
            reason: e.to_string(),
        });
        Ok((kept, skipped.collect()))
    }

    /// The pictures that cannot be decoded.
    fn unreadable(&self, progress: &mut dyn FnMut(usize)) -> Vec<(usize, Error)> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let next = AtomicUsize::new(0);
        let (send, receive) = mpsc::channel();
        let work = |send: mpsc::Sender<(usize, Result<()>)>| {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= self.len() || send.send((i, self.picture(i).map(drop))).is_err() {
                    break;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (work, send) = (&work, send.clone());
                scope.spawn(move || work(send));
            }
            drop(send);
            let mut bad = Vec::new();
            for (done, (i, result)) in receive.into_iter().enumerate() {
                if let Err(e) = result {
                    bad.push((i, e));
                }
                progress(done + 1);
            }
            bad
        })
    }

    /// The pictures at `indices`, in that order, with the same classes.
    pub fn subset(&self, indices: &[usize]) -> Dataset {
        Dataset {
            items: indices.iter().map(|&i| self.items[i]).collect(),
            ..self.clone()
        }
    }

    /// The pictures of each class, by index.
    fn per_class(&self) -> Vec<Vec<usize>> {
        let mut of_class = vec![Vec::new(); self.classes.len()];
        for (i, item) in self.items.iter().enumerate() {
            of_class[item.label].push(i);
        }
        of_class
    }

    /// That `other`, the test pictures for instance, has the same classes under the same labels; otherwise the error
    /// names those that only one of the two has.
    pub fn check_same_classes(&self, other: &Dataset) -> Result<()> {
        if self.classes == other.classes {
            return Ok(());
        }
        let only = |of: &Dataset, not: &Dataset| {
            let extra: Vec<&str> = of
                .classes
                .iter()
                .filter(|c| !not.classes.contains(c))
                .map(String::as_str)
                .collect();
            let listed = extra
                .iter()
                .take(MAX_LISTED)
                .copied()
                .collect::<Vec<_>>()
                .join(", ");
            let more = if extra.len() > MAX_LISTED { ", ..." } else { "" };
            (!extra.is_empty()).then(|| format!("; only {} has {listed}{more}", of.place))
        };
        let (here, there) = (only(self, other), only(other, self));
        let detail = match (&here, &there) {
            (None, None) => "; they are in another order".to_owned(),
            _ => here.unwrap_or_default() + &there.unwrap_or_default(),
        };
        let message = format!("its classes are not those of {}{detail}", self.place);
        Err(Error::corrupt(&other.place, message))
    }

    /// A digest of what it holds: the classes, and each picture's label, name and content. Of a PNG or JPEG file the
    /// size stands for the content, so that no file is read; one that is changed and keeps its size is not noticed.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        let mut add = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        add(b"veiltune data set 1");
        add(&(self.classes.len() as u64).to_le_bytes());
        self.classes.iter().for_each(|class| add(class.as_bytes()));
        for (i, item) in self.items.iter().enumerate() {
            add(&(item.label as u64).to_le_bytes());
            add(self.name(i).as_bytes());
            match &self.files[item.file] {
                Source::Picture { bytes, .. } => add(&bytes.to_le_bytes()),
                Source::Records(records) => add(records.pixels(item.record)),
            }
        }
        digest.finalize().into()
    }
}

/// Most classes that an error names.
const MAX_LISTED: usize = 8;
/// Most unreadable pictures that an error names.
const MAX_NAMED: usize = 10;

#[cfg(test)]
mod tests;
