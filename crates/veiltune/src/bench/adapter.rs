//! `veiltune bench adapter`: the private part of a classification, on random weights of the true shapes, with the
//! layers that are trained and served.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use clap::Args;
use serde::Serialize;
use veiltune_engine::session::Program;
use veiltune_engine::{Backend, NormKind, NormSpec, Plain, Revealed, Tally};
use veiltune_hub::{Array, Tensors};
use veiltune_nn::owc::AdapterNorms;
use veiltune_nn::{Owc, OwcConfig, load, owc};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::Network;

use super::harness::{Spread, time};
use crate::program::{Batches, Classification, Hidden};
use crate::{Error, Result};

/// Which adapter, and over which network.
#[derive(Args, Debug)]
pub struct AdapterArgs {
    /// Shape of the backbone's hidden states.
    #[arg(long, value_enum, default_value = "vit-b16")]
    backbone: Shape,
    /// Attention heads h of an adapter.
    #[arg(long, default_value_t = 1)]
    heads: usize,
    /// Width r within an adapter.
    #[arg(long, default_value_t = 240)]
    rank: usize,
    /// Adapters s.
    #[arg(long, default_value_t = 1)]
    scope: usize,
    /// Classes.
    #[arg(long, default_value_t = 100)]
    classes: usize,
    /// Images a pass.
    #[arg(long, default_value = "1")]
    batch: NonZeroUsize,
    /// Network to emulate: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US one way.
    #[arg(long, default_value = "none")]
    network: Network,
    /// Counted runs, after one that is not.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The configurations that the CryptPEFT paper found for five data sets, each on the network that it was found for,
    /// instead of one configuration.
    #[arg(long, conflicts_with_all = ["heads", "rank", "scope", "classes", "batch", "network"])]
    paper: bool,
    /// JSON on standard output instead of a table: one object, or with --paper an array.
    #[arg(long)]
    json: bool,
}

/// One adapter on one network.
struct Setting {
    name: String,
    heads: usize,
    rank: usize,
    scope: usize,
    classes: usize,
    batch: NonZeroUsize,
    network: Network,
}

/// Data set, classes, and (h, r, s) for: WAN and LAN efficiency-first, WAN and LAN utility-first (CryptPEFT, section on
/// the architectures found).
type Found = (&'static str, usize, [(usize, usize, usize); 4]);
const PAPER: [Found; 5] = [
    (
        "CIFAR-10",
        10,
        [(2, 120, 2), (4, 120, 1), (10, 180, 2), (1, 180, 2)],
    ),
    (
        "CIFAR-100",
        100,
        [(1, 300, 1), (1, 240, 1), (2, 300, 2), (1, 300, 2)],
    ),
    (
        "Food-101",
        101,
        [(4, 180, 1), (6, 180, 1), (12, 300, 1), (10, 300, 1)],
    ),
    (
        "SVHN",
        10,
        [(12, 300, 1), (12, 60, 1), (12, 180, 3), (12, 120, 3)],
    ),
    (
        "Flowers-102",
        102,
        [(1, 180, 1), (1, 120, 1), (1, 300, 1), (1, 300, 1)],
    ),
];

fn settings(args: &AdapterArgs) -> Result<Vec<Setting>> {
    if !args.paper {
        return Ok(vec![Setting {
            name: "as given".into(),
            heads: args.heads,
            rank: args.rank,
            scope: args.scope,
            classes: args.classes,
            batch: args.batch,
            network: args.network,
        }]);
    }
    let network = |name: &str| name.parse::<Network>().map_err(Error::Wire);
    let (wan, lan) = (network("wan")?, network("lan")?);
    let goals = [
        ("efficiency", wan),
        ("efficiency", lan),
        ("utility", wan),
        ("utility", lan),
    ];
    let one = |(set, classes, found): Found| {
        found
            .into_iter()
            .zip(goals)
            .map(move |((heads, rank, scope), (goal, network))| Setting {
                name: format!("{set}, {goal}"),
                heads,
                rank,
                scope,
                classes,
                batch: NonZeroUsize::MIN,
                network,
            })
    };
    Ok(PAPER.into_iter().flat_map(one).collect())
}

/// Backbones by the shape of their hidden states.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shape {
    /// 197 tokens of width 768.
    VitB16,
    /// 257 tokens of width 384.
    VitS14,
}

impl Shape {
    fn tokens_and_width(self) -> (usize, usize) {
        match self {
            Shape::VitB16 => (197, 768),
            Shape::VitS14 => (257, 384),
        }
    }
}

#[derive(Serialize)]
struct Report {
    name: String,
    tokens: usize,
    width: usize,
    heads: usize,
    rank: usize,
    scope: usize,
    batch: usize,
    network: String,
    rounds: u64,
    online_bytes: [u64; 2],
    dealer_bytes: [u64; 2],
    setup_bytes: [u64; 2],
    seconds: Spread,
    dealer_seconds: f64,
    offline_seconds: f64,
    setup_seconds: f64,
    /// Largest difference from plain float, and the largest logit beside it.
    max_logit_error: f64,
    max_logit: f64,
}

/// Runs the benchmark.
pub fn run(args: &AdapterArgs) -> Result<()> {
    if args.runs == 0 || args.classes == 0 {
        return Err(Error::Input("--runs and --classes must be at least 1".into()));
    }
    let mut reports = Vec::new();
    for setting in settings(args)? {
        let (report, cost) = measure(args, setting)?;
        match (args.json, args.paper) {
            (true, _) => {}
            (false, true) => print_line(&report, reports.is_empty()),
            (false, false) => print(&report, &cost),
        }
        reports.push(report);
    }
    if args.json {
        let text = match &reports[..] {
            [one] if !args.paper => serde_json::to_string_pretty(one),
            all => serde_json::to_string_pretty(all),
        };
        println!("{}", text.map_err(|e| Error::Input(e.to_string()))?);
    }
    Ok(())
}

fn measure(args: &AdapterArgs, setting: Setting) -> Result<(Report, Tally)> {
    let (tokens, width) = args.backbone.tokens_and_width();
    let config = config(&setting, tokens, width);
    let weights = random_weights(&config)?;
    let images: Vec<Hidden> = (0..setting.batch.get() as u64)
        .map(|i| random_image(&config, i))
        .collect();
    let (config, expected) = calibrate(config, &weights, &images)?;
    let (config, weights) = owc::fold(&config, &weights)?;

    // Every pass classifies the same images.
    let pass = Batches {
        images: setting.batch.get(),
        batch: setting.batch,
    };
    let public = Repeated(Classification::public(&config, pass));
    let client = Repeated(Classification {
        images: Some(&images),
        ..Classification::public(&config, pass)
    });
    let provider = Repeated(Classification {
        weights: Some(&weights),
        ..Classification::public(&config, pass)
    });
    let cost: Tally = public.0.plan()?.tally;
    let timing = time(
        [&client, &provider, &public],
        &cost,
        args.runs,
        setting.network,
        [VecDeque::new(), VecDeque::new()],
    )?;

    let private = timing.revealed[0].as_ref().map_or(&[][..], |r| &r.values);
    let max_logit_error = private
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    let total = cost.total();
    let report = Report {
        name: setting.name,
        tokens,
        width,
        heads: setting.heads,
        rank: setting.rank,
        scope: setting.scope,
        batch: setting.batch.get(),
        network: setting.network.to_string(),
        rounds: total.rounds,
        online_bytes: total.online_bytes,
        dealer_bytes: total.dealer_bytes,
        setup_bytes: cost.setup_bytes,
        seconds: timing.seconds,
        dealer_seconds: timing.dealer,
        offline_seconds: timing.offline,
        setup_seconds: timing.setup,
        max_logit_error,
        max_logit: expected.iter().fold(0.0, |m: f64, v| m.max(v.abs())),
    };
    Ok((report, cost))
}

fn print_line(r: &Report, first: bool) {
    if first {
        println!(
            "{:<24}{:>12}{:>20}{:>10}{:>8}{:>20}{:>20}{:>10}{:>10}{:>12}",
            "configuration",
            "(h, r, s)",
            "network",
            "online s",
            "rounds",
            "online MB each way",
            "dealer MB to each",
            "dealer s",
            "prep s",
            "logit error"
        );
    }
    let mb = |b: [u64; 2]| format!("{:.2} / {:.2}", b[0] as f64 / 1e6, b[1] as f64 / 1e6);
    println!(
        "{:<24}{:>12}{:>20}{:>10.4}{:>8}{:>20}{:>20}{:>10.4}{:>10.4}{:>12.1e}",
        r.name,
        format!("{}, {}, {}", r.heads, r.rank, r.scope),
        r.network,
        r.seconds.median,
        r.rounds,
        mb(r.online_bytes),
        mb(r.dealer_bytes),
        r.dealer_seconds,
        r.offline_seconds,
        r.max_logit_error
    );
}

fn print(r: &Report, cost: &Tally) {
    let mb = |b: [u64; 2]| format!("{:.3} / {:.3} MB", b[0] as f64 / 1e6, b[1] as f64 / 1e6);
    println!(
        "adapter h {} r {} s {}, {} tokens of {}, batch {}, network {}",
        r.heads, r.rank, r.scope, r.tokens, r.width, r.batch, r.network
    );
    println!(
        "online   {:.4} s (min {:.4}, max {:.4}), {} rounds, {} each way",
        r.seconds.median,
        r.seconds.min,
        r.seconds.max,
        r.rounds,
        mb(r.online_bytes)
    );
    println!(
        "offline  dealer {:.4} s, party {:.4} s, {} to each party",
        r.dealer_seconds,
        r.offline_seconds,
        mb(r.dealer_bytes)
    );
    println!(
        "set-up   {:.4} s, {} each way, once a session",
        r.setup_seconds,
        mb(r.setup_bytes)
    );
    println!(
        "largest logit error {:.2e} (largest logit {:.2})",
        r.max_logit_error, r.max_logit
    );
    println!(
        "{:<16}{:>8}{:>24}{:>28}",
        "operation", "rounds", "online", "dealer"
    );
    for (name, c) in cost.operations() {
        println!(
            "{name:<16}{:>8}{:>24}{:>28}",
            c.rounds,
            mb(c.online_bytes),
            mb(c.dealer_bytes)
        );
    }
}

/// A program whose every pass is the first.
struct Repeated<'a>(Classification<'a>);

impl Program for Repeated<'_> {
    type Model<B: Backend> = Owc<B>;

    fn load<B: Backend>(&self, b: &B) -> veiltune_engine::Result<Owc<B>> {
        self.0.load(b)
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &Owc<B>,
        _: usize,
    ) -> veiltune_engine::Result<Option<Revealed>> {
        self.0.forward(b, model, 0)
    }
}

fn config(args: &Setting, tokens: usize, hidden_size: usize) -> OwcConfig {
    // Wide until calibrated.
    let norm = NormSpec {
        kind: NormKind::Layer,
        eps: 1e-6,
        sigma: (0.05, 50.0),
    };
    OwcConfig {
        hidden_size,
        tokens,
        scope: args.scope,
        rank: args.rank,
        heads: args.heads,
        scale: 0.5,
        norms: vec![
            AdapterNorms {
                attention: norm,
                mlp: norm
            };
            args.scope
        ],
        final_norm: norm,
        labels: (0..args.classes).map(|i| i.to_string()).collect(),
        folded: false,
    }
}

fn uniform(stream: u64, slot: u16, n: usize, size: f64) -> Vec<f32> {
    let words = Prg::new(&Seed::from_bytes(*b"veiltune bench 2"), stream, slot).vec(n);
    words
        .into_iter()
        .map(|w| (w as i64 as f64 / 2f64.powi(63) * size) as f32)
        .collect()
}

/// Weights of variance 1 / inputs, gains of one.
fn random_weights(config: &OwcConfig) -> Result<Tensors> {
    let names = load::inventory(&Plain::new(), |p| Owc::load(p, config))?;
    let random = |(i, (name, dims)): (usize, (String, Vec<usize>))| {
        let n = dims.iter().product();
        let values = if name.contains("norm") && name.ends_with("weight") {
            vec![1.0; n]
        } else {
            uniform(
                i as u64,
                1,
                n,
                (3.0 / dims.last().copied().unwrap_or(1) as f64).sqrt(),
            )
        };
        (name, Array { dims, values })
    };
    Ok(names.into_iter().enumerate().map(random).collect())
}

fn random_image(config: &OwcConfig, index: u64) -> Hidden {
    let tokens = |i| if i < config.scope { config.tokens } else { 1 };
    (0..=config.scope)
        .map(|i| uniform(index, 2 + i as u16, tokens(i) * config.hidden_size, 3.0))
        .collect()
}

/// Ranges from a plain pass with a factor of two to spare, and that pass's logits.
fn calibrate(mut config: OwcConfig, weights: &Tensors, images: &[Hidden]) -> Result<(OwcConfig, Vec<f64>)> {
    let plain = Plain::recording();
    let batches = Batches {
        images: images.len(),
        batch: NonZeroUsize::new(images.len()).unwrap_or(NonZeroUsize::MIN),
    };
    let program = Classification {
        weights: Some(weights),
        images: Some(images),
        ..Classification::public(&config, batches)
    };
    let model = program.load(&plain)?;
    let logits = program
        .forward(&plain, &model, 0)?
        .map_or_else(Vec::new, |r| r.values);
    let mut seen = plain
        .sites()
        .into_iter()
        .filter_map(|s| s.sigma)
        .map(|(low, high)| (low / 2.0, high * 2.0));
    let norms = config
        .norms
        .iter_mut()
        .flat_map(|n| [&mut n.attention, &mut n.mlp]);
    for (norm, sigma) in norms.chain([&mut config.final_norm]).zip(&mut seen) {
        norm.sigma = sigma;
    }
    Ok((config, logits))
}
