//! AES-128 on 512-bit registers: what the generator ([`prg`](crate::prg)) and the hash of function secret sharing have in
//! common.

use std::arch::x86_64::*;
use std::fmt;

use aes::Block;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Blocks of a register.
pub const WIDTH: usize = 4;
/// Registers in flight: with the eleven round keys they leave room for the rest.
pub const FLIGHT: usize = 8;
/// Blocks in flight.
const BLOCKS: usize = WIDTH * FLIGHT;

/// The round keys of AES-128; wiped from memory when dropped, never shown by `Debug`. A value of this type is the proof that
/// the machine has the instructions that this module uses.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct RoundKeys([u128; 11]);

impl RoundKeys {
    /// The key schedule of FIPS 197, section 5.2; None if this machine lacks VAES or AVX-512.
    pub fn expand(key: &[u8; 16]) -> Option<RoundKeys> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("aes")
            && is_x86_feature_detected!("vaes");
        // SAFETY: `aes` was found.
        found.then(|| unsafe { expand(key) })
    }

    /// Every key in all of a register.
    ///
    /// # Safety
    /// The processor must have what this is compiled for; it has, for that was found when `self` was made.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,aes,vaes")]
    pub fn broadcast(&self) -> [__m512i; 11] {
        let mut wide = [_mm512_setzero_si512(); 11];
        for (wide, key) in wide.iter_mut().zip(&self.0) {
            *wide = _mm512_broadcast_i32x4(_mm_set_epi64x((key >> 64) as i64, *key as i64));
        }
        wide
    }

    /// Counter mode: `blocks[i]` becomes the encryption of `high` and `low + i`, both big-endian.
    pub(crate) fn count(&self, high: u64, low: u64, blocks: &mut [Block]) {
        // SAFETY: `self` exists, so `expand` has found every feature that `count` enables.
        unsafe { count(self, high, low, blocks) }
    }
}

impl fmt::Debug for RoundKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RoundKeys(..)")
    }
}

/// Encrypts blocks, by the keys that [`RoundKeys::broadcast`] gives.
///
/// # Safety
/// The processor must have what this is compiled for; it has where such keys were made.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,aes,vaes")]
pub fn encrypt(keys: &[__m512i; 11], mut x: [__m512i; FLIGHT]) -> [__m512i; FLIGHT] {
    for x in &mut x {
        *x = _mm512_xor_si512(*x, keys[0]);
    }
    for key in &keys[1..10] {
        for x in &mut x {
            *x = _mm512_aesenc_epi128(*x, *key);
        }
    }
    for x in &mut x {
        *x = _mm512_aesenclast_epi128(*x, keys[10]);
    }
    x
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,aes,vaes")]
fn count(keys: &RoundKeys, high: u64, low: u64, blocks: &mut [Block]) {
    let keys = keys.broadcast();
    let (h, l) = (high as i64, low as i64);
    // Reverses the bytes of every word.
    let swap = _mm512_set_epi64(
        0x08090a0b0c0d0e0f,
        0x0001020304050607,
        0x08090a0b0c0d0e0f,
        0x0001020304050607,
        0x08090a0b0c0d0e0f,
        0x0001020304050607,
        0x08090a0b0c0d0e0f,
        0x0001020304050607,
    );
    let step = _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0);
    let lanes = _mm512_set_epi64(3, 0, 2, 0, 1, 0, 0, 0);
    let mut counter = _mm512_add_epi64(_mm512_set_epi64(l, h, l, h, l, h, l, h), lanes);
    let mut next = || {
        let mut x = [counter; FLIGHT];
        for x in &mut x {
            *x = _mm512_shuffle_epi8(counter, swap);
            counter = _mm512_add_epi64(counter, step);
        }
        encrypt(&keys, x)
    };
    let (whole, rest) = blocks.as_chunks_mut::<BLOCKS>();
    for out in whole {
        store(out, next());
    }
    if !rest.is_empty() {
        let mut out = [Block::default(); BLOCKS];
        store(&mut out, next());
        rest.copy_from_slice(&out[..rest.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,aes,vaes")]
fn store(out: &mut [Block; BLOCKS], x: [__m512i; FLIGHT]) {
    for (out, x) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(x) {
        // SAFETY: a store of 64 bytes to an array of four blocks of 16 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) };
    }
}

#[target_feature(enable = "aes")]
fn expand(key: &[u8; 16]) -> RoundKeys {
    #[inline]
    #[target_feature(enable = "aes")]
    fn next<const RCON: i32>(keys: &mut [u128; 11], at: usize) {
        let key = _mm_set_epi64x((keys[at - 1] >> 64) as i64, keys[at - 1] as i64);
        let word = _mm_shuffle_epi32::<0xff>(_mm_aeskeygenassist_si128::<RCON>(key));
        let key = _mm_xor_si128(key, _mm_slli_si128::<4>(key));
        let key = _mm_xor_si128(key, _mm_slli_si128::<8>(key));
        let key = _mm_xor_si128(key, word);
        let half = |upper: __m128i| u128::from(_mm_cvtsi128_si64(upper) as u64);
        keys[at] = half(key) | half(_mm_unpackhi_epi64(key, key)) << 64;
    }
    let mut keys = [0; 11];
    keys[0] = u128::from_le_bytes(*key);
    next::<0x01>(&mut keys, 1);
    next::<0x02>(&mut keys, 2);
    next::<0x04>(&mut keys, 3);
    next::<0x08>(&mut keys, 4);
    next::<0x10>(&mut keys, 5);
    next::<0x20>(&mut keys, 6);
    next::<0x40>(&mut keys, 7);
    next::<0x80>(&mut keys, 8);
    next::<0x1b>(&mut keys, 9);
    next::<0x36>(&mut keys, 10);
    RoundKeys(keys)
}
