//! Forward-only prompt tuning on a language model that nobody sees whole, with texts that nobody else sees (SecP-Tuning, arXiv
//! 2506.15307).
//!
//! The model's owner [shares](servers::share) it between two servers; a data owner [tunes](tune) a prompt on them by forward
//! passes of one [program](program), with material from an assistant. Its texts come in by a [private lookup](lookup) of words.

pub mod args;
pub mod classify;
pub mod commands;
pub mod demo;
pub mod evaluate;
pub mod ground;
pub mod layout;
pub mod lookup;
pub mod measure;
pub mod model;
pub mod owner;
pub mod plan;
pub mod program;
pub mod servers;
pub mod store;
mod talk;
pub mod tune;

#[cfg(test)]
mod tests;
