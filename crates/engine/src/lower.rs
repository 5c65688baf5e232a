//! The verbs of [`Backend`] written once in terms of [`Gates`]: scales, lazy truncation, and the composed protocols.
//!
//! # Scales
//! Inputs, weights and truncated activations have [`SCALE`] = 16 fractional bits. A product adds scales up and is
//! truncated only when a later verb needs it: a linear layer takes inputs of up to [`MAX_SCALE`] - 16 = 34 fractional
//! bits, which a normalisation, a GELU or a ReLU of a product all meet. A value of scale s must stay below
//! 2^(62 - s); the fixed-point interpreter asserts it.
//!
//! What is good for fewer bits than its scale has is a multiple of a power of two ([`Meta::zeros`](crate::gates::Meta::zeros)): a
//! norm, an activation of a linear layer and random features give 16 fractional bits and zeros below. They are not sent, neither of
//! these values nor of the products in which they are factors.
//!
//! Composed protocols have their own files: [`activation`], [`softmax`], [`normalize`], [`argmax`], and
//! [`inverse`](crate::protocols::inverse) below the two normalising ones.

use crate::backend::{Activation, Backend, NormSpec, Owner, Party, Range, Revealed, SoftmaxSpec};
use crate::gates::{Gates, LIMIT_BITS, Local, MAX_SCALE, Product, SCALE};
use crate::protocols::{activation, argmax, carried, inverse, normalize, softmax, trigonometric::Form};
use crate::series::Series;
use crate::{Error, Result};

/// Fractional bits of sines and cosines of turns.
const FEATURE_BITS: u32 = 14;
/// A value may be divided by a power of two, which costs nothing, until it has as many fractional bits.
const FINEST: u32 = LIMIT_BITS - 2;

impl<G: Gates> Backend for G {
    type Tensor = G::T;
    type Weight = G::T;

    fn dims(&self, x: &G::T) -> Vec<usize> {
        self.meta(x).dims.clone()
    }

    fn fractional_bits(&self, x: &G::T) -> u32 {
        self.meta(x).scale
    }

    fn layer(&self, name: &str) {
        self.enter_layer(name);
    }

    fn input(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<G::T> {
        self.enter(owner, dims, values)
    }

    fn weight(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<G::T> {
        self.parameter(owner, dims, values)
    }

    fn linear(&self, x: &G::T, w: &G::T, b: Option<&G::T>) -> Result<G::T> {
        let x = match self.meta(x).scale {
            scale if scale <= MAX_SCALE - SCALE => x.clone(),
            scale => cut_factor(self, Product::MatMulNt, x, scale - SCALE, w)?,
        };
        let y = self.product(Product::MatMulNt, &x, w)?;
        match b {
            Some(b) => self.add_weight(&y, b),
            None => Ok(y),
        }
    }

    fn matmul(&self, a: &G::T, b: &G::T) -> Result<G::T> {
        let (a, b) = fit_product(self, a, b, |xs| match xs {
            [(x, bits)] if std::ptr::eq(*x, a) => Ok(vec![cut_factor(self, Product::MatMul, a, *bits, b)?]),
            _ => self.truncate(xs, false),
        })?;
        self.product(Product::MatMul, &a, &b)
    }

    fn add(&self, a: &G::T, b: &G::T) -> Result<G::T> {
        let (a, b) = align(self, a, b)?;
        self.sum_of(&a, &b, false)
    }

    fn sub(&self, a: &G::T, b: &G::T) -> Result<G::T> {
        let (a, b) = align(self, a, b)?;
        self.sum_of(&a, &b, true)
    }

    fn mul(&self, a: &G::T, b: &G::T) -> Result<G::T> {
        // What is truncated here needs no opening for the product, and what it needs of the other factor shares the round.
        let (a, b) = fit_product(self, a, b, |xs| {
            if let [(x, _)] = xs {
                let other = if std::ptr::eq(*x, a) { b } else { a };
                let secret = [*x, other].iter().all(|x| self.meta(x).owner != Owner::Public);
                if secret && !self.is_carried(other) {
                    self.open(&[*x, other])?;
                }
            }
            self.truncate_carried(xs)
        })?;
        self.product(Product::Elementwise, &a, &b)
    }

    fn scale(&self, x: &G::T, c: f64) -> Result<G::T> {
        let scale = self.meta(x).scale;
        let exponent = c.abs().log2();
        if exponent.fract() == 0.0 && (0..i64::from(FINEST)).contains(&(i64::from(scale) - exponent as i64)) {
            let x = self.local(x, &Local::Relabel((i64::from(scale) - exponent as i64) as u32))?;
            return if c < 0.0 {
                self.local(&x, &Local::Times(-1))
            } else {
                Ok(x)
            };
        }
        if !c.is_finite() || c.abs() >= 2f64.powi(20) {
            return Err(Error::program(
                "scale",
                "the factor must be finite, and below 2^20 if it is no power of two",
            ));
        }
        // Fifteen significant bits.
        let bits = if c == 0.0 {
            0
        } else {
            (15 - exponent.floor() as i32).clamp(0, 30) as u32
        };
        let x = at_most(self, x, MAX_SCALE - bits)?;
        let scale = self.meta(&x).scale;
        let x = self.local(&x, &Local::Times((c * 2f64.powi(bits as i32)).round() as i64))?;
        self.local(&x, &Local::Relabel(scale + bits))
    }

    fn add_weight(&self, x: &G::T, w: &G::T) -> Result<G::T> {
        self.add(x, w)
    }

    fn mul_weight(&self, x: &G::T, w: &G::T) -> Result<G::T> {
        self.mul(x, w)
    }

    fn sum(&self, x: &G::T, dim: usize) -> Result<G::T> {
        self.local(x, &Local::Sum(dim))
    }

    fn reshape(&self, x: &G::T, dims: &[usize]) -> Result<G::T> {
        self.local(x, &Local::Reshape(dims.to_vec()))
    }

    fn transpose(&self, x: &G::T, a: usize, b: usize) -> Result<G::T> {
        self.local(x, &Local::Transpose(a, b))
    }

    fn narrow(&self, x: &G::T, dim: usize, start: usize, len: usize) -> Result<G::T> {
        self.local(x, &Local::Narrow { dim, start, len })
    }

    fn cat(&self, xs: &[&G::T], dim: usize) -> Result<G::T> {
        let scale = xs.iter().map(|x| self.meta(x).scale).max().unwrap_or(SCALE);
        let xs = xs
            .iter()
            .map(|x| refine(self, x, scale))
            .collect::<Result<Vec<_>>>()?;
        self.concat(&xs.iter().collect::<Vec<_>>(), dim)
    }

    fn relu(&self, x: &G::T) -> Result<G::T> {
        let x = at_most(self, x, MAX_SCALE)?;
        let scale = self.meta(&x).scale;
        // What would be truncated before the next linear layer is truncated on the opening that the comparison needs.
        let cut = if scale > MAX_SCALE - SCALE {
            scale - SCALE
        } else {
            0
        };
        self.positive_part(&x, cut)
    }

    fn activation(&self, x: &G::T, f: Activation, range: Range) -> Result<G::T> {
        activation::activation(self, x, f, range)
    }

    fn turns(&self, x: &G::T) -> Result<[G::T; 2]> {
        let mut both = self.series_of(x, &Series::turns(), Form::Rounded(FEATURE_BITS))?;
        let cos = both.remove(1);
        Ok([both.remove(0), cos])
    }

    fn softmax(&self, x: &G::T, spec: &SoftmaxSpec) -> Result<G::T> {
        softmax::softmax(self, x, spec)
    }

    fn attend(&self, scores: &G::T, values: &G::T, spec: &SoftmaxSpec) -> Result<G::T> {
        softmax::attend(self, scores, values, spec)
    }

    fn normalize(&self, x: &G::T, spec: &NormSpec) -> Result<G::T> {
        normalize::normalize(self, x, spec)
    }

    fn reciprocal(&self, x: &G::T, range: (f64, f64)) -> Result<G::T> {
        inverse::reciprocal(self, x, range)
    }

    fn argmax(&self, x: &G::T) -> Result<G::T> {
        argmax::argmax(self, x)
    }

    fn trim(&self, x: &G::T) -> Result<G::T> {
        at_most(self, x, MAX_SCALE - SCALE)
    }

    fn prepare(&self, xs: &[&G::T]) -> Result<()> {
        self.open(xs)
    }

    fn reveal(&self, x: &G::T, to: Party) -> Result<Option<Revealed>> {
        let scale = self.meta(x).scale;
        if scale > SCALE {
            let x = self.truncate(&[(x, scale - SCALE)], true)?.remove(0);
            self.reveal_to(&x, to)
        } else {
            self.reveal_to(x, to)
        }
    }

    fn deliver(&self, x: &G::T) -> Result<Option<Revealed>> {
        let scale = self.meta(x).scale;
        if scale > SCALE {
            self.hand_over(&self.truncate(&[(x, scale - SCALE)], true)?.remove(0))
        } else {
            self.hand_over(x)
        }
    }
}

/// The last dimension, over which rows run.
pub(crate) fn last_dim<G: Gates>(g: &G, x: &G::T, op: &'static str) -> Result<usize> {
    g.meta(x)
        .dims
        .len()
        .checked_sub(1)
        .ok_or_else(|| Error::program(op, "a scalar has no rows"))
}

/// `x` with at most `limit` fractional bits: truncated to [`SCALE`] if it has more.
pub(crate) fn at_most<G: Gates>(g: &G, x: &G::T, limit: u32) -> Result<G::T> {
    let scale = g.meta(x).scale;
    if scale <= limit {
        Ok(x.clone())
    } else {
        Ok(g.truncate(&[(x, scale - SCALE)], false)?.remove(0))
    }
}

/// The left factor `x` of a product, without `bits` of its fractional bits, ready to multiply where that pays.
fn cut_factor<G: Gates>(g: &G, kind: Product, x: &G::T, bits: u32, w: &G::T) -> Result<G::T> {
    let pays = carried::pays(kind, g.meta(x), g.meta(w), &[bits]);
    let cut = [(x, bits)];
    let mut cut = if pays {
        g.truncate_carried(&cut)?
    } else {
        g.truncate(&cut, false)?
    };
    Ok(cut.remove(0))
}

/// `x` with at least `scale` fractional bits.
pub(crate) fn refine<G: Gates>(g: &G, x: &G::T, scale: u32) -> Result<G::T> {
    let have = g.meta(x).scale;
    if have >= scale {
        Ok(x.clone())
    } else {
        g.local(x, &Local::Refine(scale - have))
    }
}

/// Both at the finer of their scales.
fn align<G: Gates>(g: &G, a: &G::T, b: &G::T) -> Result<(G::T, G::T)> {
    let scale = g.meta(a).scale.max(g.meta(b).scale);
    Ok((refine(g, a, scale)?, refine(g, b, scale)?))
}

/// Operands whose scales add up to at most [`MAX_SCALE`]; what must be truncated is, in one round.
fn fit_product<G: Gates>(
    g: &G,
    a: &G::T,
    b: &G::T,
    truncate: impl Fn(&[(&G::T, u32)]) -> Result<Vec<G::T>>,
) -> Result<(G::T, G::T)> {
    let (sa, sb) = (g.meta(a).scale, g.meta(b).scale);
    let coarse = |s: u32| s.min(SCALE);
    let (cut_a, cut_b) = if sa + sb <= MAX_SCALE {
        (false, false)
    } else {
        // Of the operands that would do alone, the smaller: its opening, and that of its truncation, are the price.
        let (fits_a, fits_b) = (coarse(sa) + sb <= MAX_SCALE, sa + coarse(sb) <= MAX_SCALE);
        let a_is_smaller = g.meta(a).len() <= g.meta(b).len();
        match (fits_a, fits_b) {
            (true, true) => (a_is_smaller, !a_is_smaller),
            (false, false) => (true, true),
            one => one,
        }
    };
    Ok(match (cut_a && sa > SCALE, cut_b && sb > SCALE) {
        (false, false) => (a.clone(), b.clone()),
        (true, false) => (truncate(&[(a, sa - SCALE)])?.remove(0), b.clone()),
        (false, true) => (a.clone(), truncate(&[(b, sb - SCALE)])?.remove(0)),
        (true, true) => {
            let mut both = truncate(&[(a, sa - SCALE), (b, sb - SCALE)])?;
            let b = both.remove(1);
            (both.remove(0), b)
        }
    })
}
