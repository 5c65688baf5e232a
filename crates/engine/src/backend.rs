//! The seam: a model's forward pass is written once, generic over [`Backend`]; each job is an interpreter of it.
//!
//! Control flow of a forward pass depends on shapes and public configuration only, never on values: that is what
//! lets the dealer and the cost model walk it.

use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One of the two compute parties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Party {
    /// The first party; it expands its correlated randomness from its seed alone.
    P0,
    /// The second party; the dealer's corrections go to it.
    P1,
}

impl Party {
    /// The other party.
    pub fn peer(self) -> Party {
        match self {
            Party::P0 => Party::P1,
            Party::P1 => Party::P0,
        }
    }

    /// 0 or 1.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Who knows a value when it enters the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Everybody: architecture constants, public backbone weights.
    Public,
    /// One compute party alone.
    Party(Party),
    /// Additively shared between the parties by an outside owner; neither knows it.
    Shared,
}

/// The range on which a smooth function is approximated: a calibrated, public property of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Range {
    /// No approximation: float interpreters only (a public backbone). Private interpreters refuse it.
    Exact,
    /// Inputs satisfy |x| <= bound; beyond it the result is wrong, in the same way on every backend.
    Within(f64),
    /// As `Within`, but two comparisons replace the approximation by the function's asymptote beyond the bound.
    Guarded(f64),
}

/// Scores entering a softmax.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoftmaxSpec {
    /// Calibrated: |score| <= bound. At most [`SoftmaxSpec::WIDEST`]; the smaller ones of these constants take fewer rounds.
    pub bound: f64,
}

impl SoftmaxSpec {
    /// Largest bound at which the exponentials of a row fit one Fourier sum.
    pub const NARROW: f64 = 24.0;
    /// Largest bound of scores that are brought into that range at once.
    pub const WIDE: f64 = 248.0;
    /// Largest bound of scores that are brought there in two steps.
    pub const WIDEST: f64 = 1984.0;
}

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// (x - mean) / sqrt(var + eps).
    Layer,
    /// x / sqrt(mean(x^2) + eps).
    Rms,
}

/// Normalisation over the last dimension, without the affine part (fold it into the next linear layer, or apply
/// [`Backend::mul_weight`] and [`Backend::add_weight`]).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormSpec {
    /// Which normalisation.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f64,
    /// Calibrated: sqrt(var + eps) lies in `sigma.0 ..= sigma.1`; the result is wrong outside. Ratio at most [`NormSpec::RATIO`].
    pub sigma: (f64, f64),
}

impl NormSpec {
    /// Largest sigma by smallest that fixed point has room for.
    pub const RATIO: f64 = 2048.0;
}

/// A function that has a bounded-range Fourier approximation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// x * Phi(x), with the exact error function.
    Gelu,
    /// x * sigmoid(x).
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// 1 / (1 + exp(-x)).
    Sigmoid,
    /// exp(x); bounded range only.
    Exp,
    /// sin(x), any x whose period in fixed point the ring holds.
    Sin,
    /// cos(x).
    Cos,
}

/// Values that were revealed to this interpreter.
#[derive(Clone, Debug, PartialEq)]
pub struct Revealed {
    /// Row-major shape.
    pub dims: Vec<usize>,
    /// Decoded values.
    pub values: Vec<f64>,
}

/// The verbs of a forward pass.
///
/// Shapes are row-major; elementwise verbs broadcast as NumPy does. `dim` counts from the front.
pub trait Backend {
    /// An activation: float, fixed, a share, a mask, or a mere shape.
    type Tensor: Clone;
    /// A parameter for the whole session: opened once, if it is secret at all.
    type Weight: Clone;

    /// Shape of an activation.
    fn dims(&self, x: &Self::Tensor) -> Vec<usize>;

    /// Fractional bits of a fixed-point activation; 0 in floating point.
    fn fractional_bits(&self, _x: &Self::Tensor) -> u32 {
        0
    }

    /// What follows belongs to the layer `name`: the cost model also counts by layer. Nothing else depends on it.
    fn layer(&self, _name: &str) {}

    /// Brings an input into the program. `values` is given where the owner is (and everywhere for
    /// [`Owner::Public`]); elsewhere the shape alone. An [`Owner::Shared`] input has values in the clear interpreters
    /// only; the parties take the next share that its owner [outside](crate::Outside) gives them.
    fn input(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Self::Tensor>;

    /// Brings a parameter into the session; as [`Backend::input`].
    fn weight(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Self::Weight>;

    /// `x [.., in]` times `w [out, in]` transposed, plus `b [out]`.
    fn linear(&self, x: &Self::Tensor, w: &Self::Weight, b: Option<&Self::Weight>) -> Result<Self::Tensor>;
    /// Batched `[.., m, k] x [.., k, n]`.
    fn matmul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// a + b.
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// a - b.
    fn sub(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Elementwise a * b.
    fn mul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// c * x for a public c.
    fn scale(&self, x: &Self::Tensor, c: f64) -> Result<Self::Tensor>;
    /// x + w, w broadcast to x (bias, position embedding).
    fn add_weight(&self, x: &Self::Tensor, w: &Self::Weight) -> Result<Self::Tensor>;
    /// x * w elementwise, w broadcast to x (LayerScale, the gain of a norm).
    fn mul_weight(&self, x: &Self::Tensor, w: &Self::Weight) -> Result<Self::Tensor>;
    /// Sum over `dim`, which is kept with length 1.
    fn sum(&self, x: &Self::Tensor, dim: usize) -> Result<Self::Tensor>;

    /// Same elements, another shape.
    fn reshape(&self, x: &Self::Tensor, dims: &[usize]) -> Result<Self::Tensor>;
    /// Exchanges two dimensions.
    fn transpose(&self, x: &Self::Tensor, a: usize, b: usize) -> Result<Self::Tensor>;
    /// `len` entries of `dim`, from `start`.
    fn narrow(&self, x: &Self::Tensor, dim: usize, start: usize, len: usize) -> Result<Self::Tensor>;
    /// Concatenation along `dim`.
    fn cat(&self, xs: &[&Self::Tensor], dim: usize) -> Result<Self::Tensor>;

    /// max(x, 0).
    fn relu(&self, x: &Self::Tensor) -> Result<Self::Tensor>;
    /// A smooth function by its Fourier sum on `range`.
    fn activation(&self, x: &Self::Tensor, f: Activation, range: Range) -> Result<Self::Tensor>;
    /// sin(2 pi x) and cos(2 pi x), elementwise, for every x: angles in turns, because those wrap in fixed point by themselves.
    /// Error at most 4e-4, of which x to 16 fractional bits is most.
    fn turns(&self, x: &Self::Tensor) -> Result<[Self::Tensor; 2]>;
    /// Softmax over the last dimension.
    fn softmax(&self, x: &Self::Tensor, spec: &SoftmaxSpec) -> Result<Self::Tensor>;
    /// Softmax over the last dimension of `scores [.., m, n]`, times `values [.., n, d]`.
    fn attend(
        &self,
        scores: &Self::Tensor,
        values: &Self::Tensor,
        spec: &SoftmaxSpec,
    ) -> Result<Self::Tensor> {
        self.matmul(&self.softmax(scores, spec)?, values)
    }
    /// Normalisation over the last dimension, no affine part.
    fn normalize(&self, x: &Self::Tensor, spec: &NormSpec) -> Result<Self::Tensor>;
    /// 1 / x, elementwise, for positive x. Calibrated: `range` holds the smallest and the largest x; the result is wrong
    /// outside.
    fn reciprocal(&self, x: &Self::Tensor, range: (f64, f64)) -> Result<Self::Tensor>;
    /// (x - mean) / sqrt(variance + eps) for each feature of the last dimension, no affine part; `mean` and `variance` are
    /// `[features]`. Float interpreters only: what is served has it folded into its neighbours.
    fn batch_norm(
        &self,
        _x: &Self::Tensor,
        _mean: &Self::Weight,
        _variance: &Self::Weight,
        _eps: f64,
    ) -> Result<Self::Tensor> {
        Err(Error::program(
            "batch norm",
            "it has to be folded into its neighbours before a private run",
        ))
    }
    /// One-hot of the largest entry of the last dimension (the first of equals).
    fn argmax(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// x, rid of fractional bits that the next linear layer or product would cut off: what is then made of the result
    /// (its parts, its transpose) shares one truncation and, once it is opened, one opening.
    fn trim(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        Ok(x.clone())
    }
    /// Declares that several activations are about to be multiplied, so that their openings share one round.
    fn prepare(&self, xs: &[&Self::Tensor]) -> Result<()>;
    /// The only way to a plain value: `to` learns x rounded to the output precision, nobody else learns anything.
    /// `Some` where this interpreter holds the result.
    fn reveal(&self, x: &Self::Tensor, to: Party) -> Result<Option<Revealed>>;
    /// The only way to a plain value for the [outside owner](crate::Outside): it learns x rounded to the output precision, the
    /// parties learn nothing. `Some` in the clear interpreters.
    fn deliver(&self, x: &Self::Tensor) -> Result<Option<Revealed>>;
}

/// Turns a name and an expected shape into a `B::Weight`.
///
/// At the owner it reads the checkpoint; elsewhere the public configuration gives the shape alone; in training it
/// is a variable. A model never knows which.
pub struct Params<'a, B: Backend> {
    load: Rc<Loader<'a, B>>,
    prefix: String,
}

type Loader<'a, B> = dyn Fn(&str, &[usize]) -> Result<<B as Backend>::Weight> + 'a;

impl<'a, B: Backend> Params<'a, B> {
    /// `load` is called with the full dotted name and the expected shape.
    pub fn new(load: impl Fn(&str, &[usize]) -> Result<B::Weight> + 'a) -> Self {
        Params {
            load: Rc::new(load),
            prefix: String::new(),
        }
    }

    /// Parameters below `name`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Params {
            load: self.load.clone(),
            prefix: self.path(&name.to_string()),
        }
    }

    /// The parameter `name`, of shape `dims`.
    pub fn get(&self, name: &str, dims: &[usize]) -> Result<B::Weight> {
        let path = self.path(name);
        (self.load)(&path, dims).map_err(|e| Error::Parameter {
            name: path,
            source: Box::new(e),
        })
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }
}
