//! `veiltune bench`: what the protocols, adapters and language models take on this machine.

pub mod adapter;
pub mod encoder;
mod harness;
pub mod ops;
