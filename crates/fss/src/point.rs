//! Private selection: XOR shares of the one-hot vector of a secret index, over a domain of any size.
//!
//! A client deals one [`Key`] to each of two servers; each expands its own into one bit for every point, and the servers'
//! bits differ at `index` alone. Where both hold the same table `R` of ring elements,
//!
//! ```text
//! sum_j bits0[j] * R[j] - sum_j bits1[j] * R[j] = sign * R[index]
//! ```
//!
//! with a `sign` of 1 or -1 that only the client knows ([`sign`]): which server's bit is set at `index` is pseudorandom.
//!
//! # Construction
//! A distributed point function with early termination (Boyle, Gilboa, Ishai, Eurocrypt 2015 and CCS 2016) on the tree that
//! the crate describes (Guo et al., *Half-Tree*, Eurocrypt 2023). Two blocks of 128 one-bit leaves hang below each node of
//! the last level. Unlike the crate's other keys, these carry their root: no PRG is shared with the client.
//!
//! # Secrecy
//! A key shows the domain, which is public, and nothing of `index`: all but its party bit is computationally uniform,
//! under the crate's assumption, as long as the other key is unknown. Both keys together are the index. Integrity is not
//! promised: a client may deal keys of anything.
//!
//! AES calls for `bits = log2(domain)`, rounded up: `3 * 2^(bits - 8) - 1` to expand a key, `2 * (bits - 8) + 4` to deal
//! (`bits >= 8`).
//!
//! # Example
//! ```
//! use veiltune_fss::point::{self, Key};
//! # fn main() -> veiltune_fss::Result<()> {
//! let (index, table) = (3, [10i64, 20, 30, 40, 50]);
//! // In truth, fresh uniform blocks from a cryptographic PRG.
//! let keys = point::generate(index, table.len(), [0x5eed_0001, 0x5eed_0002])?;
//! let sums = [0, 1].map(|server| {
//!     let key = Key::from_bytes(server, table.len(), &keys[server].to_bytes()).expect("as dealt");
//!     let bits = key.bits();
//!     (0..table.len()).filter(|j| bits[j / 64] >> (j % 64) & 1 == 1).map(|j| table[j]).sum::<i64>()
//! });
//! assert_eq!(point::sign(&keys, index)? * (sums[0] - sums[1]), 40);
//! # Ok(())
//! # }
//! ```

use std::fmt;

use crate::hash::{Cipher, half, odd_mask, with_cipher};
use crate::tree::{
    self, BLOCK, Deal, LEAF, Shape, by_bit, check_bits, check_length, check_party, root, word,
};
use crate::{Block, Error, Result};

/// The largest domain, in bits: an expansion takes 2 MiB, and 5 MiB while it is made.
pub const MAX_BITS: u32 = 24;

const LEAF_BITS: u32 = 8;

/// One server's key. `Debug` does not show its content.
#[derive(Clone)]
pub struct Key {
    domain: usize,
    /// The root, whose lowest bit is the party, then the correction words.
    bytes: Vec<u8>,
}

/// Bytes of a key over `domain` points: `16 * (bits - 5)` where that many points take `bits >= 7` bits, and 32 below.
///
/// # Errors
/// On a domain that is empty or has more than `2^24` points.
pub fn key_bytes(domain: usize) -> Result<usize> {
    Ok(BLOCK + shape(domain)?.bytes())
}

/// Deals the keys of both servers for the point `index` of `domain`. The roots must be uniform, secret and never used for
/// another key.
///
/// # Errors
/// On a domain that is empty or has more than `2^24` points, and on an index outside it.
pub fn generate(index: usize, domain: usize, roots: [Block; 2]) -> Result<[Key; 2]> {
    with_cipher!(cipher => generate_with(cipher, index, domain, roots))
}

/// 1 where server 0's bit is the one set at `index`, the point that `keys` were dealt for, and -1 where server 1's is.
///
/// # Errors
/// On an index outside the keys' domain.
pub fn sign(keys: &[Key; 2], index: usize) -> Result<i64> {
    let domain = keys[0].domain;
    if index >= domain {
        return Err(Error::Index { domain });
    }
    let set = keys[0].bits()[index / 64] >> (index % 64) & 1;
    Ok(2 * set as i64 - 1)
}

impl Key {
    /// The key as it travels to its server: [`key_bytes`] long.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// The key over `domain` points that `party` was sent.
    ///
    /// # Errors
    /// On a party that is not 0 or 1, a domain that is empty or has more than `2^24` points, any number of bytes but
    /// [`key_bytes`], and a key of the other party.
    pub fn from_bytes(party: usize, domain: usize, bytes: &[u8]) -> Result<Key> {
        check_party(party)?;
        check_length("a key's bytes", bytes.len(), key_bytes(domain)?)?;
        if word(bytes, 0) & 1 != party as Block {
            return Err(Error::OtherParty);
        }
        let bytes = bytes.to_vec();
        Ok(Key { domain, bytes })
    }

    /// Number of points.
    pub fn domain(&self) -> usize {
        self.domain
    }

    /// This server's bit for every point: that of point `j` is bit `j % 64` of word `j / 64`. Those beyond the domain are
    /// zero. Time and memory accesses depend on the domain alone.
    pub fn bits(&self) -> Vec<u64> {
        with_cipher!(cipher => cipher.run(
            #[inline(always)]
            || self.bits_with(cipher),
        ))
    }

    #[inline(always)]
    fn bits_with<C: Cipher>(&self, cipher: C) -> Vec<u64> {
        let correction = |index| word(&self.bytes, 1 + index);
        let Shape { levels, blocks } = shape(self.domain).expect("a key's domain was checked");
        let levels = levels as usize;
        let (mut seeds, mut children) = (vec![0; 1 << levels], vec![0; 1 << levels]);
        seeds[0] = word(&self.bytes, 0);
        for level in 0..levels {
            let width = 1 << level;
            cipher.expand(correction(level), &seeds[..width], &mut children[..2 * width]);
            std::mem::swap(&mut seeds, &mut children);
        }
        let mut bits = vec![0; (2 * blocks) << levels];
        let mut hashes = vec![0; 2 << levels];
        for (block, tweak) in LEAF.into_iter().enumerate().take(blocks) {
            // These corrections are added bit by bit, not as ring elements.
            cipher.leaves(tweak, 0, &seeds, &mut hashes);
            let leaves = bits.chunks_exact_mut(2 * blocks);
            for ((leaf, hash), seed) in leaves.zip(hashes.as_chunks::<2>().0).zip(&seeds) {
                let correction = correction(levels + block) & odd_mask(*seed);
                for (i, hash) in hash.iter().enumerate() {
                    leaf[2 * block + i] = hash ^ half(correction, i as u64);
                }
            }
        }
        bits.truncate(self.domain.div_ceil(64));
        if let Some(last) = bits.last_mut() {
            *last &= u64::MAX >> (self.domain.wrapping_neg() % 64);
        }
        bits
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key {{ domain: {}, .. }}", self.domain)
    }
}

/// Bits of the smallest tree with so many points.
fn bits(domain: usize) -> Result<u32> {
    let bits = domain.checked_sub(1).map_or(0, |last| last.max(1).ilog2() + 1);
    check_bits(bits, MAX_BITS)?;
    Ok(bits)
}

fn shape(domain: usize) -> Result<Shape> {
    Ok(Shape::new(bits(domain)?, LEAF_BITS))
}

fn generate_with<C: Cipher>(cipher: C, index: usize, domain: usize, roots: [Block; 2]) -> Result<[Key; 2]> {
    let (bits, shape) = (bits(domain)?, shape(domain)?);
    if index >= domain {
        return Err(Error::Index { domain });
    }
    let alpha = index as u64;
    let mut words = vec![0; shape.bytes()];
    tree::deal(
        cipher,
        bits,
        words.len(),
        &[alpha],
        [&roots[..1], &roots[1..]],
        &mut words,
        #[inline(always)]
        |deal, _, words| deal_words(deal, bits, shape, alpha, words),
    )?;
    Ok([0, 1].map(|party| Key {
        domain,
        bytes: [&root(party, roots[party]).to_le_bytes()[..], &words].concat(),
    }))
}

#[inline(always)]
fn deal_words<C: Cipher>(mut deal: Deal<C>, bits: u32, shape: Shape, alpha: u64, words: &mut [u8]) {
    let path = by_bit(&[alpha]);
    let (inner, leaf) = words
        .as_chunks_mut::<BLOCK>()
        .0
        .split_at_mut(shape.levels as usize);
    for (level, word) in inner.iter_mut().enumerate() {
        *word = deal.descend(path[bits as usize - 1 - level]).0[0].to_le_bytes();
    }
    for (block, (word, tweak)) in leaf.iter_mut().zip(LEAF).enumerate() {
        let h = deal.hashes(tweak);
        let here = Block::from(block as u64 == alpha >> 7 & 1);
        *word = (h[0].0[0] ^ h[1].0[0] ^ here << (alpha & 127)).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Portable;
    use proptest::prelude::*;

    /// The two servers' bits, from bytes, as they have them.
    fn expand(keys: &[Key; 2]) -> [Vec<u64>; 2] {
        [0, 1].map(|party| {
            let (domain, bytes) = (keys[party].domain(), keys[party].to_bytes());
            assert_eq!(bytes.len(), key_bytes(domain).unwrap());
            Key::from_bytes(party, domain, &bytes).unwrap().bits()
        })
    }

    fn one_hot(index: usize, domain: usize) -> Vec<u64> {
        let mut words = vec![0; domain.div_ceil(64)];
        words[index / 64] = 1 << (index % 64);
        words
    }

    /// Whether the keys are those of `index`, and `sign` tells whose bit is set.
    fn is_point(index: usize, domain: usize, keys: &[Key; 2]) -> bool {
        let [ours, theirs] = expand(keys);
        let set = ours[index / 64] >> (index % 64) & 1 == 1;
        let differ = ours.iter().zip(&theirs).map(|(a, b)| a ^ b);
        differ.eq(one_hot(index, domain)) && sign(keys, index) == Ok(if set { 1 } else { -1 })
    }

    /// Roots that differ from one to the next in every bit of the hash's input.
    fn roots(seed: u64) -> [Block; 2] {
        [1, 2].map(|i| (Block::from(2 * seed + i)).wrapping_mul(0x2360ed051fc65da44385df649fccf645))
    }

    #[test]
    fn every_index_of_small_domains() {
        for domain in (1..=66).chain([100, 127, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513, 700]) {
            for index in 0..domain {
                let keys = generate(index, domain, roots((1000 * domain + index) as u64)).unwrap();
                assert!(is_point(index, domain, &keys), "{index} of {domain}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_index_of_large_domains(domain in 1usize..1 << 18, at in 0.0..1.0, roots: [u128; 2]) {
            let index = (at * domain as f64) as usize;
            prop_assert!(is_point(index, domain, &generate(index, domain, roots).unwrap()));
        }

        #[test]
        fn ciphers_agree(domain in 1usize..1 << 14, at in 0.0..1.0, roots: [u128; 2]) {
            let index = (at * domain as f64) as usize;
            let keys = generate(index, domain, roots).unwrap();
            let portable = generate_with(Portable, index, domain, roots).unwrap();
            for (fast, portable) in keys.iter().zip(&portable) {
                prop_assert_eq!(&fast.bytes, &portable.bytes);
                prop_assert_eq!(fast.bits(), portable.bits_with(Portable));
            }
        }
    }

    #[test]
    fn the_largest_domain() {
        let (index, domain) = (0x00c0_ffee, 1 << MAX_BITS);
        assert!(is_point(
            index,
            domain,
            &generate(index, domain, roots(1)).unwrap()
        ));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let bits = |bits| Error::Bits { bits, max: MAX_BITS };
        let refused = |index, domain| generate(index, domain, [1, 2]).map(|_| ()).unwrap_err();
        assert_eq!(refused(0, 0), bits(0));
        assert_eq!(refused(0, (1 << 24) + 1), bits(25));
        assert_eq!(refused(0, usize::MAX), bits(usize::BITS));
        assert_eq!(refused(300, 300), Error::Index { domain: 300 });
        let keys = generate(7, 300, [1, 2]).unwrap();
        assert_eq!(sign(&keys, 300), Err(Error::Index { domain: 300 }));

        let bytes = keys[0].to_bytes();
        assert_eq!(bytes.len(), 16 * (9 - 5));
        let read =
            |party, domain, bytes: &[u8]| Key::from_bytes(party, domain, bytes).map(|key| key.to_bytes());
        assert_eq!(read(0, 300, &bytes), Ok(bytes.clone()));
        assert_eq!(read(1, 300, &bytes), Err(Error::OtherParty));
        assert_eq!(read(2, 300, &bytes), Err(Error::Party(2)));
        assert_eq!(read(0, 0, &bytes), Err(bits(0)));
        let length = |expected, actual| Error::Length {
            what: "a key's bytes",
            expected,
            actual,
        };
        assert_eq!(read(0, 300, &bytes[1..]), Err(length(64, 63)));
        assert_eq!(read(0, 300, &[&bytes[..], &[0]].concat()), Err(length(64, 65)));
        assert_eq!(read(0, 300, &[]), Err(length(64, 0)));
        assert_eq!(read(0, 513, &bytes), Err(length(80, 64)));
    }

    #[test]
    fn a_key_does_not_show_itself() {
        let keys = generate(7, 300, roots(5)).unwrap();
        assert_eq!(format!("{:?}", keys[0]), "Key { domain: 300, .. }");
    }

    /// Not a proof of secrecy, but what a forgotten mask would break: over many keys of one and the same index, every bit
    /// of a key and of a server's expansion is set in half of them, within six standard deviations.
    #[test]
    fn keys_and_bits_look_uniform() {
        let (n, index, domain) = (1 << 12, 777, 1000);
        let keys: Vec<_> = (0..n)
            .map(|i| generate(index, domain, roots(i)).unwrap())
            .collect();
        for party in [0, 1] {
            let bits = keys.iter().map(|keys| keys[party].bits());
            assert_eq!(biased(bits.clone()), beyond(domain), "bits of party {party}");
            let words = keys.iter().map(|keys| {
                let words = keys[party].bytes.as_chunks::<8>().0.iter();
                words.map(|word| u64::from_le_bytes(*word)).collect()
            });
            assert_eq!(biased(words), [0], "of the key, only the party's number");
            // What the test would find: a bit that is never hidden at the index, in every key.
            let bare = bits.zip(&keys).map(|(mut bits, keys)| {
                let other = keys[1 - party].bits();
                bits[index / 64] ^= other[index / 64] & 1 << (index % 64);
                bits
            });
            assert_eq!(
                biased(bare),
                [&[index], &beyond(domain)[..]].concat(),
                "the control"
            );
        }
        let plus = keys.iter().filter(|keys| sign(keys, index) == Ok(1)).count();
        assert!(is_even(plus, n as usize), "{plus} of {n} signs are 1");
    }

    /// The positions of padding.
    fn beyond(domain: usize) -> Vec<usize> {
        (domain..domain.next_multiple_of(64)).collect()
    }

    /// The positions whose bit is not set in half of the samples.
    fn biased(samples: impl Iterator<Item = Vec<u64>>) -> Vec<usize> {
        let (mut set, mut n) = (Vec::new(), 0);
        for words in samples {
            set.resize(64 * words.len(), 0);
            set.iter_mut()
                .enumerate()
                .for_each(|(i, set)| *set += (words[i / 64] >> (i % 64) & 1) as usize);
            n += 1;
        }
        (0..set.len()).filter(|i| !is_even(set[*i], n)).collect()
    }

    fn is_even(set: usize, n: usize) -> bool {
        (2.0 * set as f64 - n as f64).abs() <= 6.0 * (n as f64).sqrt()
    }
}
