//! What can go wrong at the data owner.

use std::path::PathBuf;

use thiserror::Error;

/// The result of a step of tuning.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of an [`crate::Evaluate`].
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Every variant says what was wrong and what to do. Texts never appear; labels and verbalizer words do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Settings that cannot be tuned with.
    #[error("{0}")]
    Settings(String),
    /// A task's description makes no sense.
    #[error("task {task}: {detail}")]
    Task {
        /// Its file or name.
        task: String,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A line of a data file cannot be used.
    #[error("{}, line {line}: {detail}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A label of the data has no word in the task.
    #[error(
        "{}, line {line}: label {label:?} is none of the task, which knows {known}; add it to the task with its word, or correct the line", file.display()
    )]
    Label {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The label.
        label: String,
        /// The labels that have words.
        known: String,
    },
    /// A class has fewer examples than are to be drawn.
    #[error(
        "label {label:?} has {found} examples, {train} for training and {validation} for validation are to be drawn; \
         take fewer shots or add examples"
    )]
    Shots {
        /// The label.
        label: String,
        /// Examples it has.
        found: usize,
        /// Wanted for training.
        train: usize,
        /// Wanted for validation.
        validation: usize,
    },
    /// A verbalizer's word is not one token.
    #[error(
        "the word {word:?} of label {label:?} is {tokens:?} to this model's tokenizer, not one token; \
         choose a word that is one token of its own"
    )]
    Word {
        /// The word.
        word: String,
        /// Whose it is.
        label: String,
        /// What the tokenizer makes of it.
        tokens: Vec<u32>,
    },
    /// The template does not leave room for the text.
    #[error(
        "the template takes {template} tokens with its prompt, and at most {limit} are allowed with a text: shorten the template or the \
         prompt, or allow more if the model takes them"
    )]
    Room {
        /// Tokens without any text.
        template: usize,
        /// Tokens of a sequence.
        limit: usize,
    },
    /// A tokenizer refused.
    #[error("the tokenizer refused: {0}")]
    Tokenizer(Cause),
    /// The forward pass failed. What was tuned so far is kept.
    #[error("the evaluation failed: {0}; the same command goes on from the last whole generation")]
    Evaluation(Cause),
    /// The forward pass gave something else than was asked for.
    #[error("the evaluation gave {found} logits, not {wanted}")]
    Logits {
        /// Values returned.
        found: usize,
        /// Values wanted.
        wanted: usize,
    },
    /// The optimiser cannot go on.
    #[error("the optimiser cannot go on: {0}")]
    Optimiser(String),
    /// It was asked to stop before there was anything to show.
    #[error("interrupted before the first validation; the same command starts again")]
    Interrupted,
    /// A checkpoint or an artefact cannot be taken.
    #[error("{}: {detail}", file.display())]
    Checkpoint {
        /// The file.
        file: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A file is bad.
    #[error(transparent)]
    File(#[from] veiltune_hub::Error),
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
