//! Table lookup: additive shares in Z_{2^64} of entries of public tables at a secret place.
//!
//! A key is that of a point function over `2^bits` entries ([`crate::dpf`]); the parties expand all of it into shares of
//! the one-hot vector of `alpha` and take inner products with the tables (Boyle, Gilboa, Ishai, CCS 2016; for lookup with
//! a public rotation, Wagh, *Pika*, PETS 2022). To look up `T[x]` for a secret `x`, deal `alpha = -r mod 2^bits`, open
//! `c = x + r mod 2^bits`, and use `c` as the offset: the result is `T[alpha + c] = T[x]`.
//!
//! AES calls a key: `3 * 2^(bits-2) - 1` to look up in any number of tables, `2 * (bits - 2) + 4` to deal
//! (`bits >= 2`).

use crate::hash::{Cipher, LANES, Lanes, half, odd_mask, with_cipher, xor};
use crate::tree::{
    LEAF, check_bits, check_length, check_party, check_range, negate_if, parallel, root, word,
};
use crate::{Block, Result, dpf};

/// The largest table, in bits.
pub const MAX_BITS: u32 = 24;

/// Levels of tree that are expanded for all keys of a group together.
const TOP: usize = 5;

/// Levels that a step takes from there on, breadth first.
const STEP: usize = 5;

/// Seeds of one tree that a step ends with at most: they, their parents and elements fit the cache.
const SEEDS: usize = 1 << (TOP + STEP);

/// Correction bytes of one key: `16 * bits`.
pub const fn key_bytes(bits: u32) -> usize {
    dpf::key_bytes(bits)
}

/// Deals one key for each `alpha` below `2^bits`. `roots[party]` holds one uniform seed a key.
///
/// # Errors
/// On a width outside `1..=24`, buffers of different lengths, an `alpha` out of range.
pub fn generate(bits: u32, alphas: &[u64], roots: [&[Block]; 2]) -> Result<Vec<u8>> {
    check_bits(bits, MAX_BITS)?;
    dpf::generate(bits, alphas, roots)
}

/// As [`generate`], into a buffer of `alphas.len() * key_bytes(bits)` bytes.
///
/// # Errors
/// As [`generate`], and on a buffer of the wrong length.
pub fn generate_into(bits: u32, alphas: &[u64], roots: [&[Block]; 2], keys: &mut [u8]) -> Result<()> {
    check_bits(bits, MAX_BITS)?;
    dpf::generate_into(bits, alphas, roots, keys)
}

/// This party's share of `tables[t][(alpha_i + offsets[i]) mod 2^bits]`, as element `i` of vector `t` of the result.
/// Every table has `2^bits` entries.
///
/// # Errors
/// On a width outside `1..=24`, a party that is not 0 or 1, buffers whose lengths disagree, an offset out of range.
pub fn lookup(
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    offsets: &[u64],
    tables: &[&[u64]],
) -> Result<Vec<Vec<u64>>> {
    with_cipher!(cipher => lookup_with(cipher, party, bits, roots, keys, offsets, tables))
}

pub(crate) fn lookup_with<C: Cipher>(
    cipher: C,
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    offsets: &[u64],
    tables: &[&[u64]],
) -> Result<Vec<Vec<u64>>> {
    check_party(party)?;
    check_bits(bits, MAX_BITS)?;
    check_range("offsets", offsets, bits)?;
    check_length("roots", roots.len(), offsets.len())?;
    let bytes = key_bytes(bits);
    check_length("keys", keys.len(), offsets.len() * bytes)?;
    for table in tables {
        check_length("a table", table.len(), 1 << bits)?;
    }
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    // Key-major at first. Fewer keys a task where each is much work.
    let mut sums = vec![0; offsets.len() * tables.len()];
    let task = ((LANES * SEEDS) >> dpf::shape(bits).levels).clamp(1, LANES);
    parallel(&mut sums, task * tables.len(), |group, sums| {
        let range = task * group..task * group + sums.len() / tables.len();
        let keys = &keys[bytes * range.start..bytes * range.end];
        cipher.run(
            #[inline(always)]
            || {
                lookup_group(
                    cipher,
                    party,
                    bits,
                    &roots[range.clone()],
                    keys,
                    &offsets[range.clone()],
                    tables,
                    sums,
                )
            },
        );
    });
    Ok((0..tables.len())
        .map(|t| sums.iter().skip(t).step_by(tables.len()).copied().collect())
        .collect())
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the arguments of `lookup`, cut to a group"
)]
fn lookup_group<C: Cipher>(
    cipher: C,
    party: usize,
    bits: u32,
    roots: &[Block],
    keys: &[u8],
    offsets: &[u64],
    tables: &[&[u64]],
    sums: &mut [u64],
) {
    let (levels, bytes) = (dpf::shape(bits).levels as usize, key_bytes(bits));
    // The first nodes of a tree are too few to fill the cipher, so those of all keys are expanded together.
    let top = levels.min(TOP);
    let mut nodes = vec![Lanes::ZERO; 1 << top];
    for (lane, seed) in roots.iter().enumerate() {
        nodes[0].0[lane] = root(party, *seed);
    }
    for level in 0..top {
        let mut cw = Lanes::ZERO;
        for (cw, key) in cw.0.iter_mut().zip(keys.chunks_exact(bytes)) {
            *cw = word(key, level);
        }
        for node in (0..1 << level).rev() {
            let (mut left, mut right) = (nodes[node], nodes[node]);
            cipher.descend(&mut left, 0, &cw);
            xor(&mut right.0, &left.0);
            (nodes[2 * node], nodes[2 * node + 1]) = (left, right);
        }
    }
    if levels < TOP {
        sum_small(cipher, bits, &nodes, keys, offsets, tables, sums);
    } else {
        let steps = 1 + (levels - top).saturating_sub(STEP).div_ceil(STEP);
        let mut scratch = vec![0; steps * 2 * SEEDS.min(1 << levels)];
        let mut elements = vec![0; 2 * SEEDS.min(1 << levels)];
        for (lane, (key, sums)) in keys
            .chunks_exact(bytes)
            .zip(sums.chunks_exact_mut(tables.len()))
            .enumerate()
        {
            let mut seeds = [0; 1 << TOP];
            for (seed, node) in seeds.iter_mut().zip(&nodes) {
                *seed = node.0[lane];
            }
            let offset = offsets[lane] as usize;
            let mut tree = Tree {
                cipher,
                bits,
                key,
                offset,
                tables,
                sums,
                elements: &mut elements,
            };
            tree.sum(top, 0, &seeds, &mut scratch);
        }
    }
    sums.iter_mut().for_each(|sum| *sum = negate_if(party == 1, *sum));
}

/// The products of all leaves of trees that are wholly in `nodes`: one node of each key after the other.
#[inline(always)]
fn sum_small<C: Cipher>(
    cipher: C,
    bits: u32,
    nodes: &[Lanes],
    keys: &[u8],
    offsets: &[u64],
    tables: &[&[u64]],
    sums: &mut [u64],
) {
    let shape = dpf::shape(bits);
    for (block, tweak) in LEAF.into_iter().enumerate().take(shape.blocks) {
        for (node, seeds) in nodes.iter().enumerate() {
            let mut h = Lanes([tweak; LANES]);
            xor(&mut h.0, &seeds.0);
            cipher.hash(&mut h);
            let lanes = keys
                .chunks_exact(shape.bytes())
                .zip(offsets)
                .zip(sums.chunks_exact_mut(tables.len()));
            for (((key, offset), sums), (seed, h)) in lanes.zip(seeds.0.iter().zip(h.0)) {
                let cw = word(key, shape.levels as usize + block) & odd_mask(*seed);
                let start = (block << (bits - 1)) + 2 * node + *offset as usize;
                for x in [0, 1] {
                    let element = half(h, x).wrapping_add(half(cw, x));
                    let place = (start + x as usize) & ((1 << bits) - 1);
                    for (sum, table) in sums.iter_mut().zip(tables) {
                        *sum = sum.wrapping_add(element.wrapping_mul(table[place]));
                    }
                }
            }
        }
    }
}

/// One key's tree, with what is to be done with its leaves.
struct Tree<'a, C> {
    cipher: C,
    bits: u32,
    key: &'a [u8],
    offset: usize,
    tables: &'a [&'a [u64]],
    sums: &'a mut [u64],
    elements: &'a mut [u64],
}

impl<C: Cipher> Tree<'_, C> {
    /// Adds the products of all leaves below the nodes `first, first + 1, ..` of a level.
    fn sum(&mut self, level: usize, first: usize, nodes: &[Block], scratch: &mut [Block]) {
        let levels = dpf::shape(self.bits).levels as usize;
        let (mut seeds, scratch) = scratch.split_at_mut(SEEDS.min(1 << levels));
        let (mut children, scratch) = scratch.split_at_mut(seeds.len());
        let (mut level, mut first, mut width) = (level, first, nodes.len());
        seeds[..width].copy_from_slice(nodes);
        while level < levels && width < SEEDS {
            self.cipher
                .expand(word(self.key, level), &seeds[..width], &mut children[..2 * width]);
            std::mem::swap(&mut seeds, &mut children);
            (level, first, width) = (level + 1, 2 * first, 2 * width);
        }
        if level < levels {
            for (i, part) in seeds.chunks(1 << TOP).enumerate() {
                self.sum(level, first + (i << TOP), part, scratch);
            }
            return;
        }
        let elements = &mut self.elements[..2 * width];
        for (block, tweak) in LEAF.into_iter().enumerate().take(dpf::shape(self.bits).blocks) {
            self.cipher
                .leaves(tweak, word(self.key, levels + block), &seeds[..width], elements);
            let start = (block << (self.bits - 1)) + 2 * first + self.offset;
            for (sum, table) in self.sums.iter_mut().zip(self.tables) {
                let (wrapped, ahead) = table.split_at(start & (table.len() - 1));
                let cut = elements.len().min(ahead.len());
                let product = self.cipher.dot(&elements[..cut], &ahead[..cut]);
                let rest = self
                    .cipher
                    .dot(&elements[cut..], &wrapped[..elements.len() - cut]);
                *sum = sum.wrapping_add(product).wrapping_add(rest);
            }
        }
    }
}
