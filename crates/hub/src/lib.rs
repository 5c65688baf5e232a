//! veiltune-hub: what is read from and written to disk. Checkpoints, adapter artefacts, images, training data.
//!
//! Nothing here knows a model: a file is turned into named arrays of floats whose shapes the caller states, and every
//! error names the file.

pub mod adapter;
pub mod cache;
mod error;
pub mod files;
pub mod idx;
pub mod image;
pub mod processor;
pub mod safetensors;

pub use adapter::AdapterConfig;
pub use error::{Error, Result};
pub use image::{Fit, Preprocess};
pub use safetensors::{Array, Checkpoint, Precision, Tensors};
