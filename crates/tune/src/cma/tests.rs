use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Vectors {
    parameters: Vec<Defaults>,
    replays: Vec<Replay>,
    curves: Vec<Curve>,
}

#[derive(Deserialize)]
struct Defaults {
    dimension: usize,
    population: usize,
    weights: Vec<f64>,
    mueff: f64,
    cc: f64,
    c1: f64,
    cmu: f64,
    cs: f64,
    damps: f64,
    gap: f64,
}

#[derive(Deserialize)]
struct Replay {
    dimension: usize,
    population: usize,
    gap: f64,
    steps: Vec<Step>,
    covariance: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Step {
    candidates: Vec<Vec<f64>>,
    losses: Vec<f64>,
    mean: Vec<f64>,
    sigma: f64,
}

#[derive(Deserialize)]
struct Curve {
    function: String,
    dimension: usize,
    population: usize,
    sigma: f64,
    every: usize,
    runs: Vec<Vec<f64>>,
}

/// Runs of `pycma`, from tools/pycma-vectors.py.
fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../tests/vectors/pycma.json")).unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * (1.0 + a.abs().max(b.abs()))
}

#[test]
fn the_defaults_are_those_of_pycma() {
    for v in vectors().parameters {
        let p = Parameters::new(v.dimension, v.population);
        let ours = [p.mueff, p.cc, p.c1, p.cmu, p.cs, p.damps, p.gap];
        let theirs = [v.mueff, v.cc, v.c1, v.cmu, v.cs, v.damps, v.gap];
        for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert!(
                (a - b).abs() <= 1e-12 * b,
                "{} {}: {i}: {a} {b}",
                v.dimension,
                v.population
            );
        }
        assert_eq!(p.weights.len(), v.weights.len());
        assert!(p.weights.iter().zip(&v.weights).all(|(a, b)| close(*a, *b)));
    }
}

#[test]
fn the_updates_are_those_of_pycma() {
    for replay in vectors().replays {
        let n = replay.dimension;
        let mut cma = Cma::new(n, replay.population, 0.7, 0).unwrap();
        cma.parameters.gap = replay.gap;
        let state = &mut cma.state;
        state.mean.fill(0.5);
        // Their covariance starts with eigenvalues that differ a little.
        for i in 0..n {
            let variance = (1e-4 / n as f64 * i as f64).exp();
            state.covariance[i * (i + 1) / 2 + i] = variance;
            state.lengths[i] = variance.sqrt();
        }
        for (at, step) in replay.steps.iter().enumerate() {
            let mut order: Vec<usize> = (0..replay.population).collect();
            order.sort_by(|&a, &b| step.losses[a].total_cmp(&step.losses[b]));
            let relative = |i: usize| {
                let pairs = step.candidates[i].iter().zip(cma.mean());
                pairs.map(|(x, m)| (x - m) / cma.sigma()).collect()
            };
            let sorted: Vec<Vec<f64>> = order.into_iter().map(relative).collect();
            cma.update(&sorted).unwrap();
            assert!(
                close(cma.sigma(), step.sigma),
                "{at}: {} {}",
                cma.sigma(),
                step.sigma
            );
            let same = cma.mean().iter().zip(&step.mean).all(|(a, b)| close(*a, *b));
            assert!(same, "{at}: {:?} {:?}", cma.mean(), step.mean);
        }
        for (i, row) in replay.covariance.iter().enumerate() {
            for (j, want) in row[..=i].iter().enumerate() {
                let found = cma.state.covariance[i * (i + 1) / 2 + j];
                assert!(
                    (found - want).abs() < 1e-7 * want.abs().max(1.0),
                    "{i} {j}: {found} {want}"
                );
            }
        }
    }
}

fn value(function: &str, x: &[f64]) -> f64 {
    let last = (x.len() - 1) as f64;
    let scaled = |(i, x): (usize, &f64)| 10f64.powf(6.0 * i as f64 / last) * x * x;
    let valley = |w: &[f64]| 100.0 * (w[1] - w[0] * w[0]).powi(2) + (1.0 - w[0]).powi(2);
    match function {
        "sphere" => x.iter().map(|x| x * x).sum(),
        "ellipsoid" => x.iter().enumerate().map(scaled).sum(),
        _ => x.windows(2).map(valley).sum(),
    }
}

/// Evaluations until our best value is as good as theirs after `checked` evaluations: the middle of three runs each.
fn ratio(curve: &Curve, checked: usize) -> f64 {
    let start = if curve.function == "rosenbrock" { 0.0 } else { 1.0 };
    let mut theirs: Vec<f64> = curve.runs.iter().map(|r| r[checked / curve.every - 1]).collect();
    theirs.sort_by(f64::total_cmp);
    let seeds = if curve.dimension > 100 { 1 } else { 3 };
    let needed = |seed| {
        let mut cma = Cma::new(curve.dimension, curve.population, curve.sigma, seed).unwrap();
        cma.state.mean.fill(start);
        let (mut best, mut evaluations) = (f64::INFINITY, 0);
        while best > theirs[1] {
            assert!(
                evaluations < 2 * checked,
                "{} at {best}, not {}",
                curve.function,
                theirs[1]
            );
            let losses: Vec<f64> = cma.ask().iter().map(|x| value(&curve.function, x)).collect();
            best = losses.iter().copied().fold(best, f64::min);
            cma.tell(&losses).unwrap();
            evaluations += losses.len();
        }
        evaluations as f64 / checked as f64
    };
    let mut ours: Vec<f64> = (1..=seeds).map(needed).collect();
    ours.sort_by(f64::total_cmp);
    ours[ours.len() / 2]
}

#[test]
fn small_problems_converge_as_fast_as_with_pycma() {
    for curve in vectors().curves.iter().filter(|c| c.dimension == 10) {
        let ratio = ratio(curve, 5000);
        assert!(ratio < 1.25, "{}: {ratio} times the evaluations", curve.function);
    }
}

fn five_hundred_dimensions(function: &str, checked: usize) {
    let all = vectors().curves;
    let of = |c: &&Curve| c.dimension == 500 && c.function == function;
    let ratio = ratio(all.iter().find(of).unwrap(), checked);
    assert!(ratio < 1.25, "{function}: {ratio} times the evaluations");
}

#[test]
fn a_sphere_of_500_dimensions_takes_as_long_as_with_pycma() {
    five_hundred_dimensions("sphere", 2000);
}

#[test]
fn an_ellipsoid_of_500_dimensions_takes_as_long_as_with_pycma() {
    five_hundred_dimensions("ellipsoid", 2000);
}

#[test]
fn a_valley_of_500_dimensions_takes_as_long_as_with_pycma() {
    // Until then it only crosses a plateau.
    five_hundred_dimensions("rosenbrock", 3200);
}

fn run(mut cma: Cma, generations: usize, loss: impl Fn(f64) -> f64) -> Cma {
    for _ in 0..generations {
        let losses: Vec<f64> = cma.ask().iter().map(|x| loss(value("rosenbrock", x))).collect();
        cma.tell(&losses).unwrap();
    }
    cma
}

fn stored(cma: &Cma) -> String {
    serde_json::to_string(cma).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn only_the_order_of_losses_matters(seed: u64, dimension in 2usize..12, population in 4usize..15, scale in 0.01..100.0) {
        let cma = || Cma::new(dimension, population, 0.5, seed).unwrap();
        let plain = run(cma(), 12, |l| l);
        let monotone: [fn(f64, f64) -> f64; 3] = [|l, s| s * l - 7.0, |l, s| (1.0 + l).ln() * s, |l, s| (l * s).powi(3)];
        for monotone in monotone {
            prop_assert_eq!(stored(&run(cma(), 12, |l| monotone(l, scale))), stored(&plain));
        }
    }

    #[test]
    fn a_stored_run_goes_on_to_the_same_bits(seed: u64, dimension in 2usize..12, before in 0usize..9, after in 1usize..9) {
        let half = run(Cma::new(dimension, 6, 1.5, seed).unwrap(), before, |l| l);
        let back: Cma = serde_json::from_str(&stored(&half)).unwrap();
        prop_assert_eq!(stored(&run(back, after, |l| l)), stored(&run(half, after, |l| l)));
    }
}

#[test]
fn candidates_stay_until_they_are_told_of_and_differ_afterwards() {
    let mut cma = Cma::new(3, 4, 1.0, 5).unwrap();
    let asked = cma.ask();
    assert_eq!(asked, cma.ask());
    assert_ne!(asked, Cma::new(3, 4, 1.0, 6).unwrap().ask());
    cma.tell(&[4.0, 3.0, 2.0, 1.0]).unwrap();
    assert_eq!(cma.generation(), 1);
    assert_ne!(asked, cma.ask());
}

#[test]
fn what_is_not_a_number_ranks_last() {
    let after = |losses: [f64; 5]| {
        let mut cma = Cma::new(3, 5, 1.0, 5).unwrap();
        cma.tell(&losses).unwrap();
        stored(&cma)
    };
    assert_eq!(
        after([1.0, f64::NAN, 0.5, 2.0, 0.1]),
        after([1.0, 9.0, 0.5, 2.0, 0.1])
    );
    assert_ne!(
        after([1.0, f64::NAN, 0.5, 2.0, 0.1]),
        after([1.0, 0.0, 0.5, 2.0, 0.1])
    );
}

#[test]
fn a_hopeless_generation_changes_nothing() {
    let mut cma = Cma::new(3, 4, 1.0, 5).unwrap();
    let before = stored(&cma);
    let nan = cma.tell(&[f64::NAN; 4]).unwrap_err().to_string();
    assert!(nan.contains("none of the generation's losses"), "{nan}");
    let few = cma.tell(&[1.0; 3]).unwrap_err().to_string();
    assert!(few.contains("3 losses for 4"), "{few}");
    assert_eq!(before, stored(&cma));
}

/// On a plateau, on a slope without end, and where one axis is irrelevant, the numbers stay sound.
#[test]
fn endless_runs_stay_finite() {
    let slope = |x: &[f64]| x[0];
    let flat = |_: &[f64]| 0.0;
    let needle = |x: &[f64]| 1e30 * x[0] * x[0];
    for loss in [&slope as &dyn Fn(&[f64]) -> f64, &flat, &needle] {
        let mut cma = Cma::new(4, 6, 1.0, 1).unwrap();
        for _ in 0..3000 {
            let losses: Vec<f64> = cma.ask().iter().map(|x| loss(x)).collect();
            cma.tell(&losses).unwrap();
        }
        assert!(cma.ask().iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn impossible_sizes_and_states_are_refused() {
    assert!(Cma::new(1, 10, 1.0, 0).is_err());
    assert!(Cma::new(1 << 20, 10, 1.0, 0).is_err());
    assert!(Cma::new(10, 3, 1.0, 0).is_err());
    assert!(Cma::new(10, 10, 0.0, 0).is_err());
    assert!(Cma::new(10, 10, f64::NAN, 0).is_err());
    let good: serde_json::Value = serde_json::from_str(&stored(&Cma::new(3, 4, 1.0, 0).unwrap())).unwrap();
    let zeros = |n: usize| serde_json::Value::from("0".repeat(16 * n));
    let bad = [
        ("mean", zeros(2)),
        ("mean", zeros(0)),
        ("axes", zeros(8)),
        ("lengths", zeros(3)),
        ("sigma", zeros(1)),
        ("path", "7ff0000000000000".repeat(3).into()),
        ("path", "xyz".into()),
        ("population", 1_000_000.into()),
        ("decomposed", 7.into()),
    ];
    for (name, value) in bad {
        let mut state = good.clone();
        state[name] = value;
        assert!(serde_json::from_value::<Cma>(state).is_err(), "{name}");
    }
}

#[test]
fn a_debug_print_tells_sizes_alone() {
    let mut cma = Cma::new(3, 4, 0.123_456, 5).unwrap();
    cma.tell(&[1.0, 2.0, 3.0, 4.0]).unwrap();
    let text = format!("{cma:?}");
    assert_eq!(text, "Cma { dimension: 3, population: 4, generation: 1, .. }");
}
