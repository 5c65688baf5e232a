//! Bit-packing: the low `bits` (1 to 64) of each value, one after another, least significant bit first.
//!
//! A value modulo `2^21` costs 21 bits on the wire or in a file instead of 64. Eight values fill exactly `bits` bytes, so
//! packing works on blocks of eight, with every shift known at compile time.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Values in a block.
const BLOCK: usize = 8;

/// Calls a function that is generic over the width with the width given at run time.
macro_rules! for_width {
    ($bits:expr, $function:ident($($argument:expr),*)) => {
        for_width!(@ $bits, $function($($argument),*),
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32
            33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64)
    };
    (@ $bits:expr, $function:ident $arguments:tt, $($width:literal)*) => {
        match $bits {
            $($width => $function::<$width> $arguments,)*
            _ => unreachable!("packed_len has checked the width"),
        }
    };
}
/// Bytes that `n` values of `bits` bits take.
///
/// # Panics
/// If `bits` is not in 1..=64, or the result exceeds `usize` (no tensor in memory is that long).
pub const fn packed_len(n: usize, bits: u32) -> usize {
    assert!(bits >= 1 && bits <= 64, "1 to 64 bits can be packed");
    let bits = bits as usize;
    let whole = (n / BLOCK)
        .checked_mul(bits)
        .expect("more values than fit into memory");
    whole + (n % BLOCK * bits).div_ceil(8)
}

/// Packs the low `bits` of each value; higher bits are dropped (reduction modulo `2^bits`). Unused bits of
/// the last byte are zero.
///
/// # Panics
/// If `bits` is not in 1..=64.
pub fn pack(values: &[u64], bits: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_into(values, bits, &mut bytes);
    bytes
}

/// As [`pack`], appending to `bytes`; each call starts at a byte boundary.
///
/// # Panics
/// If `bits` is not in 1..=64.
pub fn pack_into(values: &[u64], bits: u32, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    bytes.resize(start + packed_len(values.len(), bits), 0);
    for_width!(bits, pack_blocks(values, &mut bytes[start..]));
}

/// Unpacks as many values of `bits` bits as `values` has places. Unused bits of the last byte are ignored.
///
/// # Panics
/// If `bits` is not in 1..=64, or `bytes` are not [`packed_len`]`(values.len(), bits)`.
pub fn unpack(bytes: &[u8], bits: u32, values: &mut [u64]) {
    assert_eq!(
        bytes.len(),
        packed_len(values.len(), bits),
        "bytes of packed values"
    );
    #[cfg(target_arch = "x86_64")]
    let (bytes, values) = if crate::simd::has_avx512() {
        // SAFETY: the features that it is compiled for were just detected.
        let done = unsafe { unpack_avx512(bytes, bits, values) };
        (&bytes[done * bits as usize..], &mut values[done * BLOCK..])
    } else {
        (bytes, values)
    };
    for_width!(bits, unpack_blocks(bytes, values));
}

fn pack_blocks<const BITS: usize>(values: &[u64], bytes: &mut [u8]) {
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    let (whole, tail) = bytes.split_at_mut(blocks.len() * BITS);
    for (block, out) in blocks.iter().zip(whole.chunks_exact_mut(BITS)) {
        pack_block::<BITS>(block, out);
    }
    if !rest.is_empty() {
        let (mut block, mut out) = ([0; BLOCK], [0; 64]);
        block[..rest.len()].copy_from_slice(rest);
        pack_block::<BITS>(&block, &mut out[..BITS]);
        tail.copy_from_slice(&out[..tail.len()]);
    }
}

#[inline(always)]
fn pack_block<const BITS: usize>(values: &[u64; BLOCK], bytes: &mut [u8]) {
    let mut words = [0u64; BLOCK + 1];
    for (i, value) in values.iter().enumerate() {
        let value = value & (u64::MAX >> (64 - BITS));
        let (word, shift) = (i * BITS / 64, i * BITS % 64);
        words[word] |= value << shift;
        if shift + BITS > 64 {
            words[word + 1] = value >> (64 - shift);
        }
    }
    let (whole, tail) = bytes.as_chunks_mut::<8>();
    for (out, word) in whole.iter_mut().zip(words) {
        *out = word.to_le_bytes();
    }
    tail.copy_from_slice(&words[BITS / 8].to_le_bytes()[..BITS % 8]);
}

fn unpack_blocks<const BITS: usize>(bytes: &[u8], values: &mut [u64]) {
    let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
    let (whole, tail) = bytes.split_at(blocks.len() * BITS);
    for (block, packed) in blocks.iter_mut().zip(whole.chunks_exact(BITS)) {
        *block = unpack_block::<BITS>(packed);
    }
    if !rest.is_empty() {
        let mut packed = [0; 64];
        packed[..tail.len()].copy_from_slice(tail);
        rest.copy_from_slice(&unpack_block::<BITS>(&packed[..BITS])[..rest.len()]);
    }
}

#[inline(always)]
fn unpack_block<const BITS: usize>(bytes: &[u8]) -> [u64; BLOCK] {
    let mut words = [0u64; BLOCK + 1];
    let (whole, tail) = bytes.as_chunks::<8>();
    for (word, packed) in words.iter_mut().zip(whole) {
        *word = u64::from_le_bytes(*packed);
    }
    let mut last = [0; 8];
    last[..BITS % 8].copy_from_slice(tail);
    words[BITS / 8] = u64::from_le_bytes(last);

    let mut values = [0; BLOCK];
    for (i, value) in values.iter_mut().enumerate() {
        let (word, shift) = (i * BITS / 64, i * BITS % 64);
        *value = words[word] >> shift;
        if shift + BITS > 64 {
            *value |= words[word + 1] << (64 - shift);
        }
        *value &= u64::MAX >> (64 - BITS);
    }
    values
}

/// Unpacks blocks as long as there are 64 bytes to read, and says how many. Of two words that a value may lie across, the first is
/// shifted down, the second up; a shift by 64 leaves nothing, as where a value ends with the word.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn unpack_avx512(bytes: &[u8], bits: u32, values: &mut [u64]) -> usize {
    let first = |i: i64| i * i64::from(bits);
    let (word, shift) = (|i| first(i) / 64, |i| first(i) % 64);
    let low = _mm512_setr_epi64(
        word(0),
        word(1),
        word(2),
        word(3),
        word(4),
        word(5),
        word(6),
        word(7),
    );
    let down = _mm512_setr_epi64(
        shift(0),
        shift(1),
        shift(2),
        shift(3),
        shift(4),
        shift(5),
        shift(6),
        shift(7),
    );
    let high = _mm512_add_epi64(low, _mm512_set1_epi64(1));
    let up = _mm512_sub_epi64(_mm512_set1_epi64(64), down);
    let mask = _mm512_set1_epi64((u64::MAX >> (64 - bits)) as i64);
    let (blocks, _) = values.as_chunks_mut::<BLOCK>();
    let mut done = 0;
    for (block, packed) in blocks.iter_mut().zip(bytes.windows(64).step_by(bits as usize)) {
        // SAFETY: a window is 64 bytes long, and no alignment is needed.
        let words = unsafe { _mm512_loadu_si512(packed.as_ptr().cast()) };
        let low = _mm512_srlv_epi64(_mm512_permutexvar_epi64(low, words), down);
        let high = _mm512_sllv_epi64(_mm512_permutexvar_epi64(high, words), up);
        let value = _mm512_and_si512(_mm512_or_si512(low, high), mask);
        // SAFETY: a block is 64 bytes long, and no alignment is needed.
        unsafe { _mm512_storeu_si512(block.as_mut_ptr().cast(), value) };
        done += 1;
    }
    done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bit by bit, as the module's first line says.
    fn pack_slowly(values: &[u64], bits: u32) -> Vec<u8> {
        let mut bytes = vec![0; packed_len(values.len(), bits)];
        let all_bits = values
            .iter()
            .flat_map(|value| (0..bits).map(move |bit| (value >> bit & 1) as u8));
        for (position, bit) in all_bits.enumerate() {
            bytes[position / 8] |= bit << (position % 8);
        }
        bytes
    }

    proptest! {
        #[test]
        fn packing_follows_its_definition_and_comes_back(
            values in prop::collection::vec(prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)], 0..300),
            bits in 1u32..=64,
        ) {
            let packed = pack(&values, bits);
            prop_assert_eq!(&packed, &pack_slowly(&values, bits));
            let mut unpacked = vec![0; values.len()];
            unpack(&packed, bits, &mut unpacked);
            let reduced: Vec<u64> = values.iter().map(|value| value & (u64::MAX >> (64 - bits))).collect();
            prop_assert_eq!(&unpacked, &reduced);
            // The portable twin of the vector kernel.
            let mut unpacked = vec![0; values.len()];
            for_width!(bits, unpack_blocks(&packed, &mut unpacked));
            prop_assert_eq!(&unpacked, &reduced);
        }
    }

    #[test]
    fn every_width_packs_a_long_tensor() {
        let values: Vec<u64> = (0..1003u64)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        for bits in 1..=64 {
            assert_eq!(pack(&values, bits), pack_slowly(&values, bits), "{bits} bits");
        }
    }

    #[test]
    fn appended_tensors_start_at_byte_boundaries() {
        let mut bytes = vec![9];
        pack_into(&[1, 1, 1], 1, &mut bytes);
        pack_into(&[2], 20, &mut bytes);
        assert_eq!(bytes, [9, 7, 2, 0, 0]);
    }

    #[test]
    fn lengths_are_checked() {
        let wrong = |bytes: &'static [u8], bits, places| {
            std::panic::catch_unwind(|| unpack(bytes, bits, &mut vec![0; places])).is_err()
        };
        assert!(wrong(&[0; 5], 20, 1), "too few places");
        assert!(wrong(&[0; 4], 20, 2), "too few bytes");
        assert!(wrong(&[0; 6], 20, 2), "too many bytes");
        assert!(!wrong(&[0; 5], 20, 2));
        assert!(!wrong(&[], 64, 0), "nothing packs into nothing");
    }
}
