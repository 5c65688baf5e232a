//! The roles as commands of their own, each on its own machine: `keys`, `dealer`, `serve` and `classify`.
//!
//! Each command runs one role for one session. What the session is (number of images, images a pass, network, comparison,
//! adapter) is configured on every machine, and compared before anything else is said.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use veiltune_engine::{Comparison, Error as EngineError};
use veiltune_nn::OwcConfig;
use veiltune_wire::pki::{Authority, Credentials, VALIDITY};
use veiltune_wire::{Error as WireError, Network};

use crate::deal::private_directory;
use crate::events::{Classified, Event, Measured};
use crate::inputs::{self, Pictures};
use crate::program::{Batches, CLIENT, Classification, Compare};
use crate::progress::Progress;
use crate::report::{Counts, Seconds, aligned, cost_heading, cost_table, grouped, print};
use crate::roles::{self, ClientConfig, Config, DealerConfig, Material, ProviderConfig, Role, Tell};
use crate::{Error, Result};

/// What `veiltune keys` takes.
#[derive(Args, Debug)]
pub struct KeysArgs {
    /// New directory; gets one folder a role
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// What the commands on all three machines take.
#[derive(Args, Debug)]
struct Session {
    /// This machine's folder of those that `veiltune keys` made
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// Images that share a forward pass, and so its rounds; the same on all three machines
    #[arg(long, default_value = "32", value_name = "N")]
    batch: NonZeroUsize,
    /// Network to emulate between client and provider: none, lan, wan, or RATE_MBIT:DELAY_US; the same on all three machines
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// How client and provider compare numbers; the same on all three machines
    ///
    /// auto takes what is sooner through the --network. A network that is real rather than emulated is not known here:
    /// `veiltune plan --network` tells what to give for it.
    #[arg(long, value_enum, default_value = "auto", value_name = "HOW")]
    comparison: Compare,
}

/// What the commands that are called take besides.
#[derive(Args, Debug)]
struct Called {
    /// Address to accept calls at, HOST:PORT; port 0 lets the system choose
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// Number of images that the client will classify, exactly
    #[arg(long, value_name = "N")]
    images: NonZeroUsize,
    /// Longest time to wait for the others to call, seconds
    #[arg(long, default_value_t = WAIT, value_name = "SECONDS")]
    wait: f64,
}

/// An hour.
const WAIT: f64 = 3600.0;

/// What `veiltune dealer` takes.
#[derive(Args, Debug)]
pub struct DealerArgs {
    #[command(flatten)]
    called: Called,
    #[command(flatten)]
    session: Session,
    /// The adapter's public adapter_config.json [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    adapter_config: Option<PathBuf>,
}

/// What `veiltune serve` takes.
#[derive(Args, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    called: Called,
    #[command(flatten)]
    session: Session,
    /// Address of `veiltune dealer`, HOST:PORT
    #[arg(long, value_name = "ADDR")]
    dealer: String,
    /// Directory of the private adapter: adapter_config.json and adapter_model.safetensors [default: the embedded one]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
}

/// What `veiltune classify` takes.
#[derive(Args, Debug)]
pub struct ClassifyArgs {
    /// PNG or JPEG files, or directories of them
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    session: Session,
    /// Address of `veiltune serve`, HOST:PORT
    #[arg(long, value_name = "ADDR")]
    provider: String,
    /// Address of `veiltune dealer`, HOST:PORT
    #[arg(long, value_name = "ADDR")]
    dealer: String,
    /// Directory of the public backbone: config.json and model.safetensors [default: the embedded one]
    #[arg(long, value_name = "DIR")]
    backbone: Option<PathBuf>,
    /// The adapter's public adapter_config.json [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    adapter_config: Option<PathBuf>,
    /// Print one JSON object to standard output instead of the table
    ///
    /// Its members: images, batch, network, comparison, rounds, online_bytes [client to provider, provider to client], setup_bytes
    /// (likewise), dealer_bytes (to the client), seconds {backbone, setup, offline, online}, predicted {rounds, online_bytes,
    /// setup_bytes, dealer_bytes}, results [{image, label, confidence}, one an image].
    #[arg(long)]
    json: bool,
}

/// Makes one authority, and a folder of credentials for each role. The authority's key is never written.
pub fn keys(args: &KeysArgs) -> Result<()> {
    let roles = [Role::Client, Role::Provider, Role::Dealer];
    let folder = |role: Role| args.out.join(role.name());
    if let Some(taken) = roles.map(folder).iter().find(|path| path.exists()) {
        return Err(Error::Input(format!(
            "{} exists; give --out a new directory, for keys are never overwritten",
            taken.display()
        )));
    }
    let authority = Authority::new()?;
    let mut text = format!(
        "keys of one authority, valid for {} days:\n",
        VALIDITY.as_secs() / 86_400
    );
    for (role, command) in roles.into_iter().zip(["classify", "serve", "dealer"]) {
        let folder = folder(role);
        private_directory(&folder).map_err(Error::io(format!("making {}", folder.display())))?;
        authority.issue(&role.identity())?.save(&folder)?;
        text += &format!(
            "{}: to the machine that runs `veiltune {command}`\n",
            folder.display()
        );
    }
    text += "Each .key file is that machine's alone: copy each folder to its machine by a way you trust, then delete it here.\n";
    say(&text);
    Ok(())
}

/// The dealer's machine.
pub fn dealer(args: &DealerArgs) -> Result<()> {
    let adapter = inputs::adapter_config(args.adapter_config.as_deref())?;
    let own = DealerConfig {
        listen: args.called.listen.clone(),
    };
    let config = args.session.called(&args.called, adapter, own)?;
    play(Role::Dealer, &config, roles::dealer, &|event| match event {
        Event::Progress { done, total, .. } if done == total => say(&format!("dealt for {total} images\n")),
        event => announce(&event),
    })
}

/// The provider's machine.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let adapter = inputs::classifier(args.adapter.as_deref())?.config;
    let own = ProviderConfig {
        listen: args.called.listen.clone(),
        weights: args.adapter.clone(),
        material: Material::Dealer(args.dealer.clone()),
    };
    let config = args.session.called(&args.called, adapter, own)?;
    play(Role::Provider, &config, roles::provider, &|event| match event {
        Event::Finished(m) => say(&format!(
            "served {} images in {:.3} s online: {} rounds, {} bytes from and {} bytes to the client\n",
            args.called.images,
            m.online,
            m.rounds,
            grouped(m.online_bytes[0]),
            grouped(m.online_bytes[1])
        )),
        event => announce(&event),
    })
}

/// The client's machine.
pub fn classify(args: &ClassifyArgs) -> Result<()> {
    let pictures = Pictures::find(&args.images)?;
    let images =
        NonZeroUsize::new(pictures.len()).ok_or_else(|| Error::Input("there are no images".into()))?;
    let adapter = inputs::adapter_config(args.adapter_config.as_deref())?;
    let own = ClientConfig {
        pictures: pictures.files().map(<[_]>::to_vec),
        backbone: args.backbone.clone(),
        provider: args.provider.clone(),
        material: Material::Dealer(args.dealer.clone()),
    };
    let config = args.session.config(images, WAIT, adapter, own)?;
    let plan = config.program().plan()?;

    let progress = Progress::new(args.json);
    let (results, measured) = (RefCell::new(Vec::new()), Cell::new(None));
    play(Role::Client, &config, roles::client, &|event| match event {
        Event::Classified(result) => results.borrow_mut().push(result),
        Event::Finished(m) => measured.set(Some(m)),
        Event::Progress { stage, done, total } => progress.at(stage, done, total),
        _ => {}
    })?;
    let results: Vec<Classified> = results.into_inner();
    let measured: Measured = match measured.into_inner() {
        Some(measured) if results.len() == images.get() => measured,
        _ => return Err(Error::Mismatch("the session ended without its result".into())),
    };

    let label = |class: usize| config.adapter.labels.get(class).cloned().unwrap_or_default();
    let row = |r: &Classified| Row {
        image: pictures.name(r.index),
        label: label(r.class),
        confidence: r.confidence,
    };
    let answer = Answer {
        images: images.get(),
        batch: config.batches.batch.get(),
        network: config.network,
        comparison: config.comparison,
        counted: Counts::counted(&measured, measured.dealer_bytes),
        seconds: Seconds::new(&measured),
        predicted: Counts::predicted(&plan, |both| both[CLIENT.index()]),
        results: results.iter().map(row).collect(),
    };
    print(args.json, &answer, || answer.table())?;
    answer.predicted.check("client", &answer.counted)
}

/// What the client's user gets.
#[derive(Serialize)]
struct Answer {
    images: usize,
    batch: usize,
    network: Network,
    comparison: Comparison,
    #[serde(flatten)]
    counted: Counts<u64>,
    seconds: Seconds,
    predicted: Counts<u64>,
    results: Vec<Row>,
}

/// One image.
#[derive(Serialize)]
struct Row {
    image: String,
    label: String,
    confidence: f64,
}

impl Answer {
    fn table(&self) -> String {
        let mut rows = vec![["image", "label", "confidence"].map(String::from)];
        rows.extend(self.results.iter().map(|r| {
            [
                r.image.clone(),
                r.label.clone(),
                format!("{:.1} %", 100.0 * r.confidence),
            ]
        }));
        let mut text = aligned(&rows, &[2]);
        text += &cost_heading(self.images, self.batch, &self.network, self.comparison);
        text += &cost_table(
            &self.counted,
            &self.predicted,
            &[("dealer bytes, to client", |c| c.dealer_bytes)],
        );
        text + &self.seconds.line()
    }
}

impl Session {
    /// What a role that is called is told.
    fn called<R>(&self, called: &Called, adapter: OwcConfig, own: R) -> Result<Config<R>> {
        self.config(called.images, called.wait, adapter, own)
    }

    /// What a role is told.
    fn config<R>(&self, images: NonZeroUsize, wait: f64, adapter: OwcConfig, own: R) -> Result<Config<R>> {
        let batches = Batches {
            images: images.get(),
            batch: self.batch.min(images),
        };
        let public = Classification::public(&adapter, batches);
        let comparison = self.comparison.over(&self.network, &public)?;
        Ok(Config {
            session: None,
            credentials: self.keys.clone(),
            network: self.network,
            wait,
            batches,
            comparison,
            adapter,
            own,
        })
    }
}

/// Plays `role`, as the commands do that people start themselves.
fn play<R>(
    role: Role,
    config: &Config<R>,
    work: fn(&Config<R>, Tell) -> Result<()>,
    tell: Tell,
) -> Result<()> {
    Credentials::load(&config.credentials, &role.identity()).map_err(|e| {
        let role = role.name();
        Error::Input(format!(
            "{e}; give --keys the {role} folder that `veiltune keys` made"
        ))
    })?;
    // Nothing is left behind, and the others see the links break.
    ctrlc::set_handler(|| {
        eprintln!("veiltune: interrupted");
        std::process::exit(130);
    })
    .map_err(|e| Error::io("catching interruptions")(std::io::Error::other(e)))?;
    work(config, tell).map_err(|e| match &e {
        Error::Wire(WireError::ProgramMismatch { .. })
        | Error::Engine(EngineError::Wire(WireError::ProgramMismatch { .. })) => Error::Input(format!(
            "{e}; give all three the configuration of one adapter and the same number of images, --batch, --network and \
             --comparison"
        )),
        _ => e,
    })
}

/// Where a role that is called can be called.
fn announce(event: &Event) {
    if let Event::Listening { address } = event {
        say(&format!("listening at {address}\n"));
    }
}

/// To standard output; that nobody reads it is no reason to end a session.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
