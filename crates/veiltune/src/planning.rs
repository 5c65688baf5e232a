//! `veiltune plan`: what a run will cost, from the adapter's public configuration alone.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use veiltune_engine::{Comparison, Cost};
use veiltune_nn::load::Served;
use veiltune_wire::Network;

use crate::inputs;
use crate::program::{Batches, CLIENT, Classification, Compare, PROVIDER};
use crate::report::{aligned, comparison_name, grouped, print};
use crate::session::ahead;
use crate::{Error, Result};

/// What `veiltune plan` takes.
#[derive(Args, Debug)]
pub struct PlanArgs {
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
    /// comparison, cheapest, rounds, wire_seconds, compute_seconds, online_seconds, dealer_seconds}].
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &PlanArgs) -> Result<()> {
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
    let mut program = Classification::public(&served, batches);
    program.comparison = args.comparison.over(&args.network, &program)?;
    let plan = program.plan()?;
    let (tally, ahead) = (&plan.tally, ahead(&plan));
    let outlook = Outlook {
        images: images.get(),
        batch: batch.get(),
        network: args.network,
        comparison: program.comparison,
        total: tally.total(),
        setup_bytes: tally.setup_bytes,
        operations: tally.operations().map(|(name, c)| (name, c.clone())).collect(),
        layers: tally
            .layers()
            .map(|(layer, cost)| Layer {
                layer: layer.to_owned(),
                cost: cost.clone(),
            })
            .collect(),
        memory_bytes: [
            tally.memory.party(CLIENT, ahead),
            tally.memory.party(PROVIDER, ahead),
            tally.memory.dealer(),
        ],
        gmacs: args.gmacs,
        estimates: estimates(args, program)?,
    };
    print(args.json, &outlook, || outlook.tables())
}

/// Either comparison on each network.
fn estimates(args: &PlanArgs, mut program: Classification) -> Result<Vec<Estimate>> {
    let mut networks = vec![Network::NONE, Network::LAN, Network::WAN];
    if !networks.contains(&args.network) {
        networks.push(args.network);
    }
    let mut costs = Vec::new();
    for comparison in [Comparison::Fss, Comparison::MaskedBits] {
        program.comparison = comparison;
        costs.push((comparison, program.plan()?.tally.total()));
    }
    let mut estimates = Vec::new();
    for network in networks {
        let cheapest = Compare::Auto.over(&network, &program)?;
        estimates.extend(costs.iter().map(|(comparison, cost)| {
            let busier = |pair: [u64; 2]| pair[0].max(pair[1]);
            let wire_seconds = cost.network_seconds(&network);
            let compute_seconds = busier(cost.macs) as f64 / (args.gmacs * 1e9);
            let dealt = usize::try_from(busier(cost.dealer_bytes)).unwrap_or(usize::MAX);
            Estimate {
                network,
                comparison: *comparison,
                cheapest: *comparison == cheapest,
                rounds: cost.rounds,
                wire_seconds,
                compute_seconds,
                online_seconds: wire_seconds + compute_seconds,
                dealer_seconds: network.transmission(dealt).as_secs_f64(),
            }
        }));
    }
    Ok(estimates)
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
#[derive(Serialize)]
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
    wire_seconds: f64,
    compute_seconds: f64,
    online_seconds: f64,
    dealer_seconds: f64,
}

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
            "online",
            "dealer's bytes",
            "",
        ];
        let mut rows = vec![head.map(String::from)];
        let seconds = |s: f64| format!("{s:.4} s");
        rows.extend(self.estimates.iter().map(|e| {
            [
                e.network.to_string(),
                comparison_name(e.comparison).into(),
                grouped(e.rounds),
                seconds(e.wire_seconds),
                seconds(e.compute_seconds),
                seconds(e.online_seconds),
                seconds(e.dealer_seconds),
                if e.cheapest {
                    "sooner".into()
                } else {
                    String::new()
                },
            ]
        }));
        text += &aligned(&rows, &[2, 3, 4, 5, 6]);
        text + &format!(
            "Estimates: a delay for each round, the busier direction's bytes, and {} billion multiply-adds a second; keys, other \
             arithmetic and encryption come on top. Sooner counts the wire and the dealer's bytes.\n",
            self.gmacs
        )
    }
}
