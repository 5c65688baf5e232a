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
    /// Something that another role asks for is not done here; the text is for that role too.
    #[error("{0}")]
    Refused(String),
    /// A thread of this process panicked.
    #[error("{0} ended unexpectedly; this is a bug, please report it")]
    Panicked(&'static str),
    /// A model does not load or does not fit.
    #[error(transparent)]
    Model(#[from] veiltune_nn::Error),
    /// A file of the model hub's formats cannot be used.
    #[error(transparent)]
    Hub(#[from] veiltune_hub::Error),
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
    /// A search of that kind ended without an adapter.
    #[error(
        "{0} found no adapter within the goal; give a lower --accuracy or more --seconds, or more to choose from"
    )]
    NothingFound(&'static str),
    /// The meters counted something else than was predicted.
    #[error("{0}: the run did something else than its plan; this is a bug, please report it")]
    Mismatch(String),
    /// Ctrl-C, or a request to terminate.
    #[error("interrupted")]
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
            Error::Input(_) | Error::Refused(_) => 2,
            Error::Model(veiltune_nn::Error::Engine(e)) | Error::Engine(e) => 1 + u8::from(of_file(e)),
            Error::Model(_) => 2,
            Error::Role { code, .. } => *code,
            Error::Interrupted => 130,
            _ => 1,
        }
    }

    /// What the other roles are told of it: enough to know who has to act, and nothing of this machine's files and addresses,
    /// which only this side's own message names.
    pub fn for_peer(&self) -> String {
        match self {
            Error::Refused(text) => text.clone(),
            Error::Wire(wire) => wire.for_peer(),
            Error::Engine(engine) => engine.for_peer(),
            Error::Input(_) | Error::Model(_) | Error::Hub(_) => {
                "something that it was given cannot be used".into()
            }
            Error::Interrupted => "it was interrupted".into(),
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "its disk is full".into()
            }
            Error::Io { .. }
            | Error::Panicked(_)
            | Error::Role { .. }
            | Error::Sessions { .. }
            | Error::NothingFound(_)
            | Error::Mismatch(_) => "it failed".into(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_what_concerns_it_and_no_paths() {
        let secret = || "/home/somebody/adapter: damaged".to_owned();
        let engine = veiltune_engine::Error::File(secret());
        for e in [
            Error::Input(secret()),
            Error::Io {
                what: secret(),
                source: io::Error::other("x"),
            },
            Error::Engine(engine),
            Error::Model(veiltune_nn::Error::Config(secret())),
            Error::Wire(veiltune_wire::Error::BadFile {
                path: secret(),
                detail: secret(),
            }),
        ] {
            let told = e.for_peer();
            assert!(!told.is_empty() && !told.contains('/'), "{told}");
            assert!(e.to_string().contains("/home"), "{e}");
        }
        assert_eq!(Error::Refused("at most 2".into()).for_peer(), "at most 2");
    }
}
