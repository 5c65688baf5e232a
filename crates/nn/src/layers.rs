//! The layers that everything else is made of.

use veiltune_engine::{Backend, NormSpec, Params, Result};

/// x W^T + b.
pub struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Weight>,
}

impl<B: Backend> Linear<B> {
    /// `weight [output, input]` and, if there is one, `bias [output]`.
    pub fn load(p: &Params<B>, input: usize, output: usize, bias: bool) -> Result<Self> {
        Ok(Linear {
            weight: p.get("weight", &[output, input])?,
            bias: bias.then(|| p.get("bias", &[output])).transpose()?,
        })
    }

    /// `[.., input]` to `[.., output]`.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        b.linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Normalisation over the last dimension. A norm whose affine part was folded into the next layer has none.
pub struct Norm<B: Backend> {
    spec: NormSpec,
    affine: Option<(B::Weight, B::Weight)>,
}

impl<B: Backend> Norm<B> {
    /// With `weight [width]` and `bias [width]`, if `affine`.
    pub fn load(p: &Params<B>, width: usize, spec: NormSpec, affine: bool) -> Result<Self> {
        let get = |name| affine.then(|| p.get(name, &[width])).transpose();
        Ok(Norm {
            spec,
            affine: get("weight")?.zip(get("bias")?),
        })
    }

    /// `[.., width]` to the same shape.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let x = b.normalize(x, &self.spec)?;
        match &self.affine {
            Some((gain, bias)) => b.add_weight(&b.mul_weight(&x, gain)?, bias),
            None => Ok(x),
        }
    }
}

/// `[batch, n, heads * width]` to `[batch, heads, n, width]`.
pub(crate) fn split_heads<B: Backend>(b: &B, x: &B::Tensor, heads: usize) -> Result<B::Tensor> {
    let (batch, n, width) = rank3(b, x)?;
    b.transpose(&b.reshape(x, &[batch, n, heads, width / heads])?, 1, 2)
}

/// `[batch, heads, n, width]` to `[batch, n, heads * width]`.
pub(crate) fn join_heads<B: Backend>(b: &B, x: &B::Tensor) -> Result<B::Tensor> {
    let x = b.transpose(x, 1, 2)?;
    match b.dims(&x)[..] {
        [batch, n, heads, width] => b.reshape(&x, &[batch, n, heads * width]),
        ref dims => Err(veiltune_engine::Error::program(
            "attention",
            format!("heads are {dims:?}"),
        )),
    }
}

/// The shape of an activation that must be `[batch, tokens, width]`.
pub(crate) fn rank3<B: Backend>(b: &B, x: &B::Tensor) -> Result<(usize, usize, usize)> {
    match b.dims(x)[..] {
        [batch, n, width] => Ok((batch, n, width)),
        ref dims => Err(veiltune_engine::Error::program(
            "model",
            format!("[batch, tokens, width] wanted, {dims:?} given"),
        )),
    }
}
