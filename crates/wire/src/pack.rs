//! Bit-packing: the low `bits` (1 to 64) of each value, one after another, least significant bit first.
//!
//! A value modulo `2^21` costs 21 bits on the wire instead of 64. Eight values fill exactly `bits` bytes, so
//! packing works on blocks of eight, with every shift known at compile time.

use crate::{Error, Result};

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

/// Unpacks `n` values of `bits` bits from `bytes` into `values`. Unused bits of the last byte are ignored.
///
/// # Errors
/// [`Error::BadBuffer`] if `values` has not `n` places or `bytes` not [`packed_len`]`(n, bits)`.
///
/// # Panics
/// If `bits` is not in 1..=64.
pub fn unpack(bytes: &[u8], n: usize, bits: u32, values: &mut [u64]) -> Result<()> {
    let check = |what, expected, got| match expected == got {
        true => Ok(()),
        false => Err(Error::BadBuffer { what, expected, got }),
    };
    check("places for unpacked values", n, values.len())?;
    check("bytes of packed values", packed_len(n, bits), bytes.len())?;
    for_width!(bits, unpack_blocks(bytes, values));
    Ok(())
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
            values in prop::collection::vec(prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)], 0..70),
            bits in 1u32..=64,
        ) {
            let packed = pack(&values, bits);
            prop_assert_eq!(&packed, &pack_slowly(&values, bits));
            let mut unpacked = vec![0; values.len()];
            unpack(&packed, values.len(), bits, &mut unpacked).unwrap();
            let reduced: Vec<u64> = values.iter().map(|value| value & (u64::MAX >> (64 - bits))).collect();
            prop_assert_eq!(unpacked, reduced);
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
        let wrong = |bytes: &[u8], n, bits, places| {
            matches!(
                unpack(bytes, n, bits, &mut vec![0; places]),
                Err(Error::BadBuffer { .. })
            )
        };
        assert!(wrong(&[0; 5], 2, 20, 1), "too few places");
        assert!(wrong(&[0; 4], 2, 20, 2), "too few bytes");
        assert!(wrong(&[0; 6], 2, 20, 2), "too many bytes");
        assert!(!wrong(&[0; 5], 2, 20, 2));
        assert!(!wrong(&[], 0, 64, 0), "nothing packs into nothing");
    }
}
