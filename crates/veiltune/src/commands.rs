//! The roles as commands of their own, each on its own machine: `keys`, `dealer`, `serve` and `classify`.
//!
//! `dealer` and `serve` are services; `classify` is one session of as many images as it is given. What all must have in common
//! (adapter, backbone, network) is compared before anything else is said.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use clap::Args;
use serde::Serialize;
use veiltune_engine::{Comparison, Error as EngineError};
use veiltune_hub::{AdapterConfig, files};
use veiltune_nn::Method;
use veiltune_nn::load::Served;
use veiltune_wire::pki::{Authority, Credentials, VALIDITY};
use veiltune_wire::{Error as WireError, Identity, Network};

use crate::deal::{self, Manifest};
use crate::events::{Classified, Event, Measured};
use crate::inputs::{self, Items};
use crate::prepare::Preparation;
use crate::program::{Batches, CLIENT, Compare};
use crate::progress::{Progress, tell as tell_user};
use crate::report::{Counts, Seconds, aligned, cost_heading, cost_table, grouped, print, say};
use crate::roles::{self, ClientConfig, Config, DealerConfig, Material, ProviderConfig, Role, Tell};
use crate::service::Limits;
use crate::session::{Open, Request};
use crate::tuning::classify::TextArgs;
use crate::{Error, Result};

/// What `veiltune keys` takes.
#[derive(Args, Debug)]
pub struct KeysArgs {
    /// New directory; gets one folder a role
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// For the five roles of prompt tuning, instead of the three of classification
    #[arg(long)]
    tuning: bool,
}

/// What the commands on all three machines take.
#[derive(Args, Debug)]
struct Machine {
    /// This machine's folder of those that `veiltune keys` made
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// Network to emulate on every link: none, lan, wan, or RATE_MBIT:DELAY_US; the same on all three machines
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// Longest time to wait for another machine to answer, seconds
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    wait: f64,
}

/// What the services take besides.
#[derive(Args, Debug)]
struct Service {
    /// Address to accept calls at, HOST:PORT; port 0 lets the system choose
    #[arg(long, value_name = "ADDR", value_parser = inputs::address)]
    listen: String,
    /// End after so many sessions, those that fail included [default: go on until interrupted]
    #[arg(long, value_name = "N")]
    sessions: Option<NonZeroUsize>,
    /// Most images of one session
    #[arg(long, default_value = "10000", value_name = "N")]
    max_images: NonZeroUsize,
    /// Most images that share a forward pass; memory grows with it
    #[arg(long, default_value = "64", value_name = "N")]
    max_batch: NonZeroUsize,
    /// Most sessions at the same time; further clients are told to come later
    #[arg(long, default_value = "2", value_name = "N")]
    parallel: NonZeroUsize,
}

impl Service {
    fn limits(&self) -> Limits {
        Limits {
            sessions: self.sessions,
            parallel: self.parallel,
            images: self.max_images,
            batch: self.max_batch,
        }
    }
}

/// Where a party has its randomness from.
#[derive(Args, Debug)]
#[group(multiple = false)]
struct From {
    /// Address of `veiltune dealer`, HOST:PORT
    #[arg(long, value_name = "ADDR", value_parser = inputs::address)]
    dealer: Option<String>,
    /// Directory with this machine's file of those that `veiltune deal` wrote, and for the client material.json; serves one session
    #[arg(long, value_name = "DIR")]
    material: Option<PathBuf>,
}

impl From {
    /// Refuses a call without either.
    fn given(&self) -> Result<&Self> {
        match (&self.dealer, &self.material) {
            (None, None) => Err(Error::Input(
                "give --dealer the dealer's address, or --material the folder of material".into(),
            )),
            _ => Ok(self),
        }
    }

    fn material(&self, role: Role) -> Material {
        match (&self.dealer, &self.material) {
            (_, Some(dir)) => Material::File(deal::file(dir, role)),
            (address, None) => Material::Dealer(address.clone().unwrap_or_default()),
        }
    }
}

/// What `veiltune dealer` takes.
#[derive(Args, Debug)]
pub struct DealerArgs {
    #[command(flatten)]
    service: Service,
    #[command(flatten)]
    machine: Machine,
    /// The adapter's public adapter_config.json, or the directory that it is in [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    adapter_config: Option<PathBuf>,
}

/// What `veiltune serve` takes.
#[derive(Args, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    service: Service,
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    from: From,
    /// Directory of the private adapter: adapter_config.json and adapter_model.safetensors [default: the embedded one]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The public backbone, a folder or a model of the hub; for methods that run it privately [default: the embedded one]
    #[arg(long, value_name = "DIR|MODEL")]
    backbone: Option<String>,
    /// Images in all that clients may have classified, for answers tell something of the adapter
    #[arg(long, value_name = "N")]
    budget: Option<NonZeroUsize>,
    /// File to keep the count of --budget in, so that it goes on where it was when the service is started again
    #[arg(long, value_name = "FILE", requires = "budget")]
    budget_file: Option<PathBuf>,
}

/// What `veiltune classify` takes.
#[derive(Args, Debug)]
pub struct ClassifyArgs {
    /// PNG or JPEG files, or directories of them
    #[arg(
        required_unless_present = "text",
        conflicts_with = "text",
        value_name = "IMAGE"
    )]
    images: Vec<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    machine: Machine,
    /// Address of `veiltune serve`, HOST:PORT
    #[arg(long, value_name = "ADDR", value_parser = inputs::address, required_unless_present = "text")]
    provider: Option<String>,
    #[command(flatten)]
    from: From,
    /// Images or texts that share a forward pass, and so its rounds [default: 32; with a --prompt 512]
    #[arg(long, value_name = "N", conflicts_with = "material")]
    batch: Option<NonZeroUsize>,
    /// How client and provider compare numbers
    ///
    /// auto takes what is sooner through the --network. A network that is real rather than emulated is not known here:
    /// `veiltune plan --network` tells what to give for it.
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        value_name = "HOW",
        conflicts_with = "material"
    )]
    comparison: Compare,
    /// Leave out images that cannot be read, and say how many, instead of ending
    #[arg(long, conflicts_with = "text")]
    skip_unreadable: bool,
    /// The public backbone: a folder with config.json and model.safetensors, or a model of the hub [default: the embedded one, which
    /// sees pictures]
    #[arg(long, value_name = "DIR|MODEL")]
    backbone: Option<String>,
    /// The adapter's public adapter_config.json, or the directory that it is in [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    adapter_config: Option<PathBuf>,
    /// Print one JSON object to standard output instead of the table
    ///
    /// Its members: images (or texts), skipped, cut (texts that do not fit), batch, network, comparison, rounds, online_bytes [client to provider, provider to client],
    /// setup_bytes (likewise), dealer_bytes (to the client), seconds {backbone, setup, offline, online}, predicted {rounds,
    /// online_bytes, setup_bytes, dealer_bytes}, results [{image (or the text's line), label, confidence}, one an image].
    #[arg(long)]
    json: bool,
}

/// Makes one authority, and a folder of credentials for each role. The authority's key is never written.
pub fn keys(args: &KeysArgs) -> Result<()> {
    use crate::tuning::servers::Role as Tuning;
    let roles: Vec<(&str, Identity, &str)> = match args.tuning {
        false => [
            (Role::Client, "classify"),
            (Role::Provider, "serve"),
            (Role::Dealer, "dealer"),
        ]
        .map(|(role, command)| (role.name(), role.identity(), command))
        .to_vec(),
        true => Tuning::ALL
            .into_iter()
            .zip([
                "share",
                "server --number 0",
                "server --number 1",
                "assistant",
                "tune",
            ])
            .map(|(role, command)| (role.name(), role.identity(), command))
            .collect(),
    };
    if let Some(taken) = roles
        .iter()
        .map(|r| args.out.join(r.0))
        .find(|path| path.exists())
    {
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
    for (name, identity, command) in roles {
        let folder = args.out.join(name);
        files::private_folder(&folder)?;
        authority.issue(&identity)?.save(&folder)?;
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
    let own = DealerConfig {
        listen: args.service.listen.clone(),
        limits: args.service.limits(),
    };
    let adapter = inputs::adapter_config(args.adapter_config.as_deref())?;
    let config = args.machine.config(adapter, own);
    play(Role::Dealer, &config, roles::dealer, &|event| match event {
        Event::Progress { done, total, .. } if done == total => say(&format!("dealt for {total} images\n")),
        event => announce(&event),
    })
}

/// The provider's machine.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let mut limits = args.service.limits();
    if args.from.material.is_some() {
        // There is no more than that.
        limits.sessions = Some(NonZeroUsize::MIN);
    }
    let own = ProviderConfig {
        listen: args.service.listen.clone(),
        weights: args.adapter.clone(),
        backbone: args.backbone.clone(),
        material: args.from.given()?.material(Role::Provider),
        limits,
        budget: args.budget,
        budget_file: args.budget_file.clone(),
    };
    let adapter = inputs::classifier(args.adapter.as_deref())?.config;
    let config = args.machine.config(adapter, own);
    play(Role::Provider, &config, roles::provider, &|event| match event {
        Event::Finished(m) => say(&format!(
            "served {} images in {:.3} s online: {} rounds, {} bytes from and {} bytes to the client\n",
            m.images,
            m.online,
            m.rounds,
            grouped(m.online_bytes[0]),
            grouped(m.online_bytes[1])
        )),
        event => announce(&event),
    })
}

/// Images that share a pass, unless something else is asked for.
const BATCH: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");
/// Texts that share a run with a prompt, unless something else is asked for: each run opens the model's weights.
const TEXTS: usize = 512;

/// The client's machine.
pub fn classify(args: &ClassifyArgs) -> Result<()> {
    if args.text.prompt.is_some() {
        let Machine { keys, network, wait } = &args.machine;
        let batch = args.batch.map_or(TEXTS, NonZeroUsize::get);
        return crate::tuning::classify::run(&args.text, keys, *network, *wait, batch, args.json);
    }
    let Some(provider) = &args.provider else {
        return Err(Error::Input(
            "texts are classified with an adapter or with a prompt; give --provider the address of `veiltune serve`, or --prompt \
             the folder that `veiltune tune` wrote"
                .into(),
        ));
    };
    let from = args.from.given()?;
    let progress = Progress::new(args.json);
    let adapter = inputs::adapter_config(args.adapter_config.as_deref())?;
    let found = Items::find(&args.images, args.text.text.as_deref(), adapter.text)?;
    let preparation = Preparation::new(&adapter, args.backbone.as_deref())?;
    let all = found.len();
    let pictures = found.check(&preparation, args.skip_unreadable, |e| {
        progress.log(&format!("skipped: {e}"))
    })?;
    let cut = pictures.cut(&preparation);
    drop(preparation);
    let skipped = all - pictures.len();
    let images = NonZeroUsize::new(pictures.len())
        .ok_or_else(|| Error::Input(format!("there are no images, and {skipped} that cannot be read")))?;
    let served = Served::shapes(&adapter.method);
    let manifest = from.material.as_deref().map(Manifest::open).transpose()?;
    let batch = match &manifest {
        Some(manifest) => manifest.batch_for(images.get())?,
        None => args.batch.unwrap_or(BATCH).min(images),
    };
    let mut request = Request {
        batches: Batches {
            images: images.get(),
            batch,
        },
        comparison: Comparison::default(),
    };
    request.comparison = match &manifest {
        Some(manifest) => manifest.comparison,
        None => args
            .comparison
            .over(&args.machine.network, &request.program(&served))?,
    };
    let plan = request.program(&served).plan()?;
    manifest.map_or(Ok(()), |manifest| manifest.check(&plan))?;
    let own = ClientConfig {
        pictures: pictures.files().map(<[_]>::to_vec),
        texts: args.text.text.clone(),
        batch,
        comparison: request.comparison,
        backbone: args.backbone.clone(),
        provider: provider.clone(),
        material: from.material(Role::Client),
    };
    let config = args.machine.config(adapter, own);

    let (results, measured) = (Mutex::new(Vec::new()), Mutex::new(None));
    play(Role::Client, &config, roles::client, &|event| match event {
        Event::Classified(result) => results
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(result),
        Event::Finished(m) => *measured.lock().unwrap_or_else(PoisonError::into_inner) = Some(m),
        Event::Progress { stage, done, total } => progress.at(stage, done, total),
        _ => {}
    })?;
    let results: Vec<Classified> = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let measured: Measured = match measured.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(measured) if results.len() == images.get() => measured,
        _ => return Err(Error::Mismatch("the session ended without its result".into())),
    };

    let label = |class: usize| {
        config
            .adapter
            .method
            .labels()
            .get(class)
            .cloned()
            .unwrap_or_default()
    };
    let row = |r: &Classified| Row {
        name: pictures.name(r.index),
        label: label(r.class),
        confidence: r.confidence,
    };
    let answer = Answer {
        texts: args.text.text.is_some(),
        images: images.get(),
        skipped,
        cut,
        batch: batch.get(),
        network: config.network,
        comparison: request.comparison,
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
    /// Whether they are texts.
    #[serde(skip)]
    texts: bool,
    images: usize,
    /// Images that could not be read.
    skipped: usize,
    /// Texts that do not fit.
    cut: usize,
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
    #[serde(rename = "image")]
    name: String,
    label: String,
    confidence: f64,
}

impl Answer {
    fn table(&self) -> String {
        let (one, several) = match self.texts {
            true => ("text", "texts"),
            false => ("image", "images"),
        };
        let mut rows = vec![[one, "label", "confidence"].map(String::from)];
        rows.extend(self.results.iter().map(|r| {
            [
                r.name.clone(),
                r.label.clone(),
                format!("{:.1} %", 100.0 * r.confidence),
            ]
        }));
        let mut text = aligned(&rows, &[2]);
        if self.skipped > 0 {
            text += &format!("{} {several} could not be read, and were skipped\n", self.skipped);
        }
        if self.cut > 0 {
            text += &format!("{} texts are longer than the adapter's and were cut\n", self.cut);
        }
        text += &cost_heading(self.images, self.batch, &self.network, self.comparison);
        text += &cost_table(
            &self.counted,
            &self.predicted,
            &[("dealer bytes, to client", |c| c.dealer_bytes)],
        );
        text + &self.seconds.line()
    }
}

impl Machine {
    /// What a role is told.
    fn config<R>(&self, adapter: AdapterConfig<Method>, own: R) -> Config<R> {
        Config {
            credentials: self.keys.clone(),
            network: self.network,
            wait: self.wait,
            adapter,
            own,
        }
    }
}

/// Plays `role`, as the commands do that people start themselves.
fn play<R>(
    role: Role,
    config: &Config<R>,
    work: fn(&Config<R>, Tell, &Open) -> Result<()>,
    tell: Tell,
) -> Result<()> {
    Credentials::load(&config.credentials, &role.identity()).map_err(|e| {
        let role = role.name();
        Error::Input(format!(
            "{e}; give --keys the {role} folder that `veiltune keys` made"
        ))
    })?;
    // Nothing is left behind, and the others are told.
    let open = Open::default();
    let links = open.clone();
    ctrlc::set_handler(move || {
        tell_user("veiltune: interrupted");
        links.abort("it was interrupted");
        std::process::exit(130);
    })
    .map_err(|e| Error::io("catching interruptions")(std::io::Error::other(e)))?;
    work(config, tell, &open).map_err(|e| match &e {
        Error::Wire(
            WireError::ProgramMismatch { .. } | WireError::ConfigurationMismatch { .. },
        )
        | Error::Engine(EngineError::Wire(WireError::ProgramMismatch { .. })) => Error::Input(format!(
            "{e}; give all three the adapter_config.json of one adapter and the same --network, and client and provider \
             the same backbone, and both --dealer or both --material"
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
