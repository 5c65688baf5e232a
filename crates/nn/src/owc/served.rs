//! The form that is served: the same function with as few and as narrow secret values as possible.
//!
//! - Between adapters nothing of the backbone's width is formed. With H_i the sum of the hidden states up to adapter i, which
//!   the client knows, and A_j the result of adapter j, the input of adapter i is `H_i + sum_{j<i} A_j`; of that only
//!   `down(A_j)` is needed, a matrix of rank * rank.
//! - What the head reads of an adapter is needed of the class token alone. With BatchNorm the head is linear in it, and `up`
//!   and the head are one matrix of classes * rank.
//! - The MLP's second layer is part of what follows it, so that its result is not formed either.
//! - An adapter whose norms are LayerNorms has a stream without its mean, and the mean as one more entry, so that they are
//!   RMSNorms; so is the final norm, because all that is added up before it is centred.

use veiltune_engine::{Backend, NormSpec, Params, Result};

use super::attention::{Attention, ClassAttention};
use super::{Branch, NormChoice, OwcConfig};
use crate::layers::{Linear, settled};

/// Adapters, norm and head.
pub(super) struct Served<B: Backend> {
    adapters: Vec<Adapter<B>>,
    /// None: part of the head, which then reads the backbone's states and each adapter on its own.
    norm: Option<NormSpec>,
    head: Linear<B>,
    /// Factor of the backbone's states before the norm.
    scale: f64,
}

impl<B: Backend> Served<B> {
    pub fn load(p: &Params<B>, c: &OwcConfig) -> Result<Self> {
        let adapters = (0..c.scope).map(|i| Adapter::load(&p.pp("adapters").pp(i), c, i));
        Ok(Served {
            adapters: adapters.collect::<Result<_>>()?,
            norm: (c.norm == NormChoice::Layer).then_some(c.final_norm),
            head: Linear::load(&p.pp("head"), c.hidden_size, c.labels.len(), true)?,
            scale: c.scale,
        })
    }

    /// `[batch, 1, classes]` from what [`OwcConfig::reads`] names.
    pub fn forward(&self, b: &B, inputs: &[B::Tensor]) -> Result<B::Tensor> {
        b.layer("inputs");
        let (whole, class) = inputs.split_at(self.adapters.len());
        let sums = running_sums(b, whole)?;
        let mut z = running_sums(b, class)?.pop().expect("one is read at least");
        let mut open: Vec<&B::Tensor> = sums.iter().collect();
        if self.norm.is_none() {
            z = b.add(&z, &b.narrow(sums.last().expect("an adapter at least"), 1, 0, 1)?)?;
            open.push(&z);
        }
        b.prepare(&open)?;

        z = match self.norm {
            Some(_) => b.scale(&z, self.scale)?,
            None => self.head.forward(b, &z)?,
        };
        let mut states = Vec::new();
        for (i, (adapter, sum)) in self.adapters.iter().zip(&sums).enumerate() {
            let state = adapter.forward(b, sum, &states, i)?;
            z = b.add(&z, &adapter.class.forward(b, &state.class(b)?)?)?;
            states.push(state);
        }
        b.layer("head");
        match &self.norm {
            Some(norm) => self.head.forward(b, &b.normalize(&z, norm)?),
            None => Ok(z),
        }
    }
}

/// x_0, x_0 + x_1, ...
fn running_sums<B: Backend>(b: &B, xs: &[B::Tensor]) -> Result<Vec<B::Tensor>> {
    let mut sums: Vec<B::Tensor> = Vec::with_capacity(xs.len());
    for x in xs {
        let sum = sums.last().map_or_else(|| Ok(x.clone()), |sum| b.add(sum, x))?;
        sums.push(sum);
    }
    Ok(sums)
}

/// One adapter. The last, and any without attention, is of the class token alone.
struct Adapter<B: Backend> {
    down: Linear<B>,
    /// From the state of each earlier adapter.
    links: Vec<Out<B>>,
    branch: Between<B>,
    /// To what the head reads.
    class: Out<B>,
}

enum Between<B: Backend> {
    Nothing,
    Relu,
    Block(Box<Block<B>>),
}

/// What an adapter's results are linear in, each opened.
struct State<B: Backend> {
    /// The stream before the MLP.
    stream: Option<B::Tensor>,
    /// After the ReLU.
    hidden: Option<B::Tensor>,
}

impl<B: Backend> State<B> {
    /// Opens its two parts.
    fn new(b: &B, stream: Option<B::Tensor>, hidden: Option<B::Tensor>) -> Result<Self> {
        let parts: Vec<&B::Tensor> = stream.iter().chain(&hidden).collect();
        b.prepare(&parts)?;
        Ok(State { stream, hidden })
    }

    /// At the class token.
    fn class(&self, b: &B) -> Result<State<B>> {
        let first = |x: &Option<B::Tensor>| x.as_ref().map(|x| b.narrow(x, 1, 0, 1)).transpose();
        Ok(State {
            stream: first(&self.stream)?,
            hidden: first(&self.hidden)?,
        })
    }
}

/// A linear map of a [`State`].
struct Out<B: Backend> {
    stream: Option<Linear<B>>,
    hidden: Option<Linear<B>>,
}

impl<B: Backend> Out<B> {
    fn load(p: &Params<B>, c: &OwcConfig, width: usize) -> Result<Self> {
        let stream = || Linear::load(&p.pp("stream"), c.stream(), width, true);
        let hidden = || Linear::load(&p.pp("hidden"), c.rank, width, true);
        Ok(Out {
            stream: (c.branch != Branch::Relu).then(stream).transpose()?,
            hidden: (c.branch != Branch::Linear).then(hidden).transpose()?,
        })
    }

    fn forward(&self, b: &B, x: &State<B>) -> Result<B::Tensor> {
        let part = |map: &Option<Linear<B>>, x: &Option<B::Tensor>| {
            map.as_ref()
                .zip(x.as_ref())
                .map(|(map, x)| map.forward(b, x))
                .transpose()
        };
        match (part(&self.stream, &x.stream)?, part(&self.hidden, &x.hidden)?) {
            (Some(x), Some(y)) => b.add(&x, &y),
            (Some(x), None) | (None, Some(x)) => Ok(x),
            (None, None) => Err(veiltune_engine::Error::program("adapter", "its state is empty")),
        }
    }
}

impl<B: Backend> Adapter<B> {
    fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let class = match c.norm {
            NormChoice::Layer => c.hidden_size,
            NormChoice::Batch => c.labels.len(),
        };
        let links = (0..index).map(|j| Out::load(&p.pp("links").pp(j), c, c.stream()));
        Ok(Adapter {
            down: Linear::load(&p.pp("down"), c.hidden_size, c.stream(), true)?,
            links: links.collect::<Result<_>>()?,
            branch: match c.branch {
                Branch::Transformer => Between::Block(Box::new(Block::load(&p.pp("block"), c, index)?)),
                Branch::Linear => Between::Nothing,
                Branch::Relu => Between::Relu,
            },
            class: Out::load(&p.pp("class"), c, class)?,
        })
    }

    fn forward(&self, b: &B, sum: &B::Tensor, earlier: &[State<B>], index: usize) -> Result<State<B>> {
        b.layer(&format!("adapter {index} projections"));
        let mut x = self.down.forward(b, sum)?;
        for (link, state) in self.links.iter().zip(earlier) {
            x = b.add(&x, &link.forward(b, state)?)?;
        }
        let state = match &self.branch {
            Between::Nothing => State::new(b, Some(settled(b, &x)?), None),
            Between::Relu => State::new(b, None, Some(settled(b, &b.relu(&x)?)?)),
            Between::Block(block) => block.forward(b, &x, index),
        };
        b.layer(&format!("adapter {index} projections"));
        state
    }
}

/// Attention, norm and the MLP's first layer.
struct Block<B: Backend> {
    norms: Option<[NormSpec; 2]>,
    attention: Tokens<B>,
    fc1: Linear<B>,
    rank: usize,
}

enum Tokens<B: Backend> {
    All(Attention<B>),
    Class(ClassAttention<B>),
}

impl<B: Backend> Block<B> {
    fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let attention = p.pp("attn");
        Ok(Block {
            norms: c.norms.get(index).map(|n| [n.attention, n.mlp]),
            attention: match index + 1 == c.scope {
                false => Tokens::All(Attention::load(&attention, c, index)?),
                true => Tokens::Class(ClassAttention::load(&attention, c, index)?),
            },
            fc1: Linear::load(&p.pp("fc1"), c.rank, c.rank, true)?,
            rank: c.rank,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor, index: usize) -> Result<State<B>> {
        b.layer(&format!("adapter {index} attention"));
        let x = match self.norms {
            Some(_) => x.clone(),
            None => settled(b, x)?,
        };
        let normal = self.normal(b, &x, 0)?;
        let x = match &self.attention {
            Tokens::All(a) => b.add(&x, &a.forward(b, &normal)?)?,
            Tokens::Class(a) => b.add(&b.narrow(&x, 1, 0, 1)?, &a.forward(b, &normal)?)?,
        };
        b.layer(&format!("adapter {index} mlp"));
        let of_class = matches!(self.attention, Tokens::Class(_));
        let x = match self.norms {
            Some(_) if of_class => x,
            _ => settled(b, &x)?,
        };
        // Opened whole for the results of this adapter: the norm reuses it.
        b.prepare(&[&x])?;
        let y = self.fc1.forward(b, &self.normal(b, &x, 1)?)?;
        // A comparison of fewer bits has the shorter keys, for one round more: worth it where there are many.
        let y = if of_class { y } else { settled(b, &y)? };
        State::new(b, Some(x), Some(settled(b, &b.relu(&y)?)?))
    }

    fn normal(&self, b: &B, x: &B::Tensor, which: usize) -> Result<B::Tensor> {
        match &self.norms {
            // The mean is the last entry.
            Some(norms) => b.normalize(&b.narrow(x, 2, 0, self.rank)?, &norms[which]),
            None => Ok(x.clone()),
        }
    }
}
