//! Argmax over the last dimension, as a one-hot vector of integers (scale 0): the first of equals wins.
//!
//! A tournament of neighbours: at each of the ceil(log2 n) levels a [comparison](super::compare) (2 rounds by
//! function secret sharing) and a product that keeps the winner (1 round); then the bits select from the top down (1 round
//! a level but the last). 4 ceil(log2 n) - 1 rounds; n - 1 comparisons a row. Each way 24 bytes a comparison, and its own
//! bits; dealer 16 bytes a comparison to the second party for the products, and what the comparison takes without the
//! selection. Exact, for |x| < 2^11.

use crate::gates::{Gates, Local, MAX_SCALE, Product};
use crate::lower::{at_most, last_dim};
use crate::{Backend, Error, Result};

/// One-hot of the largest entry of each row; see the module.
pub fn argmax<G: Gates>(g: &G, x: &G::T) -> Result<G::T> {
    let x = at_most(g, x, MAX_SCALE)?;
    let dim = last_dim(g, &x, "argmax")?;
    let mut dims = g.meta(&x).dims.clone();
    if dims[dim] == 0 {
        return Err(Error::program("argmax", "rows are empty"));
    }
    // A tournament of neighbours, so that the first of equals wins; then the bits select from the top down.
    let (mut value, mut levels) = (x, Vec::new());
    while dims[dim] > 1 {
        let (pairs, odd) = (dims[dim] / 2, dims[dim] % 2);
        let even = g.narrow(&value, dim, 0, 2 * pairs)?;
        dims[dim] = pairs;
        let mut split = dims.clone();
        split.push(2);
        let even = g.reshape(&even, &split)?;
        let side = |i| g.reshape(&g.narrow(&even, dim + 1, i, 1)?, &dims);
        let (a, b) = (side(0)?, side(1)?);
        let difference = g.sum_of(&a, &b, true)?;
        let wins = g.non_negative(&difference)?;
        let mut best = g.sum_of(&b, &g.product(Product::Elementwise, &difference, &wins)?, false)?;
        if odd == 1 {
            let last = g.narrow(&value, dim, 2 * pairs, 1)?;
            best = g.concat(&[&best, &last], dim)?;
        }
        levels.push((wins, odd));
        value = best;
        dims[dim] += odd;
    }
    let mut selected: Option<G::T> = None;
    for (wins, odd) in levels.into_iter().rev() {
        let pairs = g.meta(&wins).dims[dim];
        let (left, right, rest) = match &selected {
            None => {
                let lost = g.add_constant(&g.local(&wins, &Local::Times(-1))?, 1)?;
                (wins, lost, None)
            }
            Some(s) => {
                let here = g.narrow(s, dim, 0, pairs)?;
                let left = g.product(Product::Elementwise, &here, &wins)?;
                let right = g.sum_of(&here, &left, true)?;
                let rest = if odd == 1 {
                    Some(g.narrow(s, dim, pairs, 1)?)
                } else {
                    None
                };
                (left, right, rest)
            }
        };
        let mut flat = g.meta(&left).dims.clone();
        let mut split = flat.clone();
        split.push(1);
        flat[dim] = 2 * pairs;
        let both = g.concat(
            &[&g.reshape(&left, &split)?, &g.reshape(&right, &split)?],
            dim + 1,
        )?;
        let both = g.reshape(&both, &flat)?;
        selected = Some(match rest {
            Some(rest) => g.concat(&[&both, &rest], dim)?,
            None => both,
        });
    }
    match selected {
        Some(s) => Ok(s),
        // Rows of one: that one.
        None => {
            let zero = g.local(&g.local(&value, &Local::Times(0))?, &Local::Relabel(0))?;
            g.add_constant(&zero, 1)
        }
    }
}
