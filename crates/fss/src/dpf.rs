//! Point function: additive shares in Z_{2^64} of `1{x == alpha}`.
//!
//! The distributed point function of Boyle, Gilboa and Ishai (CCS 2016) with early termination: four ring elements hang
//! below each node of the last level, in two blocks. The highest bit of a point says which block, the lowest which
//! half, and the bits between are the path; so each block's elements are neighbours when the whole domain is expanded.
//!
//! AES calls a key: `max(bits - 2, 0) + 1` to evaluate, `2 * max(bits - 2, 0) + 4` to deal.

use crate::hash::{Cipher, LANES, with_cipher};
use crate::tree::{
    self, BLOCK, Deal, LEAF, Shape, Walk, by_bit, check_bits, check_length, check_party, check_range,
    negate_if, parallel, part,
};
use crate::{Block, Result};

/// The widest domain, in bits.
pub const MAX_BITS: u32 = 64;

/// Correction bytes of one key: `16 * bits`.
pub const fn key_bytes(bits: u32) -> usize {
    shape(bits).bytes()
}

/// Deals one key for each `alpha` below `2^bits`. `roots[party]` holds one uniform seed a key.
///
/// # Errors
/// On a width outside `1..=64`, buffers of different lengths, an `alpha` out of range.
pub fn generate(bits: u32, alphas: &[u64], roots: [&[Block]; 2]) -> Result<Vec<u8>> {
    check_bits(bits, MAX_BITS)?;
    let mut keys = vec![0; alphas.len() * key_bytes(bits)];
    generate_into(bits, alphas, roots, &mut keys)?;
    Ok(keys)
}

/// As [`generate`], into a buffer of `alphas.len() * key_bytes(bits)` bytes. A dealer of many batches that uses one buffer
/// again saves the operating system's work on fresh memory, which is several times that of dealing.
///
/// # Errors
/// As [`generate`], and on a buffer of the wrong length.
pub fn generate_into(bits: u32, alphas: &[u64], roots: [&[Block]; 2], keys: &mut [u8]) -> Result<()> {
    with_cipher!(cipher => generate_with(cipher, bits, alphas, roots, keys))
}

/// Evaluates key `i` at `xs[i]`. The parties' results add up to `1{xs[i] == alpha_i}` modulo 2^64.
///
/// # Errors
/// On a width outside `1..=64`, a party that is not 0 or 1, buffers whose lengths disagree, an `x` out of range.
pub fn evaluate(party: usize, bits: u32, roots: &[Block], keys: &[u8], xs: &[u64]) -> Result<Vec<u64>> {
    with_cipher!(cipher => evaluate_with(cipher, party, bits, roots, keys, xs))
}

pub(crate) const fn shape(bits: u32) -> Shape {
    Shape::new(bits, 2)
}

/// Which block of its leaf holds `x`.
fn block(bits: u32, x: u64) -> usize {
    if bits == 1 { 0 } else { (x >> (bits - 1)) as usize }
}

pub(crate) fn generate_with<C: Cipher>(
    cipher: C,
    bits: u32,
    alphas: &[u64],
    roots: [&[Block]; 2],
    keys: &mut [u8],
) -> Result<()> {
    check_bits(bits, MAX_BITS)?;
    tree::deal(
        cipher,
        bits,
        key_bytes(bits),
        alphas,
        roots,
        keys,
        #[inline(always)]
        |deal, range, keys| generate_group(deal, bits, &alphas[range], keys),
    )
}

#[inline(always)]
fn generate_group<C: Cipher>(mut deal: Deal<C>, bits: u32, alphas: &[u64], keys: &mut [u8]) {
    let shape = shape(bits);
    let path = by_bit(alphas);
    for level in 0..shape.levels as usize {
        let cw = deal.descend(path[bits as usize - 2 - level]);
        for (lane, key) in keys.chunks_exact_mut(shape.bytes()).enumerate() {
            key.as_chunks_mut::<BLOCK>().0[level] = cw.0[lane].to_le_bytes();
        }
    }
    for (index, tweak) in LEAF.into_iter().enumerate().take(shape.blocks) {
        let h = deal.hashes(tweak);
        for (lane, key) in keys.chunks_exact_mut(shape.bytes()).enumerate() {
            let here = u64::from(block(bits, alphas[lane]) == index);
            let cw = deal.correct_block(lane, &h, [here & !alphas[lane], here & alphas[lane]]);
            key.as_chunks_mut::<BLOCK>().0[shape.levels as usize + index] = cw.to_le_bytes();
        }
    }
}

pub(crate) fn evaluate_with<C: Cipher>(
    cipher: C,
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    xs: &[u64],
) -> Result<Vec<u64>> {
    check_party(party)?;
    check_bits(bits, MAX_BITS)?;
    check_range("xs", xs, bits)?;
    check_length("roots", roots.len(), xs.len())?;
    let bytes = key_bytes(bits);
    check_length("keys", keys.len(), xs.len() * bytes)?;
    let mut out = vec![0; xs.len()];
    parallel(&mut out, LANES, |group, out| {
        let range = LANES * group..LANES * group + out.len();
        let (roots, xs) = (&roots[range.clone()], &xs[range.clone()]);
        let ahead = part(keys, bytes * range.end, bytes * LANES);
        let keys = &keys[bytes * range.start..bytes * range.end];
        cipher.run(
            #[inline(always)]
            || {
                let lanes = roots.iter().copied().zip(keys.chunks_exact(bytes));
                evaluate_group(
                    Walk::new(cipher, party, lanes, ahead, shape(bits)),
                    party,
                    bits,
                    xs,
                    out,
                );
            },
        );
    });
    Ok(out)
}

#[inline(always)]
fn evaluate_group<C: Cipher>(mut walk: Walk<C>, party: usize, bits: u32, xs: &[u64], out: &mut [u64]) {
    let shape = shape(bits);
    let path = by_bit(xs);
    for level in 0..shape.levels as usize {
        walk.descend(level, path[bits as usize - 2 - level]);
    }
    let h = walk.hashes(xs, |x| LEAF[block(bits, x)]);
    for (lane, (out, x)) in out.iter_mut().zip(xs).enumerate() {
        *out = negate_if(
            party == 1,
            walk.element(lane, &h, shape.levels as usize + block(bits, *x), *x),
        );
    }
}
