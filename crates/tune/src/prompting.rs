//! From examples to token sequences: the template filled in, cut to fit, and padded.

use std::fmt;
use std::ops::Range;

use crate::{Cause, Error, Example, Family, Piece, Result, Task, Template};

/// What a tokenizer must do; implemented for the real ones elsewhere.
pub trait Tokenize {
    /// The tokens of `text`, without special ones around it. Space before the first word is kept, for tokenizers to which
    /// a word after a space is another one.
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, Cause>;

    /// The special tokens.
    fn specials(&self) -> Specials;
}

/// Special tokens, as far as the tokenizer has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// Begins a masked model's sequence.
    pub cls: Option<u32>,
    /// Ends a masked model's sequence.
    pub sep: Option<u32>,
    /// Where a masked model answers.
    pub mask: Option<u32>,
    /// Begins a causal model's sequence.
    pub bos: Option<u32>,
    /// Fills what is left of a row.
    pub pad: Option<u32>,
    /// Stands for what is not in the vocabulary.
    pub unknown: Option<u32>,
}

/// What stands where the prompt goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    /// These tokens, to whose embeddings the prompt is added: black-box tuning's default mode. Which they are matters little.
    Add(Vec<u32>),
    /// As many positions that the prompt itself takes; their tokens mean nothing.
    Concatenate(usize),
}

impl Slot {
    /// Tokens of the prompt.
    pub fn tokens(&self) -> usize {
        match self {
            Slot::Add(tokens) => tokens.len(),
            Slot::Concatenate(count) => *count,
        }
    }
}

/// A filled-in template. Holds a text: its debug print does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Without padding.
    pub tokens: Vec<u32>,
    /// Where the prompt stands.
    pub prompt: Range<usize>,
    /// Where the answer is read: the mask, or a causal model's last token.
    pub answer: usize,
    /// Tokens of each text that are in it.
    pub texts: [usize; 2],
    /// Tokens of the texts that did not fit.
    pub cut: usize,
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Sequence(..)")
    }
}

/// Fills in a task's template for one model.
pub struct Encoder<'a, T: ?Sized> {
    tokenizer: &'a T,
    task: &'a Task,
    template: &'a Template,
    family: Family,
    slot: Slot,
    specials: Specials,
    limit: usize,
}

impl<'a, T: Tokenize + ?Sized> Encoder<'a, T> {
    /// For sequences of at most `limit` tokens, the prompt's included.
    ///
    /// # Errors
    /// If the task has no template for `family`, the tokenizer has no mask where one is needed, the prompt is empty, or the
    /// template alone does not fit.
    pub fn new(tokenizer: &'a T, task: &'a Task, family: Family, slot: Slot, limit: usize) -> Result<Self> {
        let specials = tokenizer.specials();
        if family == Family::Masked && specials.mask.is_none() {
            let detail = "the model's tokenizer has no mask token: it is not a masked language model's";
            return Err(Error::Settings(detail.into()));
        }
        if slot.tokens() == 0 {
            return Err(Error::Settings("a prompt of no tokens".into()));
        }
        let encoder = Encoder {
            tokenizer,
            task,
            template: task.template(family)?,
            family,
            slot,
            specials,
            limit,
        };
        let room = || Error::Room {
            template: encoder.slot.tokens(),
            limit,
        };
        let fixed = encoder
            .slot
            .tokens()
            .checked_add(encoder.around()?)
            .ok_or_else(room)?;
        // A token of each text must have a place.
        if fixed + 1 + usize::from(task.pairs) > limit {
            return Err(Error::Room {
                template: fixed,
                limit,
            });
        }
        Ok(encoder)
    }

    /// The token of each label's word, as it stands after a space.
    ///
    /// # Errors
    /// If a word is not one token, not one that the model knows, or the same as another label's.
    pub fn words(&self) -> Result<Vec<u32>> {
        let mut found: Vec<u32> = Vec::new();
        for (label, word) in self.task.labels.iter().zip(&self.task.words) {
            let tokens = self.encode(&format!(" {word}"))?;
            let [token] = tokens[..] else {
                return Err(Error::Word {
                    word: word.clone(),
                    label: label.clone(),
                    tokens,
                });
            };
            if Some(token) == self.specials.unknown {
                return Err(Error::Task {
                    task: self.task.name.clone(),
                    detail: format!(
                        "the word {word:?} of label {label:?} is not in this model's vocabulary: choose another"
                    ),
                });
            }
            if let Some(other) = found.iter().position(|t| *t == token) {
                let other = &self.task.labels[other];
                return Err(Error::Task {
                    task: self.task.name.clone(),
                    detail: format!(
                        "the words of labels {other:?} and {label:?} are the same token to this model's tokenizer: \
                         choose others"
                    ),
                });
            }
            found.push(token);
        }
        Ok(found)
    }

    /// Fills in an example. What does not fit is cut from the end of the longer text, token by token; the template is whole.
    ///
    /// # Errors
    /// If the tokenizer refuses, or a pair has one text only.
    pub fn sequence(&self, example: &Example) -> Result<Sequence> {
        self.sequence_within(example, [usize::MAX; 2])
    }

    /// How many tokens of the first and the second text fit into one sequence, where no example has more than `longest` of either:
    /// both, or less of the longer.
    ///
    /// # Errors
    /// If the tokenizer refuses.
    pub fn common(&self, longest: [usize; 2]) -> Result<[usize; 2]> {
        Ok(shortened(longest, self.room()?))
    }

    fn room(&self) -> Result<usize> {
        Ok(self.limit - self.slot.tokens() - self.around()?)
    }

    /// As [`Encoder::sequence`], with at most so many tokens of the first and the second text.
    ///
    /// # Errors
    /// As [`Encoder::sequence`].
    pub fn sequence_within(&self, example: &Example, most: [usize; 2]) -> Result<Sequence> {
        let mut a = self.text(&Piece::TextA, &example.text_a)?;
        let mut b = match &example.text_b {
            Some(text) if self.task.pairs => self.text(&Piece::TextB, text)?,
            None if !self.task.pairs => Vec::new(),
            _ => {
                let detail = "an example has another number of texts than the task";
                return Err(Error::Settings(detail.into()));
            }
        };
        let all = a.len() + b.len();
        let texts = shortened([a.len().min(most[0]), b.len().min(most[1])], self.room()?);
        a.truncate(texts[0]);
        b.truncate(texts[1]);

        let (before, after) = self.ends();
        let mut tokens: Vec<u32> = before.into_iter().collect();
        let (mut prompt, mut answer) = (0..0, 0);
        for (piece, words) in self.template.pieces().iter().zip(self.literals()?) {
            match piece {
                Piece::Words(_) => tokens.extend(words),
                Piece::TextA => tokens.extend(&a),
                Piece::TextB => tokens.extend(&b),
                Piece::Prompt => {
                    prompt = tokens.len()..tokens.len() + self.slot.tokens();
                    match &self.slot {
                        Slot::Add(initial) => tokens.extend(initial),
                        Slot::Concatenate(_) => tokens.resize(prompt.end, self.padding()),
                    }
                }
                Piece::Mask if self.family == Family::Causal => answer = tokens.len().saturating_sub(1),
                Piece::Mask => {
                    answer = tokens.len();
                    tokens.extend(self.specials.mask);
                }
            }
        }
        tokens.extend(after);
        Ok(Sequence {
            tokens,
            prompt,
            answer,
            texts,
            cut: all - texts[0] - texts[1],
        })
    }

    /// The tokens of a text that stands for `place`, with the space before it.
    fn text(&self, place: &Piece, text: &str) -> Result<Vec<u32>> {
        let pieces = self.template.pieces();
        let spaced = |pair: &[Piece]| {
            pair[1] == *place
                && matches!(&pair[0], Piece::Words(words) if words.ends_with(char::is_whitespace))
        };
        if pieces.windows(2).any(spaced) {
            self.encode(&format!(" {text}"))
        } else {
            self.encode(text)
        }
    }

    /// The tokens of the template's words and, where there is none, of nothing.
    fn literals(&self) -> Result<Vec<Vec<u32>>> {
        let pieces = self.template.pieces();
        let encode = |(at, piece): (usize, &Piece)| match piece {
            // Space at the end belongs to the word that follows.
            Piece::Words(words) if at + 1 < pieces.len() => self.encode(words.trim_end()),
            Piece::Words(words) => self.encode(words),
            _ => Ok(Vec::new()),
        };
        pieces.iter().enumerate().map(encode).collect()
    }

    /// Tokens that are neither prompt nor text.
    fn around(&self) -> Result<usize> {
        let (before, after) = self.ends();
        let words: usize = self.literals()?.iter().map(Vec::len).sum();
        let mask = usize::from(self.family == Family::Masked);
        Ok(words + mask + usize::from(before.is_some()) + usize::from(after.is_some()))
    }

    fn ends(&self) -> (Option<u32>, Option<u32>) {
        match self.family {
            Family::Masked => (self.specials.cls, self.specials.sep),
            Family::Causal => (self.specials.bos, None),
        }
    }

    fn padding(&self) -> u32 {
        self.specials.pad.unwrap_or(0)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.tokenizer.encode(text).map_err(Error::Tokenizer)
    }
}

/// Of two texts of so many tokens, how many are left of each when the longer, the second of equals, is cut token by token until both
/// have at most `room`.
fn shortened([a, b]: [usize; 2], room: usize) -> [usize; 2] {
    let half = room / 2;
    if a.saturating_add(b) <= room {
        [a, b]
    } else if b <= half {
        [room - b, b]
    } else if a <= half {
        [a, room - a]
    } else {
        [room - half, half]
    }
}

#[cfg(test)]
mod tests;
