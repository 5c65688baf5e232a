//! The fixed-key hash `H(x) = AES_k(sigma(x)) ^ sigma(x)`, many blocks at a time.

use crate::Block;
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use std::sync::LazyLock;

/// Blocks hashed together: enough to hide the latency of AES, and one bit each fills a word of output.
pub(crate) const LANES: usize = 64;

/// One block for each of [`LANES`] independent walks.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [Block; LANES]);

impl Lanes {
    pub(crate) const ZERO: Self = Self([0; LANES]);
}

/// The key of the fixed permutation: the first 128 bits of the fractional part of pi.
const KEY: [u8; 16] = 0x243f6a88_85a308d3_13198a2e_03707344_u128.to_be_bytes();

/// An implementation of the hash. All give the same blocks; they differ in speed alone.
pub(crate) trait Cipher: Copy + Send + Sync {
    /// Runs `f`, compiled for the instruction set of this cipher as far as it is inlined.
    fn run<R>(self, f: impl FnOnce() -> R) -> R;

    /// Replaces every block `x` by `H(x)`.
    fn hash(self, x: &mut Lanes);

    /// Asks for these bytes to be brought into the cache.
    #[inline(always)]
    fn prefetch(self, _bytes: &[u8]) {}

    /// One level down for every lane: `s <- H(s) ^ (s if right) ^ (cw if s is odd)`. Returns the lanes' new lowest bits.
    #[inline(always)]
    fn descend(self, s: &mut Lanes, right: u64, cw: &Lanes) -> u64 {
        let mut h = *s;
        self.hash(&mut h);
        let mut t = 0;
        for lane in 0..LANES {
            let old = s.0[lane];
            let new = h.0[lane] ^ (old & bit_mask(right, lane)) ^ (cw.0[lane] & odd_mask(old));
            s.0[lane] = new;
            t |= (new as u64 & 1) << lane;
        }
        t
    }

    /// The dealer's [`Cipher::descend`], for seeds `s` and `s ^ delta`: corrects them to differ by `delta` again on the
    /// side of `right` and by nothing on the other. Returns the correction words.
    #[inline(always)]
    fn deal(self, s: &mut Lanes, delta: &Lanes, right: u64) -> Lanes {
        let (mut h, mut cw) = (*s, *s);
        xor(&mut cw.0, &delta.0);
        self.hash(&mut h);
        self.hash(&mut cw);
        for lane in 0..LANES {
            let right = bit_mask(right, lane);
            cw.0[lane] ^= h.0[lane] ^ (delta.0[lane] & !right);
            s.0[lane] = h.0[lane] ^ (s.0[lane] & right) ^ (cw.0[lane] & odd_mask(s.0[lane]));
        }
        cw
    }

    /// Both children of every seed of one tree, in order.
    #[inline(always)]
    fn expand(self, cw: Block, seeds: &[Block], children: &mut [Block]) {
        expand(self, cw, seeds, children);
    }

    /// The two ring elements that hang below each seed of one tree: the halves of `H(s ^ tweak)`, lower first, plus
    /// those of `cw` where `s` is odd.
    #[inline(always)]
    fn leaves(self, tweak: Block, cw: Block, seeds: &[Block], elements: &mut [u64]) {
        leaves(self, tweak, cw, seeds, elements);
    }

    /// The inner product of equally long vectors over Z_{2^64}.
    #[inline(always)]
    fn dot(self, a: &[u64], b: &[u64]) -> u64 {
        a.iter()
            .zip(b)
            .fold(0, |sum, (a, b)| sum.wrapping_add(a.wrapping_mul(*b)))
    }
}

#[inline(always)]
fn expand<C: Cipher>(cipher: C, cw: Block, seeds: &[Block], children: &mut [Block]) {
    for (seeds, children) in seeds.chunks(LANES).zip(children.chunks_mut(2 * LANES)) {
        let mut h = Lanes::ZERO;
        h.0[..seeds.len()].copy_from_slice(seeds);
        cipher.hash(&mut h);
        for ((s, h), pair) in seeds.iter().zip(h.0).zip(children.as_chunks_mut().0) {
            let left = h ^ (cw & odd_mask(*s));
            *pair = [left, left ^ s];
        }
    }
}

#[inline(always)]
fn leaves<C: Cipher>(cipher: C, tweak: Block, cw: Block, seeds: &[Block], elements: &mut [u64]) {
    for (seeds, elements) in seeds.chunks(LANES).zip(elements.chunks_mut(2 * LANES)) {
        let mut h = Lanes([tweak; LANES]);
        xor(&mut h.0, seeds);
        cipher.hash(&mut h);
        for ((s, h), pair) in seeds.iter().zip(h.0).zip(elements.as_chunks_mut().0) {
            let cw = cw & odd_mask(*s);
            *pair = [0, 1].map(|x| half(h, x).wrapping_add(half(cw, x)));
        }
    }
}

/// Adds `b` to `a`, as far as both reach.
#[inline(always)]
pub(crate) fn xor(a: &mut [Block], b: &[Block]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a ^= b;
    }
}

/// The lower half of a block for even `x`, the upper for odd.
#[inline(always)]
pub(crate) fn half(block: Block, x: u64) -> u64 {
    (block >> (64 * (x & 1))) as u64
}

/// All ones where bit `lane` of `bits` is set, else zero.
#[inline(always)]
pub(crate) fn bit_mask(bits: u64, lane: usize) -> Block {
    odd_mask(Block::from(bits >> lane))
}

/// All ones where the lowest bit of `x` is set, else zero.
#[inline(always)]
pub(crate) fn odd_mask(x: Block) -> Block {
    (x & 1).wrapping_neg()
}

/// Calls `$body` with the fastest [`Cipher`] this machine has.
macro_rules! with_cipher {
    ($cipher:ident => $body:expr) => {{
        #[cfg(target_arch = "x86_64")]
        if let Some($cipher) = $crate::hash::Vaes::detect() {
            return $body;
        }
        let $cipher = $crate::hash::Portable;
        $body
    }};
}
pub(crate) use with_cipher;

/// The `aes` crate, which itself uses AES-NI or the ARMv8 instructions where it finds them.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Cipher for Portable {
    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn hash(self, x: &mut Lanes) {
        static AES: LazyLock<aes::Aes128> = LazyLock::new(|| aes::Aes128::new(&KEY.into()));
        let sigma = x.0.map(|x| (x >> 64) | ((x ^ (x >> 64)) << 64));
        let mut blocks = sigma.map(|x| x.to_le_bytes().into());
        AES.encrypt_blocks(&mut blocks);
        for lane in 0..LANES {
            x.0[lane] = sigma[lane] ^ Block::from_le_bytes(blocks[lane].into());
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use vaes::Vaes;

#[cfg(target_arch = "x86_64")]
mod vaes {
    use super::{Cipher, KEY, Lanes, Portable};
    use crate::Block;
    use std::arch::x86_64::*;
    use std::sync::LazyLock;
    use veiltune_ring::vaes::{FLIGHT, RoundKeys, WIDTH, encrypt};

    /// AES on 512-bit registers, with its round keys. A value of this type is the proof that the machine has it.
    #[derive(Clone, Copy)]
    pub(crate) struct Vaes(&'static RoundKeys);

    impl Vaes {
        pub(crate) fn detect() -> Option<Self> {
            static KEYS: LazyLock<Option<RoundKeys>> = LazyLock::new(|| RoundKeys::expand(&KEY));
            let keys = KEYS.as_ref()?;
            is_x86_feature_detected!("bmi2").then_some(Self(keys))
        }
    }

    impl Cipher for Vaes {
        #[inline(always)]
        fn run<R>(self, f: impl FnOnce() -> R) -> R {
            // SAFETY: `self` exists, so `detect` has found every feature that `run` enables.
            unsafe { run(f) }
        }

        #[inline(always)]
        fn hash(self, x: &mut Lanes) {
            // SAFETY: as above.
            unsafe { hash(self.0, x) }
        }

        #[inline(always)]
        fn prefetch(self, bytes: &[u8]) {
            for line in bytes.chunks(64) {
                // SAFETY: a prefetch of an address inside a slice; it has no effect but on the cache.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
            }
        }

        #[inline(always)]
        fn descend(self, s: &mut Lanes, right: u64, cw: &Lanes) -> u64 {
            // SAFETY: as above.
            unsafe { descend(self.0, s, right, cw) }
        }

        #[inline(always)]
        fn deal(self, s: &mut Lanes, delta: &Lanes, right: u64) -> Lanes {
            // SAFETY: as above.
            unsafe { deal(self.0, s, delta, right) }
        }

        #[inline(always)]
        fn expand(self, cw: Block, seeds: &[Block], children: &mut [Block]) {
            let (seeds_full, []) = seeds.as_chunks() else {
                return super::expand(self, cw, seeds, children);
            };
            // SAFETY: as above.
            unsafe {
                expand(
                    self.0,
                    cw,
                    seeds_full,
                    children.as_chunks_mut().0.as_chunks_mut().0,
                )
            }
        }

        #[inline(always)]
        fn leaves(self, tweak: Block, cw: Block, seeds: &[Block], elements: &mut [u64]) {
            let (seeds_full, []) = seeds.as_chunks() else {
                return super::leaves(self, tweak, cw, seeds, elements);
            };
            // SAFETY: as above.
            unsafe { leaves(self.0, tweak, cw, seeds_full, elements.as_chunks_mut().0) }
        }

        #[inline(always)]
        fn dot(self, a: &[u64], b: &[u64]) -> u64 {
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks(), b.as_chunks());
            // SAFETY: as above.
            unsafe { dot(a, b) }.wrapping_add(Portable.dot(a_rest, b_rest))
        }
    }

    /// Blocks in flight.
    const BLOCKS: usize = WIDTH * FLIGHT;

    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn run<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn hash(keys: &RoundKeys, x: &mut Lanes) {
        let keys = keys.broadcast();
        for x in x.0.as_chunks_mut().0 {
            let h = hash_registers(&keys, load(x));
            store(x, h);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn descend(keys: &RoundKeys, s: &mut Lanes, right: u64, cw: &Lanes) -> u64 {
        let keys = keys.broadcast();
        let mut t = 0;
        for (part, (s, cw)) in
            s.0.as_chunks_mut()
                .0
                .iter_mut()
                .zip(cw.0.as_chunks().0)
                .enumerate()
        {
            let (mut old, cw) = (load(s), load(cw));
            let h = hash_registers(&keys, old);
            for i in 0..FLIGHT {
                let lane = BLOCKS * part + WIDTH * i;
                let moved = _mm512_mask_xor_epi64(h[i], halves(right >> lane), h[i], old[i]);
                old[i] = _mm512_mask_xor_epi64(moved, odd(old[i]), moved, cw[i]);
                let lowest = u32::from(_mm512_test_epi64_mask(old[i], _mm512_set1_epi64(1)));
                t |= u64::from(_pext_u32(lowest, 0x55)) << lane;
            }
            store(s, old);
        }
        t
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn deal(keys: &RoundKeys, s: &mut Lanes, delta: &Lanes, right: u64) -> Lanes {
        let keys = keys.broadcast();
        let mut out = Lanes::ZERO;
        let parts =
            s.0.as_chunks_mut()
                .0
                .iter_mut()
                .zip(delta.0.as_chunks().0)
                .zip(out.0.as_chunks_mut().0);
        for (part, ((s, delta), out)) in parts.enumerate() {
            let (mut old, delta) = (load(s), load(delta));
            let h0 = hash_registers(&keys, old);
            let mut other = old;
            for (other, delta) in other.iter_mut().zip(delta) {
                *other = _mm512_xor_si512(*other, delta);
            }
            let mut cw = hash_registers(&keys, other);
            for i in 0..FLIGHT {
                let go = halves(right >> (BLOCKS * part + WIDTH * i));
                cw[i] = _mm512_xor_si512(cw[i], h0[i]);
                cw[i] = _mm512_mask_xor_epi64(cw[i], !go, cw[i], delta[i]);
                let moved = _mm512_mask_xor_epi64(h0[i], go, h0[i], old[i]);
                old[i] = _mm512_mask_xor_epi64(moved, odd(old[i]), moved, cw[i]);
            }
            store(s, old);
            store(out, cw);
        }
        out
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn expand(keys: &RoundKeys, cw: Block, seeds: &[[Block; BLOCKS]], children: &mut [[[Block; BLOCKS]; 2]]) {
        let keys = keys.broadcast();
        let cw = _mm512_broadcast_i32x4(block(cw));
        let lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
        let upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
        for (seeds, children) in seeds.iter().zip(children) {
            let s = load(seeds);
            let h = hash_registers(&keys, s);
            let mut out = [s; 2];
            for i in 0..FLIGHT {
                let left = _mm512_mask_xor_epi64(h[i], odd(s[i]), h[i], cw);
                let right = _mm512_xor_si512(left, s[i]);
                out[2 * i / FLIGHT][2 * i % FLIGHT] = _mm512_permutex2var_epi64(left, lower, right);
                out[2 * i / FLIGHT][2 * i % FLIGHT + 1] = _mm512_permutex2var_epi64(left, upper, right);
            }
            store(&mut children[0], out[0]);
            store(&mut children[1], out[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn leaves(
        keys: &RoundKeys,
        tweak: Block,
        cw: Block,
        seeds: &[[Block; BLOCKS]],
        elements: &mut [[u64; 2 * BLOCKS]],
    ) {
        let keys = keys.broadcast();
        let (tweak, cw) = (
            _mm512_broadcast_i32x4(block(tweak)),
            _mm512_broadcast_i32x4(block(cw)),
        );
        for (seeds, elements) in seeds.iter().zip(elements) {
            let s = load(seeds);
            let mut x = s;
            for x in &mut x {
                *x = _mm512_xor_si512(*x, tweak);
            }
            let h = hash_registers(&keys, x);
            for ((s, h), out) in s.iter().zip(h).zip(elements.as_chunks_mut::<{ 2 * WIDTH }>().0) {
                let sum = _mm512_mask_add_epi64(h, odd(*s), h, cw);
                // SAFETY: a store of eight words to an array of eight words.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn hash_registers(keys: &[__m512i; 11], mut x: [__m512i; FLIGHT]) -> [__m512i; FLIGHT] {
        // sigma: the upper half becomes the sum of both, the lower one the old upper half.
        for x in &mut x {
            let swapped = _mm512_shuffle_epi32::<0x4e>(*x);
            *x = _mm512_mask_xor_epi64(swapped, 0xaa, swapped, *x);
        }
        let sigma = x;
        let mut x = encrypt(keys, sigma);
        for (x, sigma) in x.iter_mut().zip(sigma) {
            *x = _mm512_xor_si512(*x, sigma);
        }
        x
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn dot(a: &[[u64; 32]], b: &[[u64; 32]]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 4];
        for (a, b) in a.iter().zip(b) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.as_chunks().0.iter().zip(b.as_chunks().0)) {
                *sum = _mm512_add_epi64(*sum, _mm512_mullo_epi64(load_words(a), load_words(b)));
            }
        }
        let sum = _mm512_add_epi64(
            _mm512_add_epi64(sums[0], sums[1]),
            _mm512_add_epi64(sums[2], sums[3]),
        );
        _mm512_reduce_add_epi64(sum) as u64
    }

    /// The mask of 64-bit halves for one bit a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn halves(blocks: u64) -> __mmask8 {
        (_pdep_u32(blocks as u32, 0x55) * 3) as __mmask8
    }

    /// The mask of 64-bit halves of the blocks whose lowest bit is set.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn odd(x: __m512i) -> __mmask8 {
        _mm512_test_epi64_mask(_mm512_shuffle_epi32::<0x44>(x), _mm512_set1_epi64(1))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn block(x: Block) -> __m128i {
        _mm_set_epi64x((x >> 64) as i64, x as i64)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn load_words(x: &[u64; 8]) -> __m512i {
        // SAFETY: a load of 64 bytes from an array of 64 bytes.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn load(x: &[Block; BLOCKS]) -> [__m512i; FLIGHT] {
        let mut out = [_mm512_setzero_si512(); FLIGHT];
        for (out, x) in out.iter_mut().zip(x.as_chunks::<WIDTH>().0) {
            // SAFETY: a load of 64 bytes from an array of 64 bytes.
            *out = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        }
        out
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,bmi2,aes,vaes")]
    fn store(out: &mut [Block; BLOCKS], x: [__m512i; FLIGHT]) {
        for (out, x) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(x) {
            // SAFETY: a store of 64 bytes to an array of 64 bytes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "x86_64")]
    use proptest::prelude::*;

    #[test]
    fn portable_hash_matches_the_definition() {
        // AES-128 under the key of pi, computed block by block in the byte order of FIPS 197.
        let x: Block = 0x0f0e0d0c0b0a09080706050403020100;
        let (hi, lo) = (x >> 64, x & Block::from(u64::MAX));
        let sigma = ((hi ^ lo) << 64) | hi;
        let mut block = sigma.to_le_bytes().into();
        aes::Aes128::new(&KEY.into()).encrypt_block(&mut block);
        let mut lanes = Lanes([x; LANES]);
        Portable.hash(&mut lanes);
        assert_eq!(lanes.0, [Block::from_le_bytes(block.into()) ^ sigma; LANES]);
    }

    #[cfg(target_arch = "x86_64")]
    proptest! {
        #[test]
        fn vaes_is_portable(s: [[u128; 32]; 2], cw: [[u128; 32]; 2], right: u64) {
            let Some(vaes) = Vaes::detect() else { return Ok(()) };
            let lanes = |x: [[u128; 32]; 2]| Lanes(x.concat().try_into().unwrap());
            let (mut a, mut b) = (lanes(s), lanes(s));
            Portable.hash(&mut a);
            vaes.hash(&mut b);
            prop_assert_eq!(a.0, b.0);
            let t = Portable.descend(&mut a, right, &lanes(cw));
            prop_assert_eq!(vaes.descend(&mut b, right, &lanes(cw)), t);
            prop_assert_eq!(a.0, b.0);
            let cw_a = Portable.deal(&mut a, &lanes(cw), right);
            let cw_b = vaes.deal(&mut b, &lanes(cw), right);
            prop_assert_eq!((a.0, cw_a.0), (b.0, cw_b.0));
        }

        #[test]
        fn vaes_expands_as_portable(seeds in proptest::collection::vec(any::<u128>(), 0..100), cw: u128, tweak: u128) {
            let Some(vaes) = Vaes::detect() else { return Ok(()) };
            for seeds in [&seeds[..], &seeds[..seeds.len() & !31]] {
                let mut children = [0, 1].map(|_| vec![0; 2 * seeds.len()]);
                Portable.expand(cw, seeds, &mut children[0]);
                vaes.expand(cw, seeds, &mut children[1]);
                prop_assert_eq!(&children[0], &children[1]);
                let mut elements = [0, 1].map(|_| vec![0; 2 * seeds.len()]);
                Portable.leaves(tweak, cw, seeds, &mut elements[0]);
                vaes.leaves(tweak, cw, seeds, &mut elements[1]);
                prop_assert_eq!(&elements[0], &elements[1]);
                prop_assert_eq!(Portable.dot(&elements[0], &elements[1]), vaes.dot(&elements[0], &elements[1]));
            }
        }
    }
}
