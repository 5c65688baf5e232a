//! The private part of CryptPEFT (Xia et al., NDSS 2026): adapters in one-way communication with a public backbone,
//! a final normalisation and a head.
//!
//! With the backbone's hidden states h_0 .. h_L and scope s:
//!
//! ```text
//! a = 0;  for i in L-s .. L-1:  u = a + h_i;  a = A_i(u) + u
//! logits = head(norm(h_L + a)[class token])
//! ```
//!
//! The backbone never sees a, so its owner runs it in the clear. Only the class token reaches the head: the last
//! adapter is evaluated for that token alone, the others for all.
//!
//! A model is trained in the plain form and served in the folded one ([`fold`]): every norm's affine part, the scale
//! of the scores and of the branches are then part of a neighbouring linear layer, and in the last adapter query and
//! key weights are one matrix a head, value and output weights another, so that keys and values are never formed. Batch norms
//! vanish, LayerNorms become RMSNorms, and adapters are linked within the rank.

mod attention;
mod config;
mod fold;
mod served;
#[cfg(test)]
mod tests;
mod trained;

use veiltune_engine::{Backend, Error, Params, Result};

pub use config::{AdapterNorms, Branch, Design, NormChoice, OwcConfig};
pub use fold::fold;

use crate::Result as ModelResult;
use crate::layers::rank3;
use served::Served;
use trained::Trained;

/// The method's name in an artefact.
pub const PEFT_TYPE: &str = "CRYPTPEFT";

/// Adapters, norm and head.
pub struct Owc<B: Backend> {
    form: Form<B>,
    inputs: usize,
}

enum Form<B: Backend> {
    Trained(Trained<B>),
    Served(Served<B>),
}

impl<B: Backend> Owc<B> {
    /// In the form that `config.folded` says.
    pub fn load(p: &Params<B>, config: &OwcConfig) -> ModelResult<Self> {
        config.check()?;
        Ok(Owc {
            form: match config.folded {
                false => Form::Trained(Trained::load(p, config)?),
                true => Form::Served(Served::load(p, config)?),
            },
            inputs: config.reads(config.scope)?.len(),
        })
    }

    /// Logits `[batch, classes]` from the inputs that [`OwcConfig::reads`] names.
    pub fn forward(&self, b: &B, inputs: &[B::Tensor]) -> Result<B::Tensor> {
        if inputs.len() != self.inputs {
            let detail = format!("{} inputs wanted, {} given", self.inputs, inputs.len());
            return Err(Error::program("adapter", detail));
        }
        let logits = match &self.form {
            Form::Trained(m) => m.forward(b, inputs)?,
            Form::Served(m) => m.forward(b, inputs)?,
        };
        let (batch, _, classes) = rank3(b, &logits)?;
        b.reshape(&logits, &[batch, classes])
    }
}
