//! `veiltune bench encoder`: one private forward pass of a whole language model between two servers that have it in shares, on
//! random weights of the true shapes, compared with plain float.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use clap::{Args, ValueEnum};
use serde::Serialize;
use veiltune_engine::session::{self, Program};
use veiltune_engine::{
    Backend, Comparison, Error as EngineError, Outside, Owner, Params, Party, Plain, Result as EngineResult,
    Revealed, Tally,
};
use veiltune_hub::Array;
use veiltune_nn::language::{Attention, LanguageCheckpoint, LanguageConfig, LanguageModel, fold};
use veiltune_ring::Ring;
use veiltune_ring::codec;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::Network;

use super::harness::{STREAM_AHEAD, stream, time};
use crate::report::print;
use crate::{Error, Result};

/// Which model, and over which network.
#[derive(Args, Debug)]
pub struct EncoderArgs {
    /// Shape of the model.
    #[arg(long, value_enum, default_value = "bert-base")]
    model: Shape,
    /// Layers, if not all of them.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Tokens of a text.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Texts a pass.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Kind of attention.
    #[arg(long, value_enum, default_value = "softmax")]
    attention: Kind,
    /// Random projections of `--attention rfa`; there are twice as many features.
    #[arg(long, default_value_t = 64)]
    features: usize,
    /// Network to emulate: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US one way.
    #[arg(long, default_value = "none")]
    network: Network,
    /// How numbers are compared where they have to be.
    #[arg(long)]
    masked_bits: bool,
    /// Where material comes from: made and prepared before the clock starts, or streamed by a dealer who works while it runs.
    #[arg(long, value_enum, default_value = "prepared")]
    material: Material,
    /// Threads of each role; other systems' benchmarks have one.
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Counted runs, after one that is not; 0: a single run that counts. Streamed material serves a single one.
    #[arg(long, default_value_t = 1)]
    runs: usize,
    /// A JSON object on standard output instead of a table.
    #[arg(long)]
    json: bool,
}

/// Models by their shape.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    /// 24 layers of width 1024.
    RobertaLarge,
    /// 24 layers of width 1024.
    BertLarge,
    /// 12 layers of width 768.
    BertBase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Softmax,
    Rfa,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Material {
    /// Made before: in memory up to 4 GiB, else in files, from which it is then prepared while the clock runs.
    Prepared,
    /// Made while the clock runs.
    Streamed,
}

fn config(args: &EncoderArgs) -> Result<LanguageConfig> {
    let name = match args.model {
        Shape::RobertaLarge => "roberta-large",
        Shape::BertLarge => "bert-large",
        Shape::BertBase => "bert-base",
    };
    let preset = LanguageConfig::preset(name)?;
    let config = LanguageConfig {
        num_hidden_layers: args.layers.unwrap_or(preset.num_hidden_layers),
        has_head: false,
        ..preset
    }
    .with_attention(match args.attention {
        Kind::Softmax => Attention::Softmax,
        Kind::Rfa => Attention::Rfa {
            features: args.features,
            seed: 1,
        },
    });
    config.check()?;
    Ok(config)
}

/// A parameter: matrices of variance 1 / inputs, gains of one. The same for the same name.
fn random(name: &str, dims: &[usize]) -> Vec<f32> {
    let n = dims.iter().product();
    if name.contains("norm") && name.ends_with("weight") {
        return vec![1.0; n];
    }
    let stream = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let size = match dims.len() {
        1 => 0.1,
        _ => (3.0 / dims.last().copied().unwrap_or(1) as f64).sqrt(),
    };
    Prg::new(&Seed::from_bytes(*b"veiltune bench 3"), stream, 1)
        .vec(n)
        .into_iter()
        .map(|w| (w as i64 as f64 / 2f64.powi(63) * size) as f32)
        .collect()
}

/// A parameter of the form that is run.
fn parameter(config: &LanguageConfig, name: &str, dims: &[usize]) -> EngineResult<Vec<f32>> {
    let stored = |name: &str, dims: &[usize]| {
        Ok(Array {
            dims: dims.to_vec(),
            values: random(name, dims),
        })
    };
    fold::parameter(config, name, dims, &stored)
        .map(|array| array.values)
        .map_err(|e| EngineError::program("parameter", e.to_string()))
}

/// What enters the first layer, shared; of what leaves the last one the first position, revealed for the comparison.
struct Encoder<'a> {
    config: &'a LanguageConfig,
    dims: [usize; 3],
    comparison: Comparison,
}

impl Program for Encoder<'_> {
    type Model<B: Backend> = LanguageModel<B>;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn load<B: Backend>(&self, b: &B) -> EngineResult<LanguageModel<B>> {
        let params = Params::new(|_, dims: &[usize]| b.weight(Owner::Shared, dims, None));
        LanguageModel::load(&params, self.config).map_err(|e| EngineError::program("model", e.to_string()))
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &LanguageModel<B>,
        _: usize,
    ) -> EngineResult<Option<Revealed>> {
        let x = b.input(Owner::Shared, &self.dims, None)?;
        let y = model.hidden(b, &x, None)?;
        // Every position is computed; one is enough to see that it is right.
        b.reveal(&b.narrow(&y, 1, 0, 1)?, Party::P0)
    }
}

/// A server's shares: of the parameters expanded and made where they are wanted, so that the model is nowhere whole.
struct Expanded {
    party: Party,
    seed: Seed,
    config: LanguageConfig,
    names: VecDeque<(u64, String)>,
    inputs: VecDeque<Ring>,
}

impl Outside for Expanded {
    fn parameter(&mut self, dims: &[usize]) -> EngineResult<Ring> {
        let (index, name) = self
            .names
            .pop_front()
            .ok_or_else(|| EngineError::program("parameter", "there are more than the model has"))?;
        let first = Prg::new(&self.seed, index, 0).ring(dims);
        match self.party {
            Party::P0 => Ok(first),
            Party::P1 => {
                let values = parameter(&self.config, &name, dims)?;
                let words = codec::encode(
                    values.iter().map(|v| f64::from(*v)),
                    veiltune_engine::gates::SCALE,
                )?;
                Ok(Ring::new(dims.to_vec(), words)?.sub(&first)?)
            }
        }
    }

    fn input(&mut self, dims: &[usize]) -> EngineResult<Ring> {
        self.inputs.input(dims)
    }

    fn output(&mut self, share: Ring) -> EngineResult<()> {
        self.inputs.output(share)
    }
}

/// What enters the first layer: as an embedding's norm gives it.
fn input(dims: [usize; 3]) -> Vec<f32> {
    let words = Prg::new(&Seed::from_bytes(*b"veiltune bench 4"), 1, 0).vec(dims.iter().product());
    words
        .into_iter()
        .map(|w| (w as i64 as f64 / 2f64.powi(63) * 3f64.sqrt()) as f32)
        .collect()
}

/// Ranges from a plain pass with a factor of two to spare, and that pass's result.
fn calibrated(mut config: LanguageConfig, dims: [usize; 3]) -> Result<(LanguageConfig, Vec<f64>)> {
    let (seen, b) = (Plain::recording(), Plain::new());
    let params =
        Params::new(|name: &str, dims: &[usize]| b.weight(Owner::Public, dims, Some(&random(name, dims))));
    let model = LanguageModel::load(&params, &config)?;
    // The embedding is not part of the pass, but of what is calibrated.
    let width = [dims[0], dims[1], config.embedding_size];
    model.embed(&seen, &b.input(Owner::Public, &width, Some(&input(dims)))?)?;
    let x = b.input(Owner::Public, &dims, Some(&input(dims)))?;
    let y = model.hidden(&seen, &x, None)?;
    let expected = b
        .reveal(&b.narrow(&y, 1, 0, 1)?, Party::P0)?
        .map_or_else(Vec::new, |r| r.values);
    config.calibrate(&seen.sites(), 2.0)?;
    Ok((config.served(), expected))
}

#[derive(Serialize)]
struct Report {
    model: String,
    layers: usize,
    tokens: usize,
    batch: usize,
    attention: String,
    network: String,
    material: &'static str,
    /// Of each role.
    threads: NonZeroUsize,
    /// From input to result.
    seconds: f64,
    /// Making the material, without sending it; None: within `seconds`.
    dealer_seconds: Option<f64>,
    /// Preparing it, where that comes before; None: within `seconds`.
    offline_seconds: Option<f64>,
    setup_seconds: f64,
    rounds: u64,
    online_bytes: [u64; 2],
    dealer_bytes: [u64; 2],
    setup_bytes: [u64; 2],
    max_error: f64,
    mean_error: f64,
    /// Standard deviation of the result.
    deviation: f64,
    /// Predicted peak of either server and of the dealer in one pass.
    memory: [u64; 3],
    /// Measured peak of the process that plays all three, calibration included; 0 where the system does not tell.
    peak_of_all: u64,
    operations: Vec<(String, veiltune_engine::Cost)>,
}

/// Runs it.
pub fn run(args: &EncoderArgs) -> Result<()> {
    let config = config(args)?;
    let dims = [args.batch, args.tokens, config.hidden_size];
    if args.tokens > config.max_positions || dims.contains(&0) {
        return Err(Error::Input(format!(
            "{} texts of {} tokens; the model takes 1 to {}",
            args.batch, args.tokens, config.max_positions
        )));
    }
    let (config, expected) = calibrated(config, dims)?;
    let program = Encoder {
        config: &config,
        dims,
        comparison: match args.masked_bits {
            true => Comparison::MaskedBits,
            false => Comparison::Fss,
        },
    };
    let cost: Tally = session::plan(&program, 1)?.tally;
    let passes = match args.material {
        Material::Prepared => args.runs + 1,
        Material::Streamed => 1,
    };
    let outside = shared(&config, dims, passes)?;
    let programs = [&program, &program, &program];
    let measured = match args.material {
        Material::Prepared => {
            let t = time(programs, &cost, args.runs, args.network, outside, args.threads)?;
            Measured {
                seconds: t.seconds.median,
                dealer: Some(t.dealer),
                offline: Some(t.offline),
                setup: t.setup,
                revealed: t.revealed,
                ahead: t.ahead,
            }
        }
        Material::Streamed => {
            let t = stream(programs, &cost, args.network, outside, args.threads)?;
            Measured {
                seconds: t.seconds,
                dealer: None,
                offline: None,
                setup: t.setup,
                revealed: t.revealed,
                ahead: Some(STREAM_AHEAD),
            }
        }
    };
    let report = Report::new(args, config.num_hidden_layers, &cost, &expected, &measured);
    print(args.json, &report, || report.table())
}

/// Both servers' shares of the parameters, random ones, and of the inputs of so many passes.
fn shared(config: &LanguageConfig, dims: [usize; 3], passes: usize) -> Result<[Box<dyn Outside>; 2]> {
    let names: VecDeque<(u64, String)> = LanguageCheckpoint::inventory(config)?
        .into_iter()
        .enumerate()
        .map(|(i, (name, _))| (i as u64, name))
        .collect();
    let seed = Seed::random().map_err(EngineError::from)?;
    let mut shares = [VecDeque::new(), VecDeque::new()];
    for _ in 0..passes {
        let both = session::share(&dims, &input(dims))?;
        shares
            .iter_mut()
            .zip(both)
            .for_each(|(list, part)| list.push_back(part));
    }
    let [first, second] = shares;
    let expanded = |party, inputs| -> Box<dyn Outside> {
        Box::new(Expanded {
            party,
            seed: seed.clone(),
            config: config.clone(),
            names: names.clone(),
            inputs,
        })
    };
    Ok([expanded(Party::P0, first), expanded(Party::P1, second)])
}

/// What a pass took, as [`Report`] has it, and what it revealed.
struct Measured {
    seconds: f64,
    dealer: Option<f64>,
    offline: Option<f64>,
    setup: f64,
    revealed: [Option<Revealed>; 2],
    ahead: Option<usize>,
}

impl Report {
    /// `expected` is what plain float computes.
    fn new(args: &EncoderArgs, layers: usize, cost: &Tally, expected: &[f64], m: &Measured) -> Report {
        let private = m.revealed[0].as_ref().map_or(&[][..], |r| &r.values);
        let differences: Vec<f64> = private.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
        let n = expected.len().max(1) as f64;
        let (total, memory) = (cost.total(), &cost.memory);
        Report {
            model: format!("{:?}", args.model),
            layers,
            tokens: args.tokens,
            batch: args.batch,
            attention: format!("{:?}", args.attention).to_lowercase(),
            network: args.network.to_string(),
            material: match args.material {
                Material::Prepared => "prepared",
                Material::Streamed => "streamed",
            },
            threads: args.threads,
            seconds: m.seconds,
            dealer_seconds: m.dealer,
            offline_seconds: m.offline,
            setup_seconds: m.setup,
            rounds: total.rounds,
            online_bytes: total.online_bytes,
            dealer_bytes: total.dealer_bytes,
            setup_bytes: cost.setup_bytes,
            max_error: differences.iter().copied().fold(0.0, f64::max),
            mean_error: differences.iter().sum::<f64>() / n,
            deviation: (expected.iter().map(|v| v * v).sum::<f64>() / n).sqrt(),
            memory: [
                memory.party(Party::P0, m.ahead),
                memory.party(Party::P1, m.ahead),
                memory.dealer(),
            ],
            peak_of_all: peak(),
            operations: cost
                .operations()
                .map(|(name, c)| (name.to_owned(), c.clone()))
                .collect(),
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let mb = |b: [u64; 2]| format!("{:.1} / {:.1} MB", b[0] as f64 / 1e6, b[1] as f64 / 1e6);
        let gib = |b: u64| b as f64 / 2f64.powi(30);
        text += &format!(
            "{}, {} layers, {} x {} tokens, {} attention, network {}, material {}, threads of a role {}\n",
            self.model,
            self.layers,
            self.batch,
            self.tokens,
            self.attention,
            self.network,
            self.material,
            self.threads
        );
        text += &format!(
            "online   {:.3} s, {} rounds, {} each way\n",
            self.seconds,
            self.rounds,
            mb(self.online_bytes)
        );
        text += &match (self.dealer_seconds, self.offline_seconds) {
            (Some(dealer), Some(offline)) => format!(
                "offline  dealer {dealer:.3} s, server {offline:.3} s, {} to each server\n",
                mb(self.dealer_bytes)
            ),
            _ => format!(
                "dealer   {} to each server, in the same time\n",
                mb(self.dealer_bytes)
            ),
        };
        text += &format!(
            "set-up   {:.3} s, {} each way, once a session\n",
            self.setup_seconds,
            mb(self.setup_bytes)
        );
        text += &format!(
            "error    largest {:.2e}, mean {:.2e}, of values of deviation {:.2}\n",
            self.max_error, self.mean_error, self.deviation
        );
        text += &format!(
            "memory   predicted {:.2} and {:.2} GiB at the servers, {:.2} GiB at the dealer; all in this process at most {:.2} GiB\n",
            gib(self.memory[0]),
            gib(self.memory[1]),
            gib(self.memory[2]),
            gib(self.peak_of_all)
        );
        text += &format!(
            "{:<16}{:>8}{:>28}{:>28}\n",
            "operation", "rounds", "online", "dealer"
        );
        for (name, c) in &self.operations {
            text += &format!(
                "{name:<16}{:>8}{:>28}{:>28}\n",
                c.rounds,
                mb(c.online_bytes),
                mb(c.dealer_bytes)
            );
        }
        text
    }
}

/// The most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().split(' ').next()?.parse::<u64>().ok());
    1024 * kib.unwrap_or(0)
}
