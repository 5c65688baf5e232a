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
use veiltune_nn::load::{Backbone, Classifier};
use veiltune_wire::{Network, pki::Authority};

use crate::crew::Crew;
use crate::deal::{self, Manifest};
use crate::events::{Classified, Event, Measured, Stage};
use crate::inputs::{self, Pictures};
use crate::job::new_session;
use crate::program::{Batches, Classification, Compare, hidden_states};
use crate::progress::Progress;
use crate::report::{Private, Report};
use crate::roles::{ClientConfig, Config, DealerConfig, Material, ProviderConfig, Role};
use crate::{Error, Result};

/// What `veiltune demo` takes.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// PNG or JPEG files, or directories of them [default: twenty embedded pictures of Fashion-MNIST]
    ///
    /// A picture's true label is shown where it is known: from `labels.json` beside it (an object from file name to label), or
    /// from a name like `07_dress.png`.
    #[arg(long, num_args = 1.., value_name = "DIR|FILE")]
    images: Vec<PathBuf>,
    /// Network to emulate between client and provider: none, lan, wan, or RATE_MBIT:DELAY_US
    ///
    /// lan is 1 Gbit/s and 0.5 ms each way, wan 400 Mbit/s and 4 ms each way.
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// Directory of a public backbone: config.json and model.safetensors [default: the embedded one]
    #[arg(long, value_name = "DIR")]
    backbone: Option<PathBuf>,
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

/// Where the roles listen; the system chooses the port.
const LOOPBACK: &str = "127.0.0.1:0";

/// Runs it.
pub fn run(args: &DemoArgs) -> Result<()> {
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
    pub pictures: Pictures,
    /// What the run must cost, exactly.
    pub plan: Plan,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    /// How the pictures are divided into passes.
    pub batches: Batches,
    /// The number of each picture's true class, where it is known.
    pub truth: Vec<Option<usize>>,
    /// Public.
    pub backbone: Backbone,
    /// The provider's.
    pub classifier: Classifier,
}

impl Inputs {
    fn open(args: &DemoArgs) -> Result<Inputs> {
        let pictures = Pictures::find(&args.images)?;
        let backbone = inputs::backbone(args.backbone.as_deref())?;
        let classifier = inputs::classifier(args.adapter.as_deref())?;
        inputs::check_fit(&backbone, &classifier.config)?;
        let truth = pictures.true_classes(&classifier.config.labels)?;
        (0..pictures.len()).try_for_each(|i| pictures.load(i, &backbone).map(drop))?;
        let manifest = args.material.as_deref().map(Manifest::open).transpose()?;
        let batch = manifest
            .as_ref()
            .map_or(Ok(args.batch), |m| m.batch_for(pictures.len()))?;
        let batches = Batches {
            images: pictures.len(),
            batch: batch.min(NonZeroUsize::new(pictures.len()).unwrap_or(batch)),
        };
        let mut program = Classification::public(&classifier.config, batches);
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
            backbone,
            classifier,
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
        };
        crew.start(Role::Dealer, &setup.config(Role::Dealer, own)?)?;
        dealer = Some(crew.address(Role::Dealer, progress)?.to_string());
    }
    let own = ProviderConfig {
        listen: LOOPBACK.into(),
        weights: args.adapter.clone(),
        material: material(Role::Provider, &dealer),
    };
    crew.start(Role::Provider, &setup.config(Role::Provider, own)?)?;
    let own = ClientConfig {
        pictures: inputs.pictures.files().map(<[_]>::to_vec),
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
    let Inputs {
        pictures,
        backbone,
        classifier: Classifier { config, weights },
        ..
    } = inputs;
    let b = Plain::new();
    let vit = backbone.load(&b)?;
    let mut results = Vec::with_capacity(pictures.len());
    for i in 0..pictures.len() {
        crew.check()?;
        let pixels = pictures.load(i, backbone)?;
        let image = [hidden_states(backbone, &vit, &pixels, config.scope)?];
        let batches = Batches {
            images: 1,
            batch: NonZeroUsize::MIN,
        };
        let program = Classification {
            weights: Some(weights),
            images: Some(&image),
            ..Classification::public(config, batches)
        };
        let logits = program
            .forward(&b, &program.load(&b)?, 0)?
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
    session: [u8; 16],
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
        Ok(Setup {
            folder,
            session: new_session()?,
            args,
            inputs,
        })
    }

    /// Writes what `role` is told.
    fn config<R: Serialize>(&self, role: Role, own: R) -> Result<PathBuf> {
        let credentials = self.folder.path().join(role.name());
        let path = credentials.join("role.json");
        let config = Config {
            session: Some(self.session),
            credentials,
            network: self.args.network,
            wait: Self::WAIT,
            batches: self.inputs.batches,
            comparison: self.inputs.comparison,
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
