//! How scores become the weights of an attention: softmax, and what was proposed in its place because it is cheaper to
//! compute privately.

use serde::{Deserialize, Serialize};
use veiltune_engine::{Backend, Result, SoftmaxSpec};

/// Which function, with the calibrated ranges that it needs; public.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum AttentionSpec {
    /// No function of each score: one learned n x n matrix mixes the scores of a row (CryptPEFT).
    LinAtten,
    /// exp(s_i) / sum_j exp(s_j).
    Softmax {
        /// |score| is at most this.
        bound: f64,
    },
    /// (s_i + 5)^2 / sum_j (s_j + 5)^2 (MPCFormer, Li et al., ICLR 2023).
    TwoQuad {
        /// Smallest and largest sum of a row.
        sum: (f64, f64),
    },
    /// relu(s_i) / (sum_j relu(s_j) + 0.01) (MPCViT, Zeng et al., ICCV 2023).
    ReluSoftmax {
        /// Smallest and largest sum of a row, the constant included.
        sum: (f64, f64),
    },
    /// s_i / n (MPCViT).
    Scaled,
}

/// The kinds by name, before anything is calibrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// [`AttentionSpec::LinAtten`].
    #[default]
    LinAtten,
    /// [`AttentionSpec::Softmax`].
    Softmax,
    /// [`AttentionSpec::TwoQuad`].
    TwoQuad,
    /// [`AttentionSpec::ReluSoftmax`].
    ReluSoftmax,
    /// [`AttentionSpec::Scaled`].
    Scaled,
}

/// What MPCFormer adds to a score before it squares it.
const SHIFT: f64 = 5.0;
/// What keeps the sum of a row without a positive score away from zero.
const FLOOR: f64 = 0.01;

impl AttentionKind {
    /// With ranges that hold anything: for float interpreters, until they are calibrated.
    pub fn uncalibrated(self) -> AttentionSpec {
        let sum = (1e-9, 1e9);
        match self {
            AttentionKind::LinAtten => AttentionSpec::LinAtten,
            AttentionKind::Softmax => AttentionSpec::Softmax { bound: 1e9 },
            AttentionKind::TwoQuad => AttentionSpec::TwoQuad { sum },
            AttentionKind::ReluSoftmax => AttentionSpec::ReluSoftmax { sum },
            AttentionKind::Scaled => AttentionSpec::Scaled,
        }
    }
}

impl AttentionSpec {
    /// Its name.
    pub fn kind(&self) -> AttentionKind {
        match self {
            AttentionSpec::LinAtten => AttentionKind::LinAtten,
            AttentionSpec::Softmax { .. } => AttentionKind::Softmax,
            AttentionSpec::TwoQuad { .. } => AttentionKind::TwoQuad,
            AttentionSpec::ReluSoftmax { .. } => AttentionKind::ReluSoftmax,
            AttentionSpec::Scaled => AttentionKind::Scaled,
        }
    }

    /// Weights from scores `[.., n]`, which are already divided by the root of the head's width. LinAtten's mixing has
    /// parameters and is done by its layer: here its scores are returned as they are.
    pub fn weights<B: Backend>(&self, b: &B, scores: &B::Tensor) -> Result<B::Tensor> {
        match *self {
            AttentionSpec::Softmax { bound } => b.softmax(scores, &SoftmaxSpec { bound }),
            _ => divided(b, self.terms(b, scores)?, Ok),
        }
    }

    /// The product of these weights, `[.., m, n]`, and `values [.., n, d]`: divided last, as there are fewer results than weights.
    pub fn attend<B: Backend>(&self, b: &B, scores: &B::Tensor, values: &B::Tensor) -> Result<B::Tensor> {
        match *self {
            AttentionSpec::Softmax { bound } => b.attend(scores, values, &SoftmaxSpec { bound }),
            _ => divided(b, self.terms(b, scores)?, |terms| b.matmul(&terms, values)),
        }
    }

    /// What the weights of a row are in proportion to, and the reciprocal of its sum where they are divided by it. Not for softmax, whose
    /// exponentials are the engine's.
    fn terms<B: Backend>(&self, b: &B, scores: &B::Tensor) -> Result<(B::Tensor, Option<B::Tensor>)> {
        let last = b.dims(scores).len() - 1;
        match *self {
            AttentionSpec::LinAtten | AttentionSpec::Softmax { .. } => Ok((scores.clone(), None)),
            AttentionSpec::TwoQuad { sum } => {
                let shifted = add_constant(b, scores, SHIFT)?;
                let square = b.mul(&shifted, &shifted)?;
                let inverse = b.reciprocal(&b.sum(&square, last)?, sum)?;
                Ok((square, Some(inverse)))
            }
            AttentionSpec::ReluSoftmax { sum } => {
                let positive = b.relu(scores)?;
                let total = add_constant(b, &b.sum(&positive, last)?, FLOOR)?;
                let inverse = b.reciprocal(&total, sum)?;
                Ok((positive, Some(inverse)))
            }
            AttentionSpec::Scaled => {
                let scaled = b.scale(scores, 1.0 / b.dims(scores)[last] as f64)?;
                Ok((scaled, None))
            }
        }
    }
}

/// What `then` makes of the terms, times the reciprocal of their sum.
fn divided<B: Backend>(
    b: &B,
    (terms, inverse): (B::Tensor, Option<B::Tensor>),
    then: impl FnOnce(B::Tensor) -> Result<B::Tensor>,
) -> Result<B::Tensor> {
    let y = then(terms)?;
    match inverse {
        Some(inverse) => b.mul(&y, &inverse),
        None => Ok(y),
    }
}

fn add_constant<B: Backend>(b: &B, x: &B::Tensor, c: f64) -> Result<B::Tensor> {
    let ones = vec![1; b.dims(x).len()];
    let constant = b.input(veiltune_engine::Owner::Public, &ones, Some(&[c as f32]))?;
    b.add(x, &constant)
}
