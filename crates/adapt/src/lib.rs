//! veiltune-adapt: training, in the clear and at the provider.
//!
//! Backbones are pretrained on a public task; adapters are trained on a frozen backbone's hidden states through the very
//! forward pass that later runs privately, and their norms are calibrated on the training data.

pub mod cache;
mod checkpoint;
pub mod data;
mod discriminant;
mod error;
pub mod evaluate;
pub mod language;
pub mod optim;
mod plot;
pub mod pretrain;
pub mod search;
#[cfg(test)]
mod testing;
pub mod texts;
pub mod train;
pub mod variables;
mod warm;
pub mod workers;

pub use error::{Error, Result};
pub use variables::Variables;
