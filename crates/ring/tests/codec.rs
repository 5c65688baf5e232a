//! The fixed-point codec: accuracy, rounding, and what it refuses.

use proptest::prelude::*;
use veiltune_ring::{Error, codec};

proptest! {
    #[test]
    fn round_trip_within_half_a_unit(x in -1e6f64..1e6, scale in 0u32..=32) {
        let back = codec::decode(&codec::encode([x], scale).unwrap(), scale)[0];
        prop_assert!((back - x).abs() <= (-f64::from(scale) - 1.0).exp2(), "{x} came back as {back}");
    }

    #[test]
    fn integers_come_back(x in -(1i64 << 53)..=1 << 53, scale in 0u32..=codec::MAX_SCALE) {
        let real = codec::decode(&[x as u64], scale);
        prop_assert_eq!(codec::encode(&real, scale).unwrap(), [x as u64]);
    }

    #[test]
    fn single_precision_is_exact(bits in any::<u32>(), scale in 0u32..=codec::MAX_SCALE) {
        let x = f32::from_bits(bits);
        prop_assert_eq!(codec::encode([x], scale), codec::encode([f64::from(x)], scale));
    }
}

#[test]
fn halves_go_to_even() {
    let units = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5].map(|x| x / 256.0);
    let expected = [0i64, 2, 2, 0, -2, -2].map(|x| x as u64);
    assert_eq!(codec::encode(units, 8).unwrap(), expected);
}

#[test]
fn limits() {
    let top = 2f64.powi(47);
    assert_eq!(codec::encode([-top], 16).unwrap(), [1 << 63]);
    assert_eq!(
        codec::encode([top.next_down()], 16).unwrap(),
        [(1 << 63) - (1 << 10)]
    );
    assert_eq!(codec::decode(&[1 << 63], 63), [-1.0]);
    for bad in [
        top,
        (-top).next_down(),
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
    ] {
        assert_eq!(
            codec::encode([0.0, bad, f64::NAN], 16),
            Err(Error::Encode { index: 1, scale: 16 })
        );
    }
    assert_eq!(codec::encode([0.0], 64), Err(Error::Scale(64)));
    assert_eq!(codec::encode(Vec::<f32>::new(), 16), Ok(vec![]));
}
