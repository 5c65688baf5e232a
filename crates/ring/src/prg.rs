//! The pseudorandom generator that masks and correlated randomness come from: AES-128 in counter mode.
//!
//! A [`Seed`] is the AES key. Who draws from it names a *gate* (64 bits) and a *slot* within it (16 bits); the
//! 128-bit counter block is `gate | slot | block number` (big-endian, 48 bits for the number), so that streams of
//! different names never overlap, however long they are. Where the processor has VAES and AVX-512, a kernel of our own makes
//! the blocks, elsewhere the `aes` crate, by AES-NI or the ARM instructions where it finds them: the same stream.

use std::fmt;

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Block};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::simd::{fill_rows, vectorised};
use crate::{Error, Ring};

/// A secret 128-bit seed; wiped from memory when dropped, never shown by `Debug`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Seed([u8; 16]);

impl Seed {
    /// A fresh seed from the operating system.
    ///
    /// # Errors
    /// [`Error::Random`] if it has none to give.
    pub fn random() -> Result<Seed, Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|_| Error::Random)?;
        Ok(Seed(bytes))
    }

    /// The seed with these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Seed {
        Seed(bytes)
    }

    /// The bytes themselves, for sending them to the party that shares the seed.
    pub fn expose(&self) -> &[u8; 16] {
        &self.0
    }

    /// The child seed for `label`: the first half of SHA-256 over a fixed prefix, this seed and the label. Children
    /// of different labels are independent, and none tells anything about its parent.
    pub fn derive(&self, label: &[u8]) -> Seed {
        let hash = Sha256::new()
            .chain_update(b"veiltune-ring seed v1\0")
            .chain_update(self.0);
        let mut digest: [u8; 32] = hash.chain_update(label).finalize().into();
        let mut child = Seed([0; 16]);
        child.0.copy_from_slice(&digest[..16]);
        digest.zeroize();
        child
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// Blocks encrypted at a time: several rounds of the widest AES backend, and still well inside the first cache.
const BATCH: usize = 256;
/// Bytes of one AES block.
const BLOCK: u64 = 16;
/// Blocks in one stream.
const STREAM: u64 = 1 << 48;

/// One stream of pseudorandom bytes. It is the same whatever the sizes of the pieces it is drawn in; words and
/// blocks are read from it in little-endian order.
#[derive(Clone)]
pub struct Prg {
    cipher: Cipher,
    gate: u64,
    slot: u16,
    /// Bytes drawn so far.
    position: u64,
}

impl Prg {
    /// The stream named `gate`, `slot` under `seed`, at its start.
    pub fn new(seed: &Seed, gate: u64, slot: u16) -> Prg {
        Prg {
            cipher: Cipher::new(&seed.0),
            gate,
            slot,
            position: 0,
        }
    }

    /// Moves to the start of a 16-byte block, counted from the start of the stream.
    ///
    /// # Panics
    /// If `block` is 2^48 or more: no stream is that long.
    pub fn seek(&mut self, block: u64) {
        assert!(block < STREAM, "a stream has 2^48 blocks");
        self.position = block * BLOCK;
    }

    /// Fills `out` with the next words.
    pub fn fill_u64(&mut self, out: &mut [u64]) {
        self.fill(out, u64::from_le_bytes);
    }

    /// Fills `out` with the next bytes.
    pub fn fill_bytes(&mut self, out: &mut [u8]) {
        self.fill(out, u8::from_le_bytes);
    }

    /// The next `n` words.
    pub fn vec(&mut self, n: usize) -> Vec<u64> {
        let mut out = vec![0; n];
        self.fill_u64(&mut out);
        out
    }

    /// A uniform tensor of shape `dims`.
    pub fn ring(&mut self, dims: impl Into<Vec<usize>>) -> Ring {
        let mut out = Ring::zeros(dims);
        self.fill_u64(out.make_mut());
        out
    }

    /// The next `n` 128-bit blocks.
    pub fn blocks(&mut self, n: usize) -> Vec<u128> {
        let mut out = vec![0; n];
        self.fill(&mut out, u128::from_le_bytes);
        out
    }

    /// `n` uniform words below 2^`bits`, each drawn from 1, 2, 4 or 8 bytes of the stream: the fewest that hold it.
    ///
    /// # Panics
    /// If `bits` exceeds 64.
    pub fn bits(&mut self, n: usize, bits: u32) -> Vec<u64> {
        let mut out = vec![0; n];
        self.fill_bits(&mut out, bits);
        out
    }

    /// As [`bits`](Prg::bits), filling `out`.
    ///
    /// # Panics
    /// If `bits` exceeds 64.
    pub fn fill_bits(&mut self, out: &mut [u64], bits: u32) {
        assert!(bits <= 64, "a word has 64 bits");
        let mask = u64::MAX.checked_shr(64 - bits).unwrap_or(0);
        match bits {
            0..=8 => self.fill(out, |b| u64::from(u8::from_le_bytes(b)) & mask),
            9..=16 => self.fill(out, |b| u64::from(u16::from_le_bytes(b)) & mask),
            17..=32 => self.fill(out, |b| u64::from(u32::from_le_bytes(b)) & mask),
            _ => self.fill(out, |b| u64::from_le_bytes(b) & mask),
        }
    }

    /// Words further on in the stream, as [`bits`](Prg::bits) draws them: `first` of them are passed over.
    ///
    /// # Panics
    /// If that is not a whole number of 16-byte blocks, or `bits` exceeds 64.
    pub fn skip_bits(&mut self, first: u64, bits: u32) {
        let bytes = match bits {
            0..=8 => 1,
            9..=16 => 2,
            17..=32 => 4,
            33..=64 => 8,
            _ => panic!("a word has 64 bits"),
        };
        assert!(
            (self.position + first * bytes).is_multiple_of(BLOCK),
            "a piece of a stream starts with a block"
        );
        self.seek((self.position + first * bytes) / BLOCK);
    }

    /// Fills `out` with what `read` makes of `N` bytes each.
    fn fill<T: Send, const N: usize>(&mut self, out: &mut [T], read: impl Fn([u8; N]) -> T + Sync) {
        let bytes = (out.len() as u64)
            .checked_mul(N as u64)
            .and_then(|n| self.position.checked_add(n));
        let end = bytes
            .filter(|&end| end <= STREAM * BLOCK)
            .expect("a stream has 2^48 blocks");
        let start = self.position;
        fill_rows(out, 1, |first, piece| {
            self.fill_at(start + (first * N) as u64, piece, &read)
        });
        self.position = end;
    }

    fn fill_at<T, const N: usize>(&self, position: u64, mut out: &mut [T], read: impl Fn([u8; N]) -> T) {
        let mut buffer = [Block::default(); BATCH];
        let (mut block, mut skip) = (position / BLOCK, (position % BLOCK) as usize);
        while !out.is_empty() {
            let wanted = (skip + out.len() * N).div_ceil(BLOCK as usize);
            let blocks = &mut buffer[..wanted.min(BATCH)];
            self.cipher
                .count(self.gate, u64::from(self.slot) << 48 | block, blocks);
            let bytes = &Block::slice_as_flattened(blocks)[skip..];
            let whole = (bytes.len() / N).min(out.len());
            let (now, later) = out.split_at_mut(whole);
            for (o, b) in now.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *o = read(*b);
            }
            // Where elements straddle blocks, start again inside the block that the next one begins in.
            let next = skip + whole * N;
            block += next as u64 / BLOCK;
            skip = next % BLOCK as usize;
            out = later;
        }
    }
}

/// AES-128 in counter mode.
#[derive(Clone)]
enum Cipher {
    #[cfg(target_arch = "x86_64")]
    Vaes(crate::vaes::RoundKeys),
    Portable(Aes128),
}

impl Cipher {
    fn new(key: &[u8; 16]) -> Cipher {
        #[cfg(target_arch = "x86_64")]
        if let Some(keys) = crate::vaes::RoundKeys::expand(key) {
            return Cipher::Vaes(keys);
        }
        Cipher::Portable(Aes128::new(key.into()))
    }

    /// `blocks[i]` becomes the encryption of `high` and `low + i`, both big-endian.
    fn count(&self, high: u64, low: u64, blocks: &mut [Block]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Cipher::Vaes(keys) => keys.count(high, low, blocks),
            Cipher::Portable(aes) => {
                counters(high, low, blocks);
                aes.encrypt_blocks(blocks);
            }
        }
    }
}

vectorised! {
    fn counters(high: u64, low: u64, blocks: &mut [Block]) {
        for (n, block) in (0..).zip(blocks) {
            block[..8].copy_from_slice(&high.to_be_bytes());
            block[8..].copy_from_slice(&(low + n).to_be_bytes());
        }
    }
}

impl fmt::Debug for Prg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prg {
            gate, slot, position, ..
        } = self;
        write!(
            f,
            "Prg {{ gate: {gate}, slot: {slot}, position: {position}, .. }}"
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_fastest_cipher_is_the_portable_one(key: [u8; 16], high: u64, low in 0..u64::MAX - 1000, n in 0usize..400) {
            let mut blocks = [vec![Block::default(); n], vec![Block::default(); n]];
            Cipher::new(&key).count(high, low, &mut blocks[0]);
            Cipher::Portable(Aes128::new(&key.into())).count(high, low, &mut blocks[1]);
            prop_assert_eq!(&blocks[0], &blocks[1]);
        }
    }
}
