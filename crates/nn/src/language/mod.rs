//! Language models over any backend: BERT, RoBERTa, ALBERT and MiniLM encoders, and causal models of the Llama layout.
//!
//! The word table is no parameter of the program: who looks words up does it elsewhere and brings rows of it,
//! `[batch, tokens, embedding_size]`. [`LanguageModel::embed`] makes of them what enters the first layer,
//! [`LanguageModel::forward`] runs the layers, [`LanguageModel::logits`] compares the result with a few rows of the table. Names of
//! parameters are this module's own, whatever the checkpoint's are: see [`checkpoint`].

mod attention;
mod block;
mod calibrate;
pub mod checkpoint;
mod config;
pub mod fold;
mod layout;
mod random;

use std::cell::RefCell;
use std::collections::HashMap;

use veiltune_engine::{Activation, Backend, Error as EngineError, Owner, Params, Range, Result};

pub use checkpoint::LanguageCheckpoint;
pub use config::{Attention, AttentionRanges, Family, HiddenAct, LanguageConfig, LayerRanges};

use crate::Result as ModelResult;
use crate::layers::{Linear, rank3};
use attention::Scene;
use block::{Block, Norm, activate, of_scaled, weights_of};

/// A language model on some interpreter, without its word table.
pub struct LanguageModel<B: Backend> {
    config: LanguageConfig,
    embedding: Option<Embedding<B>>,
    blocks: Vec<Block<B>>,
    /// After the last layer: Llama's norm, or what a folded encoder's last norm still lacks.
    last: Option<Last<B>>,
    head: Option<Head<B>>,
}

enum Last<B: Backend> {
    Norm(Norm<B>),
    Affine(Norm<B>),
}

/// What an encoder adds to word vectors, and the norm that follows.
struct Embedding<B: Backend> {
    /// Also with the first token type's vector, which all tokens have.
    positions: B::Weight,
    norm: Norm<B>,
    /// ALBERT's, to the width of a hidden state.
    mapping: Option<Linear<B>>,
}

/// What an encoder's hidden state goes through before it is compared with word vectors.
struct Head<B: Backend> {
    dense: Linear<B>,
    act: Option<Activation>,
    range: Range,
    norm: Norm<B>,
}

impl<B: Backend> LanguageModel<B> {
    /// All parameters except the word table come through `p`, each once, also where layers share it.
    pub fn load(p: &Params<B>, config: &LanguageConfig) -> ModelResult<Self> {
        config.check()?;
        let loaded = RefCell::new(HashMap::new());
        let p = &Params::new(|name, dims| {
            if let Some(weight) = loaded.borrow().get(name) {
                return Ok(B::Weight::clone(weight));
            }
            let weight = p.get(name, dims).map_err(|e| match e {
                // Named again by the parameters that this function stands for.
                EngineError::Parameter { source, .. } => *source,
                other => other,
            })?;
            loaded.borrow_mut().insert(name.to_owned(), weight.clone());
            Ok(weight)
        });
        let (c, d) = (config, config.hidden_size);
        let llama = c.family == Family::Llama;
        let embedding = (!llama).then(|| Embedding::load(&p.pp("embeddings"), c));
        let blocks = (0..c.num_hidden_layers).map(|i| Block::load(p, c, i));
        let last = if llama {
            Some(Last::Norm(Norm::load(
                &p.pp("final_norm"),
                d,
                of_scaled(c.final_norm, c.stream(c.num_hidden_layers - 1)),
                true,
                false,
            )?))
        } else if c.folded {
            let name = weights_of(c, c.num_hidden_layers - 1);
            let p = p.pp(name).pp(block::NORMS[1]);
            Some(Last::Affine(Norm::load(&p, d, c.final_norm, true, true)?))
        } else {
            None
        };
        let head = c.has_head.then(|| Head::load(&p.pp("head"), c));
        Ok(LanguageModel {
            embedding: embedding.transpose()?,
            blocks: blocks.collect::<Result<_>>()?,
            last,
            head: head.transpose()?,
            config: config.clone(),
        })
    }

    /// What it was loaded with.
    pub fn config(&self) -> &LanguageConfig {
        &self.config
    }

    /// Rows of the word table `[batch, tokens, embedding_size]` to what enters the first layer, `[batch, tokens, hidden]`: with
    /// position and type vectors, normalised, and mapped to the width of a hidden state. A token's position is its index in the
    /// row, padding or not. Llama takes words as they are.
    pub fn embed(&self, b: &B, words: &B::Tensor) -> Result<B::Tensor> {
        let (_, tokens, _) = rank3(b, words)?;
        if tokens > self.config.max_positions {
            return Err(EngineError::program(
                "embedding",
                format!("{tokens} tokens; the model has {}", self.config.max_positions),
            ));
        }
        match &self.embedding {
            Some(embedding) => {
                b.layer("embedding");
                embedding.forward(b, words, &self.config)
            }
            None => Ok(words.clone()),
        }
    }

    /// The last hidden state at position `answer` alone, `[batch, 1, hidden]`, from what enters the first layer. The last layer's
    /// queries, MLP and norms are computed for that position only, and of a causal model nothing after it.
    ///
    /// `keep` `[batch, tokens]` is 1 where there is a token and 0 where there is padding, to which nothing attends; None: there is no
    /// padding. What comes out at a padded position means nothing.
    pub fn forward(
        &self,
        b: &B,
        x: &B::Tensor,
        keep: Option<&B::Tensor>,
        answer: usize,
    ) -> Result<B::Tensor> {
        self.run(b, x, keep, Some(answer))
    }

    /// The last hidden states of all positions, `[batch, tokens, hidden]`; otherwise as [`LanguageModel::forward`].
    pub fn hidden(&self, b: &B, x: &B::Tensor, keep: Option<&B::Tensor>) -> Result<B::Tensor> {
        self.run(b, x, keep, None)
    }

    /// Hidden states 0 to `last` of all positions, each `[batch, tokens, hidden]`, of texts without padding: what enters each of
    /// the first layers, and what comes out of the last of them. No later layer is run.
    pub fn states(&self, b: &B, x: &B::Tensor, last: usize) -> Result<Vec<B::Tensor>> {
        let (_, tokens, _) = rank3(b, x)?;
        let scene = Scene::new(b, &self.config, tokens, None)?;
        let mut states = vec![x.clone()];
        for (i, block) in self.blocks.iter().take(last).enumerate() {
            b.layer(&format!("block {i}"));
            let x = block.forward(b, &states[i], &scene, None)?;
            states.push(x);
        }
        if last == self.blocks.len()
            && let Some(x) = states.pop()
        {
            states.push(self.finish(b, x)?);
        }
        Ok(states)
    }

    fn run(
        &self,
        b: &B,
        x: &B::Tensor,
        keep: Option<&B::Tensor>,
        answer: Option<usize>,
    ) -> Result<B::Tensor> {
        let (batch, tokens, _) = rank3(b, x)?;
        if answer.is_some_and(|i| i >= tokens) || keep.is_some_and(|k| b.dims(k) != [batch, tokens]) {
            let detail = format!(
                "the answer at {answer:?} of {tokens} tokens, a mask of {:?}",
                keep.map(|k| b.dims(k))
            );
            return Err(EngineError::program("language model", detail));
        }
        let (tokens, x, keep) = match answer {
            Some(answer) if self.config.family.causal() => {
                let tokens = answer + 1;
                let keep = keep.map(|k| b.narrow(k, 1, 0, tokens)).transpose()?;
                (tokens, b.narrow(x, 1, 0, tokens)?, keep)
            }
            _ => (tokens, x.clone(), keep.cloned()),
        };
        let scene = Scene::new(b, &self.config, tokens, keep.as_ref())?;
        let count = self.blocks.len();
        // It is read four times.
        let mut x = b.trim(&x)?;
        for (i, block) in self.blocks.iter().enumerate() {
            b.layer(&format!("block {i}"));
            let only = answer.filter(|_| i + 1 == count);
            x = block.forward(b, &x, &scene, only)?;
        }
        self.finish(b, x)
    }

    /// What comes out of the last layer as the model's hidden state.
    fn finish(&self, b: &B, x: B::Tensor) -> Result<B::Tensor> {
        match &self.last {
            Some(Last::Norm(norm)) => norm.forward(b, &x),
            Some(Last::Affine(norm)) => norm.affine(b, &x),
            None => Ok(x),
        }
    }

    /// How well each of a few words fits, `[batch, labels]`, at a position's last hidden state `[batch, 1, hidden]`: through the
    /// masked-LM head, if there is one, times `rows` `[labels, embedding_size]` of the word table (or of the untied output table),
    /// plus `bias` `[labels]`, which causal models have not.
    pub fn logits(
        &self,
        b: &B,
        at_answer: &B::Tensor,
        rows: &B::Tensor,
        bias: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        b.layer("head");
        let (batch, positions, _) = rank3(b, at_answer)?;
        let x = match &self.head {
            Some(head) => head.forward(b, at_answer)?,
            None => at_answer.clone(),
        };
        let width = rank3(b, &x)?.2;
        let x = b.reshape(&x, &[batch * positions, width])?;
        let logits = b.matmul(&x, &b.transpose(rows, 0, 1)?)?;
        match bias {
            Some(bias) => b.add(&logits, bias),
            None => Ok(logits),
        }
    }

    /// The mean over all real positions of the last hidden states, `[batch, hidden]`, as sentence encoders use it.
    pub fn pooled(&self, b: &B, hidden: &B::Tensor, keep: Option<&B::Tensor>) -> Result<B::Tensor> {
        b.layer("pooling");
        let (batch, tokens, d) = rank3(b, hidden)?;
        let mean = match keep {
            Some(keep) => {
                let keep = b.reshape(keep, &[batch, tokens, 1])?;
                let sum = b.sum(&b.mul(hidden, &keep)?, 1)?;
                // At least one token is real. The ends are widened, so that none lies on them.
                let range = (0.75, tokens as f64 + 0.25);
                b.mul(&sum, &b.reciprocal(&b.sum(&keep, 1)?, range)?)?
            }
            None => b.scale(&b.sum(hidden, 1)?, 1.0 / tokens as f64)?,
        };
        b.reshape(&mean, &[batch, d])
    }
}

impl<B: Backend> Embedding<B> {
    fn load(p: &Params<B>, c: &LanguageConfig) -> Result<Self> {
        let (width, d) = (c.embedding_size, c.hidden_size);
        let mapping = (c.family == Family::Albert).then(|| Linear::load(&p.pp("mapping"), width, d, true));
        Ok(Embedding {
            positions: p.get("positions", &[c.max_positions, width])?,
            norm: Norm::load(&p.pp("norm"), width, c.embedding_norm, true, true)?,
            mapping: mapping.transpose()?,
        })
    }

    fn forward(&self, b: &B, words: &B::Tensor, c: &LanguageConfig) -> Result<B::Tensor> {
        let tokens = b.dims(words)[1];
        let dims = [1, c.max_positions, c.embedding_size];
        let zero = b.input(Owner::Public, &dims, Some(&vec![0.0; dims.iter().product()]))?;
        let positions = b.narrow(&b.add_weight(&zero, &self.positions)?, 1, 0, tokens)?;
        let x = self.norm.forward(b, &b.add(words, &positions)?)?;
        match &self.mapping {
            Some(mapping) => mapping.forward(b, &x),
            None => Ok(x),
        }
    }
}

impl<B: Backend> Head<B> {
    fn load(p: &Params<B>, c: &LanguageConfig) -> Result<Self> {
        Ok(Head {
            dense: Linear::load(&p.pp("dense"), c.hidden_size, c.embedding_size, true)?,
            act: c.hidden_act.smooth(),
            range: c.head_activation,
            norm: Norm::load(&p.pp("norm"), c.embedding_size, c.head_norm, true, true)?,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let x = activate(b, &self.dense.forward(b, x)?, self.act, self.range)?;
        self.norm.forward(b, &x)
    }
}
