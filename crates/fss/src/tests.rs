//! The gates against their definitions, and each implementation of the hash against the other.

use crate::hash::Portable;
use crate::{Block, Error, cmp, dcf, dpf, table};
use proptest::collection::vec;
use proptest::prelude::*;

/// Distinct roots for both parties.
fn roots(n: usize, seed: u64) -> [Vec<Block>; 2] {
    let mut x = Block::from(seed) | 1 << 127;
    [(); 2].map(|()| {
        (0..n)
            .map(|_| {
                x = x
                    .wrapping_mul(0x2360ed051fc65da44385df649fccf645)
                    .wrapping_add(0x5851f42d4c957f2d14057b7ef767814f);
                x ^ (x >> 64)
            })
            .collect()
    })
}

fn slices(roots: &[Vec<Block>; 2]) -> [&[Block]; 2] {
    [&roots[0], &roots[1]]
}

fn bit(words: [&[u64]; 2], i: usize) -> bool {
    (words[0][i / 64] ^ words[1][i / 64]) >> (i % 64) & 1 == 1
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// Every alpha with every x: `(alphas, xs)`, one key a pair.
fn pairs(bits: u32) -> (Vec<u64>, Vec<u64>) {
    (0..1 << bits)
        .flat_map(|alpha| (0..1 << bits).map(move |x| (alpha, x)))
        .unzip()
}

#[test]
fn comparison_and_point_are_right_on_all_of_small_domains() {
    for bits in 1..=8 {
        let (alphas, xs) = pairs(bits);
        let roots = roots(alphas.len(), u64::from(bits));
        let keys = cmp::generate(bits, &alphas, slices(&roots)).unwrap();
        assert_eq!(keys.len(), alphas.len() * cmp::key_bytes(bits));
        let y = [0, 1].map(|p| cmp::evaluate(p, bits, &roots[p], &keys, &xs).unwrap());
        let points = dpf::generate(bits, &alphas, slices(&roots)).unwrap();
        assert_eq!(points.len(), alphas.len() * dpf::key_bytes(bits));
        let z = [0, 1].map(|p| dpf::evaluate(p, bits, &roots[p], &points, &xs).unwrap());
        for i in 0..alphas.len() {
            assert_eq!(
                bit([&y[0], &y[1]], i),
                xs[i] < alphas[i],
                "bits {bits}: {} < {}",
                xs[i],
                alphas[i]
            );
            let sum = z[0][i].wrapping_add(z[1][i]);
            assert_eq!(
                sum,
                u64::from(xs[i] == alphas[i]),
                "bits {bits}: {} == {}",
                xs[i],
                alphas[i]
            );
        }
    }
}

#[test]
fn dcf_is_right_on_all_of_small_domains() {
    for bits in 1..=8 {
        let alphas: Vec<u64> = (0..1 << bits).collect();
        let betas: Vec<u64> = alphas
            .iter()
            .map(|a| (a + 1).wrapping_mul(0x9e3779b97f4a7c15))
            .collect();
        let xs = pairs(bits).1;
        let roots = roots(alphas.len(), u64::from(bits));
        let keys = dcf::generate(bits, &alphas, &betas, slices(&roots)).unwrap();
        assert_eq!(keys.len(), alphas.len() * dcf::key_bytes(bits));
        let y = [0, 1].map(|p| dcf::evaluate(p, bits, &roots[p], &keys, 1 << bits, &xs).unwrap());
        for (i, x) in xs.iter().enumerate() {
            let alpha = i >> bits;
            let expected = if *x < alphas[alpha] { betas[alpha] } else { 0 };
            assert_eq!(
                y[0][i].wrapping_add(y[1][i]),
                expected,
                "bits {bits}: {x} < {alpha}"
            );
        }
    }
}

#[test]
fn many_points_of_a_key_are_what_each_is_alone() {
    for bits in [1, 2, 3, 24, 64] {
        let low = u64::MAX >> (64 - bits);
        let spread = |i: u64| i.wrapping_mul(0x9e3779b97f4a7c15) >> 7 & low;
        let alphas: Vec<u64> = (0..11).map(spread).collect();
        let betas: Vec<[u64; 2]> = alphas.iter().map(|a| [!a, a.wrapping_mul(3)]).collect();
        let roots = roots(alphas.len(), u64::from(bits));
        let mut keys = vec![0; alphas.len() * dcf::pair_key_bytes(bits)];
        dcf::generate_pairs_into(bits, &alphas, &betas, slices(&roots), &mut keys).unwrap();
        let single = dcf::generate(bits, &alphas, &alphas, slices(&roots)).unwrap();
        // Near alpha and far from it, twice over, in no order.
        let points = |a: &u64| -> Vec<u64> {
            let near = (0..40).map(|i| a.wrapping_add(20).wrapping_sub(i) & low);
            near.chain((0..60).map(|i| spread(i % 45))).collect()
        };
        let xs: Vec<u64> = alphas.iter().flat_map(points).collect();
        let each = xs.len() / alphas.len();
        for (party, roots) in roots.iter().enumerate() {
            let many = dcf::evaluate_pairs(party, bits, roots, &keys, each, &xs).unwrap();
            let many_single = dcf::evaluate(party, bits, roots, &single, each, &xs).unwrap();
            for (i, x) in xs.iter().enumerate() {
                let key = i / each;
                let root = &roots[key..=key];
                let bytes = &keys[key * dcf::pair_key_bytes(bits)..][..dcf::pair_key_bytes(bits)];
                let alone = dcf::evaluate_pairs(party, bits, root, bytes, 1, &[*x]).unwrap();
                assert_eq!(many[i], alone[0], "bits {bits}: {x}");
                let bytes = &single[key * dcf::key_bytes(bits)..][..dcf::key_bytes(bits)];
                let alone = dcf::evaluate(party, bits, root, bytes, 1, &[*x]).unwrap();
                assert_eq!(many_single[i], alone[0], "bits {bits}: {x}");
            }
        }
    }
}

#[test]
fn pairs_of_a_dcf_are_right_on_all_of_small_domains() {
    for bits in 1..=8 {
        let alphas: Vec<u64> = (0..1 << bits).collect();
        let betas: Vec<[u64; 2]> = alphas
            .iter()
            .map(|a| [1, (a + 1).wrapping_mul(0x9e3779b97f4a7c15)])
            .collect();
        let xs = pairs(bits).1;
        let roots = roots(alphas.len(), u64::from(bits));
        let mut keys = vec![0; alphas.len() * dcf::pair_key_bytes(bits)];
        dcf::generate_pairs_into(bits, &alphas, &betas, slices(&roots), &mut keys).unwrap();
        let y = [0, 1].map(|p| dcf::evaluate_pairs(p, bits, &roots[p], &keys, 1 << bits, &xs).unwrap());
        for (i, x) in xs.iter().enumerate() {
            let alpha = i >> bits;
            let expected = if *x < alphas[alpha] { betas[alpha] } else { [0, 0] };
            let sum = [0, 1].map(|w| y[0][i][w].wrapping_add(y[1][i][w]));
            assert_eq!(sum, expected, "bits {bits}: {x} < {alpha}");
        }
    }
    assert_eq!([1, 2, 40].map(dcf::pair_key_bytes), [32, 64, 32 * 38 + 64]);
}

#[test]
fn table_is_right_on_all_of_small_domains() {
    for bits in 1..=6 {
        let (alphas, offsets) = pairs(bits);
        let roots = roots(alphas.len(), u64::from(bits));
        let keys = table::generate(bits, &alphas, slices(&roots)).unwrap();
        check_table(bits, &alphas, &offsets, &roots, &keys);
    }
}

fn check_table(bits: u32, alphas: &[u64], offsets: &[u64], roots: &[Vec<Block>; 2], keys: &[u8]) {
    let squares: Vec<u64> = (0..1 << bits).map(|j: u64| j * j + 1).collect();
    let noise: Vec<u64> = (1..=1 << bits)
        .map(|j: u64| j.wrapping_mul(0xd1342543de82ef95))
        .collect();
    let tables = [&squares[..], &noise[..]];
    let y = [0, 1].map(|p| table::lookup(p, bits, &roots[p], keys, offsets, &tables).unwrap());
    for (t, table) in tables.iter().enumerate() {
        for i in 0..alphas.len() {
            let expected = table[((alphas[i] + offsets[i]) & mask(bits)) as usize];
            assert_eq!(
                y[0][t][i].wrapping_add(y[1][t][i]),
                expected,
                "bits {bits}, table {t}, key {i}"
            );
        }
    }
}

#[test]
fn large_tables_are_expanded_in_parts() {
    for bits in [11, 12, 13, 15] {
        let alphas = [0, 1, mask(bits), mask(bits) / 3, 1 << (bits - 1)];
        let offsets = [mask(bits), 0, 1, mask(bits) / 5, 1 << (bits - 1)];
        let roots = roots(5, u64::from(bits));
        let keys = table::generate(bits, &alphas, slices(&roots)).unwrap();
        check_table(bits, &alphas, &offsets, &roots, &keys);
    }
}

#[test]
fn batches_are_the_same_on_any_number_of_threads_and_in_any_cut() {
    let n = 3000;
    let bits = 20;
    let alphas: Vec<u64> = (0..n as u64).map(|i| (i * 349) & mask(bits)).collect();
    let roots = roots(n, 7);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let cmps = cmp::generate(bits, &alphas, slices(&roots)).unwrap();
            let dcfs = dcf::generate(bits, &alphas, &alphas, slices(&roots)).unwrap();
            let y = cmp::evaluate(1, bits, &roots[1], &cmps, &alphas).unwrap();
            let z = dcf::evaluate(1, bits, &roots[1], &dcfs, 1, &alphas).unwrap();
            (cmps, dcfs, y, z)
        })
    };
    let one = run(1);
    assert_eq!(one, run(3));
    let (head, tail) = one.0.split_at(64 * cmp::key_bytes(bits));
    assert_eq!(
        cmp::evaluate(1, bits, &roots[1][..64], head, &alphas[..64]).unwrap(),
        one.2[..1]
    );
    assert_eq!(
        cmp::evaluate(1, bits, &roots[1][64..], tail, &alphas[64..]).unwrap(),
        one.2[1..]
    );
}

/// Not a proof of secrecy, but what a forgotten mask would break: for one and the same alpha and point, each bit of a
/// correction word and of a party's share is set in half of all keys, within six standard deviations.
#[test]
fn keys_and_shares_look_uniform() {
    let (n, bits) = (1 << 14, 12);
    let (alphas, xs) = (vec![1234; n], vec![1235; n]);
    let roots = roots(n, 99);
    let even = |what: &str, words: &mut dyn Iterator<Item = u64>| {
        let mut ones = [0i64; 64];
        words.for_each(|word| (0..64).for_each(|bit| ones[bit] += (word >> bit & 1) as i64));
        for (bit, ones) in ones.iter().enumerate() {
            assert!(
                (2 * ones - n as i64).pow(2) < 36 * n as i64,
                "{what}, bit {bit}: {ones} of {n}"
            );
        }
    };
    let even_keys = |what: &str, keys: &[u8]| {
        let words = keys.as_chunks::<8>().0;
        for place in 0..words.len() / n {
            let column = words.iter().skip(place).step_by(words.len() / n);
            even(
                &format!("{what} word {place}"),
                &mut column.map(|word| u64::from_le_bytes(*word)),
            );
        }
    };
    let cmps = cmp::generate(bits, &alphas, slices(&roots)).unwrap();
    even_keys("cmp", &cmps);
    let dpfs = dpf::generate(bits, &alphas, slices(&roots)).unwrap();
    even_keys("dpf", &dpfs);
    let dcfs = dcf::generate(bits, &alphas, &alphas, slices(&roots)).unwrap();
    even_keys("dcf", &dcfs);
    let mut paired = vec![0; n * dcf::pair_key_bytes(bits)];
    dcf::generate_pairs_into(bits, &alphas, &vec![[1, 1234]; n], slices(&roots), &mut paired).unwrap();
    even_keys("dcf of pairs", &paired);
    for party in [0, 1] {
        let roots = &roots[party];
        let y = cmp::evaluate(party, bits, roots, &cmps, &xs).unwrap();
        even(
            "a comparison",
            &mut (0..n).map(|i| (y[i / 64] >> (i % 64) & 1).wrapping_neg()),
        );
        even(
            "a point",
            &mut dpf::evaluate(party, bits, roots, &dpfs, &xs).unwrap().into_iter(),
        );
        let y = dcf::evaluate_pairs(party, bits, roots, &paired, 1, &xs).unwrap();
        for w in 0..2 {
            even("a dcf of pairs", &mut y.iter().map(|y| y[w]));
        }
        even("both of a pair", &mut y.iter().map(|y| y[0] ^ y[1]));
        even(
            "a dcf",
            &mut dcf::evaluate(party, bits, roots, &dcfs, 1, &xs)
                .unwrap()
                .into_iter(),
        );
    }
}

#[test]
fn empty_batches_are_fine() {
    assert_eq!(cmp::generate(24, &[], [&[], &[]]), Ok(vec![]));
    assert_eq!(cmp::evaluate(0, 24, &[], &[], &[]), Ok(vec![]));
    assert_eq!(dcf::generate(24, &[], &[], [&[], &[]]), Ok(vec![]));
    assert_eq!(dcf::evaluate(0, 24, &[], &[], 3, &[]), Ok(vec![]));
    assert_eq!(dcf::evaluate(0, 1, &[7], &[0; 16], 0, &[]), Ok(vec![]));
    assert_eq!(dpf::evaluate(1, 24, &[], &[], &[]), Ok(vec![]));
    assert_eq!(table::lookup(1, 2, &[], &[], &[], &[&[0; 4]]), Ok(vec![vec![]]));
    assert_eq!(table::lookup(1, 1, &[7], &[0; 16], &[0], &[]), Ok(vec![]));
}

#[test]
fn misuse_is_an_error() {
    let r: &[Block] = &[7];
    assert_eq!(
        cmp::generate(0, &[0], [r, r]),
        Err(Error::Bits { bits: 0, max: 64 })
    );
    assert_eq!(
        dcf::generate(65, &[0], &[0], [r, r]),
        Err(Error::Bits { bits: 65, max: 64 })
    );
    assert_eq!(
        table::generate(25, &[0], [r, r]),
        Err(Error::Bits { bits: 25, max: 24 })
    );
    assert_eq!(dpf::evaluate(2, 8, r, &[0; 128], &[0]), Err(Error::Party(2)));
    assert_eq!(
        cmp::generate(8, &[0, 256], [&[1, 2], &[3, 4]]),
        Err(Error::Range {
            what: "alphas",
            index: 1,
            bits: 8
        })
    );
    assert_eq!(
        cmp::evaluate(0, 8, r, &[0; 32], &[256]),
        Err(Error::Range {
            what: "xs",
            index: 0,
            bits: 8
        })
    );
    assert_eq!(
        table::lookup(0, 3, r, &[0; 48], &[8], &[&[0; 8]]),
        Err(Error::Range {
            what: "offsets",
            index: 0,
            bits: 3
        })
    );
    let length = |what, expected, actual| Error::Length {
        what,
        expected,
        actual,
    };
    assert_eq!(
        cmp::generate(8, &[0], [r, &[]]),
        Err(length("roots of party 1", 1, 0))
    );
    assert_eq!(
        dpf::generate(8, &[0], [&[], r]),
        Err(length("roots of party 0", 1, 0))
    );
    assert_eq!(dcf::generate(8, &[0], &[], [r, r]), Err(length("betas", 1, 0)));
    assert_eq!(
        cmp::evaluate(0, 24, r, &[0; 287], &[0]),
        Err(length("keys", 288, 287))
    );
    assert_eq!(
        cmp::evaluate(0, 24, r, &[0; 288], &[]),
        Err(length("roots", 0, 1))
    );
    assert_eq!(
        dcf::evaluate(0, 8, r, &[0; 176], usize::MAX, &[0]),
        Err(length("xs", usize::MAX, 1))
    );
    assert_eq!(
        dcf::evaluate(0, 8, r, &[0; 175], 1, &[0]),
        Err(length("keys", 176, 175))
    );
    assert_eq!(
        table::lookup(0, 3, r, &[0; 48], &[0], &[&[0; 7]]),
        Err(length("a table", 8, 7))
    );
}

/// Points of `bits` bits, the extremes and neighbours among them more often than chance would have it.
fn points(bits: u32, n: usize) -> impl Strategy<Value = Vec<(u64, u64)>> {
    let point = move || prop_oneof![2 => any::<u64>(), 1 => Just(0), 1 => Just(u64::MAX)];
    let pair = (point(), point(), 0..4u8).prop_map(move |(a, x, near)| match near {
        0 => (a & mask(bits), a & mask(bits)),
        1 => (a & mask(bits), a.wrapping_add(1) & mask(bits)),
        _ => (a & mask(bits), x & mask(bits)),
    });
    vec(pair, n)
}

fn batches() -> impl Strategy<Value = (u32, Vec<(u64, u64)>, u64)> {
    (1..=64u32, 0..150usize).prop_flat_map(|(bits, n)| (Just(bits), points(bits, n), any::<u64>()))
}

proptest! {
    #[test]
    fn gates_are_right_and_portable_agrees((bits, pairs, seed) in batches()) {
        let (alphas, xs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let roots = roots(alphas.len(), seed);
        let betas: Vec<u64> = roots[0].iter().map(|r| (r >> 7) as u64).collect();

        let keys = cmp::generate(bits, &alphas, slices(&roots)).unwrap();
        let mut twin = vec![0; keys.len()];
        cmp::generate_with(Portable, bits, &alphas, slices(&roots), &mut twin).unwrap();
        prop_assert_eq!(&twin, &keys);
        let y = [0, 1].map(|p| cmp::evaluate(p, bits, &roots[p], &keys, &xs).unwrap());
        prop_assert_eq!(&cmp::evaluate_with(Portable, 0, bits, &roots[0], &keys, &xs).unwrap(), &y[0]);
        for i in 0..64 * y[0].len() {
            let expected = i < xs.len() && xs[i] < alphas[i];
            prop_assert_eq!(bit([&y[0], &y[1]], i), expected);
        }

        let keys = dpf::generate(bits, &alphas, slices(&roots)).unwrap();
        let mut twin = vec![0; keys.len()];
        dpf::generate_with(Portable, bits, &alphas, slices(&roots), &mut twin).unwrap();
        prop_assert_eq!(&twin, &keys);
        let y = [0, 1].map(|p| dpf::evaluate(p, bits, &roots[p], &keys, &xs).unwrap());
        prop_assert_eq!(&dpf::evaluate_with(Portable, 1, bits, &roots[1], &keys, &xs).unwrap(), &y[1]);
        for i in 0..xs.len() {
            prop_assert_eq!(y[0][i].wrapping_add(y[1][i]), u64::from(xs[i] == alphas[i]));
        }

        let keys = dcf::generate(bits, &alphas, &betas, slices(&roots)).unwrap();
        let mut twin = vec![0; keys.len()];
        dcf::generate_with(Portable, bits, &alphas, betas.as_chunks::<1>().0, slices(&roots), &mut twin).unwrap();
        prop_assert_eq!(&twin, &keys);
        let twice: Vec<u64> = xs.iter().zip(&alphas).flat_map(|(x, a)| [*x, a.saturating_sub(1)]).collect();
        let y = [0, 1].map(|p| dcf::evaluate(p, bits, &roots[p], &keys, 2, &twice).unwrap());
        prop_assert_eq!(&dcf::evaluate_with::<_, 1>(Portable, 0, bits, &roots[0], &keys, 2, &twice).unwrap().into_flattened(), &y[0]);
        for i in 0..twice.len() {
            let expected = if twice[i] < alphas[i / 2] { betas[i / 2] } else { 0 };
            prop_assert_eq!(y[0][i].wrapping_add(y[1][i]), expected);
        }

        let betas: Vec<[u64; 2]> = betas.iter().zip(&alphas).map(|(b, a)| [*b, *a]).collect();
        let mut keys = vec![0; alphas.len() * dcf::pair_key_bytes(bits)];
        let mut twin = keys.clone();
        dcf::generate_pairs_into(bits, &alphas, &betas, slices(&roots), &mut keys).unwrap();
        dcf::generate_with(Portable, bits, &alphas, &betas, slices(&roots), &mut twin).unwrap();
        prop_assert_eq!(&twin, &keys);
        let y = [0, 1].map(|p| dcf::evaluate_pairs(p, bits, &roots[p], &keys, 2, &twice).unwrap());
        prop_assert_eq!(&dcf::evaluate_with(Portable, 1, bits, &roots[1], &keys, 2, &twice).unwrap(), &y[1]);
        for i in 0..twice.len() {
            let expected = if twice[i] < alphas[i / 2] { betas[i / 2] } else { [0, 0] };
            prop_assert_eq!([0, 1].map(|w| y[0][i][w].wrapping_add(y[1][i][w])), expected);
        }
    }

    #[test]
    fn tables_are_right_and_portable_agrees(bits in 1..=10u32, pairs in vec(any::<(u64, u64)>(), 0..20), seed: u64) {
        let (alphas, offsets): (Vec<_>, Vec<_>) =
            pairs.into_iter().map(|(a, x)| (a & mask(bits), x & mask(bits))).unzip();
        let roots = roots(alphas.len(), seed);
        let keys = table::generate(bits, &alphas, slices(&roots)).unwrap();
        check_table(bits, &alphas, &offsets, &roots, &keys);
        let entries: Vec<u64> = (0..1 << bits).map(|j: u64| j.wrapping_mul(seed | 1)).collect();
        let tables = [&entries[..]];
        prop_assert_eq!(
            table::lookup_with(Portable, 0, bits, &roots[0], &keys, &offsets, &tables).unwrap(),
            table::lookup(0, bits, &roots[0], &keys, &offsets, &tables).unwrap()
        );
    }
}
