//! `veiltune bench ops`: one private operation at a time, between two parties over TLS on loopback with an emulated
//! network, and its error against double precision.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use clap::Args;
use serde::Serialize;
use veiltune_engine::session::{self, Program};
use veiltune_engine::{
    Activation, Backend, Comparison, Error, Fixed, NormKind, NormSpec, Outside, Owner, Party, Range, Result,
    Revealed, SoftmaxSpec,
};
use veiltune_ring::Ring;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::Network;

use super::harness::{Spread, time};

/// What to measure.
#[derive(Args, Debug)]
pub struct OpsArgs {
    /// Network to emulate: none, lan (1 Gbit/s, 0.5 ms), wan (400 Mbit/s, 4 ms), secp-lan, secp-wan-a, secp-wan-b, or
    /// RATE_MBIT:DELAY_US one way.
    #[arg(long, default_value = "none")]
    network: Network,
    /// Operations whose name contains this; all if not given.
    #[arg(long)]
    only: Option<String>,
    /// Threads of each role; other systems' benchmarks have one.
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Counted runs of each operation, after one that is not.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Elements over which the error against double precision is taken.
    #[arg(long, default_value_t = 10_000_000)]
    error_elements: usize,
    /// One JSON array on standard output instead of a table.
    #[arg(long)]
    json: bool,
}

/// An operation on fixed shapes.
struct Operation {
    name: &'static str,
    verb: Verb,
    dims: Vec<usize>,
    /// Inputs are uniform in -size ..= size.
    size: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Verb {
    Relu(Comparison),
    Activation(Activation, Range),
    Softmax(SoftmaxSpec),
    Normalize(NormSpec),
    /// Weight `[n, k]` of this owner, opened at set-up.
    Linear(usize, Owner),
    /// Two dynamic operands, `[.., m, k] x [.., k, n]`.
    MatMul(usize),
}

fn operations() -> Vec<Operation> {
    let within = |f, bound| Verb::Activation(f, Range::Within(bound));
    let layer_norm = NormSpec {
        kind: NormKind::Layer,
        eps: 1e-6,
        sigma: (0.5, 8.0),
    };
    let rms_norm = NormSpec {
        kind: NormKind::Rms,
        ..layer_norm
    };
    let op = |name, verb, dims: &[usize], size| Operation {
        name,
        verb,
        dims: dims.to_vec(),
        size,
    };
    vec![
        op("relu", Verb::Relu(Comparison::Fss), &[1 << 20], 8.0),
        op(
            "relu, masked bits",
            Verb::Relu(Comparison::MaskedBits),
            &[1 << 20],
            8.0,
        ),
        op("gelu", within(Activation::Gelu, 6.4), &[128, 3072], 6.4),
        op(
            "gelu guarded",
            Verb::Activation(Activation::Gelu, Range::Guarded(6.4)),
            &[128, 3072],
            30.0,
        ),
        op("silu", within(Activation::Silu, 12.8), &[128, 3072], 12.8),
        op("tanh", within(Activation::Tanh, 6.4), &[128, 3072], 6.4),
        op("sigmoid", within(Activation::Sigmoid, 12.8), &[128, 3072], 12.8),
        op("cos", within(Activation::Cos, 6.4), &[128, 3072], 6.4),
        op(
            "softmax",
            Verb::Softmax(SoftmaxSpec { bound: 15.0 }),
            &[12, 128, 128],
            15.0,
        ),
        op("layer norm", Verb::Normalize(layer_norm), &[128, 768], 6.0),
        op("rms norm", Verb::Normalize(rms_norm), &[128, 768], 6.0),
        op(
            "linear, weight of the second party",
            Verb::Linear(3072, Owner::Party(Party::P1)),
            &[128, 768],
            8.0,
        ),
        op(
            "linear, shared weight",
            Verb::Linear(3072, Owner::Shared),
            &[128, 768],
            8.0,
        ),
        op("matmul, both shared", Verb::MatMul(3072), &[128, 768], 8.0),
        op("attention scores", Verb::MatMul(128), &[12, 128, 64], 8.0),
    ]
}

/// An operation's inputs: all values (in the clear), or this role's alone.
struct Inputs<'a> {
    operation: &'a Operation,
    x: Option<Vec<f32>>,
    y: Option<Vec<f32>>,
}

impl Operation {
    fn second_dims(&self) -> Option<Vec<usize>> {
        let k = *self.dims.last()?;
        match self.verb {
            Verb::Linear(n, _) => Some(vec![n, k]),
            Verb::MatMul(n) => {
                let mut dims = self.dims.clone();
                let rank = dims.len();
                (dims[rank - 2], dims[rank - 1]) = (k, n);
                Some(dims)
            }
            _ => None,
        }
    }

    fn second_size(&self) -> f64 {
        if matches!(self.verb, Verb::Linear(..)) {
            0.1
        } else {
            self.size
        }
    }

    fn values(&self, stream: u64) -> Result<Inputs<'_>> {
        let seed = Seed::from_bytes(*b"veiltune bench 1");
        let draw = |dims: &[usize], slot, size: f64| -> Vec<f32> {
            let words = Prg::new(&seed, stream, slot).vec(dims.iter().product());
            // Multiples of 2^-16, so that encoding them is exact.
            words
                .into_iter()
                .map(|w| (((w as i64 as f64) / 2f64.powi(63) * size * 65536.0).round() / 65536.0) as f32)
                .collect()
        };
        let y = self.second_dims().map(|d| draw(&d, 1, self.second_size()));
        Ok(Inputs {
            operation: self,
            x: Some(draw(&self.dims, 0, self.size)),
            y,
        })
    }

    /// Whether the second operand is a parameter of the second party.
    fn owned_weight(&self) -> bool {
        matches!(self.verb, Verb::Linear(_, Owner::Party(_)))
    }
}

impl Program for Inputs<'_> {
    type Model<B: Backend> = Option<B::Weight>;

    fn load<B: Backend>(&self, b: &B) -> Result<Option<B::Weight>> {
        match (self.operation.verb, self.operation.second_dims()) {
            (Verb::Linear(_, owner), Some(dims)) => Ok(Some(b.weight(owner, &dims, self.y.as_deref())?)),
            _ => Ok(None),
        }
    }

    fn forward<B: Backend>(&self, b: &B, weight: &Option<B::Weight>, _: usize) -> Result<Option<Revealed>> {
        self.run(b, weight)?;
        Ok(None)
    }

    fn comparison(&self) -> Comparison {
        match self.operation.verb {
            Verb::Relu(comparison) => comparison,
            _ => Comparison::default(),
        }
    }
}

impl Inputs<'_> {
    fn run<B: Backend>(&self, b: &B, weight: &Option<B::Weight>) -> Result<B::Tensor> {
        let x = b.input(Owner::Shared, &self.operation.dims, self.x.as_deref())?;
        match (self.operation.verb, weight, self.operation.second_dims()) {
            (Verb::Relu(_), ..) => b.relu(&x),
            (Verb::Activation(f, range), ..) => b.activation(&x, f, range),
            (Verb::Softmax(spec), ..) => b.softmax(&x, &spec),
            (Verb::Normalize(spec), ..) => b.normalize(&x, &spec),
            (Verb::Linear(..), Some(w), _) => b.linear(&x, w, None),
            (Verb::MatMul(_), _, Some(dims)) => {
                b.matmul(&x, &b.input(Owner::Shared, &dims, self.y.as_deref())?)
            }
            _ => Err(Error::program("bench", "a weight is missing")),
        }
    }
}

#[derive(Serialize)]
struct Row {
    operation: &'static str,
    shape: Vec<usize>,
    network: String,
    rounds: u64,
    online_bytes: [u64; 2],
    dealer_bytes: [u64; 2],
    setup_bytes: [u64; 2],
    seconds: Spread,
    /// Computing a pass's material at the dealer, without sending it.
    dealer_seconds: f64,
    /// Preparing a pass's material at the busier party.
    offline_seconds: f64,
    max_error: f64,
    mean_error: f64,
    error_elements: usize,
}

/// Runs the benchmark.
pub fn run(args: &OpsArgs) -> Result<()> {
    if args.runs == 0 {
        return Err(Error::program("bench", "--runs must be at least 1"));
    }
    let wanted = |o: &Operation| args.only.as_ref().is_none_or(|w| o.name.contains(w.as_str()));
    let chosen: Vec<Operation> = operations().into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = operations().iter().map(|o| o.name).collect();
        return Err(Error::program(
            "bench",
            format!("no such operation; there are: {}", names.join("; ")),
        ));
    }
    let mut rows = Vec::new();
    for operation in &chosen {
        tracing::info!("{}", operation.name);
        let row = measure(operation, args)?;
        if !args.json {
            if rows.is_empty() {
                println!(
                    "{:<36}{:>8}{:>22}{:>26}{:>28}{:>10}{:>10}{:>12}{:>12}",
                    "operation",
                    "rounds",
                    "online MB each way",
                    "dealer MB to each",
                    "online s min/median/max",
                    "dealer s",
                    "prep s",
                    "max error",
                    "mean error"
                );
            }
            print_row(&row);
        }
        rows.push(row);
    }
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&rows).map_err(|e| Error::File(e.to_string()))?
        );
    }
    Ok(())
}

fn print_row(r: &Row) {
    let mb = |b: [u64; 2]| format!("{:.3} / {:.3}", b[0] as f64 / 1e6, b[1] as f64 / 1e6);
    println!(
        "{:<36}{:>8}{:>22}{:>26}{:>28}{:>10.4}{:>10.4}{:>12.2e}{:>12.2e}",
        r.operation,
        r.rounds,
        mb(r.online_bytes),
        mb(r.dealer_bytes),
        format!(
            "{:.4}/{:.4}/{:.4}",
            r.seconds.min, r.seconds.median, r.seconds.max
        ),
        r.dealer_seconds,
        r.offline_seconds,
        r.max_error,
        r.mean_error
    );
}

fn measure(operation: &Operation, args: &OpsArgs) -> Result<Row> {
    let cost = session::plan(&operation.values(0)?, 1)?.tally;
    let (shares, owned) = shares(operation, args.runs + 1)?;
    let nothing = Inputs {
        operation,
        x: None,
        y: None,
    };
    let owner = Inputs {
        operation,
        x: None,
        y: owned,
    };
    let timing = time(
        [&nothing, &owner, &nothing],
        &cost,
        args.runs,
        args.network,
        shares.map(|s| Box::new(s) as Box<dyn Outside>),
        args.threads,
    )?;
    let (max_error, mean_error, error_elements) = error(operation, args.error_elements)?;
    let total = cost.total();
    Ok(Row {
        operation: operation.name,
        shape: operation.dims.clone(),
        network: args.network.to_string(),
        rounds: total.rounds,
        online_bytes: total.online_bytes,
        dealer_bytes: total.dealer_bytes,
        setup_bytes: cost.setup_bytes,
        seconds: timing.seconds,
        dealer_seconds: timing.dealer,
        offline_seconds: timing.offline,
        max_error,
        mean_error,
        error_elements,
    })
}

/// Each party's shares, in program order.
type Shares = [VecDeque<Ring>; 2];

/// Shares of the inputs of all passes, and the weight where the second party owns it.
fn shares(operation: &Operation, passes: usize) -> Result<(Shares, Option<Vec<f32>>)> {
    let Inputs { x, y, .. } = operation.values(0)?;
    let mut shares = [VecDeque::new(), VecDeque::new()];
    let mut give = |dims: &[usize], values: &Option<Vec<f32>>, times: usize| -> Result<()> {
        let Some(values) = values else { return Ok(()) };
        for (list, part) in shares.iter_mut().zip(session::share(dims, values)?) {
            list.extend(std::iter::repeat_n(part, times));
        }
        Ok(())
    };
    let second = operation.second_dims().unwrap_or_default();
    match operation.verb {
        Verb::Linear(..) => {
            if !operation.owned_weight() {
                give(&second, &y, 1)?;
            }
            give(&operation.dims, &x, passes)?;
        }
        Verb::MatMul(_) => {
            for _ in 0..passes {
                give(&operation.dims, &x, 1)?;
                give(&second, &y, 1)?;
            }
        }
        _ => give(&operation.dims, &x, passes)?,
    }
    let owned = operation.owned_weight().then_some(y).flatten();
    Ok((shares, owned))
}

/// Largest and mean error of the fixed-point interpreter, which equals the parties bit for bit, against double
/// precision.
fn error(operation: &Operation, elements: usize) -> Result<(f64, f64, usize)> {
    let (mut max, mut sum, mut count, mut stream) = (0f64, 0f64, 0usize, 1);
    while count < elements.max(1) {
        let inputs = operation.values(stream)?;
        let fixed = Fixed::new()?;
        let weight = inputs.load(&fixed)?;
        let y = inputs.run(&fixed, &weight)?;
        for (a, b) in fixed.values(&y).into_iter().zip(reference(&inputs)?) {
            max = max.max((a - b).abs());
            sum += (a - b).abs();
            count += 1;
        }
        stream += 1;
    }
    Ok((max, sum / count as f64, count))
}

fn reference(inputs: &Inputs) -> Result<Vec<f64>> {
    let x: Vec<f64> = inputs.x.iter().flatten().map(|v| f64::from(*v)).collect();
    let row = inputs.operation.dims.last().copied().unwrap_or(1);
    let by_row = |f: &dyn Fn(&[f64]) -> Vec<f64>| x.chunks(row).flat_map(f).collect();
    Ok(match inputs.operation.verb {
        Verb::Relu(_) => x.iter().map(|v| v.max(0.0)).collect(),
        Verb::Activation(f, _) => x.iter().map(|v| f.exact(*v)).collect(),
        Verb::Softmax(_) => by_row(&|r| {
            let e: Vec<f64> = r.iter().map(|v| v.exp()).collect();
            let total: f64 = e.iter().sum();
            e.iter().map(|v| v / total).collect()
        }),
        Verb::Normalize(spec) => by_row(&|r| {
            let n = r.len() as f64;
            let mean = if spec.kind == NormKind::Layer {
                r.iter().sum::<f64>() / n
            } else {
                0.0
            };
            let variance = r.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            r.iter()
                .map(|v| (v - mean) / (variance + spec.eps).sqrt())
                .collect()
        }),
        Verb::Linear(..) | Verb::MatMul(_) => exact_product(inputs)?,
    })
}

/// The inputs are multiples of 2^-16, so that the product of their integers is exact.
fn exact_product(inputs: &Inputs) -> Result<Vec<f64>> {
    let ring = |dims: &[usize], values: &Option<Vec<f32>>| -> Result<Ring> {
        let words = values
            .iter()
            .flatten()
            .map(|v| (f64::from(*v) * 65536.0).round() as i64 as u64)
            .collect();
        Ok(Ring::new(dims.to_vec(), words)?)
    };
    let operation = inputs.operation;
    let x = ring(&operation.dims, &inputs.x)?;
    let y = ring(&operation.second_dims().unwrap_or_default(), &inputs.y)?;
    let product = if matches!(operation.verb, Verb::Linear(..)) {
        x.matmul_nt(&y)?
    } else {
        x.matmul(&y)?
    };
    Ok(product
        .as_slice()
        .iter()
        .map(|v| *v as i64 as f64 / 2f64.powi(32))
        .collect())
}
