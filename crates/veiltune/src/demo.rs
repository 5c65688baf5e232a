//! `veiltune demo`: starts the roles as processes of their own, and compares what the client learned with plain float.
//!
//! This process plays no part in the protocol. It stands where the user would: it sees the pictures, the adapter and the
//! result only to show them side by side.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use tempfile::TempDir;
use veiltune_engine::session::{Plan, Program};
use veiltune_engine::{Comparison, Error as EngineError, Plain};
use veiltune_hub::files;
use veiltune_nn::load::{Classifier, Served};
use veiltune_wire::{Network, pki::Authority};

use crate::crew::Crew;
use crate::deal::{self, Manifest};
use crate::events::{Classified, Event, Measured, Stage};
use crate::inputs::{self, Items};
use crate::prepare::Preparation;
use crate::program::{Batches, Classification, Compare};
use crate::progress::Progress;
use crate::report::{Private, Report};
use crate::roles::{ClientConfig, Config, DealerConfig, Material, ProviderConfig, Role};
use crate::service::Limits;
use crate::session::check_backbone;
use crate::{Error, Result};

/// What `veiltune demo` takes.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    #[command(subcommand)]
    other: Option<Other>,
    /// PNG or JPEG files, or directories of them [default: twenty embedded pictures of Fashion-MNIST]
    ///
    /// A picture's true label is shown where it is known: from `labels.json` beside it (an object from file name to label), or
    /// from a name like `07_dress.png`.
    #[arg(long, num_args = 1.., value_name = "DIR|FILE", conflicts_with = "text")]
    images: Vec<PathBuf>,
    /// Texts instead, one a line (pairs with a tab between), for an --adapter and a --backbone that read them
    #[arg(long, value_name = "FILE", requires_all = ["adapter", "backbone"])]
    text: Option<PathBuf>,
    /// Network to emulate on every link: none, lan, wan, or RATE_MBIT:DELAY_US
    ///
    /// lan is 1 Gbit/s and 0.5 ms each way, wan 400 Mbit/s and 4 ms each way.
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// A public backbone: a folder with config.json and model.safetensors, or a model of the hub [default: the embedded one]
    #[arg(long, value_name = "DIR|MODEL")]
    backbone: Option<String>,
    /// Directory of a private adapter: adapter_config.json and adapter_model.safetensors [default: the embedded one]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Images that share a forward pass, and so its rounds
    #[arg(long, default_value = "32", value_name = "N", conflicts_with = "material")]
    batch: NonZeroUsize,
    /// How the parties compare numbers; auto takes what is sooner through the network
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        value_name = "HOW",
        conflicts_with = "material"
    )]
    comparison: Compare,
    /// Use the material that `veiltune deal` wrote to this directory; no dealer runs. It serves exactly once
    #[arg(long, value_name = "DIR")]
    material: Option<PathBuf>,
    /// Print one JSON object to standard output instead of the table
    ///
    /// Its members: images, agree, max_logit_error, comparison, rounds, online_bytes [client to provider, provider to client],
    /// setup_bytes (likewise), dealer_bytes [to client, to provider], seconds {backbone, setup, offline, online}, predicted
    /// {rounds, online_bytes, setup_bytes, dealer_bytes}, results [one an image], and what is known besides.
    #[arg(long)]
    json: bool,
}

/// The demonstration of the other job.
#[derive(clap::Subcommand, Debug)]
enum Other {
    /// Tune a prompt for a small embedded language model with five processes on this machine
    Tune(crate::tuning::demo::DemoTuneArgs),
}

/// Where the roles listen; the system chooses the port.
const LOOPBACK: &str = "127.0.0.1:0";

/// Runs it.
pub fn run(args: &DemoArgs) -> Result<()> {
    if let Some(Other::Tune(args)) = &args.other {
        return crate::tuning::demo::run(args);
    }
    let progress = Progress::new(args.json);
    // What is wrong with the input is found before any process is started.
    let inputs = Inputs::open(args)?;
    let mut crew = Crew::new()?;
    let private = run_privately(args, &inputs, &mut crew, &progress)?;
    let plain = run_plainly(&inputs, &crew, &progress)?;
    let report = Report::new(&inputs, args.network, &private, &plain)?;
    report.print(args.json)?;
    report.check()
}

/// What the command works on.
pub struct Inputs {
    /// The client's.
    pub pictures: Items,
    /// What the run must cost, exactly.
    pub plan: Plan,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    /// How the pictures are divided into passes.
    pub batches: Batches,
    /// The number of each picture's true class, where it is known.
    pub truth: Vec<Option<usize>>,
    /// How the client prepares them.
    pub preparation: Preparation,
    /// The provider's, as it was trained.
    pub classifier: Classifier,
    /// The provider's, as it is served.
    pub served: Served,
}

impl Inputs {
    fn open(args: &DemoArgs) -> Result<Inputs> {
        let backbone = args.backbone.as_deref();
        let classifier = inputs::classifier(args.adapter.as_deref())?;
        let pictures = Items::find(&args.images, args.text.as_deref(), classifier.config.text)?;
        let preparation = Preparation::new(&classifier.config, backbone)?;
        check_backbone(
            &classifier.config,
            Some(preparation.source()),
            backbone.unwrap_or("the embedded one"),
        )?;
        let served = classifier
            .serve(preparation.backbone())
            .map_err(|e| inputs::bad_weights(e, args.adapter.as_deref(), "--adapter"))?;
        let truth = pictures.true_classes(classifier.config.method.labels())?;
        let pictures = pictures.check(&preparation, false, drop)?;
        let manifest = args.material.as_deref().map(Manifest::open).transpose()?;
        let batch = manifest
            .as_ref()
            .map_or(Ok(args.batch), |m| m.batch_for(pictures.len()))?;
        let batches = Batches {
            images: pictures.len(),
            batch: batch.min(NonZeroUsize::new(pictures.len()).unwrap_or(batch)),
        };
        let mut program = Classification::public(&served, batches);
        program.comparison = match &manifest {
            Some(manifest) => manifest.comparison,
            None => args.comparison.over(&args.network, &program)?,
        };
        let (plan, comparison) = (program.plan()?, program.comparison);
        manifest.map_or(Ok(()), |m| m.check(&plan))?;
        Ok(Inputs {
            plan,
            comparison,
            pictures,
            batches,
            truth,
            preparation,
            classifier,
            served,
        })
    }
}

/// The roles, each a process; what client and provider measured, and what the client learned.
fn run_privately(args: &DemoArgs, inputs: &Inputs, crew: &mut Crew, progress: &Progress) -> Result<Private> {
    let setup = Setup::new(args, inputs)?;
    let (mut results, mut client, mut provider) = (vec![None; inputs.pictures.len()], None, None);
    let material = |role, dealer: &Option<String>| match (&args.material, dealer) {
        (None, Some(address)) => Material::Dealer(address.clone()),
        (dir, _) => Material::File(deal::file(dir.as_deref().unwrap_or(Path::new(".")), role)),
    };

    let mut dealer = None;
    if args.material.is_none() {
        let own = DealerConfig {
            listen: LOOPBACK.into(),
            limits: Limits::ONE,
        };
        crew.start(Role::Dealer, &setup.config(Role::Dealer, own)?)?;
        dealer = Some(crew.address(Role::Dealer, progress)?.to_string());
    }
    let own = ProviderConfig {
        listen: LOOPBACK.into(),
        weights: args.adapter.clone(),
        backbone: args.backbone.clone(),
        material: material(Role::Provider, &dealer),
        limits: Limits::ONE,
        budget: None,
        budget_file: None,
    };
    crew.start(Role::Provider, &setup.config(Role::Provider, own)?)?;
    let own = ClientConfig {
        pictures: inputs.pictures.files().map(<[_]>::to_vec),
        texts: args.text.clone(),
        batch: inputs.batches.batch,
        comparison: inputs.comparison,
        backbone: args.backbone.clone(),
        provider: crew.address(Role::Provider, progress)?.to_string(),
        material: material(Role::Client, &dealer),
    };
    crew.start(Role::Client, &setup.config(Role::Client, own)?)?;

    crew.listen(progress, |role, event| {
        match event {
            Event::Classified(result) => {
                let place = results.get_mut(result.index);
                place.into_iter().for_each(|place| *place = Some(result.clone()));
            }
            Event::Finished(measured) if role == Role::Client => client = Some(measured),
            Event::Finished(measured) => provider = Some(measured),
            _ => {}
        }
        false
    })?;
    let lost = || Error::Mismatch("a role ended without its result".into());
    let results = results
        .into_iter()
        .collect::<Option<Vec<Classified>>>()
        .ok_or_else(lost)?;
    let measured: [Measured; 2] = [client.ok_or_else(lost)?, provider.ok_or_else(lost)?];
    Ok(Private { results, measured })
}

/// The logits of the same forward pass in plain float.
fn run_plainly(inputs: &Inputs, crew: &Crew, progress: &Progress) -> Result<Vec<Classified>> {
    let pictures = &inputs.pictures;
    let b = Plain::new();
    let preparer = inputs.preparation.load()?;
    let program = Classification::public(&inputs.served, Batches::ONE);
    let model = program.load(&b)?;
    let mut results = Vec::with_capacity(pictures.len());
    for i in 0..pictures.len() {
        crew.check()?;
        let image = vec![preparer.inputs(&pictures.load(i, &inputs.preparation)?)?];
        let program = Classification {
            images: Some(&image),
            ..program
        };
        let logits = program
            .forward(&b, &model, 0)?
            .map_or_else(Vec::new, |r| r.values);
        let result = Classified::new(i, logits);
        results.push(result.ok_or_else(|| EngineError::program("head", "the adapter has no classes"))?);
        progress.at(Stage::Reference, i + 1, pictures.len());
    }
    Ok(results)
}

/// The files of a run: each role's certificates and configuration, in a directory that only this user can read and that is
/// gone when the run is.
struct Setup<'a> {
    folder: TempDir,
    args: &'a DemoArgs,
    inputs: &'a Inputs,
}

impl<'a> Setup<'a> {
    /// The longest that a role waits for the others; the client comes last, after the backbone.
    const WAIT: f64 = 3600.0;

    fn new(args: &'a DemoArgs, inputs: &'a Inputs) -> Result<Setup<'a>> {
        let folder = tempfile::Builder::new().prefix("veiltune-").tempdir();
        let folder = folder.map_err(Error::io("making a temporary directory"))?;
        let authority = Authority::new()?;
        for role in [Role::Client, Role::Provider, Role::Dealer] {
            authority
                .issue(&role.identity())?
                .save(folder.path().join(role.name()))?;
        }
        Ok(Setup { folder, args, inputs })
    }

    /// Writes what `role` is told.
    fn config<R: Serialize>(&self, role: Role, own: R) -> Result<PathBuf> {
        let credentials = self.folder.path().join(role.name());
        let path = credentials.join("role.json");
        let config = Config {
            credentials,
            network: self.args.network,
            wait: Self::WAIT,
            adapter: self.inputs.classifier.config.clone(),
            own,
        };
        files::write_json(&path, &config).map_err(|e| Error::Io {
            what: "writing a role's configuration".into(),
            source: std::io::Error::other(e),
        })?;
        Ok(path)
    }
}
