//! veiltune-nn: layers, backbones and adapters, written once over any [`veiltune_engine::Backend`].
//!
//! A model is one file with its configuration. Control flow depends on configuration and shapes alone.

mod affine;
pub mod attention;
pub mod backbone;
mod block;
pub mod encoder;
mod error;
pub mod head;
pub mod language;
pub mod layers;
pub mod layout;
pub mod load;
pub mod method;
pub mod owc;
pub mod peft;
#[cfg(test)]
mod testing;
pub mod text;
pub mod vit;

pub use backbone::Backbone;
pub use encoder::EncoderConfig;
pub use error::{Error, Result};
pub use head::HeadConfig;
pub use layers::{Linear, Norm};
pub use layout::{Layout, Variant};
pub use load::Classifier;
pub use method::{Method, Private, Read};
pub use owc::{Owc, OwcConfig};
pub use text::TextEncoder;
pub use vit::{Vit, VitConfig};
