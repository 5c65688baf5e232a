//! Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): grey pictures of 28 x 28 pixels in ten classes.

use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use veiltune_hub::{Preprocess, idx};

use crate::{Error, Result};

/// Side of a picture.
pub const SIDE: usize = 28;
/// Pixels of a picture.
pub const PIXELS: usize = SIDE * SIDE;

/// The classes, in the order of their labels.
pub const LABELS: [&str; 10] = [
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
];

/// How pictures are prepared: mean and deviation are those of the training pixels.
pub fn preprocess() -> Preprocess {
    Preprocess {
        size: SIDE,
        centre_crop: false,
        image_mean: vec![0.286],
        image_std: vec![0.353],
    }
}

/// Pictures and their labels.
#[derive(Clone, Debug, Default)]
pub struct Pictures {
    /// `PIXELS` bytes each.
    pub pixels: Vec<u8>,
    /// One a picture.
    pub labels: Vec<u8>,
}

/// Which of the two published files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// 60 000 pictures, for training and validation.
    Train,
    /// 10 000 pictures, for the final figure alone.
    Test,
}

impl Pictures {
    /// Reads one split from the directory of the four IDX files, gzipped or not.
    pub fn open(dir: &Path, split: Split) -> Result<Self> {
        let stem = if split == Split::Train { "train" } else { "t10k" };
        let find = |kind: &str| {
            let plain = dir.join(format!("{stem}-{kind}-ubyte"));
            if plain.exists() {
                plain
            } else {
                dir.join(format!("{stem}-{kind}-ubyte.gz"))
            }
        };
        let (pixels, labels) = (
            idx::read(&find("images-idx3"), 3)?,
            idx::read(&find("labels-idx1"), 1)?,
        );
        if pixels.dims[1..] != [SIDE, SIDE] || pixels.dims[0] != labels.dims[0] {
            let detail = format!(
                "pictures {:?} and labels {:?} do not belong together",
                pixels.dims, labels.dims
            );
            return Err(Error::Settings(detail));
        }
        if let Some(label) = labels.values.iter().find(|&&l| l as usize >= LABELS.len()) {
            return Err(Error::Settings(format!(
                "label {label} of {} classes",
                LABELS.len()
            )));
        }
        Ok(Pictures {
            pixels: pixels.values,
            labels: labels.values,
        })
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// One picture's pixels.
    pub fn picture(&self, i: usize) -> &[u8] {
        &self.pixels[i * PIXELS..][..PIXELS]
    }

    /// Sets a tenth aside for validation: (training, validation). The same for every seed of training.
    pub fn with_validation(&self) -> (Pictures, Pictures) {
        let order = shuffled(self.len(), &mut StdRng::seed_from_u64(0));
        let (held, kept) = order.split_at(self.len() / 10);
        (self.select(kept), self.select(held))
    }

    /// These pictures, in this order.
    pub fn select(&self, which: &[usize]) -> Pictures {
        Pictures {
            pixels: which.iter().flat_map(|&i| self.picture(i)).copied().collect(),
            labels: which.iter().map(|&i| self.labels[i]).collect(),
        }
    }

    /// The mirrored pictures.
    pub fn mirrored(&self) -> Pictures {
        let pixels = self
            .pixels
            .chunks(SIDE)
            .flat_map(|row| row.iter().rev())
            .copied()
            .collect();
        Pictures {
            pixels,
            labels: self.labels.clone(),
        }
    }
}

/// The numbers below `count` in random order.
pub fn shuffled(count: usize, rng: &mut StdRng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(rng);
    order
}

/// A random view of a picture: a crop of half to all of its area, perhaps mirrored, in another contrast; normalised.
pub fn random_view(pixels: &[u8], rng: &mut StdRng) -> Vec<f32> {
    let (area, aspect) = (
        rng.random_range(0.5f32..1.0),
        rng.random_range(-0.25f32..0.25).exp(),
    );
    let (w, h) = ((area * aspect).sqrt().min(1.0), (area / aspect).sqrt().min(1.0));
    let (x0, y0) = (rng.random_range(0.0..=1.0 - w), rng.random_range(0.0..=1.0 - h));
    let (mirror, contrast) = (rng.random_bool(0.5), rng.random_range(0.7f32..1.3));
    let Preprocess {
        image_mean,
        image_std,
        ..
    } = preprocess();
    let mut view = Vec::with_capacity(PIXELS);
    for row in 0..SIDE {
        let y = (y0 + h * (row as f32 + 0.5) / SIDE as f32) * SIDE as f32 - 0.5;
        for column in 0..SIDE {
            let across = if mirror { SIDE - 1 - column } else { column };
            let x = (x0 + w * (across as f32 + 0.5) / SIDE as f32) * SIDE as f32 - 0.5;
            view.push((contrast * sample(pixels, x, y) / 255.0 - image_mean[0]) / image_std[0]);
        }
    }
    view
}

/// The value between four pixels.
fn sample(pixels: &[u8], x: f32, y: f32) -> f32 {
    let last = SIDE as f32 - 1.0;
    let (x, y) = (x.clamp(0.0, last), y.clamp(0.0, last));
    let (left, top) = (x as usize, y as usize);
    let (right, bottom) = ((left + 1).min(SIDE - 1), (top + 1).min(SIDE - 1));
    let (fx, fy) = (x - left as f32, y - top as f32);
    let at = |x: usize, y: usize| pixels[y * SIDE + x] as f32;
    let mix = |y: usize| at(left, y) * (1.0 - fx) + at(right, y) * fx;
    mix(top) * (1.0 - fy) + mix(bottom) * fy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::stripes;

    /// An IDX file's content.
    fn idx(dims: &[u32], values: &[u8]) -> Vec<u8> {
        let dims_bytes = dims.iter().flat_map(|d| d.to_be_bytes());
        [0, 0, 8, dims.len() as u8]
            .into_iter()
            .chain(dims_bytes)
            .chain(values.iter().copied())
            .collect()
    }

    #[test]
    fn files_are_read_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let own = stripes(6);
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        assert!(Pictures::open(dir.path(), Split::Test).is_err());
        write("t10k-images-idx3-ubyte", &idx(&[6, 28, 28], &own.pixels));
        write("t10k-labels-idx1-ubyte", &idx(&[6], &own.labels));
        let read = Pictures::open(dir.path(), Split::Test).unwrap();
        assert_eq!(
            (read.pixels, read.labels),
            (own.pixels.clone(), own.labels.clone())
        );
        write("t10k-labels-idx1-ubyte", &idx(&[6], &[10; 6]));
        assert!(
            Pictures::open(dir.path(), Split::Test)
                .unwrap_err()
                .to_string()
                .contains("label 10")
        );
        write("t10k-labels-idx1-ubyte", &idx(&[5], &own.labels[..5]));
        assert!(
            Pictures::open(dir.path(), Split::Test)
                .unwrap_err()
                .to_string()
                .contains("belong together")
        );
    }

    #[test]
    fn validation_is_a_tenth_that_training_does_not_see() {
        let mut own = stripes(50);
        // Each picture says which it is.
        (0..50).for_each(|i| own.pixels[i * PIXELS] = i as u8);
        let (train, held) = own.with_validation();
        assert_eq!((train.len(), held.len()), (45, 5));
        let mut numbers: Vec<u8> = [&train, &held]
            .iter()
            .flat_map(|p| p.pixels.iter().step_by(PIXELS))
            .copied()
            .collect();
        numbers.sort();
        assert_eq!(numbers, (0..50).collect::<Vec<u8>>());
        assert_eq!(own.with_validation().1.pixels, held.pixels);
    }

    #[test]
    fn mirroring_twice_changes_nothing() {
        let own = stripes(3).select(&[1, 2]);
        let once = own.mirrored();
        assert_eq!(once.picture(0)[0], own.picture(0)[SIDE - 1]);
        assert_eq!(once.mirrored().pixels, own.pixels);
    }

    #[test]
    fn views_stay_within_the_pictures_values() {
        let mut rng = StdRng::seed_from_u64(1);
        let flat = [100; PIXELS];
        for _ in 0..20 {
            let view = random_view(&flat, &mut rng);
            assert_eq!(view.len(), PIXELS);
            // One grey level stays one grey level, in another contrast.
            assert!(view.iter().all(|v| (v - view[0]).abs() < 1e-5));
            let level = (view[0] * 0.353 + 0.286) * 255.0;
            assert!((69.0..131.0).contains(&level), "{level}");
        }
    }
}
