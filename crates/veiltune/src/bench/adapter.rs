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
    /// One JSON object on standard output instead of a table.
    #[arg(long)]
    json: bool,
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
    let (tokens, width) = args.backbone.tokens_and_width();
    let config = config(args, tokens, width);
    let weights = random_weights(&config)?;
    let images: Vec<Hidden> = (0..args.batch.get() as u64)
        .map(|i| random_image(&config, i))
        .collect();
    let (config, expected) = calibrate(config, &weights, &images)?;
    let (config, weights) = owc::fold(&config, &weights)?;

    // Every pass classifies the same images.
    let pass = Batches {
        images: args.batch.get(),
        batch: args.batch,
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
        args.network,
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
        tokens,
        width,
        heads: args.heads,
        rank: args.rank,
        scope: args.scope,
        batch: args.batch.get(),
        network: args.network.to_string(),
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
    if args.json {
        let text = serde_json::to_string_pretty(&report).map_err(|e| Error::Input(e.to_string()))?;
        println!("{text}");
    } else {
        print(&report, &cost);
    }
    Ok(())
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

fn config(args: &AdapterArgs, tokens: usize, hidden_size: usize) -> OwcConfig {
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
