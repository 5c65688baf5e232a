//! Smooth activations by the trigonometric gate: GELU, SiLU, tanh, sigmoid, exp, sin, cos.
//!
//! - [`Range::Within`]: the [trigonometric gate](super::trigonometric) with the function's series. 1 round, scale + p bits
//!   each way, 16 bytes an element and harmonic from the dealer. Error at most 4e-4 on the range; beyond it the series
//!   does what it likes, on every backend alike.
//!
//!   An input of more than 46 fractional bits, a product of scale 50, is not truncated before the gate but after it: the gate's
//!   result is [raised](super::trigonometric::Form), opened in as many bits as its range needs, and truncated on that opening. 2
//!   rounds; for GELU with a period of 32 of an input with 18 [zeros](crate::gates::Meta::zeros) 37 and 40 bits each way and, dealt,
//!   76 bits a harmonic and 106 more; a linear layer of the result opens 23 bits. Beyond twice the range the result may also wrap. The result has
//!   18 zeros.
//! - [`Range::Guarded`]: x is first clamped to the range, clamp(x) = x - max(x - b, 0) + max(-x - b, 0), by one batch of
//!   two [comparisons](super::compare) an element (two more rounds by function secret sharing; 16 bytes
//!   each way, and what two comparisons take from the dealer). GELU and SiLU get max(x - b, 0) added back, so that they
//!   go on as x and 0; the others stay at their end value. For |x| + b < 2^12. Error at most 5e-4 everywhere.

use std::sync::Arc;

use crate::backend::{Activation, Range};
use crate::gates::{Gates, LIMIT_BITS, Local, MAX_SCALE, SCALE};
use crate::lower::{at_most, refine};
use crate::series::Series;
use crate::{Backend, Error, Result};

use super::trigonometric::Form;

/// The largest scale that leaves room for the period of every series.
pub(crate) const MAX_INPUT_SCALE: u32 = 46;

/// f(x); see the module.
pub fn activation<G: Gates>(g: &G, x: &G::T, f: Activation, range: Range) -> Result<G::T> {
    if let (Range::Within(bound), true) = (range, g.meta(x).scale > MAX_INPUT_SCALE && f != Activation::Exp) {
        return raised(g, x, &Series::for_activation(f, bound)?);
    }
    let x = at_most(g, x, MAX_INPUT_SCALE)?;
    match range {
        Range::Exact => Err(Error::program(
            "activation",
            "an exact activation is for the public part of a model; calibrate a range for the private part",
        )),
        Range::Within(bound) => g.series(&x, &Series::for_activation(f, bound)?, Form::Whole),
        Range::Guarded(bound) => {
            let series = Series::for_activation(f, bound)?;
            let scale = g.meta(&x).scale;
            let b = (bound * 2f64.powi(scale as i32)).round() as i64 as u64;
            // clamp(x) = x - max(x - b, 0) + max(-x - b, 0), both parts in one comparison.
            let negated = g.local(&x, &Local::Times(-1))?;
            let rank = g.meta(&x).dims.len();
            if rank == 0 {
                return Err(Error::program("activation", "a scalar; give it one dimension"));
            }
            let both = g.concat(&[&x, &negated], 0)?;
            let excess = g.positive_part(&g.add_constant(&both, b.wrapping_neg())?, 0)?;
            let n = g.meta(&x).dims[0];
            let above = g.narrow(&excess, 0, 0, n)?;
            let below = g.narrow(&excess, 0, n, n)?;
            let inside = g.sum_of(&g.sum_of(&x, &above, true)?, &below, false)?;
            let y = g.series(&inside, &series, Form::Whole)?;
            // Beyond the range GELU and SiLU go on as x and 0, the others stay at their end value.
            match f {
                Activation::Gelu | Activation::Silu => g.add(&y, &above),
                _ => Ok(y),
            }
        }
    }
}

/// The series of an input of any scale, with [`SCALE`] fractional bits and as many zeros as a linear layer leaves room for.
fn raised<G: Gates>(g: &G, x: &G::T, series: &Arc<Series>) -> Result<G::T> {
    // A linear term grows beyond the range; the others are bounded by one, and their series by two.
    let bits = if series.linear == 0.0 {
        1
    } else {
        series.period.log2().ceil().max(1.0) as u32
    };
    let y = g.series(x, series, Form::Raised(bits))?;
    let y = g.truncate(&[(&y, LIMIT_BITS - bits - SCALE)], false)?.remove(0);
    refine(g, &y, MAX_SCALE - SCALE)
}
