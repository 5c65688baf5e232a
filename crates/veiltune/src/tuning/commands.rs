//! The other roles' commands: `share`, `server`, `assistant`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use veiltune_wire::Network;

use super::args::{AttentionArgs, CalibrationArgs, Servers};
use super::model;
use super::servers::{Role, Service, Station, serve, share};
use super::store::PublicModel;
use crate::progress::tell;
use crate::report::say;
use crate::{Error, Result};

/// What `veiltune share` takes.
#[derive(Args, Debug)]
pub struct ShareArgs {
    /// The language model: a folder with config.json, tokenizer and model.safetensors or a GGUF file, or a model of the hub
    #[arg(long, value_name = "DIR|NAME")]
    model: String,
    /// Its name at the servers [default: the folder's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    servers: Servers,
    #[command(flatten)]
    attention: AttentionArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Most tokens of a text, prompt and padding included
    #[arg(long, default_value_t = 128, value_name = "N")]
    tokens: usize,
}

/// What `veiltune server` and `veiltune assistant` take.
#[derive(Args, Debug)]
pub struct ServerArgs {
    /// This machine's folder of those that `veiltune keys --tuning` made
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// Address to accept calls at, HOST:PORT; port 0 lets the system choose
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// Folder for shares of models, which are encrypted
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// File with the key to the store, made if it is not there [default: store.key in the --keys folder]
    #[arg(long, value_name = "FILE")]
    store_key: Option<PathBuf>,
    /// End after so many runs [default: go on until interrupted]
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Network to emulate on every link: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US; the same on all machines
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// Longest time to wait for another machine to answer, seconds
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    wait: f64,
    /// Memory that a run may need, GiB; runs that need more are refused
    #[arg(long, default_value_t = 16.0, value_name = "GIB")]
    memory: f64,
    /// End when standard input does
    #[arg(long, hide = true)]
    with_parent: bool,
}

/// What a server takes besides.
#[derive(Args, Debug)]
pub struct ComputeArgs {
    /// Which of the two servers this is
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..2))]
    number: u8,
    /// Address of the assistant, HOST:PORT
    #[arg(long, value_name = "ADDR")]
    assistant: String,
    /// Address of server 0, HOST:PORT; for server 1
    #[arg(long, value_name = "ADDR", required_if_eq("number", "1"))]
    peer: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// A compute server.
pub fn server(args: &ComputeArgs) -> Result<()> {
    let role = if args.number == 0 {
        Role::Server0
    } else {
        Role::Server1
    };
    start(
        role,
        &args.server,
        Some(args.assistant.clone()),
        args.peer.clone(),
    )
}

/// The assistant.
pub fn assistant(args: &ServerArgs) -> Result<()> {
    start(Role::Assistant, args, None, None)
}

fn start(role: Role, args: &ServerArgs, assistant: Option<String>, peer: Option<String>) -> Result<()> {
    if args.with_parent {
        crate::roles::end_with_parent();
    }
    let wait = Duration::try_from_secs_f64(args.wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
    let station = Station::new(role, &args.keys, args.network, wait)?;
    let key = args
        .store_key
        .clone()
        .unwrap_or_else(|| args.keys.join("store.key"));
    let service = Service {
        listen: args.listen.clone(),
        assistant,
        peer,
        store: (args.store.clone(), key),
        runs: args.runs,
        memory: (args.memory * 2f64.powi(30)) as u64,
        stop: Arc::default(),
    };
    serve(&station, &service, &|address| {
        say(&format!("listening at {address}\n"));
    })
}

/// The model owner.
pub fn owner(args: &ShareArgs) -> Result<()> {
    let (addresses, station) = (args.servers.addresses()?, args.servers.station(Role::ModelOwner)?);
    let checkpoint = model::open(&args.model)?;
    tell("calibrating");
    let ready = args
        .calibration
        .ready(&checkpoint, args.attention.attention(), args.tokens)?;
    let name = args.name.clone().unwrap_or_else(|| {
        let path = Path::new(&args.model);
        path.file_name()
            .map_or_else(|| args.model.clone(), |n| n.to_string_lossy().into_owned())
    });
    let public = public(name, &ready, &checkpoint.tokenizer)?;
    public.check()?;
    let all = [
        (Role::Server0, addresses.servers[0].clone()),
        (Role::Server1, addresses.servers[1].clone()),
        (Role::Assistant, addresses.assistant),
    ];
    let mut told = std::time::Instant::now();
    let mut progress = |part: f64| {
        if told.elapsed() > Duration::from_secs(2) {
            told = std::time::Instant::now();
            tell(&format!("shared {:.0} %", 100.0 * part));
        }
    };
    share(
        &station,
        &public,
        &ready.weights,
        &ready.table,
        &all,
        &mut progress,
    )?;
    say(&format!("shared {} as {}\n", public.name, public.fingerprint));
    Ok(())
}

/// What servers and data owners may know of a model.
pub fn public(name: String, ready: &model::Ready, words: &veiltune_hub::Tokenizer) -> Result<PublicModel> {
    let mut number = [0; 32];
    getrandom::fill(&mut number).map_err(|e| Error::io("drawing a number")(std::io::Error::other(e)))?;
    Ok(PublicModel {
        name,
        fingerprint: crate::session::hex(&number),
        config: ready.config.clone(),
        deviation: ready.deviation,
        tokenizer: words.to_json()?,
        special: words.special(),
    })
}
