//! veiltune-hub: what is read from and written to disk. Checkpoints, adapter artefacts, images, training data; and what
//! is fetched from the model hub to be there.
//!
//! Nothing here knows a model: a file is turned into named arrays of floats whose shapes the caller states, and every
//! error names the file.

pub mod adapter;
pub mod augment;
pub mod cache;
pub mod dataset;
mod download;
mod error;
pub mod files;
pub mod gguf;
pub mod idx;
pub mod image;
pub mod processor;
mod random;
pub mod safetensors;
pub mod tokenizer;

pub use adapter::{AdapterConfig, Pooling, TextForm};
pub use augment::{Augment, View};
pub use cache::fetch;
pub use dataset::Dataset;
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use image::{Fit, Preprocess};
pub use safetensors::{Array, Checkpoint, Precision, Tensors};
pub use tokenizer::{Special, Tokenizer};
