//! `veiltune deal`: the dealer's material as files, each of which a later run consumes exactly once.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use clap::Args;
use serde::{Deserialize, Serialize};
use veiltune_engine::material::{DealId, FileSink, Label, Sink};
use veiltune_engine::session::{Plan, deal};
use veiltune_engine::{Comparison, Error as EngineError};
use veiltune_hub::files;
use veiltune_nn::load::Served;
use veiltune_ring::prg::Seed;
use veiltune_wire::Network;

use crate::events::Stage;
use crate::inputs;
use crate::program::{Batches, CLIENT, Classification, Compare, PROVIDER};
use crate::progress::Progress;
use crate::report::say;
use crate::roles::Role;
use crate::{Error, Result};

/// What `veiltune deal` takes.
#[derive(Args, Debug)]
pub struct DealArgs {
    /// Directory to write client.material and provider.material to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of images that the material is for, exactly
    #[arg(long, value_name = "N")]
    images: NonZeroUsize,
    /// Images that share a forward pass, and so its rounds
    #[arg(long, default_value = "32", value_name = "N")]
    batch: NonZeroUsize,
    /// The adapter's public adapter_config.json, or the directory that it is in [default: the embedded one]
    #[arg(long, value_name = "DIR|FILE")]
    adapter: Option<PathBuf>,
    /// How the parties will compare numbers; auto takes what is sooner through the network
    #[arg(long, value_enum, default_value = "auto", value_name = "HOW")]
    comparison: Compare,
    /// Network that the comparison is chosen for: none, lan, wan, or RATE_MBIT:DELAY_US
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
}

/// Beside the material: what it is for. Whatever does not fit is refused before any material is consumed.
#[derive(Serialize, Deserialize)]
pub struct Manifest {
    #[serde(flatten)]
    batches: Batches,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    program: [u8; 32],
}

const MANIFEST: &str = "material.json";

impl Manifest {
    /// Of the material in `dir`.
    pub fn open(dir: &Path) -> Result<Manifest> {
        files::read_json(&dir.join(MANIFEST)).map_err(|e| {
            Error::Input(format!(
                "{e}; give --material a directory that `veiltune deal` wrote"
            ))
        })
    }

    /// Images a pass, if there is material for so many images.
    pub fn batch_for(&self, images: usize) -> Result<NonZeroUsize> {
        let made_for = self.batches.images;
        if made_for == images {
            return Ok(self.batches.batch);
        }
        Err(Error::Input(format!(
            "the material is for {made_for} images, not {images}; run `veiltune deal --images {images}`"
        )))
    }

    /// Refuses another program.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        if self.program == plan.program {
            return Ok(());
        }
        Err(Error::Input(
            "the material was dealt for another adapter; run `veiltune deal` with this --adapter".into(),
        ))
    }
}

/// Where `role`'s material is within a directory.
pub fn file(dir: &Path, role: Role) -> PathBuf {
    dir.join(format!("{}.material", role.name()))
}

/// Writes both parties' material.
pub fn run(args: &DealArgs) -> Result<()> {
    let progress = Progress::new(false);
    let batches = Batches {
        images: args.images.get(),
        batch: args.batch,
    };
    let served = Served::shapes(&inputs::adapter_config(args.adapter.as_deref())?.method);
    let mut program = Classification::public(&served, batches);
    program.comparison = args.comparison.over(&args.network, &program)?;
    let plan = program.plan()?;

    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    ctrlc::set_handler(move || flag.store(true, Relaxed)).map_err(|e| Error::Io {
        what: "catching interruptions".into(),
        source: std::io::Error::other(e),
    })?;

    // Material is secret.
    files::private_folder(&args.out)?;
    let seeds = [random()?, random()?];
    let mut paths = Vec::new();
    let deal_id = DealId::random()?;
    let mut sink = |role, party, seed: &Seed| -> Result<Box<dyn Sink>> {
        let path = file(&args.out, role);
        let sink = FileSink::create(
            &path,
            &Label {
                party,
                program: plan.program,
            },
            deal_id,
            seed,
        )?;
        paths.push(path);
        Ok(Box::new(sink))
    };
    let sinks = [
        sink(Role::Client, CLIENT, &seeds[0])?,
        sink(Role::Provider, PROVIDER, &seeds[1])?,
    ];
    deal(&program, batches.passes(), seeds, sinks, |passes| {
        progress.at(
            Stage::Offline,
            (passes * args.batch.get()).min(batches.images),
            batches.images,
        );
        if interrupted.load(Relaxed) {
            Err(EngineError::Stopped("an interruption"))
        } else {
            Ok(())
        }
    })
    .map_err(|e| {
        if interrupted.load(Relaxed) {
            Error::Interrupted
        } else {
            e.into()
        }
    })?;
    files::write_json(
        &args.out.join(MANIFEST),
        &Manifest {
            batches,
            comparison: program.comparison,
            program: plan.program,
        },
    )
    .map_err(|e| Error::Input(e.to_string()))?;
    for path in paths {
        say(&format!("{}\n", path.display()));
    }
    Ok(())
}

fn random() -> Result<Seed> {
    Ok(Seed::random().map_err(EngineError::from)?)
}
