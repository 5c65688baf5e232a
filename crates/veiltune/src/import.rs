//! `veiltune import`: a LoRA of the PEFT library becomes one that can be evaluated, planned and served.

use std::path::PathBuf;

use clap::Args;
use veiltune_engine::Plain;
use veiltune_engine::plain::Site;
use veiltune_engine::session::Program;
use veiltune_nn::load::Classifier;
use veiltune_nn::peft;

use crate::events::Stage;
use crate::inputs::{self, Items};
use crate::prepare::{Preparation, Preparer};
use crate::program::{Batches, Classification};
use crate::progress::Progress;
use crate::report::say;
use crate::{Error, Result};

/// What `veiltune import` takes.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// Folder of the LoRA: adapter_config.json and adapter_model.safetensors, as the PEFT library writes them
    #[arg(long, value_name = "DIR")]
    peft: PathBuf,
    /// The backbone that it was trained on, a ViT or DeiT: a folder or a model of the hub [default: the embedded one]
    #[arg(long, value_name = "DIR|MODEL")]
    backbone: Option<String>,
    /// Some of the pictures that it was trained on: PNG or JPEG files, or directories of them
    ///
    /// The private program needs to know the ranges of the values within, which are measured on these pictures and become public.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR|FILE")]
    images: Vec<PathBuf>,
    /// Text file with the names of the classes, one a line, in the order of the head's outputs [default: LABEL_0, LABEL_1, ...]
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Factor by which the measured ranges are widened on both sides
    #[arg(long, default_value_t = 1.5, value_name = "FACTOR")]
    margin: f64,
    /// Folder to write the adapter to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs it.
pub fn run(args: &ImportArgs) -> Result<()> {
    if !(args.margin >= 1.0 && args.margin.is_finite()) {
        return Err(Error::Input("--margin must be a number of at least 1".into()));
    }
    let labels = args.labels.as_ref().map(|path| -> Result<Vec<String>> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Input(format!("{}: {e}; give a text file to --labels", path.display())))?;
        Ok(text.lines().map(|line| line.trim().to_owned()).collect())
    });
    let backbone = args.backbone.as_deref();
    let of_peft = |e: veiltune_nn::Error| {
        let dir = args.peft.display();
        Error::Input(format!(
            "{dir}: {e}; give a LoRA of a ViT or DeiT classifier to --peft, and its backbone to --backbone"
        ))
    };
    let mut classifier =
        peft::import(&args.peft, &inputs::backbone(backbone)?, labels.transpose()?).map_err(of_peft)?;
    let preparation = Preparation::new(&classifier.config, backbone)?;
    let pictures = Items::find(&args.images, None, None)?.check(&preparation, false, drop)?;
    let sites = ranges(&classifier, &preparation, &pictures)?;
    classifier
        .config
        .method
        .calibrate(&sites, args.margin)
        .map_err(of_peft)?;
    classifier.write(&args.out).map_err(|e| {
        Error::Input(format!(
            "{e}; give a folder with room that can be written to --out"
        ))
    })?;
    say(&format!(
        "{}: {} classes, ranges of {} pictures\n",
        args.out.display(),
        classifier.config.method.labels().len(),
        pictures.len()
    ));
    Ok(())
}

/// What all pictures have at each place that has a calibrated range.
fn ranges(classifier: &Classifier, preparation: &Preparation, pictures: &Items) -> Result<Vec<Site>> {
    let progress = Progress::new(false);
    let served = classifier.serve(preparation.backbone())?;
    let preparer: Preparer = preparation.load()?;
    let mut all: Vec<Site> = Vec::new();
    for i in 0..pictures.len() {
        let image = vec![preparer.inputs(&pictures.load(i, preparation)?)?];
        let program = Classification {
            images: Some(&image),
            ..Classification::public(&served, Batches::ONE)
        };
        let b = Plain::recording();
        program.forward(&b, &program.load(&b)?, 0)?;
        let sites = b.sites();
        if all.is_empty() {
            all = sites;
        } else {
            all.iter_mut()
                .zip(&sites)
                .for_each(|(all, site)| widen(all, site));
        }
        progress.at(Stage::Reference, i + 1, pictures.len());
    }
    Ok(all)
}

fn widen(all: &mut Site, site: &Site) {
    all.input = all.input.max(site.input);
    all.range = match (all.range, site.range) {
        (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
        (a, b) => a.or(b),
    };
}
