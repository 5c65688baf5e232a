//! The private program of a tuning run, or of classification with a tuned prompt: what the data owner's texts and prompts and
//! the model owner's weights become. Everything secret comes from [outside](veiltune_engine::Outside) the two servers.
//!
//! The first pass takes the texts in: their rows of the word table, found by a [private lookup](super::lookup), become the
//! hidden states that every later pass starts from. A generation's pass has the prompts of all candidates as input, a
//! validation's pass one prompt; both deliver the label words' logits at the answer's position to the data owner.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use veiltune_engine::session::{Plan, Program, plan};
use veiltune_engine::{
    Backend, Comparison, Error as EngineError, Owner, Params, Party, Result as EngineResult, Revealed,
};
use veiltune_hub::Tensors;
use veiltune_nn::language::{LanguageConfig, LanguageModel};

use crate::{Error, Result};

/// What the prompt does at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is added to the embeddings of an initial text's tokens.
    Add,
    /// It stands there itself.
    Concatenate,
}

/// Everything that decides which messages are exchanged, besides the model; the servers and the assistant see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Tokens of a text, padding and prompt included.
    pub tokens: usize,
    /// Position whose hidden state gives the logits.
    pub answer: usize,
    /// First position of the prompt.
    pub start: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// What the prompt does there.
    pub mode: Mode,
    /// Texts to tune on, or to classify.
    pub texts: usize,
    /// Texts to validate on.
    pub validation: usize,
    /// Label words.
    pub labels: usize,
    /// Prompts of a generation.
    pub candidates: usize,
    /// Prompts that share a forward pass: rounds are paid once for them, memory grows with them.
    pub together: usize,
}

/// What a pass does. The data owner asks for one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The texts come in.
    Texts,
    /// The candidates of a generation are evaluated on the texts.
    Generation,
    /// One prompt is evaluated on the validation texts.
    Validation,
}

impl Pass {
    /// All of them; a pass's number is its place here.
    pub const ALL: [Pass; 3] = [Pass::Texts, Pass::Generation, Pass::Validation];

    /// As servers and assistant are asked for it.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// Passes of a run, at most.
pub const PASSES: usize = 1 << 32;

/// Largest sizes that a shape may state, against requests that would only exhaust memory.
const MOST: usize = 1 << 20;
/// Largest generation.
const CANDIDATES: usize = 1 << 12;

impl Shape {
    /// The kinds of passes that there are, in order.
    pub fn kinds(&self) -> &'static [Pass] {
        match self.validation {
            0 => &Pass::ALL[..2],
            _ => &Pass::ALL,
        }
    }

    /// Rows of the word table that are looked up: every token of every text, and the label words.
    pub fn rows(&self) -> usize {
        (self.texts + self.validation) * self.tokens + self.labels
    }

    /// Refuses what no run has.
    pub fn check(&self, model: &LanguageConfig) -> Result<()> {
        let refuse = |what: String| Err(Error::Refused(what));
        let positive = [
            ("tokens", self.tokens),
            ("prompt tokens", self.prompt),
            ("texts", self.texts),
            ("labels", self.labels),
            ("candidates", self.candidates),
            ("candidates together", self.together),
        ];
        for (name, value) in positive {
            if !(1..=MOST).contains(&value) {
                return refuse(format!("{value} {name}: 1 to {MOST} are possible"));
            }
        }
        if self.candidates > CANDIDATES {
            return refuse(format!(
                "{} candidates: at most {CANDIDATES} are possible",
                self.candidates
            ));
        }
        if self.validation > MOST || self.rows() > MOST {
            return refuse(format!(
                "{} looked-up words: at most {MOST} are possible",
                self.rows()
            ));
        }
        if self.tokens > model.max_positions {
            return refuse(format!(
                "texts of {} tokens: the model takes at most {}",
                self.tokens, model.max_positions
            ));
        }
        if self.answer >= self.tokens || self.start > self.tokens || self.prompt > self.tokens - self.start {
            return refuse(format!(
                "an answer at {} and a prompt at {} to {} in texts of {} tokens",
                self.answer,
                self.start,
                self.start.saturating_add(self.prompt),
                self.tokens
            ));
        }
        Ok(())
    }
}

/// The data owner's secrets, where they are known in the clear; never with a `Debug`.
#[derive(Clone, Default)]
pub struct Texts {
    /// Rows of the word table, `[rows, width]`: the training texts' tokens, the validation texts', the label words.
    pub words: Vec<f32>,
    /// 1 where a token is part of its text, 0 where it fills it up, `[texts, tokens]`.
    pub keep: Vec<f32>,
}

impl Texts {
    /// Those of a range of the training texts and of one of the validation texts.
    pub fn some(&self, shape: &Shape, train: &Range<usize>, validation: &Range<usize>) -> Texts {
        let width = self.words.len() / shape.rows();
        let texts = [
            train.clone(),
            shape.texts + validation.start..shape.texts + validation.end,
        ];
        let rows = |of: &[f32], width: usize| {
            let rows = texts.iter().flat_map(|t| &of[t.start * width..t.end * width]);
            rows.copied().collect::<Vec<f32>>()
        };
        let mut words = rows(&self.words, shape.tokens * width);
        words.extend_from_slice(&self.words[self.words.len() - shape.labels * width..]);
        Texts {
            words,
            keep: rows(&self.keep, shape.tokens),
        }
    }
}

/// What clear interpreters are given of the data owner's part.
pub trait Known: Sync {
    /// The texts.
    fn texts(&self) -> &Texts;
    /// The prompts of the pass that runs, `[candidates, prompt, hidden]`.
    fn prompts(&self) -> Vec<f32>;
}

/// See the module. With neither weights nor inputs it deals, plans, and is what the servers run.
#[derive(Clone, Copy)]
pub struct Tuning<'a> {
    /// The model: architecture and calibration.
    pub model: &'a LanguageConfig,
    /// Sizes.
    pub shape: &'a Shape,
    /// How comparisons are done.
    pub comparison: Comparison,
    /// The model's parameters, as they are served.
    pub weights: Option<&'a Tensors>,
    /// The data owner's part.
    pub known: Option<&'a dyn Known>,
}

impl<'a> Tuning<'a> {
    /// What all roles know of it.
    pub fn public(model: &'a LanguageConfig, shape: &'a Shape, comparison: Comparison) -> Tuning<'a> {
        Tuning {
            model,
            shape,
            comparison,
            weights: None,
            known: None,
        }
    }
}

/// The model on a backend, and the texts once they are in.
pub struct Loaded<B: Backend> {
    model: Arc<LanguageModel<B>>,
    texts: RefCell<Option<Taken<B>>>,
}

impl<B: Backend> Loaded<B> {
    /// A model that is there, and no texts yet.
    pub fn of(model: Arc<LanguageModel<B>>) -> Self {
        Loaded {
            model,
            texts: RefCell::new(None),
        }
    }
}

/// What the first pass leaves for the later ones.
struct Taken<B: Backend> {
    /// Embedded `[texts, tokens, hidden]` of the training and of the validation texts, and which tokens count.
    sets: [Option<(B::Tensor, B::Tensor)>; 2],
    /// The label words' rows, and biases.
    labels: (B::Tensor, Option<B::Tensor>),
}

/// Width of a row of the word table: a decoder's bias is its last entry.
pub fn table_width(model: &LanguageConfig) -> usize {
    model.embedding_size + usize::from(model.has_head)
}

/// Rows of the table that words are looked up in: a model whose logits have a table of their own has it below the words'.
pub fn table_rows(model: &LanguageConfig) -> usize {
    model.vocab_size * if model.tied { 1 } else { 2 }
}

/// The three servers of the lookup each give a term, and each term has a secret sign.
pub const TERMS: usize = 3;

impl Tuning<'_> {
    /// The exact cost of one pass of each kind.
    pub fn plan(&self) -> Result<Plan> {
        Ok(plan(self, self.shape.kinds().len())?)
    }

    fn shared<B: Backend>(&self, b: &B, dims: &[usize], values: Option<Vec<f32>>) -> EngineResult<B::Tensor> {
        b.input(Owner::Shared, dims, values.as_deref())
    }

    /// The looked-up rows `[rows, width]`.
    fn rows<B: Backend>(&self, b: &B) -> EngineResult<B::Tensor> {
        let (rows, width) = (self.shape.rows(), table_width(self.model));
        let known = self.known.map(|k| k.texts());
        let mut terms = Vec::new();
        for i in 0..TERMS {
            let values = known.map(|t| match i {
                0 => t.words.clone(),
                _ => vec![0.0; rows * width],
            });
            terms.push(self.shared(b, &[rows, width], values)?);
        }
        let signs = self.shared(b, &[rows, TERMS], known.map(|_| vec![1.0; rows * TERMS]))?;
        b.prepare(&[&terms[0], &terms[1], &terms[2], &signs])?;
        let mut sum = None;
        for (i, term) in terms.iter().enumerate() {
            let signed = b.mul(term, &b.narrow(&signs, 1, i, 1)?)?;
            sum = Some(match sum {
                None => signed,
                Some(sum) => b.add(&sum, &signed)?,
            });
        }
        b.trim(&sum.ok_or_else(|| EngineError::program("lookup", "no terms"))?)
    }

    fn take_in<B: Backend>(&self, b: &B, model: &LanguageModel<B>) -> EngineResult<Taken<B>> {
        b.layer("texts");
        let (s, width) = (self.shape, self.model.embedding_size);
        let rows = self.rows(b)?;
        let keep = self.shared(
            b,
            &[s.texts + s.validation, s.tokens],
            self.known.map(|k| k.texts().keep.clone()),
        )?;
        let set = |first: usize, count: usize| -> EngineResult<Option<(B::Tensor, B::Tensor)>> {
            if count == 0 {
                return Ok(None);
            }
            let words = b.narrow(
                &b.narrow(&rows, 0, first * s.tokens, count * s.tokens)?,
                1,
                0,
                width,
            )?;
            let x = model.embed(b, &b.reshape(&words, &[count, s.tokens, width])?)?;
            Ok(Some((x, b.narrow(&keep, 0, first, count)?)))
        };
        let labels = b.narrow(&rows, 0, s.rows() - s.labels, s.labels)?;
        let bias = match self.model.has_head {
            true => Some(b.reshape(&b.narrow(&labels, 1, width, 1)?, &[s.labels])?),
            false => None,
        };
        Ok(Taken {
            sets: [set(0, s.texts)?, set(s.texts, s.validation)?],
            labels: (b.narrow(&labels, 1, 0, width)?, bias),
        })
    }

    /// The mean of a bare text's last hidden states, `[hidden]`, from its rows of the word table, `[tokens, width]`: what a
    /// classifier of its own would be given. In the clear.
    pub fn pooled<B: Backend>(&self, b: &B, loaded: &Loaded<B>, words: &[f32]) -> EngineResult<Vec<f32>> {
        let (width, size) = (table_width(self.model), self.model.embedding_size);
        let words = b.input(Owner::Public, &[1, words.len() / width, width], Some(words))?;
        let x = loaded.model.embed(b, &b.narrow(&words, 2, 0, size)?)?;
        let hidden = loaded.model.hidden(b, &x, None)?;
        let pooled = b.reveal(&loaded.model.pooled(b, &hidden, None)?, Party::P0)?;
        let values = pooled.map_or_else(Vec::new, |r| r.values);
        Ok(values.into_iter().map(|v| v as f32).collect())
    }

    /// Logits `[prompts * texts, labels]` of `prompts [prompts, slots, hidden]` on one set of texts.
    fn logits<B: Backend>(
        &self,
        b: &B,
        model: &LanguageModel<B>,
        taken: &Taken<B>,
        set: &(B::Tensor, B::Tensor),
        prompts: &B::Tensor,
    ) -> EngineResult<B::Tensor> {
        let (s, d) = (self.shape, self.model.hidden_size);
        let (base, keep) = set;
        let (count, n) = (b.dims(prompts)[0], b.dims(base)[0]);
        let zero = |len: usize| b.input(Owner::Public, &[count, 1, len, 1], Some(&vec![0.0; count * len]));
        let part = |start: usize, len: usize| -> EngineResult<B::Tensor> {
            b.reshape(&b.narrow(base, 1, start, len)?, &[1, n, len, d])
        };
        let prompts = b.reshape(prompts, &[count, 1, s.prompt, d])?;
        let at_slots = match s.mode {
            Mode::Add => b.add(&part(s.start, s.prompt)?, &prompts)?,
            Mode::Concatenate => {
                let zero = b.input(Owner::Public, &[1, n, 1, 1], Some(&vec![0.0; n]))?;
                b.add(&prompts, &zero)?
            }
        };
        let end = s.start + s.prompt;
        let mut parts = Vec::new();
        if s.start > 0 {
            parts.push(b.add(&part(0, s.start)?, &zero(s.start)?)?);
        }
        parts.push(at_slots);
        if end < s.tokens {
            parts.push(b.add(&part(end, s.tokens - end)?, &zero(s.tokens - end)?)?);
        }
        let x = b.cat(&parts.iter().collect::<Vec<_>>(), 2)?;
        let x = b.reshape(&x, &[count * n, s.tokens, d])?;
        let keep = b.reshape(keep, &[1, n, s.tokens])?;
        let copies = b.input(Owner::Public, &[count, 1, 1], Some(&vec![0.0; count]))?;
        let keep = b.reshape(&b.add(&keep, &copies)?, &[count * n, s.tokens])?;
        let at = model.forward(b, &x, Some(&keep), s.answer)?;
        let (rows, bias) = &taken.labels;
        model.logits(b, &at, rows, bias.as_ref())
    }
}

impl Program for Tuning<'_> {
    type Model<B: Backend> = Loaded<B>;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn paced(&self) -> bool {
        true
    }

    fn load<B: Backend>(&self, b: &B) -> EngineResult<Loaded<B>> {
        Ok(Loaded::of(Arc::new(load_model(b, self.model, self.weights)?)))
    }

    fn forward<B: Backend>(&self, b: &B, loaded: &Loaded<B>, index: usize) -> EngineResult<Option<Revealed>> {
        let pass = self.shape.kinds().get(index).copied();
        let pass = pass.ok_or_else(|| EngineError::program("tuning", format!("there is no pass {index}")))?;
        if pass == Pass::Texts {
            *loaded.texts.borrow_mut() = Some(self.take_in(b, &loaded.model)?);
            return Ok(None);
        }
        let texts = loaded.texts.borrow();
        let taken = texts
            .as_ref()
            .ok_or_else(|| EngineError::program("tuning", "no texts came in"))?;
        let (count, set) = match pass {
            Pass::Validation => (1, &taken.sets[1]),
            _ => (self.shape.candidates, &taken.sets[0]),
        };
        let set = set
            .as_ref()
            .ok_or_else(|| EngineError::program("tuning", "there are no texts for this pass"))?;
        let dims = [count, self.shape.prompt, self.model.hidden_size];
        let prompts = self.shared(b, &dims, self.known.map(|k| k.prompts()))?;
        let mut logits = Vec::new();
        for start in (0..count).step_by(self.shape.together) {
            let some = b.narrow(&prompts, 0, start, self.shape.together.min(count - start))?;
            logits.push(self.logits(b, &loaded.model, taken, set, &some)?);
        }
        b.deliver(&b.cat(&logits.iter().collect::<Vec<_>>(), 0)?)
    }
}

/// The model, with its parameters where they are known.
pub fn load_model<B: Backend>(
    b: &B,
    model: &LanguageConfig,
    weights: Option<&Tensors>,
) -> EngineResult<LanguageModel<B>> {
    let load = |name: &str, dims: &[usize]| {
        let values = match weights {
            None => None,
            Some(weights) => {
                let array = weights
                    .get(name)
                    .ok_or_else(|| EngineError::program("parameter", format!("no tensor {name}")))?;
                Some(array.values.as_slice())
            }
        };
        b.weight(Owner::Shared, dims, values)
    };
    LanguageModel::load(&Params::new(load), model).map_err(of_model)
}

pub(crate) fn of_model(e: veiltune_nn::Error) -> EngineError {
    match e {
        veiltune_nn::Error::Engine(e) => e,
        e => EngineError::program("model", e.to_string()),
    }
}
