//! veiltune-tune: what the data owner does of forward-only prompt tuning, in the clear and alone.
//!
//! A task turns labelled texts into token sequences; an optimiser proposes prompts; their losses come from logits that some
//! forward pass returns, which may run under MPC: this crate does not know. The result is an artefact in PEFT's layout.
//!
//! ```text
//! Task + data file -> Examples -> Shots -> Encoder -> Sequence ...> forward pass
//! Cma -> Projection -> Prompts ...................................> forward pass
//! logits of the label words -> Score -> Cma; the best Prompt -> Artefact
//! ```
//!
//! Texts, labels, prompts and losses are the data owner's secrets: the types that hold them print none of it.

pub mod artefact;
pub mod cma;
mod error;
mod linear;
mod loss;
pub mod plot;
mod projection;
mod prompting;
mod shots;
pub mod task;
mod tuning;

pub use artefact::{Artefact, Mode};
pub use cma::Cma;
pub use error::{Cause, Error, Result};
pub use linear::{Labelled, Linear};
pub use loss::{Loss, Metric, Score, answer};
pub use projection::{Projection, Prompt};
pub use prompting::{Encoder, Sequence, Slot, Specials, Tokenize};
pub use shots::{Drawn, Shots, subset};
pub use task::{Example, Family, Piece, Task, Template};
pub use tuning::{
    Best, Ended, Evaluate, Labels, Outcome, Planned, Progress, Record, Settings, Split, Tuner, score,
};
