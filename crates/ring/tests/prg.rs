//! The generator: known answers, and the rules that keep its streams apart.

use std::collections::HashSet;

use proptest::prelude::*;
use veiltune_ring::prg::{Prg, Seed};

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
        .collect()
}

/// NIST SP 800-38A, F.5.1 (CTR-AES128): the output blocks. The initial counter is a gate, a slot and a block number.
#[test]
fn nist_counter_mode_vectors() {
    let key = bytes("2b7e151628aed2a6abf7158809cf4f3c").try_into().unwrap();
    let mut prg = Prg::new(&Seed::from_bytes(key), 0xf0f1_f2f3_f4f5_f6f7, 0xf8f9);
    prg.seek(0xfafb_fcfd_feff);
    let mut out = [0; 64];
    prg.fill_bytes(&mut out);
    let expected = "ec8cdf7398607cb0f2d21675ea9ea1e4362b7c3c6773516318a077d7fc5073ae\
                    6a2cc3787889374fbeb4c81b17ba6c44e89c399ff0f198c6d40a31db156cabfe";
    assert_eq!(out.as_slice(), bytes(expected));
    prg.seek(0xfafb_fcfd_feff);
    let blocks: Vec<u8> = prg.blocks(4).iter().flat_map(|b| b.to_le_bytes()).collect();
    assert_eq!(out.as_slice(), blocks);
}

fn stream(gate: u64, slot: u16) -> Prg {
    Prg::new(&Seed::from_bytes(*b"sixteen test key"), gate, slot)
}

proptest! {
    /// However a stream is cut into draws, and whatever is drawn, it is one stream of bytes.
    #[test]
    fn pieces_do_not_matter(cuts in proptest::collection::vec((0usize..5, 0usize..700), 1..8)) {
        let mut prg = stream(1, 2);
        let mut drawn = Vec::new();
        for (kind, n) in cuts {
            match kind {
                0 => { let mut b = vec![0; n]; prg.fill_bytes(&mut b); drawn.extend(b) }
                1 => drawn.extend(prg.vec(n).iter().flat_map(|w| w.to_le_bytes())),
                2 => drawn.extend(prg.blocks(n).iter().flat_map(|b| b.to_le_bytes())),
                3 => drawn.extend(prg.bits(n, 32).iter().flat_map(|&w| (w as u32).to_le_bytes())),
                _ => drawn.extend(prg.bits(n, 8).iter().map(|&w| w as u8)),
            }
        }
        let mut whole = vec![0; drawn.len()];
        stream(1, 2).fill_bytes(&mut whole);
        prop_assert!(drawn == whole);
    }

    #[test]
    fn narrow_words_fit(bits in 0u32..=64, n in 0usize..600) {
        let words = stream(3, 4).bits(n, bits);
        prop_assert_eq!(words.len(), n);
        prop_assert!(words.iter().all(|&w| (w as u128) < 1 << bits));
        // Each bit is set somewhere among 200 or more words, except with probability 2^-194.
        let seen = words.iter().fold(0, |a, w| a | w);
        prop_assert!(n < 200 || seen.count_ones() == bits);
    }

    #[test]
    fn seeking_is_skipping(block in 0u64..1000) {
        let (mut skipped, mut sought) = (stream(5, 6), stream(5, 6));
        skipped.blocks(block as usize);
        sought.seek(block);
        prop_assert_eq!(skipped.vec(5), sought.vec(5));
    }
}

/// Streams of neighbouring gates and slots, and both ends of a stream, have no block in common.
#[test]
fn streams_do_not_overlap() {
    let mut seen = HashSet::new();
    for gate in [0, 1, 1 << 16, 1 << 48, u64::MAX] {
        for slot in [0, 1, 1 << 15, u16::MAX] {
            let mut prg = stream(gate, slot);
            for start in [0, (1 << 48) - 50] {
                prg.seek(start);
                assert!(prg.blocks(50).into_iter().all(|block| seen.insert(block)));
            }
        }
    }
}

#[test]
#[should_panic(expected = "2^48 blocks")]
fn a_stream_ends() {
    let mut prg = stream(0, 0);
    prg.seek((1 << 48) - 1);
    prg.vec(3);
}

#[test]
fn threads_change_nothing() {
    let draw = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut prg = stream(9, 9);
            let head = prg.bits(3, 8);
            (
                head,
                prg.vec(100_001),
                prg.bits(100_003, 13),
                prg.ring([300, 200]).into_vec(),
            )
        })
    };
    assert!(draw(1) == draw(3));
}

#[test]
fn seeds() {
    let seed = Seed::from_bytes([7; 16]);
    assert_eq!(seed.expose(), &[7; 16]);
    assert_ne!(seed.derive(b"a").expose(), seed.derive(b"b").expose());
    assert_ne!(seed.derive(b"").expose(), seed.expose());
    assert_eq!(seed.derive(b"a").expose(), seed.clone().derive(b"a").expose());
    assert_ne!(Seed::random().unwrap().expose(), Seed::random().unwrap().expose());
    assert_eq!(format!("{seed:?}"), "Seed(..)");
    assert!(!format!("{:?}", Prg::new(&seed, 1, 2)).contains("[7"));
}
