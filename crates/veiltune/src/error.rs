//! What ends a command, and the exit code that it ends with.

use std::io;

use thiserror::Error;

use crate::events::Rank;

/// The result of a command or of a step of it.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command ended. Each message is one line: what was wrong, where, and what to do.
#[derive(Debug, Error)]
pub enum Error {
    /// Something that the user gave cannot be used.
    #[error("{0}")]
    Input(String),
    /// A model does not load or does not fit.
    #[error(transparent)]
    Model(#[from] veiltune_nn::Error),
    /// The private computation failed.
    #[error(transparent)]
    Engine(#[from] veiltune_engine::Error),
    /// A link failed, or the peer at its other end misbehaved.
    #[error(transparent)]
    Wire(#[from] veiltune_wire::Error),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// One of the processes of the run failed.
    #[error("{role}: {message}")]
    Role {
        /// Which.
        role: &'static str,
        /// Its own words, or what was seen of its end.
        message: String,
        /// Its exit code.
        code: u8,
    },
    /// Of a service's sessions some have failed, each of which was told of.
    #[error("{failed} of {of} sessions failed")]
    Sessions {
        /// How many.
        failed: usize,
        /// Of how many.
        of: usize,
    },
    /// The meters counted something else than was predicted.
    #[error("{0}: the run did something else than its plan; this is a bug, please report it")]
    Mismatch(String),
    /// Ctrl-C, or a request to terminate.
    #[error("interrupted; every process of the run has been ended")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source,
        }
    }

    /// 2 for what the user gave, 130 after an interruption, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        use veiltune_engine::Error as Engine;
        fn of_file(e: &Engine) -> bool {
            match e {
                Engine::File(_) | Engine::Range { .. } => true,
                Engine::Parameter { source, .. } => of_file(source),
                _ => false,
            }
        }
        match self {
            Error::Input(_) => 2,
            Error::Model(veiltune_nn::Error::Engine(e)) | Error::Engine(e) => 1 + u8::from(of_file(e)),
            Error::Model(_) => 2,
            Error::Role { code, .. } => *code,
            Error::Interrupted => 130,
            _ => 1,
        }
    }

    /// How close to the first cause this error is, when several roles of a run fail together.
    pub fn rank(&self) -> Rank {
        use veiltune_engine::Error as Engine;
        use veiltune_wire::Error as Wire;
        let (Error::Wire(wire) | Error::Engine(Engine::Wire(wire))) = self else {
            return if matches!(self, Error::Engine(Engine::Stopped(_))) {
                Rank::Echo
            } else {
                Rank::Cause
            };
        };
        match wire {
            Wire::PeerAborted { .. } | Wire::Aborted { .. } | Wire::Closed { .. } => Rank::Echo,
            Wire::PeerGone { .. }
            | Wire::Truncated { .. }
            | Wire::Silent { .. }
            | Wire::Rejected { .. }
            | Wire::Unreachable { .. }
            | Wire::NobodyCame { .. } => Rank::Witness,
            _ => Rank::Cause,
        }
    }
}

impl From<veiltune_adapt::Error> for Error {
    fn from(e: veiltune_adapt::Error) -> Self {
        match e {
            veiltune_adapt::Error::Interrupted => Error::Interrupted,
            veiltune_adapt::Error::Engine(e) => Error::Engine(e),
            e => Error::Input(e.to_string()),
        }
    }
}
