//! Comparison: XOR shares of the bit `1{x < alpha}`.
//!
//! A point function's tree suffices (Gupta et al., *SIGMA*, PETS 2024): on every node the control bits of the parties
//! differ exactly where `alpha` lies below it. Where `x` goes left, the right sibling's control bit is that of the parent
//! plus that of the left child, so the path to `x` alone tells whether `alpha` lies anywhere to its right. The last eight
//! bits are compared by a leaf of 256 bits, which holds `1{j < alpha mod 256}`.
//!
//! AES calls a key: `max(bits - 8, 0) + 1` to evaluate, `2 * max(bits - 8, 0) + 4` to deal.

use crate::hash::{Cipher, LANES, with_cipher};
use crate::tree::{
    self, BLOCK, Deal, LEAF, Shape, Walk, by_bit, check_bits, check_length, check_party, check_range,
    parallel, part,
};
use crate::{Block, Result};

/// The widest domain, in bits.
pub const MAX_BITS: u32 = 64;

const LEAF_BITS: u32 = 8;

/// Words of output a task: enough work to be worth a thread.
const TASK: usize = 16;

/// Correction bytes of one key: `16 * (bits - 6)` for `bits >= 7`, and 16 below.
pub const fn key_bytes(bits: u32) -> usize {
    Shape::new(bits, LEAF_BITS).bytes()
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

/// Evaluates key `i` at `xs[i]`. Bit `i % 64` of word `i / 64` of the result is this party's share; the bits beyond the
/// last key are zero.
///
/// # Errors
/// On a width outside `1..=64`, a party that is not 0 or 1, buffers whose lengths disagree, an `x` out of range.
pub fn evaluate(party: usize, bits: u32, roots: &[Block], keys: &[u8], xs: &[u64]) -> Result<Vec<u64>> {
    with_cipher!(cipher => evaluate_with(cipher, party, bits, roots, keys, xs))
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
    let shape = Shape::new(bits, LEAF_BITS);
    let path = by_bit(alphas);
    for level in 0..shape.levels as usize {
        let cw = deal.descend(path[bits as usize - 1 - level]);
        for (lane, key) in keys.chunks_exact_mut(shape.bytes()).enumerate() {
            key.as_chunks_mut::<BLOCK>().0[level] = cw.0[lane].to_le_bytes();
        }
    }
    for (block, tweak) in LEAF.into_iter().enumerate().take(shape.blocks) {
        let h = deal.hashes(tweak);
        for (lane, key) in keys.chunks_exact_mut(shape.bytes()).enumerate() {
            let below = first_ones((alphas[lane] & 0xff).saturating_sub(128 * block as u64));
            let cw = h[0].0[lane] ^ h[1].0[lane] ^ below;
            key.as_chunks_mut::<BLOCK>().0[shape.levels as usize + block] = cw.to_le_bytes();
        }
    }
}

/// The block whose lowest `count` bits are set, all of them for 128 and more.
fn first_ones(count: u64) -> Block {
    Block::MAX
        .checked_shl(count as u32)
        .map_or(Block::MAX, |ones| !ones)
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
    let shape = Shape::new(bits, LEAF_BITS);
    let mut out = vec![0; xs.len().div_ceil(LANES)];
    parallel(&mut out, TASK, |task, out| {
        for (i, out) in out.iter_mut().enumerate() {
            let first = LANES * (TASK * task + i);
            let range = first..xs.len().min(first + LANES);
            let (roots, xs) = (&roots[range.clone()], &xs[range.clone()]);
            let ahead = part(keys, bytes * range.end, bytes * LANES);
            let keys = &keys[bytes * range.start..bytes * range.end];
            *out = cipher.run(
                #[inline(always)]
                || {
                    let lanes = roots.iter().copied().zip(keys.chunks_exact(bytes));
                    evaluate_group(Walk::new(cipher, party, lanes, ahead, shape), bits, xs)
                },
            );
        }
    });
    Ok(out)
}

#[inline(always)]
fn evaluate_group<C: Cipher>(mut walk: Walk<C>, bits: u32, xs: &[u64]) -> u64 {
    let shape = Shape::new(bits, LEAF_BITS);
    let path = by_bit(xs);
    let mut shares = 0;
    for level in 0..shape.levels as usize {
        let (above, right) = (walk.t, path[bits as usize - 1 - level]);
        walk.descend(level, right);
        shares ^= (above ^ walk.t) & !right;
    }
    let block = |x: u64| (x >> 7 & 1) as usize;
    let h = walk.hashes(xs, |x| LEAF[block(x)]);
    for (lane, x) in xs.iter().enumerate() {
        let leaf = h.0[lane] ^ walk.correction(lane, shape.levels as usize + block(*x));
        shares ^= ((leaf >> (x & 127)) as u64 & 1) << lane;
    }
    shares & (u64::MAX >> (LANES - xs.len()))
}
