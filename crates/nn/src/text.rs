//! Public text encoders: the hidden states of a text as rows, of which every text has equally many.
//!
//! An encoder runs each text alone, without padding, in the clear. Of each hidden state then come as many rows, whatever the
//! length of the text: with [`Pooling::Mean`] first the mean over its tokens, then the tokens themselves, over and over until the
//! rows are full. So whoever computes on the rows learns nothing of the length, and a mean over rows needs no mask. The first
//! row is what vision transformers call the class token: it stands for the whole text.

use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};
use veiltune_engine::{Backend, Owner};
use veiltune_hub::{Pooling, TextForm};

use crate::language::{Family, LanguageCheckpoint, LanguageModel};
use crate::{Error, Result};

/// A public text encoder, and how it reads texts.
#[derive(Debug)]
pub struct TextEncoder {
    checkpoint: LanguageCheckpoint,
    form: TextForm,
}

/// A text, or a pair, as its encoder's words. Holds a text: its debug print does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Words {
    /// Their numbers, special words included.
    pub ids: Vec<u32>,
    /// How many of them are the first text's.
    pub first: usize,
    /// How many did not fit.
    pub cut: usize,
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Words(..)")
    }
}

impl TextEncoder {
    /// Of the checkpoint in the folder `dir`: see [`LanguageCheckpoint::open`].
    pub fn open(dir: &Path, form: TextForm) -> Result<Self> {
        Self::new(LanguageCheckpoint::open(dir)?, form)
    }

    /// # Errors
    /// If the model is a causal one, has no token to pool, or has not so many positions; or if no word would fit.
    pub fn new(checkpoint: LanguageCheckpoint, form: TextForm) -> Result<Self> {
        let refuse = |detail: String| Err(Error::Config(detail));
        let config = &checkpoint.config;
        if config.family == Family::Llama {
            return refuse("a causal model is no text encoder; bert, roberta and albert are".into());
        }
        if form.pooling == Pooling::Class && checkpoint.tokenizer.special().cls.is_none() {
            return refuse("the tokenizer has no class token to pool; pool the mean".into());
        }
        let most = config.max_positions;
        let encoder = TextEncoder { checkpoint, form };
        let least = encoder.specials().iter().sum::<usize>() + 1 + usize::from(form.pairs);
        match (least..=most).contains(&form.tokens) {
            true => Ok(encoder),
            false => refuse(format!(
                "{} tokens of a text; {least} to {most} are possible",
                form.tokens
            )),
        }
    }

    /// How texts are read.
    pub fn form(&self) -> TextForm {
        self.form
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.checkpoint.config.num_hidden_layers
    }

    /// Width of a hidden state.
    pub fn width(&self) -> usize {
        self.checkpoint.config.hidden_size
    }

    /// Rows of each state.
    pub fn rows(&self) -> usize {
        self.form.tokens + usize::from(self.form.pooling == Pooling::Mean)
    }

    /// The words of a text, or of a pair, with special ones around. What does not fit is cut from the end of the longer text.
    ///
    /// # Errors
    /// If there are two texts where one is expected, or the reverse; if a text is empty; or of the tokenizer.
    pub fn words(&self, first: &str, second: Option<&str>) -> Result<Words> {
        if second.is_some() != self.form.pairs {
            let (wanted, given) = match self.form.pairs {
                true => ("pairs of texts", "one text"),
                false => ("single texts", "a pair"),
            };
            return Err(Error::Config(format!("{wanted} are wanted, {given} is given")));
        }
        let encode = |text: &str| {
            let ids = self.checkpoint.tokenizer.encode(text.trim())?;
            match ids.is_empty() {
                true => Err(Error::Config("a text without words".into())),
                false => Ok(ids),
            }
        };
        let mut a = encode(first)?;
        let mut b = second.map(encode).transpose()?.unwrap_or_default();
        let [begin, between, end] = self.specials();
        let room = self.form.tokens - begin - between - end;
        let cut = (a.len() + b.len()).saturating_sub(room);
        for _ in 0..cut {
            if a.len() > b.len() {
                a.pop()
            } else {
                b.pop()
            };
        }
        let special = self.checkpoint.tokenizer.special();
        let separators = |count| std::iter::repeat_n(special.sep.unwrap_or_default(), count);
        let mut ids: Vec<u32> = special.cls.filter(|_| begin > 0).into_iter().collect();
        ids.extend(a);
        // BERT counts the separator with the first text. RoBERTa, which has two, has no types.
        ids.extend(separators(between));
        let first = if self.form.pairs {
            ids.len()
        } else {
            ids.len() + end
        };
        ids.extend(b);
        ids.extend(separators(end));
        Ok(Words { ids, first, cut })
    }

    /// Special words before the first text, after it if there is a second, and at the end.
    fn specials(&self) -> [usize; 3] {
        let special = self.checkpoint.tokenizer.special();
        let separator = usize::from(special.sep.is_some());
        let doubled = if self.checkpoint.config.family == Family::Roberta {
            2
        } else {
            1
        };
        [
            usize::from(special.cls.is_some()),
            if self.form.pairs { doubled * separator } else { 0 },
            separator,
        ]
    }

    /// A hash of the parameters and of the tokenizer, which tells one encoder from another.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new_with_prefix(self.checkpoint.fingerprint()?);
        hash.update(self.checkpoint.tokenizer.fingerprint()?);
        Ok(hash.finalize().into())
    }

    /// Ready to run, with public weights.
    pub fn load<B: Backend>(&self, b: &B) -> Result<TextModel<'_, B>> {
        // Read now: it is no part of the loaded model.
        self.checkpoint.words()?;
        Ok(TextModel {
            encoder: self,
            model: self.checkpoint.load(b, Owner::Public, &self.checkpoint.config)?,
            second: match self.form.pairs {
                true => self.checkpoint.second_type()?,
                false => None,
            },
        })
    }
}

/// A text encoder on some interpreter.
pub struct TextModel<'a, B: Backend> {
    encoder: &'a TextEncoder,
    model: LanguageModel<B>,
    /// Added to the words of a second text.
    second: Option<Vec<f32>>,
}

impl<B: Backend> TextModel<'_, B> {
    /// Hidden states 0 to `last` of a text, each `[1, rows, width]`.
    pub fn states(&self, b: &B, words: &Words, last: usize) -> Result<Vec<B::Tensor>> {
        let checkpoint = &self.encoder.checkpoint;
        let mut rows = checkpoint.embeddings(&words.ids)?;
        let width = checkpoint.config.embedding_size;
        if let Some(second) = &self.second {
            for row in rows.chunks_exact_mut(width).skip(words.first) {
                row.iter_mut().zip(second).for_each(|(v, s)| *v += s);
            }
        }
        let rows = b.input(Owner::Public, &[1, words.ids.len(), width], Some(&rows))?;
        let states = self.model.states(b, &self.model.embed(b, &rows)?, last)?;
        states.iter().map(|state| self.fill(b, state)).collect()
    }

    /// As many rows as every text has.
    fn fill(&self, b: &B, state: &B::Tensor) -> Result<B::Tensor> {
        let tokens = b.dims(state)[1];
        let mut parts = Vec::new();
        if self.encoder.form.pooling == Pooling::Mean {
            parts.push(b.scale(&b.sum(state, 1)?, 1.0 / tokens as f64)?);
        }
        let mut left = self.encoder.form.tokens;
        while left > 0 {
            let taken = left.min(tokens);
            parts.push(b.narrow(state, 1, 0, taken)?);
            left -= taken;
        }
        Ok(b.cat(&parts.iter().collect::<Vec<_>>(), 1)?)
    }
}
