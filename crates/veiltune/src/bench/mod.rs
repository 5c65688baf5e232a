//! `veiltune bench`: what the protocols and adapters take on this machine.

pub mod adapter;
mod harness;
pub mod ops;
