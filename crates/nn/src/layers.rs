//! The layers that everything else is made of.

use veiltune_engine::{Backend, NormSpec, Owner, Params, Result};

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

/// What a batch norm adds to a variance.
pub const BATCH_NORM_EPS: f64 = 1e-5;

/// Normalisation over the last dimension, or of each of its features over a training set. A norm whose affine part was folded
/// into the next layer has none.
pub struct Norm<B: Backend> {
    kind: Kind<B>,
    affine: Option<(B::Weight, B::Weight)>,
}

enum Kind<B: Backend> {
    Rows(NormSpec),
    Features { mean: B::Weight, variance: B::Weight },
}

impl<B: Backend> Norm<B> {
    /// With `weight [width]` and `bias [width]`, if `affine`.
    pub fn load(p: &Params<B>, width: usize, spec: NormSpec, affine: bool) -> Result<Self> {
        let get = |name| affine.then(|| p.get(name, &[width])).transpose();
        Ok(Norm {
            kind: Kind::Rows(spec),
            affine: get("weight")?.zip(get("bias")?),
        })
    }

    /// BatchNorm with `weight`, `bias`, `running_mean` and `running_var`, each `[width]`.
    pub fn batch(p: &Params<B>, width: usize) -> Result<Self> {
        let get = |name| p.get(name, &[width]);
        Ok(Norm {
            kind: Kind::Features {
                mean: get("running_mean")?,
                variance: get("running_var")?,
            },
            affine: Some((get("weight")?, get("bias")?)),
        })
    }

    /// `[.., width]` to the same shape.
    pub fn forward(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let x = match &self.kind {
            Kind::Rows(spec) => b.normalize(x, spec)?,
            Kind::Features { mean, variance } => b.batch_norm(x, mean, variance, BATCH_NORM_EPS)?,
        };
        self.affine(b, &x)
    }

    /// The affine part alone, on what is already normalised.
    pub fn affine(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor> {
        match &self.affine {
            Some((gain, bias)) => b.add_weight(&b.mul_weight(x, gain)?, bias),
            None => Ok(x.clone()),
        }
    }
}

/// x in few fractional bits, for several layers that would each cut them down for themselves: the same value.
pub(crate) fn settled<B: Backend>(b: &B, x: &B::Tensor) -> Result<B::Tensor> {
    /// More than a linear layer takes as they are.
    const MANY: u32 = 34;
    if b.fractional_bits(x) <= MANY {
        return Ok(x.clone());
    }
    // A product takes its operands in few bits. By the least positive number, which is exact, and back.
    const LEAST: f64 = 1.0 / 65536.0;
    let ones = vec![1; b.dims(x).len()];
    let least = b.input(Owner::Public, &ones, Some(&[LEAST as f32]))?;
    b.scale(&b.mul(x, &least)?, 1.0 / LEAST)
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
