//! `veiltune plan`: what a run will cost, from the adapter's public configuration alone.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use veiltune_engine::session::{Plan, sooner};
use veiltune_engine::{Comparison, Cost, Memory};
use veiltune_nn::load::Served;
use veiltune_wire::Network;

use crate::inputs;
use crate::program::{Batches, CLIENT, Classification, Compare, PROVIDER};
use crate::report::{aligned, comparison_name, grouped, print};
use crate::session::{ahead, overlaps};
use crate::{Error, Result};

/// What `veiltune plan` takes.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct PlanArgs {
    #[command(subcommand)]
    other: Option<Other>,
    /// The adapter's public adapter_config.json, or the directory that it is in [default: the embedded one]
    #[arg(long, visible_alias = "adapter-config", value_name = "DIR|FILE")]
    adapter: Option<PathBuf>,
    /// Number of images
    #[arg(long, default_value = "1", value_name = "N")]
    images: NonZeroUsize,
    /// Images that share a forward pass, and so its rounds
    #[arg(long, default_value = "32", value_name = "N")]
    batch: NonZeroUsize,
    /// Network that --comparison auto is chosen for: none, lan, wan, or RATE_MBIT:DELAY_US
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// How the parties compare numbers; auto takes what is sooner through the network
    #[arg(long, value_enum, default_value = "auto", value_name = "HOW")]
    comparison: Compare,
    /// Multiply-adds that a party does in a second, in billions, for the estimates
    #[arg(long, default_value_t = 50.0, value_name = "RATE")]
    gmacs: f64,
    /// Print one JSON object to standard output instead of tables
    ///
    /// Its members: images, batch, network, comparison, rounds, online_bytes [client to provider, provider to client], setup_bytes
    /// (likewise), dealer_bytes [to client, to provider], macs [of the client, of the provider], operations {name: the same},
    /// layers [{layer, and the same}, in order], memory_bytes [of client, provider, dealer], gmacs, estimates [{network,
    /// comparison, cheapest, rounds, wire_seconds, compute_seconds, prepare_seconds, online_seconds, dealer_seconds, total_seconds}].
    #[arg(long)]
    json: bool,
}

/// What else can be planned.
#[derive(Subcommand, Debug)]
enum Other {
    /// What tuning a prompt on shares of a language model will cost, by pass and for the whole budget
    ///
    /// Takes what `tune` takes: of the servers' model, or of one that is at hand (--model, without --servers).
    Tune(crate::tuning::plan::PlanArgs),
}

/// Runs it.
pub fn run(args: &PlanArgs) -> Result<()> {
    if let Some(Other::Tune(args)) = &args.other {
        return crate::tuning::plan::run(args);
    }
    if !(args.gmacs > 0.0 && args.gmacs.is_finite()) {
        return Err(Error::Input("--gmacs must be a positive number".into()));
    }
    let served = Served::shapes(&inputs::adapter_config(args.adapter.as_deref())?.method);
    let images = args.images;
    let batch = args.batch.min(images);
    let batches = Batches {
        images: images.get(),
        batch,
    };
    let program = Classification::public(&served, batches);
    let of = |comparison| -> Result<(Comparison, Counted)> {
        let program = Classification {
            comparison,
            ..program
        };
        Ok((comparison, Counted::of(&program)?))
    };
    let either = [of(Comparison::Fss)?, of(Comparison::MaskedBits)?];
    let comparison = match args.comparison {
        Compare::Auto => sooner(&either[0].1.total, &either[1].1.total, &args.network),
        Compare::Fss => Comparison::Fss,
        Compare::MaskedBits => Comparison::MaskedBits,
    };
    let counted = &either[usize::from(comparison != Comparison::Fss)].1;
    let ahead = ahead(&counted.total);
    let outlook = Outlook {
        images: images.get(),
        batch: batch.get(),
        network: args.network,
        comparison,
        total: counted.total.clone(),
        setup_bytes: counted.setup_bytes,
        operations: counted.operations.clone(),
        layers: counted.layers.clone(),
        memory_bytes: [
            counted.memory.party(CLIENT, ahead),
            counted.memory.party(PROVIDER, ahead),
            counted.memory.dealer(),
        ],
        gmacs: args.gmacs,
        estimates: estimates(args, &either),
    };
    print(args.json, &outlook, || outlook.tables())
}

/// Full passes that are counted: each further one costs as much as the last of these.
const COUNTED: usize = 3;

/// What a run costs, however many passes it has.
#[derive(Debug, PartialEq)]
struct Counted {
    total: Cost,
    setup_bytes: [u64; 2],
    operations: BTreeMap<&'static str, Cost>,
    layers: Vec<Layer>,
    memory: Memory,
}

impl Counted {
    fn of(program: &Classification) -> Result<Counted> {
        let Batches { images, batch } = program.batches;
        let (full, rest) = (images / batch, images % batch);
        let of = |full: usize| {
            let images = full * batch.get() + rest;
            let batches = Batches { images, batch };
            Ok::<_, Error>(Counted::direct(&Classification { batches, ..*program }.plan()?))
        };
        if full <= COUNTED {
            return of(full);
        }
        let (less, mut counted) = (of(COUNTED - 1)?, of(COUNTED)?);
        let times = (full - COUNTED) as u64;
        further(&mut counted.total, &less.total, times);
        for (name, cost) in &mut counted.operations {
            further(cost, &less.operations[name], times);
        }
        for (layer, less) in counted.layers.iter_mut().zip(&less.layers) {
            further(&mut layer.cost, &less.cost, times);
        }
        more(&mut counted.memory.material, less.memory.material, times);
        Ok(counted)
    }

    fn direct(plan: &Plan) -> Counted {
        let tally = &plan.tally;
        let layers = tally.layers().map(|(layer, cost)| Layer {
            layer: layer.to_owned(),
            cost: cost.clone(),
        });
        Counted {
            total: tally.total(),
            setup_bytes: tally.setup_bytes,
            operations: tally.operations().map(|(name, c)| (name, c.clone())).collect(),
            layers: layers.collect(),
            memory: tally.memory,
        }
    }
}

/// Adds so many times what `cost` has more than `less`.
fn further(cost: &mut Cost, less: &Cost, times: u64) {
    more(&mut cost.rounds, less.rounds, times);
    for i in 0..2 {
        more(&mut cost.online_bytes[i], less.online_bytes[i], times);
        more(&mut cost.dealer_bytes[i], less.dealer_bytes[i], times);
        more(&mut cost.macs[i], less.macs[i], times);
    }
}

fn more(value: &mut u64, less: u64, times: u64) {
    *value = value.saturating_add((*value - less).saturating_mul(times));
}

/// Either comparison on each network.
fn estimates(args: &PlanArgs, either: &[(Comparison, Counted); 2]) -> Vec<Estimate> {
    let mut networks = vec![Network::NONE, Network::LAN, Network::WAN];
    if !networks.contains(&args.network) {
        networks.push(args.network);
    }
    let mut estimates = Vec::new();
    for network in networks {
        let cheapest = sooner(&either[0].1.total, &either[1].1.total, &network);
        estimates.extend(either.iter().map(|(comparison, counted)| Estimate {
            network,
            comparison: *comparison,
            cheapest: *comparison == cheapest,
            rounds: counted.total.rounds,
            seconds: Seconds::estimate(
                &counted.total,
                counted.setup_bytes,
                &network,
                overlaps(&counted.total),
                args.gmacs,
            ),
        }));
    }
    estimates
}

/// All that is known beforehand; what is counted is exact.
#[derive(Serialize)]
struct Outlook {
    images: usize,
    batch: usize,
    network: Network,
    comparison: Comparison,
    #[serde(flatten)]
    total: Cost,
    setup_bytes: [u64; 2],
    operations: BTreeMap<&'static str, Cost>,
    layers: Vec<Layer>,
    /// Of client, provider and dealer.
    memory_bytes: [u64; 3],
    gmacs: f64,
    estimates: Vec<Estimate>,
}

/// What a layer costs in all passes.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Layer {
    layer: String,
    #[serde(flatten)]
    cost: Cost,
}

/// One comparison on one network.
#[derive(Serialize)]
struct Estimate {
    network: Network,
    comparison: Comparison,
    cheapest: bool,
    rounds: u64,
    #[serde(flatten)]
    seconds: Seconds,
}

/// Where the time of a session goes, as far as it can be told beforehand.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Seconds {
    /// A delay for each round, and the busier direction's bytes.
    #[serde(rename = "wire_seconds")]
    pub wire: f64,
    /// Multiply-adds of the busier party.
    #[serde(rename = "compute_seconds")]
    pub compute: f64,
    /// The busier party's preparation of what it was dealt, beside the online phase where it does not come first.
    #[serde(rename = "prepare_seconds")]
    pub prepare: f64,
    /// The online phase: all of the above where preparation does not come first.
    #[serde(rename = "online_seconds")]
    pub online: f64,
    /// The dealer's bytes on their way to the party that gets more, or until they are computed if that takes longer.
    #[serde(rename = "dealer_seconds")]
    pub dealer: f64,
    /// From the beginning of a session to its end.
    #[serde(rename = "total_seconds")]
    pub total: f64,
}

impl Seconds {
    /// For a program of this cost. `overlaps` says whether material is prepared while the parties are online; `gmacs` are
    /// billions of multiply-adds a second.
    pub fn estimate(
        cost: &Cost,
        setup_bytes: [u64; 2],
        network: &Network,
        overlaps: bool,
        gmacs: f64,
    ) -> Seconds {
        let busier = |pair: [u64; 2]| pair[0].max(pair[1]);
        let transmission = |bytes: u64| {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            network.transmission(bytes).as_secs_f64()
        };
        let dealt = busier(cost.dealer_bytes);
        let wire = cost.network_seconds(network);
        let compute = busier(cost.macs) as f64 / (gmacs * 1e9);
        let prepare = dealt as f64 * if overlaps { BESIDE } else { BEFORE };
        let dealer = transmission(dealt).max(dealt as f64 * DEALING);
        // The weights are opened while material comes in.
        let setup = transmission(busier(setup_bytes));
        let (online, total) = match overlaps {
            true => {
                let online = wire + compute + prepare;
                (online, dealer.max(setup + online))
            }
            false => (wire + compute, dealer.max(prepare).max(setup) + wire + compute),
        };
        Seconds {
            wire,
            compute,
            prepare,
            online,
            dealer,
            total,
        }
    }
}

/// Seconds a byte of the busier party's dealt material, each measured on one core of an AMD EPYC (Zen 5, AVX-512) with
/// `veiltune bench adapter`; docs/results/cryptpeft.md compares what they predict with what was measured.
///
/// To prepare it before the online phase: "party" seconds of `--paper`.
const BEFORE: f64 = 2.0e-9;
/// To prepare it beside the online phase: what the online seconds of `--method lora` and `--method adaptformer` have beyond the
/// wire and the multiply-adds.
const BESIDE: f64 = 0.37e-9;
/// To deal it: "dealer" seconds of `--method lora` and `--method adaptformer`, from 2 to 3, with writing it to disk.
const DEALING: f64 = 2.0e-9;

impl Outlook {
    fn tables(&self) -> String {
        let mut text = format!(
            "images: {}, images a pass: {}, comparison: {}\n\n",
            self.images,
            self.batch,
            comparison_name(self.comparison)
        );
        let head = |what: &str| {
            let columns = [
                what,
                "rounds",
                "client to provider",
                "provider to client",
                "dealer to client",
                "dealer to provider",
                "multiply-adds of client",
                "of provider",
            ];
            columns.map(String::from)
        };
        let row = |name: &str, c: &Cost| {
            let pairs = [c.online_bytes, c.dealer_bytes, c.macs].into_iter().flatten();
            let numbers: Vec<u64> = std::iter::once(c.rounds).chain(pairs).collect();
            std::array::from_fn(|i| {
                if i == 0 {
                    name.to_owned()
                } else {
                    grouped(numbers[i - 1])
                }
            })
        };
        let mut rows = vec![head("operation")];
        rows.extend(self.operations.iter().map(|(name, cost)| row(name, cost)));
        rows.push(head("layer"));
        rows.extend(self.layers.iter().map(|l| row(&l.layer, &l.cost)));
        rows.push(row("all", &self.total));
        text += &aligned(&rows, &[1, 2, 3, 4, 5, 6, 7]);
        text += &format!(
            "Bytes. Once a session besides, for the weights: {} from the client to the provider, {} back.\n",
            grouped(self.setup_bytes[0]),
            grouped(self.setup_bytes[1])
        );
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        let [client, provider, dealer] = self.memory_bytes.map(mib);
        text += &format!(
            "Memory for tensors and material, at most: client {client}, provider {provider}, dealer {dealer}. The backbone and \
             the weights come on top.\n\n"
        );

        let head = [
            "network",
            "comparison",
            "rounds",
            "on the wire",
            "multiply-adds",
            "preparing",
            "online",
            "dealer",
            "in all",
            "",
        ];
        let mut rows = vec![head.map(String::from)];
        let seconds = |s: f64| format!("{s:.4} s");
        rows.extend(self.estimates.iter().map(|e| {
            [
                e.network.to_string(),
                comparison_name(e.comparison).into(),
                grouped(e.rounds),
                seconds(e.seconds.wire),
                seconds(e.seconds.compute),
                seconds(e.seconds.prepare),
                seconds(e.seconds.online),
                seconds(e.seconds.dealer),
                seconds(e.seconds.total),
                if e.cheapest {
                    "sooner".into()
                } else {
                    String::new()
                },
            ]
        }));
        text += &aligned(&rows, &[2, 3, 4, 5, 6, 7, 8]);
        text + &format!(
            "Estimates: a delay for each round and the busier direction's bytes, {} billion multiply-adds a second, and what the \
             busier party takes to prepare the dealer's bytes, a part of the online phase where there is too much to be prepared \
             before. The dealer: to compute its bytes or to send them, whichever takes longer. In all: from the beginning of a \
             session to its end, the client's backbone not included. Sooner counts the wire and the dealer's bytes.\n",
            self.gmacs
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_passes_cost_what_counting_each_of_them_says() {
        let served = Served::shapes(&inputs::adapter_config(None).unwrap().method);
        for (images, batch) in [(1, 1), (7, 2), (8, 2), (9, 1), (23, 4), (40, 4)] {
            let batch = NonZeroUsize::new(batch).unwrap();
            let program = Classification::public(&served, Batches { images, batch });
            let either = [Comparison::Fss, Comparison::MaskedBits].map(|comparison| {
                let program = Classification {
                    comparison,
                    ..program
                };
                let counted = Counted::of(&program).unwrap();
                assert_eq!(
                    counted,
                    Counted::direct(&program.plan().unwrap()),
                    "{images} {batch}"
                );
                (comparison, counted)
            });
            for network in [Network::NONE, Network::LAN, Network::WAN] {
                let known = Compare::Auto.over(&network, &program).unwrap();
                assert_eq!(sooner(&either[0].1.total, &either[1].1.total, &network), known);
            }
        }
    }

    /// The figures of docs/results/cryptpeft.md: rounds, bytes from the client, to the provider, and online seconds measured.
    #[test]
    fn estimates_are_near_what_was_measured() {
        let lora = (252, 314_280_000, 4_494_250_000, true);
        let adaptformer = (267, 257_860_000, 2_679_170_000, true);
        let last_layer = (23, 4_060_000, 5_380_000, false);
        for ((rounds, sent, dealt, overlaps), network, measured) in [
            (lora, Network::LAN, 4.502),
            (lora, Network::WAN, 9.166),
            (adaptformer, Network::LAN, 3.610),
            (adaptformer, Network::WAN, 7.605),
            (last_layer, Network::LAN, 0.055),
            (last_layer, Network::WAN, 0.174),
        ] {
            let cost = Cost {
                rounds,
                online_bytes: [sent, 0],
                dealer_bytes: [0, dealt],
                macs: [0, if overlaps { 16_777_000_000 } else { 239_000_000 }],
            };
            let s = Seconds::estimate(&cost, [0, 1_000_000], &network, overlaps, 50.0);
            assert!((s.online / measured - 1.0).abs() < 0.15, "{s:?} {measured}");
            // A dealer that streams so much takes longer than everything else.
            assert!(s.total >= s.online && s.total >= s.dealer, "{s:?}");
            assert_eq!(overlaps, s.dealer > s.online, "{s:?}");
        }
    }
}
