//! What can go wrong with a model.

use thiserror::Error;

/// The result of loading or converting a model.
pub type Result<T> = std::result::Result<T, Error>;

/// Model errors. A forward pass itself gives the engine's.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration that no model has.
    #[error("configuration: {0}")]
    Config(String),
    /// The interpreter refused.
    #[error(transparent)]
    Engine(#[from] veiltune_engine::Error),
    /// A file is bad.
    #[error(transparent)]
    File(#[from] veiltune_hub::Error),
}
