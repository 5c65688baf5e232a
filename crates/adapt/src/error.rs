//! What can go wrong in training.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// The result of a training step.
pub type Result<T> = std::result::Result<T, Error>;

/// Training errors.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Settings that cannot be trained with.
    #[error("{0}")]
    Settings(String),
    /// The loss is no longer finite.
    #[error("training diverged: the loss is {0}; lower the learning rate")]
    Diverged(f32),
    /// It was asked to stop. What is done is kept; the same call goes on from there.
    #[error("interrupted; the same command goes on from here")]
    Interrupted,
    /// Hidden states would not fit on the disk.
    #[error("{}: hidden states need {} more, {} are free; free some, or take fewer views", dir.display(), size(*needed), size(*free))]
    NoSpace {
        /// The cache.
        dir: PathBuf,
        /// Bytes.
        needed: u64,
        /// Bytes.
        free: u64,
    },
    /// The disk is full.
    #[error("{}: the disk is full; what is whole is kept: free some space and run the same command again", .0.display())]
    DiskFull(PathBuf),
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] veiltune_nn::Error),
    /// The interpreter refused.
    #[error(transparent)]
    Engine(#[from] veiltune_engine::Error),
    /// A file is bad.
    #[error(transparent)]
    File(#[from] veiltune_hub::Error),
    /// Tensor arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        few if few < 1e8 => format!("{:.1} MB", few / 1e6),
        many => format!("{:.2} GB", many / 1e9),
    }
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Error::Io {
            path: path.to_owned(),
            source,
        }
    }
}
