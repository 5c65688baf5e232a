//! The veiltune command line.

mod bench;
mod commands;
mod crew;
mod deal;
mod demo;
mod error;
mod events;
mod import;
mod inputs;
mod learn;
mod methods;
mod planning;
mod prepare;
mod program;
mod progress;
mod report;
mod roles;
mod service;
mod session;
mod tuning;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use veiltune_adapt::workers;

use error::{Error, Result};

/// Gates allocate and free buffers of many megabytes; an allocator that keeps them spares the page faults, which otherwise
/// cost more than the arithmetic.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds for which the allocator keeps freed memory, ten times as long for large blocks: a pass gives back and takes again
/// the same buffers layer by layer, and the kernel clears fresh pages at the price of the pass's own arithmetic.
const KEEP_FREED_MEMORY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "60000");

/// Private classification: one side's images or texts, another side's adapter, and neither sees the other's.
///
/// A public backbone runs in the clear where the images are. The adapter and the classification head, which belong to
/// somebody else, run under secure computation between the two sides; only the side with the images learns the result. A
/// third process, the dealer, supplies randomness and sees neither images, adapter nor result.
#[derive(Parser)]
#[command(
    version,
    after_help = "Set RUST_LOG (info, debug) to see what the processes do, on standard error."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Classify images privately with three processes on this machine, and compare with plain float
    ///
    /// Starts client, provider and dealer as processes of their own that talk over TCP with mutual TLS, and shows each image's
    /// private label beside the one that ordinary floating point gives, then what it cost. Fails if the run took another
    /// number of rounds or bytes than was predicted for it.
    Demo(demo::DemoArgs),
    /// Write the dealer's material to files, for a later `demo`, `serve` or `classify` with `--material`
    ///
    /// Material depends on the adapter's public configuration, the number of images, how they are batched and how numbers are
    /// compared, so it can be made long before.
    /// Each file goes to its own party, in secret: whoever holds both can see everything. A run removes what it uses.
    Deal(deal::DealArgs),
    /// Train an adapter on labelled pictures or texts, in the clear
    ///
    /// The backbone's hidden states are computed once and kept in a cache, so that training takes minutes. An interrupted run goes
    /// on where it stopped when the same command is given again.
    Train(learn::train::TrainArgs),
    /// Search for an adapter that is accurate enough and cheap enough, training as few as possible
    ///
    /// Candidates are measured on a part of the training pictures or texts; the test pictures are never read. Writes the adapter that was
    /// found, and the Pareto front of accuracy against seconds as tables and a plot. Can be interrupted and resumed.
    Search(learn::search::SearchArgs),
    /// Measure how often a trained adapter is right, in floating point or in the protocols' fixed point
    ///
    /// On the test part of the pictures, or on all of them where nothing tells training pictures from test pictures; on all texts.
    Evaluate(learn::evaluate::EvaluateArgs),
    /// Take over a LoRA that was trained with the PEFT library, so that it can be evaluated, planned and served
    ///
    /// Of a ViT or DeiT image classifier, on queries, keys or values. The pictures are needed to calibrate it.
    Import(import::ImportArgs),
    /// Say what a run will cost, before anything runs
    ///
    /// Exact rounds and bytes, by operation and by layer, memory, and estimated seconds on three networks with either comparison.
    Plan(planning::PlanArgs),
    /// Make the keys and certificates that three machines prove themselves with
    Keys(commands::KeysArgs),
    /// Deal randomness to sessions of `serve` and `classify` on other machines, one after the other
    ///
    /// Start this first, then `serve`. Sees no image, no adapter and no result. All three must be given the configuration of the
    /// same adapter; the client says how many images there are.
    Dealer(commands::DealerArgs),
    /// Serve a private adapter to clients on other machines, session after session
    ///
    /// Learns nothing of the images or of their labels. A client that fails or vanishes ends its own session only.
    Serve(commands::ServeArgs),
    /// Classify images or texts with an adapter that another machine serves, or texts with a tuned prompt
    ///
    /// The adapter's backbone runs here, in the clear; with a --prompt, texts (--text) go in shares to the two servers of
    /// `veiltune tune`. Only this machine learns the labels.
    Classify(commands::ClassifyArgs),
    /// Share a language model between two servers, so that others can tune prompts on it and nobody sees it
    ///
    /// Once: the servers keep their shares, encrypted. The assistant must run too.
    Share(tuning::commands::ShareArgs),
    /// Compute on shares of a language model and of texts, one of two servers
    Server(tuning::commands::ComputeArgs),
    /// Deal randomness to two servers; sees neither models nor texts
    Assistant(tuning::commands::ServerArgs),
    /// Tune a prompt for a language model that two servers have in shares, with texts that nobody else sees
    ///
    /// By forward passes alone (CMA-ES, black-box tuning). With --model and without --servers the same in the clear, for who has
    /// the model: to measure what a private run will reach. An interrupted run goes on when the same command is given again.
    Tune(tuning::tune::TuneArgs),
    /// Measure single operations of the protocols, or whole adapters
    #[command(subcommand)]
    Bench(Bench),
    /// Play one role of a run that another process has set up; ends when standard input does
    #[command(hide = true)]
    Role {
        /// Which role.
        role: roles::Role,
        /// Its configuration file.
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Time, traffic and error of each private operation, between two parties over TLS on loopback
    Ops(bench::ops::OpsArgs),
    /// Time, traffic and accuracy of an adapter's private part, on random weights of true shapes
    Adapter(bench::adapter::AdapterArgs),
    /// Time, traffic and error of a whole language model's forward pass, on random weights of true shapes
    Encoder(bench::encoder::EncoderArgs),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let mut environment = vec![KEEP_FREED_MEMORY];
    if matches!(
        command,
        Command::Train(_) | Command::Search(_) | Command::Evaluate(_)
    ) {
        environment.push(workers::UNSPLIT);
    }
    workers::restart_with(&environment);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A line that cannot be written would end the thread that has something to log.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();

    let (result, told) = match &command {
        Command::Demo(args) => (demo::run(args), false),
        Command::Deal(args) => (deal::run(args), false),
        Command::Train(args) => learn::told(learn::train::run(args)),
        Command::Search(args) => learn::told(learn::search::run(args)),
        Command::Evaluate(args) => learn::told(learn::evaluate::run(args)),
        Command::Import(args) => (import::run(args), false),
        Command::Plan(args) => (planning::run(args), false),
        Command::Keys(args) => (commands::keys(args), false),
        Command::Dealer(args) => (commands::dealer(args), false),
        Command::Serve(args) => (commands::serve(args), false),
        Command::Classify(args) => (commands::classify(args), false),
        Command::Share(args) => (tuning::commands::owner(args), false),
        Command::Server(args) => (tuning::commands::server(args), false),
        Command::Assistant(args) => (tuning::commands::assistant(args), false),
        Command::Tune(args) => (tuning::tune::run(args), false),
        Command::Bench(Bench::Ops(args)) => (bench::ops::run(args).map_err(Error::from), false),
        Command::Bench(Bench::Adapter(args)) => (bench::adapter::run(args), false),
        Command::Bench(Bench::Encoder(args)) => (bench::encoder::run(args), false),
        // A role tells the process that started it.
        Command::Role { role, config } => (roles::run(*role, config), true),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            if !told {
                progress::tell(&format!("veiltune: {e}"));
            }
            ExitCode::from(e.exit_code())
        }
    }
}
