//! veiltune-engine: one forward pass, many interpreters.
//!
//! A model is written once over [`Backend`]. [`Plain`] runs it in floating point; [`Fixed`] in the protocols' fixed
//! point, in the clear; [`Session`] walks it three ways: [`Offline`] (dealer, preparing party, cost) and [`Online`]
//! (the party that computes).

pub mod backend;
pub mod cost;
mod error;
pub mod fixed;
mod float;
pub mod gates;
mod lower;
pub mod material;
pub mod offline;
pub mod online;
mod opening;
pub mod outside;
pub mod plain;
mod product;
pub mod protocols;
#[cfg(test)]
mod secrecy;
pub mod series;
pub mod session;

pub use backend::{
    Activation, Backend, NormKind, NormSpec, Owner, Params, Party, Range, Revealed, SoftmaxSpec,
};
pub use cost::{Cost, Memory, Tally};
pub use error::{Error, Result};
pub use fixed::Fixed;
pub use offline::Offline;
pub use online::Online;
pub use outside::Outside;
pub use plain::Plain;
pub use protocols::compare::Comparison;
