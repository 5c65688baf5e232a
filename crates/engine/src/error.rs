//! What can go wrong in the engine, by who can act on it.

use thiserror::Error;

/// The result of an engine call.
pub type Result<T> = std::result::Result<T, Error>;

/// Engine errors.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The program asks for something impossible: shapes, scales, ranges.
    #[error("{op}: {detail}")]
    Program {
        /// The verb.
        op: &'static str,
        /// What was wrong and what to do.
        detail: String,
    },
    /// A parameter could not be brought in.
    #[error("parameter {name}: {source}")]
    Parameter {
        /// Dotted name.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// A value does not fit the fixed-point range.
    #[error("{op}: {detail}")]
    Range {
        /// The verb.
        op: &'static str,
        /// Which bound was exceeded; never the value.
        detail: String,
    },
    /// A file of weights or material is bad.
    #[error("{0}")]
    File(String),
    /// The float interpreter failed.
    #[error("float backend: {0}")]
    Candle(#[from] candle_core::Error),
    /// Ring arithmetic refused its operands.
    #[error(transparent)]
    Ring(#[from] veiltune_ring::Error),
    /// A link failed, or the peer misbehaved.
    #[error(transparent)]
    Wire(#[from] veiltune_wire::Error),
    /// Function secret sharing refused its operands.
    #[error(transparent)]
    Fss(#[from] veiltune_fss::Error),
    /// Another phase of this role ended first; its error is the one to read.
    #[error("{0} of this role ended first")]
    Stopped(&'static str),
}

impl Error {
    /// What the other roles are told of it: enough to know who has to act, and nothing of this side's files and values.
    pub fn for_peer(&self) -> String {
        match self {
            Error::Wire(wire) => wire.for_peer(),
            Error::Parameter { source, .. } => match &**source {
                Error::Wire(wire) => wire.for_peer(),
                _ => "a file of its own cannot be used".into(),
            },
            Error::File(_) => "a file of its own cannot be used".into(),
            Error::Stopped(phase) => format!("{phase} failed there"),
            _ => "its computation failed".into(),
        }
    }

    /// An [`Error::Program`].
    pub fn program(op: &'static str, detail: impl Into<String>) -> Self {
        Error::Program {
            op,
            detail: detail.into(),
        }
    }
}
