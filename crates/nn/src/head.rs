//! The cheapest private classifier: a linear layer on the backbone's last state at the class token (a linear probe).

use serde::{Deserialize, Serialize};
use veiltune_engine::{Backend, NormSpec, Params, Result};

use crate::layers::{Linear, rank3};
use crate::method::{Read, Tokens};
use crate::{Error, Result as ModelResult};

/// Architecture; public.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadConfig {
    /// Width d of the backbone.
    pub hidden_size: usize,
    /// The norm before the head, without parameters: computed by the client, in the clear.
    pub norm: NormSpec,
    /// Names of the classes.
    pub labels: Vec<String>,
}

impl HeadConfig {
    pub(crate) fn check(&self) -> ModelResult<()> {
        let sizes = [self.hidden_size, self.labels.len()];
        if sizes.iter().any(|n| !(1..=1 << 16).contains(n)) || self.norm.eps.is_nan() || self.norm.eps <= 0.0
        {
            return Err(Error::Config("a size of the head is zero or absurd".into()));
        }
        Ok(())
    }

    pub(crate) fn reads(&self, layers: usize) -> Vec<Read> {
        vec![Read {
            norm: Some(self.norm),
            ..Read::hidden(layers, Tokens::Class)
        }]
    }
}

/// x W^T + b.
pub struct Head<B: Backend>(Linear<B>);

impl<B: Backend> Head<B> {
    /// Parameters `head.weight [classes, d]` and `head.bias [classes]`.
    pub fn load(p: &Params<B>, c: &HeadConfig) -> Result<Self> {
        Ok(Head(Linear::load(
            &p.pp("head"),
            c.hidden_size,
            c.labels.len(),
            true,
        )?))
    }

    /// `[batch, 1, d]` to logits `[batch, classes]`.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let logits = self.0.forward(b, x)?;
        let (batch, _, classes) = rank3(b, &logits)?;
        b.reshape(&logits, &[batch, classes])
    }
}
