//! veiltune-adapt: training, in the clear and at the provider.
//!
//! Backbones are pretrained on a public task; adapters are trained on a frozen backbone's hidden states through the very
//! forward pass that later runs privately, and their norms are calibrated on the training data.

pub mod adapter;
pub mod data;
mod error;
pub mod optim;
pub mod pretrain;
pub mod probe;
#[cfg(test)]
mod testing;
pub mod variables;

pub use error::{Error, Result};
pub use variables::Variables;
