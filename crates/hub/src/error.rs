//! What can be wrong with a file.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// The result of reading or writing.
pub type Result<T> = std::result::Result<T, Error>;

/// Every variant names the file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be: truncated, corrupt, of another format, too large.
    #[error("{file}: {detail}")]
    Corrupt {
        /// The file.
        file: String,
        /// What is wrong.
        detail: String,
    },
    /// A model is not on this machine, and could not be had from the model hub.
    #[error("{model}: {detail}")]
    Hub {
        /// The name that was asked for.
        model: String,
        /// Why, and what to do.
        detail: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("{file}: no tensor {name}")]
    Missing {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the model's configuration implies.
    #[error("{file}: tensor {name} has shape {found:?}, the configuration wants {expected:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// What the file has.
        found: Vec<usize>,
        /// What the caller stated.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or an infinity.
    #[error("{file}: tensor {name} holds a value that is not finite")]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
    },
}

impl Error {
    pub(crate) fn corrupt(file: impl Into<String>, detail: impl ToString) -> Self {
        Error::Corrupt {
            file: file.into(),
            detail: detail.to_string(),
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Error::Io {
            path: path.to_owned(),
            source,
        }
    }
}
