//! What can go wrong in training.

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
