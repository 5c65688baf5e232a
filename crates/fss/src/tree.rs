//! The tree that every gate shares: how a domain is split, how a dealer and how an evaluator walk it.

use crate::hash::{Cipher, LANES, Lanes, half, odd_mask};
use crate::{Block, Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Added to a seed before it is hashed into block 0 or 1 of its leaf. Inner nodes hash the seed itself.
pub(crate) const LEAF: [Block; 2] = [2, 4];

/// Bytes of a block.
pub(crate) const BLOCK: usize = 16;

/// How a domain of `2^bits` points is split into `levels` of tree and leaves of one or two blocks.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) levels: u32,
    pub(crate) blocks: usize,
}

impl Shape {
    /// `leaf_bits`: the logarithm of the entries that two blocks of leaf hold.
    pub(crate) const fn new(bits: u32, leaf_bits: u32) -> Self {
        Self {
            levels: bits.saturating_sub(leaf_bits),
            blocks: if bits < leaf_bits { 1 } else { 2 },
        }
    }

    /// Bytes of the correction words of tree and leaf.
    pub(crate) const fn bytes(self) -> usize {
        BLOCK * (self.levels as usize + self.blocks)
    }
}

/// Checks a dealer's arguments and cuts them into groups of up to [`LANES`] keys for `group`, which fills its keys.
#[inline(always)]
pub(crate) fn deal<C: Cipher>(
    cipher: C,
    bits: u32,
    bytes: usize,
    alphas: &[u64],
    roots: [&[Block]; 2],
    keys: &mut [u8],
    group: impl Fn(Deal<C>, Range<usize>, &mut [u8]) + Send + Sync,
) -> Result<()> {
    check_range("alphas", alphas, bits)?;
    check_length("roots of party 0", roots[0].len(), alphas.len())?;
    check_length("roots of party 1", roots[1].len(), alphas.len())?;
    check_length("keys", keys.len(), alphas.len() * bytes)?;
    parallel(keys, LANES * bytes, |index, keys| {
        let range = LANES * index..LANES * index + keys.len() / bytes;
        cipher.run(
            #[inline(always)]
            || {
                let deal = Deal::new(cipher, roots.map(|roots| &roots[range.clone()]));
                group(deal, range, keys);
            },
        );
    });
    Ok(())
}

/// The dealer's walk along the path to `alpha`, for up to [`LANES`] keys.
pub(crate) struct Deal<C> {
    cipher: C,
    /// What the parties' seeds on the path differ by.
    delta: Lanes,
    /// Party 0's seed on the path.
    seed: Lanes,
}

impl<C: Cipher> Deal<C> {
    #[inline(always)]
    fn new(cipher: C, roots: [&[Block]; 2]) -> Self {
        let mut deal = Self {
            cipher,
            delta: Lanes::ZERO,
            seed: Lanes::ZERO,
        };
        for (lane, (r0, r1)) in roots[0].iter().zip(roots[1]).enumerate() {
            deal.seed.0[lane] = root(0, *r0);
            deal.delta.0[lane] = root(0, *r0) ^ root(1, *r1);
        }
        deal
    }

    /// One level down, to the right where `alpha` has its bit set. Returns the correction words.
    #[inline(always)]
    pub(crate) fn descend(&mut self, alpha: u64) -> Lanes {
        self.cipher.deal(&mut self.seed, &self.delta, alpha)
    }

    /// What each party gets from hashing its seed under `tweak`.
    #[inline(always)]
    pub(crate) fn hashes(&self, tweak: Block) -> [Lanes; 2] {
        let mut h = [Lanes::ZERO; 2];
        for lane in 0..LANES {
            h[0].0[lane] = self.seed.0[lane] ^ tweak;
            h[1].0[lane] = h[0].0[lane] ^ self.delta.0[lane];
        }
        self.cipher.hash(&mut h[0]);
        self.cipher.hash(&mut h[1]);
        h
    }

    /// The correction that makes the parties' additive shares, made from their hashes `h0` and `h1`, add up to `value`.
    #[inline(always)]
    pub(crate) fn correct(&self, lane: usize, h0: u64, h1: u64, value: u64) -> u64 {
        // Exactly one party adds it; where that is party 1, it counts negative.
        negate_if(
            self.seed.0[lane] & 1 == 0,
            value.wrapping_sub(h0).wrapping_add(h1),
        )
    }

    /// As [`Deal::correct`], for the two elements of a block.
    #[inline(always)]
    pub(crate) fn correct_block(&self, lane: usize, h: &[Lanes; 2], values: [u64; 2]) -> Block {
        let cw = |i| {
            Block::from(self.correct(
                lane,
                half(h[0].0[lane], i),
                half(h[1].0[lane], i),
                values[i as usize],
            ))
        };
        cw(0) | cw(1) << 64
    }
}

/// An evaluator's walk towards a point, for up to [`LANES`] pairs of key and point.
pub(crate) struct Walk<'a, C> {
    cipher: C,
    keys: [&'a [u8]; LANES],
    lanes: usize,
    seed: Lanes,
    cw: Lanes,
    /// The keys that will be wanted next, to be fetched during this walk.
    ahead: std::slice::Chunks<'a, u8>,
    /// The seeds' lowest bits: the parties' differ on the path to `alpha`, and only there.
    pub(crate) t: u64,
}

impl<'a, C: Cipher> Walk<'a, C> {
    #[inline(always)]
    pub(crate) fn new(
        cipher: C,
        party: usize,
        lanes: impl Iterator<Item = (Block, &'a [u8])>,
        ahead: &'a [u8],
        shape: Shape,
    ) -> Self {
        let t = (party as u64).wrapping_neg();
        let mut walk = Self {
            cipher,
            keys: [&[]; LANES],
            lanes: 0,
            seed: Lanes::ZERO,
            cw: Lanes::ZERO,
            ahead: ahead.chunks(ahead.len().div_ceil(shape.levels.max(1) as usize).max(1)),
            t,
        };
        for (seed, key) in lanes.take(LANES) {
            walk.seed.0[walk.lanes] = root(party, seed);
            walk.keys[walk.lanes] = key;
            walk.lanes += 1;
        }
        walk
    }

    /// One level down by correction word `level`, to the right where the point has its bit set.
    #[inline(always)]
    pub(crate) fn descend(&mut self, level: usize, right: u64) {
        for lane in 0..self.lanes {
            self.cw.0[lane] = word(self.keys[lane], level);
        }
        // Keys are read once, and memory is slower than AES.
        self.cipher.prefetch(self.ahead.next().unwrap_or_default());
        self.t = self.cipher.descend(&mut self.seed, right, &self.cw);
    }

    /// Every lane's seed, hashed under the tweak of its point.
    #[inline(always)]
    pub(crate) fn hashes(&self, points: &[u64], tweak: impl Fn(u64) -> Block) -> Lanes {
        let mut h = self.seed;
        for (h, x) in h.0.iter_mut().zip(points) {
            *h ^= tweak(*x);
        }
        self.cipher.hash(&mut h);
        h
    }

    /// The ring element that half `x % 2` of the hash makes with block `index` of the key. Party 1 negates it.
    #[inline(always)]
    pub(crate) fn element(&self, lane: usize, h: &Lanes, index: usize, x: u64) -> u64 {
        half(h.0[lane], x).wrapping_add(half(self.correction(lane, index), x))
    }

    /// Correction word `index` of a lane where its seed is odd, else zero.
    #[inline(always)]
    pub(crate) fn correction(&self, lane: usize, index: usize) -> Block {
        word(self.keys[lane], index) & odd_mask(self.seed.0[lane])
    }

    /// The 64-bit correction at byte `offset` of a lane's key where its seed is odd, else zero.
    #[inline(always)]
    pub(crate) fn value(&self, lane: usize, offset: usize) -> u64 {
        let word = self.keys[lane][offset..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        word & odd_mask(self.seed.0[lane]) as u64
    }
}

/// The bytes of the group of `len` bytes that starts at `start`, as far as they exist.
#[inline(always)]
pub(crate) fn part(keys: &[u8], start: usize, len: usize) -> &[u8] {
    let start = start.min(keys.len());
    &keys[start..keys.len().min(start + len)]
}

/// A root with the party's control bit in place.
pub(crate) fn root(party: usize, root: Block) -> Block {
    (root & !1) | party as Block
}

/// `-x` or `x`, in constant time.
#[inline(always)]
pub(crate) fn negate_if(negate: bool, x: u64) -> u64 {
    let minus = u64::from(negate).wrapping_neg();
    (x ^ minus).wrapping_sub(minus)
}

/// Block `index` of a key.
#[inline(always)]
pub(crate) fn word(key: &[u8], index: usize) -> Block {
    Block::from_le_bytes(key.as_chunks::<BLOCK>().0[index])
}

/// Turns up to 64 points into words by bit: bit `lane` of word `b` is bit `b` of `points[lane]`.
#[inline(always)]
pub(crate) fn by_bit(points: &[u64]) -> [u64; LANES] {
    let mut a = [0; LANES];
    a[..points.len()].copy_from_slice(points);
    // Swaps ever smaller off-diagonal squares (Warren, Hacker's Delight, section 7-3).
    let (mut half, mut mask) = (32, u64::from(u32::MAX));
    while half > 0 {
        for square in a.chunks_exact_mut(2 * half) {
            let (top, bottom) = square.split_at_mut(half);
            for (a, b) in top.iter_mut().zip(bottom) {
                let swap = ((*a >> half) ^ *b) & mask;
                *a ^= swap << half;
                *b ^= swap;
            }
        }
        half /= 2;
        mask ^= mask << half;
    }
    a
}

/// Calls `f` with the index and the content of each chunk, on all threads of the current pool.
pub(crate) fn parallel<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    if rayon::current_num_threads() == 1 || out.len() <= chunk {
        out.chunks_mut(chunk).enumerate().for_each(|(i, part)| f(i, part));
    } else {
        out.par_chunks_mut(chunk)
            .enumerate()
            .for_each(|(i, part)| f(i, part));
    }
}

pub(crate) fn check_bits(bits: u32, max: u32) -> Result<()> {
    if (1..=max).contains(&bits) {
        Ok(())
    } else {
        Err(Error::Bits { bits, max })
    }
}

pub(crate) fn check_party(party: usize) -> Result<()> {
    if party < 2 {
        Ok(())
    } else {
        Err(Error::Party(party))
    }
}

pub(crate) fn check_length(what: &'static str, actual: usize, expected: usize) -> Result<()> {
    if actual == expected {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            actual,
        })
    }
}

pub(crate) fn check_range(what: &'static str, values: &[u64], bits: u32) -> Result<()> {
    match values.iter().position(|x| x.checked_shr(bits).unwrap_or(0) != 0) {
        None => Ok(()),
        Some(index) => Err(Error::Range { what, index, bits }),
    }
}
