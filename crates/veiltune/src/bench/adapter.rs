//! `veiltune bench adapter`: the private part of a classification, on random weights of the true shapes, with the
//! layers that are trained and served; and the methods that one-way adapters are compared with.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use clap::{Args, ValueEnum};
use serde::Serialize;
use veiltune_engine::session::Program;
use veiltune_engine::{Backend, Owner, Params, Plain, Revealed, Tally};
use veiltune_hub::{Array, Tensors};
use veiltune_nn::layout::Variant;
use veiltune_nn::load::{self, Served};
use veiltune_nn::method::{State, Tokens};
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{Method, Private, Read, VitConfig};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::Network;

use super::harness::{Spread, time};
use crate::methods::{Ground, MethodArgs};
use crate::program::{Batches, CLIENT, Classification, Inputs};
use crate::{Error, Result};

/// Which method, and over which network.
#[derive(Args, Debug)]
pub struct AdapterArgs {
    #[command(flatten)]
    method: MethodArgs,
    /// Shape of the backbone.
    #[arg(long, value_enum, default_value = "vit-b16")]
    backbone: Shape,
    /// Classes.
    #[arg(long, default_value_t = 100)]
    classes: usize,
    /// Images a pass.
    #[arg(long, default_value = "1")]
    batch: NonZeroUsize,
    /// Network to emulate: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US one way.
    #[arg(long, default_value = "none")]
    network: Network,
    /// Threads of each role; other systems' benchmarks have one.
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Counted runs, after one that is not.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The configurations that the CryptPEFT paper found for five data sets, each on the network that it was found for,
    /// instead of one configuration.
    #[arg(long, conflicts_with_all = ["method", "heads", "rank", "scope", "classes", "batch", "network"])]
    paper: bool,
    /// JSON on standard output instead of a table: one object, or with --paper an array.
    #[arg(long)]
    json: bool,
}

/// One method on one network.
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
            heads: args.method.heads,
            rank: args.method.rank(),
            scope: args.method.scope,
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

/// Backbones by their shape.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    /// 197 tokens of width 768, 12 layers.
    VitB16,
    /// 257 tokens of width 384, 12 layers.
    VitS14,
}

impl Shape {
    fn config(self) -> VitConfig {
        let (hidden_size, num_attention_heads, patch_size) = match self {
            Shape::VitB16 => (768, 12, 16),
            Shape::VitS14 => (384, 6, 14),
        };
        VitConfig {
            hidden_size,
            num_hidden_layers: 12,
            num_attention_heads,
            intermediate_size: 4 * hidden_size,
            hidden_act: HiddenAct::Gelu,
            image_size: 224,
            patch_size,
            num_channels: 3,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            layer_scale: false,
        }
    }
}

fn method(args: &AdapterArgs, setting: &Setting) -> Result<Method> {
    let vit = args.backbone.config();
    let labels = (0..setting.classes).map(|i| i.to_string()).collect();
    let chosen = MethodArgs {
        heads: setting.heads,
        rank: Some(setting.rank),
        scope: setting.scope,
        ..args.method.clone()
    };
    let ground = Ground {
        width: vit.hidden_size,
        tokens: vit.tokens(),
        layers: vit.num_hidden_layers,
        vision: Some((&vit, Variant::default())),
    };
    chosen.build(&ground, labels)
}

#[derive(Serialize)]
struct Report {
    name: String,
    method: &'static str,
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
    let method = method(args, &setting)?;
    method.check()?;
    let layers = args.backbone.config().num_hidden_layers;
    let states = States {
        layers,
        batch: setting.batch.get(),
    };
    let trained = random_weights(&method)?;
    let (method, expected) = calibrate(method, &trained, &states)?;
    let fetch = |name: &str, dims: &[usize]| Ok(random(name, dims));
    let provider = Served {
        method: method.served(),
        private: Some(method.fold(&trained, &fetch)?),
        public: method.fold_public(&fetch)?,
    };
    drop(trained);
    let client = Served {
        private: None,
        ..provider.clone()
    };
    let shapes = Served::shapes(&method);
    let images = vec![states.inputs(&provider.method)?];

    // Every pass classifies the same images.
    let pass = Batches {
        images: setting.batch.get(),
        batch: setting.batch,
    };
    let public = Repeated(Classification::public(&shapes, pass));
    let client = Repeated(Classification {
        images: Some(&images),
        ..Classification::public(&client, pass)
    });
    let provider = Repeated(Classification::public(&provider, pass));
    let cost: Tally = public.0.plan()?.tally;
    let timing = time(
        [&client, &provider, &public],
        &cost,
        args.runs,
        setting.network,
        [Box::new(VecDeque::new()), Box::new(VecDeque::new())],
        args.threads,
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
        method: method.peft_type(),
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
        "{}, h {} r {} s {}, batch {}, network {}",
        r.method, r.heads, r.rank, r.scope, r.batch, r.network
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
    type Model<B: Backend> = Private<B>;

    fn load<B: Backend>(&self, b: &B) -> veiltune_engine::Result<Private<B>> {
        self.0.load(b)
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &Private<B>,
        _: usize,
    ) -> veiltune_engine::Result<Option<Revealed>> {
        self.0.forward(b, model, 0)
    }
}

fn uniform(name: &str, n: usize, size: f64) -> Vec<f32> {
    // A stream of its own for each name.
    let stream = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let words = Prg::new(&Seed::from_bytes(*b"veiltune bench 2"), stream, 1).vec(n);
    words
        .into_iter()
        .map(|w| (w as i64 as f64 / 2f64.powi(63) * size) as f32)
        .collect()
}

/// A parameter: matrices of variance 1 / inputs, gains and variances of one.
fn random(name: &str, dims: &[usize]) -> Array {
    let n = dims.iter().product();
    let one = name.contains("norm") && name.ends_with("weight") || name.ends_with("running_var");
    let values = match one {
        true => vec![1.0; n],
        false => uniform(name, n, (3.0 / dims.last().copied().unwrap_or(1) as f64).sqrt()),
    };
    Array {
        dims: dims.to_vec(),
        values,
    }
}

/// The backbone's parameters on the float interpreter.
fn public(b: &Plain) -> Params<'_, Plain> {
    Params::new(move |name, dims| b.weight(Owner::Public, dims, Some(&random(name, dims).values)))
}

/// The provider's parameters.
fn random_weights(method: &Method) -> Result<Tensors> {
    let b = Plain::new();
    let names = load::inventory(&b, |p| method.load(p, &public(&b)))?;
    let one = |(name, dims): (String, Vec<usize>)| {
        let array = random(&name, &dims);
        (name, array)
    };
    Ok(names.into_iter().map(one).collect())
}

/// What a backbone of so many layers gives for random pictures.
struct States {
    layers: usize,
    batch: usize,
}

impl States {
    fn inputs(&self, method: &Method) -> Result<Inputs> {
        let b = Plain::new();
        let reads = method.reads(self.layers)?;
        let one = |read: &Read| -> Result<Vec<f32>> {
            let all = Read {
                tokens: Tokens::All,
                ..*read
            };
            let dims = method.input_dims(&all, self.batch);
            let name = match read.state {
                State::Patches => "patches".to_owned(),
                State::Hidden(i) => format!("hidden {i}"),
            };
            let values = uniform(&name, dims.iter().product(), 3.0);
            let state = b.input(Owner::Public, &dims, Some(&values))?;
            let x = read.prepare(&b, &state)?;
            let revealed = b.reveal(&x, CLIENT)?;
            Ok(revealed.map_or_else(Vec::new, |r| r.values.iter().map(|&v| v as f32).collect()))
        };
        reads.iter().map(one).collect()
    }
}

/// Ranges from a plain pass with a factor of two to spare, and that pass's logits.
fn calibrate(mut method: Method, trained: &Tensors, states: &States) -> Result<(Method, Vec<f64>)> {
    let (seen, b) = (Plain::recording(), Plain::new());
    let model = method.load(&load::params(&b, Owner::Public, trained), &public(&b))?;
    let inputs = states.inputs(&method)?;
    let reads = method.reads(states.layers)?;
    let inputs = reads.iter().zip(&inputs).map(|(read, values)| {
        b.input(
            Owner::Public,
            &method.input_dims(read, states.batch),
            Some(values),
        )
    });
    let logits = model.forward(&seen, &inputs.collect::<veiltune_engine::Result<Vec<_>>>()?)?;
    method.calibrate(&seen.sites(), 2.0)?;
    let logits = b.reveal(&logits, CLIENT)?;
    Ok((method, logits.map_or_else(Vec::new, |r| r.values)))
}
