//! What a tuning run will cost, before it runs: exact rounds and bytes of each kind of pass and of the whole budget.

use clap::Args;
use serde::Serialize;
use veiltune_engine::session::plan;
use veiltune_engine::{Comparison, Cost, Memory, Party};
use veiltune_nn::language::LanguageConfig;
use veiltune_tune::Settings;
use veiltune_wire::Network;

use super::args::RunArgs;
use super::ground::Chosen;
use super::layout::tune;
use super::lookup;
use super::program::{Pass, Shape, Tuning, table_rows, table_width};
use super::servers::Role;
use super::tune::comparison;
use crate::report::{self, aligned};
use crate::{Error, Result};

/// What `veiltune plan tune` takes.
#[derive(Args, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    /// A JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Says what a run would cost, on the servers' model or on one that is at hand and could be shared.
pub fn run(args: &PlanArgs) -> Result<()> {
    let (run, drawn) = (&args.run, Chosen::draw(&args.run)?);
    let (config, words) = match run.servers.servers.is_empty() {
        false => {
            let (addresses, station) = (run.servers.addresses()?, run.servers.station(Role::DataOwner)?);
            let public = run.on_servers(&station, &addresses)?;
            let words = public.words()?;
            (public.config, words)
        }
        true => {
            let checkpoint = run.open()?;
            let ready = run
                .calibration
                .ready(&checkpoint, run.attention.attention(), run.tokens)?;
            (ready.config, checkpoint.tokenizer)
        }
    };
    let (_, _, shape) = run.lay_out(&config, &words, &drawn)?;
    let network = &run.servers.network;
    let comparison = comparison(&config, &shape, network)?;
    let cost = cost(&config, &shape, comparison, &run.settings(), network)?;
    report::print(args.json, &cost, || table(&cost, &shape))
}

/// Gates that the servers' preparation runs ahead.
pub const AHEAD: usize = 4;

/// Bytes of memory that server 0, server 1 and the assistant need at most. A server holds the word table before it runs passes, and
/// everybody which of its rows are selected.
pub fn memory(passes: &Memory, model: &LanguageConfig, shape: &Shape) -> [u64; 3] {
    let table = 8 * (table_rows(model) * table_width(model)) as u64;
    let selected = lookup::selected_bytes(shape.rows(), table_rows(model));
    let server = |party| passes.party(party, Some(AHEAD)).max(table) + selected;
    [server(Party::P0), server(Party::P1), passes.dealer() + selected]
}

/// The cost of one pass of a kind.
#[derive(Clone, Serialize)]
pub struct PassCost {
    /// Rounds between the servers.
    pub rounds: u64,
    /// Bytes from server 0 and from server 1 to the other.
    pub online_bytes: [u64; 2],
    /// Bytes from the assistant to server 0 and to server 1.
    pub dealer_bytes: [u64; 2],
    /// Bytes from the data owner to the servers.
    pub owner_sends: u64,
    /// Bytes from the servers to the data owner.
    pub owner_receives: u64,
    /// Estimated seconds by network: what is sent, a delay a round; and computing and material at the rates below.
    pub seconds: Vec<(String, f64)>,
}

/// A run's.
#[derive(Serialize)]
pub struct RunCost {
    /// Sizes.
    pub shape: Shape,
    /// Opening the model's parameters, each way, once a run.
    pub setup_bytes: [u64; 2],
    /// The word lookup's keys, from the data owner to all three.
    pub lookup_keys: u64,
    /// By pass.
    pub texts: PassCost,
    /// Of all candidates of a generation.
    pub generation: PassCost,
    /// Of one prompt.
    pub validation: Option<PassCost>,
    /// Generations of the budget, and validations.
    pub passes: [u64; 2],
    /// Estimated seconds of the whole budget, by network.
    pub seconds: Vec<(String, f64)>,
    /// Bytes of the whole budget: between the servers both ways, from the assistant, and from and to the data owner.
    pub online_bytes: u64,
    /// From the assistant to both servers.
    pub dealer_bytes: u64,
    /// Estimated peak memory of server 0, server 1 and the assistant.
    pub memory: [u64; 3],
    /// One pass of each kind, by operation.
    pub operations: Vec<(&'static str, Cost)>,
}

/// Multiply-adds a second that a role does while the others work on the same two cores, and seconds a byte of material takes
/// to be made, moved and prepared: `bench encoder --material streamed` on two cores gives both.
const MACS: f64 = 20e9;
const MATERIAL: f64 = 4e-9;

const NETWORKS: [&str; 4] = ["lan", "secp-lan", "secp-wan-a", "secp-wan-b"];

/// These, and the user's own if it is another.
fn networks(own: &Network) -> Vec<(String, Network)> {
    let parse = |name: &str| name.parse::<Network>().ok().map(|n| (name.to_owned(), n));
    let mut all: Vec<_> = NETWORKS.into_iter().filter_map(parse).collect();
    if *own != Network::NONE && all.iter().all(|(_, network)| network != own) {
        all.push((own.to_string(), *own));
    }
    all
}

fn seconds(cost: &Cost, network: &Network) -> f64 {
    let material = (cost.dealer_bytes[0] + cost.dealer_bytes[1]) as f64;
    let most = cost.dealer_bytes[0].max(cost.dealer_bytes[1]);
    let line = network
        .transmission(usize::try_from(most).unwrap_or(usize::MAX))
        .as_secs_f64();
    // Material is made, moved and used at the same time: the slowest counts.
    let computing = 2.5 * cost.macs[0].max(cost.macs[1]) as f64 / MACS + material * MATERIAL;
    cost.network_seconds(network) + computing.max(line)
}

fn difference(later: &Cost, earlier: &Cost) -> Cost {
    let less = |a: [u64; 2], b: [u64; 2]| [a[0] - b[0], a[1] - b[1]];
    Cost {
        rounds: later.rounds - earlier.rounds,
        online_bytes: less(later.online_bytes, earlier.online_bytes),
        dealer_bytes: less(later.dealer_bytes, earlier.dealer_bytes),
        macs: less(later.macs, earlier.macs),
    }
}

/// What a run of these sizes costs. `budget` prompts are evaluated, with a validation of two prompts each `every` of them.
pub fn cost(
    model: &LanguageConfig,
    shape: &Shape,
    comparison: Comparison,
    settings: &Settings,
    network: &Network,
) -> Result<RunCost> {
    settings.check().map_err(tune)?;
    let networks = networks(network);
    let program = Tuning::public(model, shape, comparison);
    let mut before = Cost::default();
    let (mut outside, mut passes) = ([0, 0], Vec::new());
    let mut last = None;
    for kinds in 1..=shape.kinds().len() {
        let tally = plan(&program, kinds)?.tally;
        let total = tally.total();
        let own = difference(&total, &before);
        let now = [tally.outside.inputs, tally.outside.outputs];
        let one = |network: &Network| seconds(&own, network);
        passes.push(PassCost {
            rounds: own.rounds,
            online_bytes: own.online_bytes,
            dealer_bytes: own.dealer_bytes,
            // Server 0 expands its shares; the word lookup's terms are not the data owner's.
            owner_sends: now[0] - outside[0],
            owner_receives: 2 * (now[1] - outside[1]),
            seconds: networks.iter().map(|(n, net)| (n.clone(), one(net))).collect(),
        });
        (before, outside) = (total, now);
        last = Some(tally);
    }
    let tally = last.ok_or_else(|| Error::Input("there is nothing to plan".into()))?;
    let terms = 8 * (super::program::TERMS * shape.rows() * table_width(model)) as u64;
    passes[0].owner_sends -= terms;
    let planned = settings.planned();
    // Without texts of their own, validations are passes over those that are tuned on.
    let (generations, validations) = match shape.validation {
        0 => (planned.generations + planned.validations, 0),
        _ => (planned.generations, planned.validated),
    };
    let validation = passes.get(Pass::Validation.number() as usize).cloned();
    let (texts, generation) = (passes[0].clone(), passes[1].clone());
    let all = |f: &dyn Fn(&PassCost) -> u64| {
        f(&texts) + generations * f(&generation) + validations * validation.as_ref().map_or(0, f)
    };
    let total_seconds = networks
        .iter()
        .enumerate()
        .map(|(i, (name, network))| {
            let at = |p: &PassCost| p.seconds[i].1;
            let setup = network
                .transmission(
                    usize::try_from(tally.setup_bytes[0].max(tally.setup_bytes[1])).unwrap_or(usize::MAX),
                )
                .as_secs_f64();
            let sum = at(&texts)
                + generations as f64 * at(&generation)
                + validations as f64 * validation.as_ref().map_or(0.0, at);
            (name.clone(), setup + sum)
        })
        .collect();
    let key = veiltune_fss::point::key_bytes(table_rows(model)).unwrap_or(0);
    Ok(RunCost {
        shape: shape.clone(),
        setup_bytes: tally.setup_bytes,
        lookup_keys: (6 * shape.rows() * key) as u64,
        passes: [generations, validations],
        seconds: total_seconds,
        online_bytes: all(&|p| p.online_bytes[0] + p.online_bytes[1]),
        dealer_bytes: all(&|p| p.dealer_bytes[0] + p.dealer_bytes[1]),
        memory: memory(&tally.memory, model, shape),
        operations: tally.operations().map(|(name, c)| (name, c.clone())).collect(),
        texts,
        generation,
        validation,
    })
}

fn table(cost: &RunCost, shape: &Shape) -> String {
    let mut text = format!(
        "{} + {} texts of {} tokens ({} of them prompt), {} candidates a generation, {} together\n",
        shape.texts, shape.validation, shape.tokens, shape.prompt, shape.candidates, shape.together
    );
    let mb = |b: u64| format!("{:.2}", b as f64 / 1e6);
    let head = [
        "pass",
        "times",
        "rounds",
        "servers MB",
        "assistant MB",
        "owner MB",
    ];
    let networks = cost.seconds.iter().map(|(name, _)| format!("{name} s"));
    let mut rows = vec![
        head.into_iter()
            .map(String::from)
            .chain(networks)
            .collect::<Vec<_>>(),
    ];
    let mut add = |name: &str, times: u64, p: &PassCost| {
        let mut row = vec![
            name.to_owned(),
            times.to_string(),
            p.rounds.to_string(),
            mb(p.online_bytes[0] + p.online_bytes[1]),
            mb(p.dealer_bytes[0] + p.dealer_bytes[1]),
            mb(p.owner_sends + p.owner_receives),
        ];
        row.extend(p.seconds.iter().map(|(_, s)| format!("{s:.2}")));
        rows.push(row);
    };
    add("texts", 1, &cost.texts);
    add("generation", cost.passes[0], &cost.generation);
    if let Some(validation) = &cost.validation {
        add("validation", cost.passes[1], validation);
    }
    let width = rows[0].len();
    let mut total = vec![
        "whole budget".to_owned(),
        String::new(),
        String::new(),
        mb(cost.online_bytes),
        mb(cost.dealer_bytes),
        String::new(),
    ];
    total.extend(cost.seconds.iter().map(|(_, s)| format!("{s:.1}")));
    total.resize(width, String::new());
    rows.push(total);
    text += &aligned(&rows, &(1..width).collect::<Vec<_>>());
    text += &format!(
        "set-up {} MB each way and {} MB of keys for the word lookup, once a run\n",
        mb(cost.setup_bytes[0]),
        mb(cost.lookup_keys)
    );
    let gib = |b: u64| b as f64 / 2f64.powi(30);
    text + &format!(
        "memory at most {:.2} and {:.2} GiB at the servers, {:.2} GiB at the assistant; seconds are estimates for two cores\n",
        gib(cost.memory[0]),
        gib(cost.memory[1]),
        gib(cost.memory[2])
    )
}
