//! One suite for every interpreter: each operation, with every combination of owners, on random shapes and at the
//! extremes.
//!
//! - Plain against Fixed: within the bound stated with the case.
//! - Fixed against the parties: bit for bit. Fixed draws the masks of the same seeds, so even the rounding bit of a
//!   one-round truncation must agree.
//! - Cost against the meters: rounds, bytes each way, dealer bytes, exactly.

mod harness;

use harness::{Case, Op, Who, check, uniform};
use proptest::prelude::*;
use veiltune_engine::{Activation, NormKind, NormSpec, Range, SoftmaxSpec};

const OWNERS: [Who; 4] = [Who::Public, Who::P0, Who::P1, Who::Shared];
/// A unit of the fixed-point input, 2^-16.
const ULP: f64 = 1.0 / 65536.0;

fn who() -> impl Strategy<Value = Who> {
    prop::sample::select(OWNERS.to_vec())
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 24,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn matmul(m in 0usize..5, k in 1usize..9, n in 0usize..6, batch in 0usize..3, a in who(), b in who(), seed: u64) {
        let x = Case::input(a, &[batch, m, k], uniform(seed, 8.0));
        let y = Case::input(b, &[batch, k, n], uniform(seed + 1, 8.0));
        check(Op::MatMul, &[x, y], 8.0 * 2.0 * ULP * k as f64)?;
    }

    #[test]
    fn products_of_truncated_rows(m in 0usize..3, k in 1usize..40, n in 1usize..40, a in who(), b in who(), seed: u64) {
        let fine = [0, 1].map(|i| Case::input(a, &[2, m, k], uniform(seed + i, 4.0)));
        let y = Case::input(b, &[2, k, n], uniform(seed + 2, 2.0));
        let bound = (2.0 + 32.0) * 2.0 * ULP * k as f64;
        check(Op::FineRow, &[fine[0].clone(), fine[1].clone(), y], bound)?;
        if m > 0 {
            check(Op::Trim, &fine, (4.8 + 4.8) * 8.0 * ULP * k as f64)?;
        }
        let w = Case::weight(b, &[n, k], uniform(seed + 2, 2.0));
        check(Op::FineRowLinear, &[fine[0].clone(), fine[1].clone(), w], bound)?;
    }

    #[test]
    fn linear(m in 0usize..5, k in 1usize..9, n in 1usize..6, a in who(), w in who(), seed: u64) {
        let x = Case::input(a, &[2, m, k], uniform(seed, 8.0));
        let w = Case::weight(w, &[n, k], uniform(seed + 1, 2.0));
        let b = Case::weight(w.who, &[n], uniform(seed + 2, 2.0));
        check(Op::Linear, &[x, w, b], 10.0 * ULP * (k + 1) as f64)?;
    }

    #[test]
    fn elementwise(dims in prop::collection::vec(1usize..5, 1..4), a in who(), b in who(), c in who(), seed: u64) {
        let x = Case::input(a, &dims, uniform(seed, 30.0));
        let y = Case::input(b, &dims[dims.len() - 1..], uniform(seed + 1, 30.0));
        for op in [Op::Mul, Op::Add, Op::Sub, Op::ReluOfSum] {
            check(op, &[x.clone(), y.clone()], 62.0 * ULP)?;
        }
        let z = Case::input(c, &dims, uniform(seed + 2, 30.0));
        check(Op::SumTimes, &[x.clone(), y, z], 242.0 * ULP)?;
        check(Op::Square, std::slice::from_ref(&x), 62.0 * ULP)?;
        for c in [0.125, -2.0, 0.3, -1e-3, 0.0, 77.7] {
            check(Op::Scale(c), std::slice::from_ref(&x), ULP * (c.abs() + 1.0) + 30.0 * c.abs() / 32768.0)?;
        }
    }

    #[test]
    fn truncation(n in 0usize..40, a in who(), seed: u64, size in prop::sample::select(vec![1e-4, 1.0, 1000.0, 2000.0])) {
        let x = Case::input(a, &[n], uniform(seed, size));
        let y = Case::input(a, &[n], uniform(seed + 1, 1.0));
        // A product of scale 32, squared: the operands are truncated first.
        check(Op::MulTwice, &[x, y], (4.0 * size + 4.0) * ULP)?;
    }

    #[test]
    fn relu_and_argmax(rows in 0usize..4, n in 1usize..12, a in who(), seed: u64) {
        let x = Case::input(a, &[rows, n], uniform(seed, 4000.0));
        check(Op::Relu, &[x], ULP)?;
        let x = Case::input(a, &[rows, n], uniform(seed, 2000.0));
        check(Op::Argmax, &[x], 0.0)?;
    }

    #[test]
    fn relu_of_many_and_of_products(n in 0usize..300, a in who(), b in who(), seed: u64) {
        let x = Case::input(a, &[n], uniform(seed, 60.0));
        let y = Case::input(b, &[n], uniform(seed + 1, 60.0));
        check(Op::Relu, std::slice::from_ref(&x), ULP)?;
        // Plain rounds to 24 bits.
        check(Op::ReluOfProduct, &[x.clone(), y.clone()], 5e-4)?;
        check(Op::ReluOfFineProduct, &[x, y], 60.0 * 60.0 / 32768.0)?;
    }

    #[test]
    fn activations(n in 0usize..600, a in who(), seed: u64) {
        use Activation::*;
        for (f, bound) in [(Gelu, 6.4), (Silu, 12.0), (Tanh, 6.0), (Sigmoid, 12.0), (Sin, 6.4), (Cos, 6.4), (Exp, 2.0)] {
            let x = Case::input(a, &[n], uniform(seed, bound));
            check(Op::Activation(f, Range::Within(bound)), &[x], 4e-4)?;
        }
        for f in [Gelu, Silu] {
            // 0.5 * (x of scale 32): a product feeds the gate without truncation.
            let x = Case::input(a, &[n], uniform(seed, 6.0));
            check(Op::ActivationOfProduct(f, Range::Within(6.4)), &[x.clone(), x], 2.5e-3)?;
        }
    }

    #[test]
    fn activations_of_fine_products(n in 0usize..600, a in who(), seed: u64) {
        use Activation::*;
        for (f, bound) in [(Gelu, 6.4), (Gelu, 12.8), (Silu, 12.0), (Tanh, 6.0), (Sigmoid, 12.0), (Exp, 2.0)] {
            let x = Case::input(a, &[n], uniform(seed, bound));
            let y = Case::input(a, &[n], uniform(seed + 1, 3.3));
            // 15 bits of the 0.3.
            check(Op::ActivationOfFineProduct(f, Range::Within(bound)), &[x, y], 6e-4)?;
        }
    }

    #[test]
    fn zeros_on_their_way(rows in 1usize..4, a in who(), w in who(), seed: u64) {
        let width = 32;
        let x = Case::input(a, &[rows, width], uniform(seed, 2.0));
        let one = Case::input(a, &[width], vec![1.0; width]);
        let w = Case::weight(w, &[width, width], uniform(seed + 1, 0.3));
        let norm = NormSpec { kind: NormKind::Layer, eps: 1e-6, sigma: (0.1, 1.5) };
        check(Op::Mlp(norm, Range::Within(6.4)), &[x, one, w], 4e-3)?;
    }

    #[test]
    fn turns(n in 0usize..600, a in who(), seed: u64) {
        // Any angle; an input's last bit is 2^-16 of a turn.
        let x = Case::input(a, &[n], uniform(seed, 40.0));
        check(Op::Turns, std::slice::from_ref(&x), 4e-4)?;
        check(Op::TurnsOfProduct, &[x.clone(), x], 4e-4)?;
    }

    #[test]
    fn guarded_activations(n in 1usize..60, a in who(), seed: u64) {
        use Activation::*;
        for (f, bound) in [(Gelu, 6.4), (Silu, 12.8), (Tanh, 8.0), (Sigmoid, 12.8)] {
            let x = Case::input(a, &[n], uniform(seed, 500.0));
            check(Op::Activation(f, Range::Guarded(bound)), &[x], 5e-4)?;
        }
    }

    #[test]
    fn softmax(rows in 0usize..4, n in 1usize..300, a in who(), seed: u64, bound in prop::sample::select(vec![0.5, 4.0, 15.0, 24.0])) {
        let x = Case::input(a, &[rows, n], uniform(seed, bound));
        check(Op::Softmax(SoftmaxSpec { bound }), &[x], 1e-3)?;
    }

    #[test]
    fn attend(rows in 0usize..4, n in 1usize..250, d in 1usize..9, a in who(), b in who(), seed: u64, bound in prop::sample::select(vec![0.5, 4.0, 15.0, 24.0, 90.0]), size in prop::sample::select(vec![1.0, 30.0])) {
        let x = Case::input(a, &[2, rows, n], uniform(seed, bound));
        let v = Case::input(b, &[2, n, d], uniform(seed + 1, size));
        // Wide scores: those that matter add up.
        let error = if bound > 24.0 { 2e-3 } else { 1e-3 } * size;
        check(Op::Attend(SoftmaxSpec { bound }), &[x.clone(), v.clone()], error)?;
        let one = Case::input(b, &[1], vec![1.0]);
        check(Op::AttendToFineProduct(SoftmaxSpec { bound }), &[x, v, one], error)?;
    }

    #[test]
    fn wide_softmax(rows in 0usize..4, n in 1usize..300, a in who(), seed: u64, bound in prop::sample::select(vec![25.0, 90.0, 240.0, 300.0, 1984.0])) {
        let x = Case::input(a, &[rows, n], uniform(seed, bound));
        check(Op::Softmax(SoftmaxSpec { bound }), &[x], 1e-3 + 1e-5 * n as f64)?;
    }

    #[test]
    fn normalize(rows in 0usize..4, n in 2usize..200, a in who(), seed: u64, size in prop::sample::select(vec![0.2, 1.0, 20.0, 60.0]), layer: bool) {
        let kind = if layer { NormKind::Layer } else { NormKind::Rms };
        // With two or three entries the deviation itself varies widely.
        let n = n + 12;
        let x = Case::input(a, &[rows, n], uniform(seed, size));
        let spec = NormSpec { kind, eps: 1e-6, sigma: (size / 16.0, size) };
        check(Op::Normalize(spec), std::slice::from_ref(&x), 2e-3)?;
        // Of 32 fractional bits, by a factor of one.
        let one = Case::input(a, &[n], vec![1.0; n]);
        check(Op::NormalizeOfProduct(spec), &[x.clone(), one.clone()], 2e-3)?;
        // Of 49 fractional bits.
        let spec = NormSpec { sigma: (0.3 * size / 16.0, 0.3 * size), ..spec };
        check(Op::NormalizeOfFineProduct(spec), &[x, one], 2e-3)?;
    }

    #[test]
    fn reciprocal(n in 1usize..200, a in who(), seed: u64, high in prop::sample::select(vec![0.1, 4.0, 300.0])) {
        let low: f64 = high / 200.0;
        let positive = |v: f32| low * (high / low).powf(0.5 + 0.5 * f64::from(v));
        let x: Vec<f32> = uniform(seed, 1.0).into_iter().map(|v| positive(v) as f32).collect();
        // The smallest encodes to within half a unit.
        let range = (low - ULP, high + ULP);
        // The relative error that `power` states, in the lowest octaves.
        let bound = 1.4e-4 / low + ULP;
        check(Op::Reciprocal(range), &[Case::input(a, &[n], x.clone())], bound)?;
        let roots = x.into_iter().map(f32::sqrt).collect();
        check(Op::ReciprocalOfSquare((0.9 * low, 1.1 * high)), &[Case::input(a, &[n], roots)], bound)?;
    }

    #[test]
    fn shapes(a in who(), b in who(), seed: u64) {
        let x = Case::input(a, &[2, 3, 4], uniform(seed, 2.0));
        let y = Case::input(b, &[2, 3, 4], uniform(seed + 1, 2.0));
        // Views of opened and of unopened tensors.
        check(Op::Views, &[x, y], 600.0 * ULP)?;
    }
}

#[test]
fn extremes() -> Result<(), TestCaseError> {
    for who in OWNERS {
        let input = |values: &[f32]| Case::input(who, &[values.len()], values.to_vec());
        let top = 4095.99;
        check(
            Op::Relu,
            &[input(&[0.0, -0.0, top, -top, 1.0 / 65536.0, -1.0 / 65536.0])],
            ULP,
        )?;
        check(
            Op::Square,
            &[input(&[0.0, 46000.0, -46000.0])],
            46000.0 * 2.0 * ULP,
        )?;
        check(
            Op::Argmax,
            &[Case::input(
                who,
                &[3, 4],
                vec![1., 1., 1., 1., 0., 2., 2., 0., -5., -6., -7., -4.],
            )],
            0.0,
        )?;
        let gelu = Op::Activation(Activation::Gelu, Range::Within(6.4));
        check(gelu, &[input(&[0.0, 6.4, -6.4, 6.399])], 4e-4)?;
        let spec = SoftmaxSpec { bound: 24.0 };
        let rows = [
            24.0, -24.0, -24.0, 24.0, 24.0, 24.0, -24.0, -24.0, -24.0, 0.0, 0.01, -24.0,
        ];
        check(
            Op::Softmax(spec),
            &[Case::input(who, &[4, 3], rows.to_vec())],
            1e-3,
        )?;
        let norm = NormSpec {
            kind: NormKind::Layer,
            eps: 1e-6,
            sigma: (0.25, 4.0),
        };
        let row: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { 101.0 } else { 99.0 }).collect();
        check(Op::Normalize(norm), &[Case::input(who, &[1, 64], row)], 2e-3)?;
    }
    Ok(())
}

#[test]
fn what_is_dealt_in_several_pieces() -> Result<(), TestCaseError> {
    let x = Case::input(Who::Shared, &[3001], uniform(9, 6.0));
    let one = Case::input(Who::Shared, &[3001], vec![3.0; 3001]);
    let range = Range::Within(6.4);
    check(
        Op::Activation(Activation::Gelu, range),
        std::slice::from_ref(&x),
        4e-4,
    )?;
    check(Op::Turns, std::slice::from_ref(&x), 4e-4)?;
    check(
        Op::ActivationOfFineProduct(Activation::Gelu, range),
        &[x.clone(), one],
        6e-4,
    )?;
    // More than are dealt at a time of any value.
    let x = Case::input(Who::Shared, &[5, 3600], uniform(10, 8.0).repeat(5));
    check(Op::Square, &[x], 16.0 * ULP)
}

#[test]
fn beyond_the_range_plain_errs_as_the_private_one_does() -> Result<(), TestCaseError> {
    let x = Case::input(Who::Shared, &[64], uniform(5, 14.0));
    check(Op::Activation(Activation::Gelu, Range::Within(6.4)), &[x], 5e-4)
}

#[test]
fn bounds_are_asserted() {
    let refused = |op, x: Case| harness::fixed(op, &[x]).expect_err("must be refused").to_string();
    let big = |v: f32| Case::input(Who::P0, &[2], vec![v, 1.0]);
    assert!(refused(Op::Relu, big(4096.5)).contains("2^"));
    assert!(refused(Op::Softmax(SoftmaxSpec { bound: 2.0 }), big(40.0)).contains("wider"));
    let spec = NormSpec {
        kind: NormKind::Layer,
        eps: 1e-6,
        sigma: (0.1, 1.0),
    };
    assert!(refused(Op::Normalize(spec), big(4000.0)).contains("2^"));
    let x = Case::input(Who::P0, &[1], vec![3e6]);
    assert!(refused(Op::Cube, x).contains("range"));
}
