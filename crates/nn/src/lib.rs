//! veiltune-nn: layers, backbones and adapters, written once over any [`veiltune_engine::Backend`].
//!
//! A model is one file with its configuration. Control flow depends on configuration and shapes alone.

pub mod backbone;
mod error;
pub mod layers;
pub mod layout;
pub mod load;
pub mod owc;
#[cfg(test)]
mod testing;
pub mod vit;

pub use backbone::Backbone;
pub use error::{Error, Result};
pub use layers::{Linear, Norm};
pub use layout::{Layout, Variant};
pub use load::Classifier;
pub use owc::{Owc, OwcConfig};
pub use vit::{Vit, VitConfig};
