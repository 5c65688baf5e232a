//! The fixed-point gates that the private interpreters share: [`Fixed`](crate::Fixed), the dealer, the parties and
//! the cost model implement these few; everything else in [`Backend`](crate::Backend) is written once on top of
//! them in `lower.rs`.

use std::sync::Arc;

use veiltune_ring::Ring;

use crate::protocols::{coarse_max::CoarseMax, lines::Lines, trigonometric::Form};
use crate::series::Series;
use crate::{Error, Owner, Party, Result, Revealed};

/// Fractional bits of an activation after truncation, and of every weight.
pub const SCALE: u32 = 16;
/// Largest scale that a product may reach; with it, |value| < 2^([`LIMIT_BITS`] - MAX_SCALE).
pub const MAX_SCALE: u32 = 50;
/// Every value that is truncated satisfies |x| < 2^62 in the ring (asserted by the fixed-point interpreter).
pub const LIMIT_BITS: u32 = 62;
/// Activations that are compared satisfy |x| < 2^VALUE_BITS (asserted by the fixed-point interpreter).
pub const VALUE_BITS: u32 = 12;

/// What is public about a fixed-point tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Row-major shape.
    pub dims: Vec<usize>,
    /// Fractional bits: the ring element is round(x * 2^scale).
    pub scale: u32,
    /// Who knows it.
    pub owner: Owner,
    /// The ring element, each of its shares, and each mask it is opened with, are multiples of 2^zeros: an opening takes the
    /// other bits alone.
    pub zeros: u32,
}

impl Meta {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bits of an element that are not always zero: what travels when it is opened, and when shares of it are dealt.
    pub fn bits(&self) -> u32 {
        64 - self.zeros
    }
}

/// Most zeros that are kept count of.
const MAX_ZEROS: u32 = 63;

/// A local linear map of one tensor. It commutes with masking, so that an opening survives it.
#[derive(Clone, Debug)]
pub enum Local {
    /// Another shape.
    Reshape(Vec<usize>),
    /// Two dimensions exchanged.
    Transpose(usize, usize),
    /// `len` entries of `dim` from `start`.
    Narrow {
        /// The dimension.
        dim: usize,
        /// First entry.
        start: usize,
        /// Number of entries.
        len: usize,
    },
    /// Broadcast to a shape.
    Broadcast(Vec<usize>),
    /// Sum over a dimension, kept with length 1.
    Sum(usize),
    /// Multiplication by a public integer; the scale stays.
    Times(i64),
    /// Multiplication by 2^bits that adds as many fractional bits: the value stays.
    Refine(u32),
    /// The same ring element read with another scale: the value is divided by 2^(new - old).
    Relabel(u32),
}

impl Local {
    /// Shape and scale of the result.
    pub fn meta(&self, x: &Meta) -> Result<Meta> {
        let mut out = x.clone();
        match self {
            Local::Reshape(dims) => {
                if dims.iter().product::<usize>() != x.len() {
                    return Err(Error::program(
                        "reshape",
                        format!("{:?} does not have the size of {dims:?}", x.dims),
                    ));
                }
                out.dims = dims.clone();
            }
            Local::Transpose(a, b) => {
                check_dim("transpose", &x.dims, (*a).max(*b))?;
                out.dims.swap(*a, *b);
            }
            Local::Narrow { dim, start, len } => {
                check_dim("narrow", &x.dims, *dim)?;
                if start.checked_add(*len).is_none_or(|end| end > x.dims[*dim]) {
                    return Err(Error::program(
                        "narrow",
                        format!("{start} + {len} exceeds dimension {dim} of {:?}", x.dims),
                    ));
                }
                out.dims[*dim] = *len;
            }
            Local::Broadcast(dims) => {
                if veiltune_ring::broadcast_shape(&x.dims, dims)? != *dims {
                    return Err(Error::program(
                        "broadcast",
                        format!("{:?} does not broadcast to {dims:?}", x.dims),
                    ));
                }
                out.dims = dims.clone();
            }
            Local::Sum(dim) => {
                check_dim("sum", &x.dims, *dim)?;
                out.dims[*dim] = 1;
            }
            Local::Times(k) => out.zeros = (x.zeros + k.trailing_zeros()).min(MAX_ZEROS),
            Local::Refine(bits) => {
                out.scale += bits;
                out.zeros = (x.zeros + bits).min(MAX_ZEROS);
            }
            Local::Relabel(scale) => out.scale = *scale,
        }
        Ok(out)
    }

    /// The map on ring elements: a share, a mask or a masked value.
    pub fn apply(&self, x: &Ring) -> Result<Ring> {
        Ok(match self {
            Local::Reshape(dims) => x.reshape(dims.clone())?,
            Local::Transpose(a, b) => x.transpose(*a, *b)?,
            Local::Narrow { dim, start, len } => x.narrow(*dim, *start, *len)?,
            Local::Broadcast(dims) => x.broadcast_to(dims.clone())?,
            Local::Sum(dim) => x.sum(*dim)?,
            Local::Times(k) => x.mul_scalar(*k as u64),
            Local::Refine(bits) => x.shl(*bits),
            Local::Relabel(_) => x.clone(),
        })
    }
}

/// A bilinear product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// Elementwise, broadcasting.
    Elementwise,
    /// `[.., m, k] x [.., k, n]`.
    MatMul,
    /// `[.., m, k] x [.., n, k]`: the layout of a linear layer's weight.
    MatMulNt,
}

impl Product {
    /// Shape of the product.
    pub fn dims(self, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
        Ok(match self {
            Product::Elementwise => veiltune_ring::broadcast_shape(a, b)?,
            Product::MatMul => veiltune_ring::matmul_shape(a, b)?,
            Product::MatMulNt => veiltune_ring::matmul_nt_shape(a, b)?,
        })
    }

    /// The product in Z_{2^64}.
    pub fn apply(self, a: &Ring, b: &Ring) -> Result<Ring> {
        Ok(match self {
            Product::Elementwise => a.mul(b)?,
            Product::MatMul => a.matmul(b)?,
            Product::MatMulNt => a.matmul_nt(b)?,
        })
    }

    /// Multiply-adds of the product whose result has shape `out`.
    pub fn macs(self, a: &[usize], out: &[usize]) -> u64 {
        let inner = if self == Product::Elementwise {
            1
        } else {
            a.last().copied().unwrap_or(1)
        };
        out.iter().product::<usize>() as u64 * inner as u64
    }
}

/// The gates.
pub trait Gates {
    /// A fixed-point activation or parameter.
    type T: Clone;

    /// Its public part.
    fn meta<'a>(&self, x: &'a Self::T) -> &'a Meta;

    /// What follows belongs to the layer `name`, for the cost model.
    fn enter_layer(&self, _name: &str) {}

    /// An input of `owner`, encoded with [`SCALE`]; `values` where they are known.
    fn enter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Self::T>;
    /// A parameter: as `enter`, and opened for the whole session if it has two or more dimensions.
    fn parameter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Self::T>;

    /// A local linear map.
    fn local(&self, x: &Self::T, map: &Local) -> Result<Self::T>;
    /// Concatenation along `dim`; scales must agree.
    fn concat(&self, xs: &[&Self::T], dim: usize) -> Result<Self::T>;
    /// a + b or a - b, broadcasting; scales must agree.
    fn sum_of(&self, a: &Self::T, b: &Self::T, subtract: bool) -> Result<Self::T>;
    /// x + c for a public ring constant c (already at the scale of x).
    fn add_constant(&self, x: &Self::T, c: u64) -> Result<Self::T>;

    /// Opens masked values, all in one round; those opened before cost nothing.
    fn open(&self, xs: &[&Self::T]) -> Result<()>;
    /// A product; opens what it needs in one round. Scales add up.
    fn product(&self, kind: Product, a: &Self::T, b: &Self::T) -> Result<Self::T>;
    /// x / 2^bits, the scale reduced by `bits`, all in one round. Error at most one unit in the last place;
    /// `faithful`: exactly floor.
    fn truncate(&self, xs: &[(&Self::T, u32)], faithful: bool) -> Result<Vec<Self::T>>;
    /// As `truncate`, one-round; sums and elementwise products of the results open nothing more. See
    /// [`carried`](crate::protocols::carried).
    fn truncate_carried(&self, xs: &[(&Self::T, u32)]) -> Result<Vec<Self::T>>;
    /// Whether elementwise products of `x` open nothing for it, because it is a result of `truncate_carried`.
    fn is_carried(&self, x: &Self::T) -> bool;
    /// Sum of squares over the last dimension, kept with length 1. Scales add up.
    fn square_sum(&self, x: &Self::T) -> Result<Self::T>;
    /// Trigonometric series of one period, and of as many harmonics.
    fn series_of(&self, x: &Self::T, all: &[Arc<Series>], form: Form) -> Result<Vec<Self::T>>;
    /// One of them.
    fn series(&self, x: &Self::T, series: &Arc<Series>, form: Form) -> Result<Self::T> {
        Ok(self.series_of(x, std::slice::from_ref(series), form)?.remove(0))
    }
    /// max(x, 0) / 2^cut for |x| < 2^[`VALUE_BITS`], the scale reduced by `cut` and rounded as by `truncate`.
    fn positive_part(&self, x: &Self::T, cut: u32) -> Result<Self::T>;
    /// The bit x >= 0 as a number of scale 0, for |x| < 2^[`VALUE_BITS`].
    fn non_negative(&self, x: &Self::T) -> Result<Self::T>;
    /// A piecewise linear function of positive values: see [`Lines`].
    fn lines(&self, x: &Self::T, lines: &Arc<Lines>) -> Result<Self::T>;
    /// A coarse maximum of the last dimension: see [`CoarseMax`].
    fn coarse_max(&self, x: &Self::T, spec: &CoarseMax) -> Result<Self::T>;
    /// tables\[t\]\[x\] for an integer x (scale 0) in 0..2^bits.
    fn lookup(&self, x: &Self::T, bits: u32, tables: &[Arc<Vec<u64>>], scale: u32) -> Result<Vec<Self::T>>;
    /// Sends x to `to`.
    fn reveal_to(&self, x: &Self::T, to: Party) -> Result<Option<Revealed>>;
    /// Hands x to the outside owner.
    fn hand_over(&self, x: &Self::T) -> Result<Option<Revealed>>;
}

/// Owner of a value computed from values of `a` and `b`.
pub(crate) fn joint_owner(a: Owner, b: Owner) -> Owner {
    match (a, b) {
        (Owner::Public, o) | (o, Owner::Public) => o,
        (a, b) if a == b => a,
        _ => Owner::Shared,
    }
}

pub(crate) fn check_dim(op: &'static str, dims: &[usize], dim: usize) -> Result<()> {
    if dim < dims.len() {
        Ok(())
    } else {
        Err(Error::program(
            op,
            format!("dimension {dim} of a tensor of shape {dims:?}"),
        ))
    }
}

/// Shape of a concatenation.
pub(crate) fn concat_meta(xs: &[&Meta], dim: usize) -> Result<Meta> {
    let first = xs
        .first()
        .ok_or_else(|| Error::program("cat", "nothing to concatenate"))?;
    check_dim("cat", &first.dims, dim)?;
    let mut out = (*first).clone();
    for x in &xs[1..] {
        let same = x.dims.len() == out.dims.len()
            && x.dims
                .iter()
                .zip(&out.dims)
                .enumerate()
                .all(|(i, (a, b))| i == dim || a == b);
        if !same || x.scale != out.scale {
            return Err(Error::program(
                "cat",
                format!(
                    "{:?} (scale {}) and {:?} (scale {})",
                    out.dims, out.scale, x.dims, x.scale
                ),
            ));
        }
        out.dims[dim] += x.dims[dim];
        out.zeros = out.zeros.min(x.zeros);
        out.owner = if out.owner == x.owner {
            out.owner
        } else {
            Owner::Shared
        };
    }
    Ok(out)
}

/// Shape, scale and owner of a sum.
pub(crate) fn sum_meta(a: &Meta, b: &Meta) -> Result<Meta> {
    if a.scale != b.scale {
        return Err(Error::program(
            "add",
            format!("scales {} and {} differ", a.scale, b.scale),
        ));
    }
    Ok(Meta {
        dims: veiltune_ring::broadcast_shape(&a.dims, &b.dims)?,
        scale: a.scale,
        owner: joint_owner(a.owner, b.owner),
        zeros: a.zeros.min(b.zeros),
    })
}

/// Shape, scale and owner of a product.
pub(crate) fn product_meta(kind: Product, a: &Meta, b: &Meta) -> Result<Meta> {
    let scale = a.scale + b.scale;
    if scale >= LIMIT_BITS {
        return Err(Error::program(
            "product",
            format!("scales {} + {} leave no room for the value", a.scale, b.scale),
        ));
    }
    Ok(Meta {
        dims: kind.dims(&a.dims, &b.dims)?,
        scale,
        owner: joint_owner(a.owner, b.owner),
        zeros: (a.zeros + b.zeros).min(MAX_ZEROS),
    })
}

/// Meta data of x + c.
pub(crate) fn shifted_meta(x: &Meta, c: u64) -> Meta {
    Meta {
        zeros: x.zeros.min(c.trailing_zeros()),
        ..x.clone()
    }
}

/// The multiple of 2^zeros just below each element.
pub(crate) fn floor_to(mut x: Ring, zeros: u32) -> Ring {
    if zeros > 0 {
        x.make_mut().iter_mut().for_each(|v| *v &= u64::MAX << zeros);
    }
    x
}

/// Whether all elements are multiples of 2^zeros.
pub(crate) fn are_multiples(x: &Ring, zeros: u32) -> bool {
    x.as_slice().iter().all(|v| v.trailing_zeros() >= zeros)
}

/// Whether a parameter is opened when the session is set up: matrices are, vectors (biases, gains) only if a product
/// needs them.
pub(crate) fn opens_at_setup(owner: Owner, dims: &[usize]) -> bool {
    owner != Owner::Public && dims.len() >= 2
}

/// Checks given values against a shape and encodes them with [`SCALE`].
pub(crate) fn encode(op: &'static str, dims: &[usize], values: &[f32]) -> Result<veiltune_ring::Ring> {
    let words = veiltune_ring::codec::encode(values.iter().map(|v| f64::from(*v)), SCALE)?;
    let len = words.len();
    Ring::new(dims.to_vec(), words)
        .map_err(|_| Error::program(op, format!("{len} values for shape {dims:?}")))
}

/// The error for values that are not where their owner is.
pub(crate) fn missing(op: &'static str, owner: Owner) -> Error {
    Error::program(op, format!("values of {owner:?} are needed at this role"))
}
