//! The form that is trained: the definition, layer by layer.

use veiltune_engine::{Backend, NormSpec, Params, Result};

use super::attention::Attention;
use super::{Branch, NormChoice, OwcConfig};
use crate::layers::{Linear, Norm};

/// Adapters, norm and head.
pub(super) struct Trained<B: Backend> {
    pub adapters: Vec<Adapter<B>>,
    norm: Norm<B>,
    head: Linear<B>,
}

impl<B: Backend> Trained<B> {
    pub fn load(p: &Params<B>, c: &OwcConfig) -> Result<Self> {
        let adapters = (0..c.scope).map(|i| Adapter::load(&p.pp("adapters").pp(i), c, i));
        Ok(Trained {
            adapters: adapters.collect::<Result<_>>()?,
            norm: norm(&p.pp("norm"), c.hidden_size, c, c.final_norm)?,
            head: Linear::load(&p.pp("head"), c.hidden_size, c.labels.len(), true)?,
        })
    }

    /// `[batch, 1, classes]` from s + 1 hidden states, the last at the class token.
    pub fn forward(&self, b: &B, hidden: &[B::Tensor]) -> Result<B::Tensor> {
        // Each adapter's result is added to the next hidden state at once.
        let mut u = hidden[0].clone();
        for (i, (adapter, next)) in self.adapters.iter().zip(&hidden[1..]).enumerate() {
            u = b.add(&adapter.forward(b, &u, i)?, next)?;
        }
        self.classify(b, &u)
    }

    pub fn classify(&self, b: &B, z: &B::Tensor) -> Result<B::Tensor> {
        b.layer("head");
        self.head.forward(b, &self.norm.forward(b, z)?)
    }
}

fn norm<B: Backend>(p: &Params<B>, width: usize, c: &OwcConfig, spec: NormSpec) -> Result<Norm<B>> {
    match c.norm {
        NormChoice::Layer => Norm::load(p, width, spec, true),
        NormChoice::Batch => Norm::batch(p, width),
    }
}

/// A(u) + u, where A is `scale * up(branch(down(u)))`.
pub(super) struct Adapter<B: Backend> {
    down: Linear<B>,
    branch: Between<B>,
    up: Linear<B>,
    scale: f64,
}

enum Between<B: Backend> {
    Nothing,
    Relu,
    Block(Box<Block<B>>),
}

impl<B: Backend> Adapter<B> {
    fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        Ok(Adapter {
            down: Linear::load(&p.pp("down"), c.hidden_size, c.rank, true)?,
            branch: match c.branch {
                Branch::Transformer => Between::Block(Box::new(Block::load(&p.pp("block"), c, index)?)),
                Branch::Linear => Between::Nothing,
                Branch::Relu => Between::Relu,
            },
            up: Linear::load(&p.pp("up"), c.rank, c.hidden_size, true)?,
            scale: c.scale,
        })
    }

    pub fn forward(&self, b: &B, u: &B::Tensor, index: usize) -> Result<B::Tensor> {
        b.layer(&format!("adapter {index} projections"));
        let x = self.down.forward(b, u)?;
        let (x, u) = match &self.branch {
            Between::Nothing => (x, u.clone()),
            Between::Relu => (b.relu(&x)?, u.clone()),
            Between::Block(block) if block.class_only => {
                (block.forward(b, &x, index)?, b.narrow(u, 1, 0, 1)?)
            }
            Between::Block(block) => (block.forward(b, &x, index)?, u.clone()),
        };
        b.layer(&format!("adapter {index} projections"));
        b.add(&b.scale(&self.up.forward(b, &x)?, self.scale)?, &u)
    }

    /// The same adapter for all tokens.
    #[cfg(test)]
    pub fn of_all_tokens(mut self) -> Self {
        if let Between::Block(block) = &mut self.branch {
            block.class_only = false;
        }
        self
    }
}

/// Pre-norm attention and MLP.
struct Block<B: Backend> {
    norm1: Norm<B>,
    attention: Attention<B>,
    norm2: Norm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    /// The last adapter's: only the class token comes out.
    class_only: bool,
}

impl<B: Backend> Block<B> {
    fn load(p: &Params<B>, c: &OwcConfig, index: usize) -> Result<Self> {
        let r = c.rank;
        let norms = c
            .norms
            .get(index)
            .map_or([c.final_norm; 2], |n| [n.attention, n.mlp]);
        Ok(Block {
            norm1: norm(&p.pp("norm1"), r, c, norms[0])?,
            attention: Attention::load(&p.pp("attn"), c, index)?,
            norm2: norm(&p.pp("norm2"), r, c, norms[1])?,
            fc1: Linear::load(&p.pp("fc1"), r, r, true)?,
            fc2: Linear::load(&p.pp("fc2"), r, r, true)?,
            class_only: index + 1 == c.scope,
        })
    }

    fn forward(&self, b: &B, x: &B::Tensor, index: usize) -> Result<B::Tensor> {
        b.layer(&format!("adapter {index} attention"));
        let normal = self.norm1.forward(b, x)?;
        let x = match self.class_only {
            true => b.add(&b.narrow(x, 1, 0, 1)?, &self.attention.forward_class(b, &normal)?)?,
            false => b.add(x, &self.attention.forward(b, &normal)?)?,
        };
        b.layer(&format!("adapter {index} mlp"));
        let hidden = b.relu(&self.fc1.forward(b, &self.norm2.forward(b, &x)?)?)?;
        b.add(&x, &self.fc2.forward(b, &hidden)?)
    }
}
