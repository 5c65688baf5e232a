//! From a task and its labelled texts to rows for a model.

use veiltune_hub::Tokenizer;
use veiltune_nn::language::LanguageConfig;
use veiltune_tune::{Encoder, Example, Shots, Slot, Task, Tokenize};

use super::args::RunArgs;
use super::layout::{Rows, tune};
use super::model::{self, Words};
use super::program::{Mode, Shape};
use crate::{Error, Result};

/// What is public of the model, and what follows from it for the texts.
pub struct Ground<'a> {
    /// The model.
    pub config: &'a LanguageConfig,
    /// Its tokenizer.
    pub words: &'a Tokenizer,
    /// The task.
    pub task: &'a Task,
    /// What stands where the prompt goes.
    pub slot: Slot,
    /// Most tokens of a row.
    pub tokens: usize,
    /// Rows are rounded up to it.
    pub bucket: usize,
}

impl Ground<'_> {
    /// Rows of these texts.
    pub fn rows(&self, examples: &[&Example]) -> Result<Rows> {
        let words = Words(self.words);
        let padding = words.specials().pad.unwrap_or(0);
        let limit = self.limit();
        Rows::new(&self.encoder(&words)?, examples, padding, self.bucket, limit)
    }

    /// Rows of the table that give the label words' logits.
    pub fn labels(&self) -> Result<Vec<u32>> {
        let words = Words(self.words);
        let labels = self.encoder(&words)?.words().map_err(tune)?;
        Ok(labels
            .into_iter()
            .map(|id| model::label_row(self.config, id))
            .collect())
    }

    /// Most tokens of a row.
    pub fn limit(&self) -> usize {
        self.tokens.min(self.config.max_positions)
    }

    /// How many texts are cut, and what can be done about it.
    pub fn cut(&self, rows: &Rows) -> String {
        let (limit, all) = (self.limit(), rows.len());
        let advice = match limit < self.tokens {
            true => "all that the model takes",
            false => "--tokens allows more",
        };
        format!("{} of {all} texts are cut to {limit} tokens: {advice}", rows.cut)
    }

    fn encoder<'w>(&'w self, words: &'w Words<'w>) -> Result<Encoder<'w, Words<'w>>> {
        let family = model::template(self.config);
        Encoder::new(words, self.task, family, self.slot.clone(), self.limit()).map_err(tune)
    }

    /// Sizes of a run on these rows, of which the first `train` are tuned on.
    pub fn shape(&self, rows: &Rows, train: usize, population: usize, together: usize) -> Shape {
        Shape {
            tokens: rows.tokens,
            answer: rows.answer,
            start: rows.start,
            prompt: rows.prompt,
            mode: match self.slot {
                Slot::Add(_) => Mode::Add,
                Slot::Concatenate(_) => Mode::Concatenate,
            },
            texts: train,
            validation: rows.len() - train,
            labels: self.task.labels.len(),
            candidates: population,
            together,
        }
    }
}

/// The tokens whose embeddings the prompt is added to: those of a text, again and again.
pub fn initial(words: &Tokenizer, task: &Task, text: Option<&str>, count: usize) -> Result<Vec<u32>> {
    let usual = format!(
        "Which of these words fits the text best: {}?",
        task.words.join(", ")
    );
    let text = text.or(task.initial.as_deref());
    let tokens = words.encode(text.unwrap_or(&usual))?;
    match tokens.is_empty() {
        true => Err(Error::Input(
            "the initial text has no words that the model knows".into(),
        )),
        false => Ok(tokens.iter().copied().cycle().take(count).collect()),
    }
}

/// A task, and the texts of a run. Holds texts and labels, and so has no `Debug`.
pub struct Chosen {
    /// What is asked of them.
    pub task: Task,
    /// Those to tune on, then those to validate on.
    pub examples: Vec<Example>,
    /// Number of the former.
    pub train: usize,
}

impl Chosen {
    /// Draws them by the seed.
    pub fn draw(run: &RunArgs) -> Result<Chosen> {
        let task = Task::named(&run.task).map_err(tune)?;
        let all = task.examples(&run.data).map_err(tune)?;
        let labels: Vec<usize> = all.iter().map(|e| e.label).collect();
        let shots = Shots {
            train: run.shots,
            validation: run.validation_shots.unwrap_or(run.shots),
        };
        let drawn = shots.draw(&labels, &task.labels, run.seed).map_err(tune)?;
        let which = drawn.train.iter().chain(&drawn.validation);
        Ok(Chosen {
            task,
            examples: which.map(|&i| all[i].clone()).collect(),
            train: drawn.train.len(),
        })
    }
}
