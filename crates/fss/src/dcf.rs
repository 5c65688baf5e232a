//! Distributed comparison function: additive shares in Z_{2^64} of `beta * 1{x < alpha}`, at many points a key.
//!
//! After Boyle et al. (*Function Secret Sharing for Mixed-Mode and Fixed-Point Secure Computation*, Eurocrypt 2021): the
//! shares along the path to `x` add up. Here node `j` on the path to `alpha` carries the value
//! `beta * (alpha_j - alpha_{j-1})` (bits from the top, `alpha_{-1} = 0`) and every other node carries zero, so that an
//! `x` which leaves the path at bit `j` has collected `beta * alpha_j`. Four ring elements hang below each node of the
//! last level, for the last two bits.
//!
//! A key of a pair carries two payloads at once: the second takes the half of each inner node's hash that the first leaves,
//! and blocks of its own below the last level.
//!
//! AES calls: `2 * max(bits - 2, 0) + 1` a point, one more for a pair, `4 * max(bits - 2, 0) + 4` to deal a key.

use crate::hash::{Cipher, LANES, Lanes, with_cipher};
use crate::tree::{
    self, BLOCK, Deal, LEAF, Shape, Walk, by_bit, check_bits, check_length, check_party, check_range,
    negate_if, parallel, part,
};
use crate::{Block, Result};

/// The widest domain, in bits.
pub const MAX_BITS: u32 = 64;

const WORD: usize = 8;

/// Correction bytes of one key: `24 * (bits - 2) + 32` for `bits >= 2`, and 16 for one bit.
pub const fn key_bytes(bits: u32) -> usize {
    bytes::<1>(bits)
}

/// Correction bytes of one key of a pair: `32 * (bits - 2) + 64` for `bits >= 2`, and 32 for one bit.
pub const fn pair_key_bytes(bits: u32) -> usize {
    bytes::<2>(bits)
}

const fn bytes<const W: usize>(bits: u32) -> usize {
    let shape = shape(bits);
    values::<W>(bits) + W * WORD * shape.levels as usize
}

/// Where the corrections of the inner nodes' values start: after those of the tree and of each payload's leaf.
const fn values<const W: usize>(bits: u32) -> usize {
    let shape = shape(bits);
    shape.bytes() + BLOCK * (W - 1) * shape.blocks
}

/// Deals one key for each `alpha` below `2^bits`, with the payload `beta`. `roots[party]` holds one uniform seed a key.
///
/// # Errors
/// On a width outside `1..=64`, buffers of different lengths, an `alpha` out of range.
pub fn generate(bits: u32, alphas: &[u64], betas: &[u64], roots: [&[Block]; 2]) -> Result<Vec<u8>> {
    check_bits(bits, MAX_BITS)?;
    let mut keys = vec![0; alphas.len() * key_bytes(bits)];
    generate_into(bits, alphas, betas, roots, &mut keys)?;
    Ok(keys)
}

/// As [`generate`], into a buffer of `alphas.len() * key_bytes(bits)` bytes. A dealer of many batches that uses one buffer
/// again saves the operating system's work on fresh memory, which is several times that of dealing.
///
/// # Errors
/// As [`generate`], and on a buffer of the wrong length.
pub fn generate_into(
    bits: u32,
    alphas: &[u64],
    betas: &[u64],
    roots: [&[Block]; 2],
    keys: &mut [u8],
) -> Result<()> {
    with_cipher!(cipher => generate_with(cipher, bits, alphas, betas.as_chunks::<1>().0, roots, keys))
}

/// As [`generate_into`], with two payloads a key and `alphas.len() * pair_key_bytes(bits)` bytes.
///
/// # Errors
/// As [`generate_into`].
pub fn generate_pairs_into(
    bits: u32,
    alphas: &[u64],
    betas: &[[u64; 2]],
    roots: [&[Block]; 2],
    keys: &mut [u8],
) -> Result<()> {
    with_cipher!(cipher => generate_with(cipher, bits, alphas, betas, roots, keys))
}

/// Evaluates key `i` at `xs[i * points_per_key..][..points_per_key]`. The parties' results, in the order of `xs`, add up
/// to `beta_i * 1{x < alpha_i}` modulo 2^64.
///
/// # Errors
/// On a width outside `1..=64`, a party that is not 0 or 1, buffers whose lengths disagree, an `x` out of range.
pub fn evaluate(
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    points_per_key: usize,
    xs: &[u64],
) -> Result<Vec<u64>> {
    with_cipher!(cipher => {
        let shares = evaluate_with::<_, 1>(cipher, party, bits, roots, keys, points_per_key, xs);
        shares.map(Vec::into_flattened)
    })
}

/// As [`evaluate`], for keys of pairs: both payloads' shares at each point.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_pairs(
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    points_per_key: usize,
    xs: &[u64],
) -> Result<Vec<[u64; 2]>> {
    with_cipher!(cipher => evaluate_with(cipher, party, bits, roots, keys, points_per_key, xs))
}

const fn shape(bits: u32) -> Shape {
    Shape::new(bits, 2)
}

/// Which block of its leaf holds `x`.
fn block(x: u64) -> usize {
    (x >> 1 & 1) as usize
}

/// The half of an inner node's hash that payload `w` takes.
#[inline(always)]
fn inner(h: Block, w: usize) -> u64 {
    (h >> (64 * w)) as u64
}

/// Added to a seed before it is hashed into block `block` of payload `w`'s leaf.
#[inline(always)]
fn tweak(w: usize, block: usize) -> Block {
    LEAF[block] << (2 * w)
}

pub(crate) fn generate_with<C: Cipher, const W: usize>(
    cipher: C,
    bits: u32,
    alphas: &[u64],
    betas: &[[u64; W]],
    roots: [&[Block]; 2],
    keys: &mut [u8],
) -> Result<()> {
    check_bits(bits, MAX_BITS)?;
    check_length("betas", betas.len(), alphas.len())?;
    tree::deal(
        cipher,
        bits,
        bytes::<W>(bits),
        alphas,
        roots,
        keys,
        #[inline(always)]
        |deal, range, keys| generate_group(deal, bits, &alphas[range.clone()], &betas[range], keys),
    )
}

#[inline(always)]
fn generate_group<C: Cipher, const W: usize>(
    mut deal: Deal<C>,
    bits: u32,
    alphas: &[u64],
    betas: &[[u64; W]],
    keys: &mut [u8],
) {
    let shape = shape(bits);
    let path = by_bit(alphas);
    // What the path to alpha has collected so far.
    let mut sums = [[0; W]; LANES];
    for level in 0..shape.levels as usize {
        let right = path[bits as usize - 1 - level];
        let h = deal.hashes(LEAF[0]);
        for (lane, key) in keys.chunks_exact_mut(bytes::<W>(bits)).enumerate() {
            let key = key[values::<W>(bits)..].as_chunks_mut::<WORD>().0;
            for w in 0..W {
                let target = betas[lane][w] & (right >> lane & 1).wrapping_neg();
                let (h0, h1) = (inner(h[0].0[lane], w), inner(h[1].0[lane], w));
                let cw = deal.correct(lane, h0, h1, target.wrapping_sub(sums[lane][w]));
                key[W * level + w] = cw.to_le_bytes();
                sums[lane][w] = target;
            }
        }
        let cw = deal.descend(right);
        for (lane, key) in keys.chunks_exact_mut(bytes::<W>(bits)).enumerate() {
            key.as_chunks_mut::<BLOCK>().0[level] = cw.0[lane].to_le_bytes();
        }
    }
    for (w, index) in (0..W).flat_map(|w| (0..shape.blocks).map(move |index| (w, index))) {
        let h = deal.hashes(tweak(w, index));
        for (lane, key) in keys.chunks_exact_mut(bytes::<W>(bits)).enumerate() {
            let value = |x: u64| {
                let below = u64::from(x < alphas[lane] & 3).wrapping_neg();
                (betas[lane][w] & below).wrapping_sub(sums[lane][w])
            };
            let cw = deal.correct_block(lane, &h, [value(2 * index as u64), value(2 * index as u64 + 1)]);
            let place = shape.levels as usize + w * shape.blocks + index;
            key.as_chunks_mut::<BLOCK>().0[place] = cw.to_le_bytes();
        }
    }
}

pub(crate) fn evaluate_with<C: Cipher, const W: usize>(
    cipher: C,
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    points_per_key: usize,
    xs: &[u64],
) -> Result<Vec<[u64; W]>> {
    check_party(party)?;
    check_bits(bits, MAX_BITS)?;
    check_range("xs", xs, bits)?;
    check_length("xs", xs.len(), roots.len().saturating_mul(points_per_key))?;
    let bytes = bytes::<W>(bits);
    check_length("keys", keys.len(), roots.len() * bytes)?;
    let mut out = vec![[0; W]; xs.len()];
    if points_per_key >= MANY {
        parallel(&mut out, points_per_key, |i, out| {
            let (xs, key) = (
                &xs[points_per_key * i..][..points_per_key],
                &keys[bytes * i..][..bytes],
            );
            cipher.run(
                #[inline(always)]
                || evaluate_key(OneKey::new(cipher, party, bits, roots[i], key), party, xs, out),
            );
        });
        return Ok(out);
    }
    parallel(&mut out, LANES, |group, out| {
        let first = LANES * group;
        let xs = &xs[first..first + out.len()];
        let lanes = (first..first + out.len())
            .map(|i| i / points_per_key)
            .map(|key| (roots[key], &keys[bytes * key..bytes * (key + 1)]));
        let ahead = part(
            keys,
            bytes * ((first + out.len()) / points_per_key),
            bytes * LANES.div_ceil(points_per_key),
        );
        cipher.run(
            #[inline(always)]
            || {
                evaluate_group(
                    Walk::new(cipher, party, lanes, ahead, shape(bits)),
                    party,
                    bits,
                    xs,
                    out,
                )
            },
        );
    });
    Ok(out)
}

#[inline(always)]
fn evaluate_group<C: Cipher, const W: usize>(
    mut walk: Walk<C>,
    party: usize,
    bits: u32,
    xs: &[u64],
    out: &mut [[u64; W]],
) {
    let shape = shape(bits);
    let path = by_bit(xs);
    for level in 0..shape.levels as usize {
        let h = walk.hashes(xs, |_| LEAF[0]);
        for (lane, out) in out.iter_mut().enumerate() {
            for (w, out) in out.iter_mut().enumerate() {
                let place = values::<W>(bits) + WORD * (W * level + w);
                *out = out
                    .wrapping_add(inner(h.0[lane], w))
                    .wrapping_add(walk.value(lane, place));
            }
        }
        walk.descend(level, path[bits as usize - 1 - level]);
    }
    for w in 0..W {
        let h = walk.hashes(xs, |x| tweak(w, block(x)));
        for (lane, (out, x)) in out.iter_mut().zip(xs).enumerate() {
            let place = shape.levels as usize + w * shape.blocks + block(*x);
            let leaf = walk.element(lane, &h, place, *x);
            out[w] = negate_if(party == 1, out[w].wrapping_add(leaf));
        }
    }
}

/// From how many points a key on they are walked to key by key: a part of the lanes then has nothing to do.
const MANY: usize = LANES / 2;

/// One key at any number of points, with the key's corrections in all lanes. As far down as the paths to points that follow each
/// other have no more than [`LANES`] different beginnings, only these are walked. The points are public.
#[inline(always)]
fn evaluate_key<C: Cipher, const W: usize>(
    start: OneKey<C, W>,
    party: usize,
    xs: &[u64],
    out: &mut [[u64; W]],
) {
    let (bits, shape) = (start.bits, shape(start.bits));
    // How many points part from the one before at each level.
    let mut parting = [0; MAX_BITS as usize + 1];
    for pair in xs.windows(2) {
        let same = (pair[0] ^ pair[1]).leading_zeros() + bits - u64::BITS;
        parting[same as usize] += 1;
    }
    let (mut shared, mut heads) = (0, 1);
    while shared < shape.levels as usize && heads + parting[shared] <= LANES {
        heads += parting[shared];
        shared += 1;
    }
    let parts = |a: u64, b: u64| (a ^ b).checked_shr(bits - shared as u32).unwrap_or(0) != 0;
    let mut firsts = [xs[0]; LANES];
    let mut head = 0;
    for pair in xs.windows(2) {
        head += usize::from(parts(pair[0], pair[1]));
        firsts[head] = pair[1];
    }
    let mut top = start;
    top.walk(0..shared, &by_bit(&firsts));
    head = 0;
    let mut before = xs[0];
    for (xs, out) in xs.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let mut rest = top;
        for (lane, x) in xs.iter().enumerate() {
            head += usize::from(parts(before, *x));
            before = *x;
            rest.seeds.0[lane] = top.seeds.0[head];
            rest.sums[lane] = top.sums[head];
        }
        rest.walk(shared..shape.levels as usize, &by_bit(xs));
        rest.finish(party, xs, out);
    }
}

/// Up to [`LANES`] points of one key, on their ways.
#[derive(Clone, Copy)]
struct OneKey<'a, C, const W: usize> {
    cipher: C,
    bits: u32,
    /// Corrections of seeds and leaves, and of inner nodes' values.
    blocks: &'a [[u8; BLOCK]],
    words: &'a [[u8; WORD]],
    seeds: Lanes,
    /// What each path has collected.
    sums: [[u64; 2]; LANES],
}

impl<'a, C: Cipher, const W: usize> OneKey<'a, C, W> {
    #[inline(always)]
    fn new(cipher: C, party: usize, bits: u32, root: Block, key: &'a [u8]) -> Self {
        OneKey {
            cipher,
            bits,
            blocks: key.as_chunks().0,
            words: key[values::<W>(bits)..].as_chunks().0,
            seeds: Lanes([tree::root(party, root); LANES]),
            sums: [[0; 2]; LANES],
        }
    }

    #[inline(always)]
    fn block(&self, index: usize) -> Block {
        Block::from_le_bytes(self.blocks[index])
    }

    #[inline(always)]
    fn walk(&mut self, levels: std::ops::Range<usize>, path: &[u64; LANES]) {
        let mut shares = [[0; 2]; LANES];
        for level in levels {
            let value = |w: usize| Block::from(u64::from_le_bytes(self.words[W * level + w])) << (64 * w);
            let cw = (0..W).fold(0, |cw, w| cw | value(w));
            self.cipher
                .leaves(LEAF[0], cw, &self.seeds.0, shares.as_flattened_mut());
            for (sum, share) in self.sums.as_flattened_mut().iter_mut().zip(shares.as_flattened()) {
                *sum = sum.wrapping_add(*share);
            }
            let cw = Lanes([self.block(level); LANES]);
            self.cipher
                .descend(&mut self.seeds, path[self.bits as usize - 1 - level], &cw);
        }
    }

    #[inline(always)]
    fn finish(&self, party: usize, xs: &[u64], out: &mut [[u64; W]]) {
        let shape = shape(self.bits);
        let mut shares = [[0; 2]; LANES];
        for (w, index) in (0..W).flat_map(|w| (0..shape.blocks).map(move |index| (w, index))) {
            let cw = self.block(shape.levels as usize + w * shape.blocks + index);
            self.cipher
                .leaves(tweak(w, index), cw, &self.seeds.0, shares.as_flattened_mut());
            for (((out, x), sum), share) in out.iter_mut().zip(xs).zip(&self.sums).zip(&shares) {
                if block(*x) == index {
                    out[w] = negate_if(party == 1, sum[w].wrapping_add(share[(x & 1) as usize]));
                }
            }
        }
    }
}
