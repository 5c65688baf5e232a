//! `veiltune evaluate`: how often a trained adapter is right, in floating point or as the protocols compute it.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use serde::Serialize;
use veiltune_adapt::cache::Source;
use veiltune_adapt::evaluate::{Arithmetic, Evaluation, Model, evaluate};
use veiltune_adapt::train::Pictures;
use veiltune_nn::load::Classifier;

use super::{Bar, DataArgs, Labelled, Views, all_reads, interruptible};
use crate::inputs;
use crate::prepare::Preparation;
use crate::report::print;
use crate::session::check_backbone;
use crate::{Error, Result};

/// What `veiltune evaluate` takes.
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// How it is computed
    #[arg(long, value_enum, default_value = "float", value_name = "HOW")]
    arithmetic: ArithmeticArg,
    /// Print one JSON object to standard output instead of text
    ///
    /// Its members: adapter, backbone, arithmetic, pictures (or texts), skipped (unreadable ones), accuracy (0 to 1), f1
    /// (for texts of a task that reports it), loss (mean cross-entropy), beyond_range (pictures that leave a calibrated range so far that they have no result; they count as wrong).
    #[arg(long)]
    json: bool,
}

/// How a model is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArithmeticArg {
    /// In floating point, as it was trained
    Float,
    /// In floating point, in the form in which it is served
    Served,
    /// In the fixed point of the protocols, bit for bit what client and provider compute together
    Fixed,
}

impl From<ArithmeticArg> for Arithmetic {
    fn from(a: ArithmeticArg) -> Self {
        match a {
            ArithmeticArg::Float => Arithmetic::Float,
            ArithmeticArg::Served => Arithmetic::Served,
            ArithmeticArg::Fixed => Arithmetic::Fixed,
        }
    }
}

#[derive(Serialize)]
struct Summary {
    adapter: PathBuf,
    backbone: String,
    arithmetic: Arithmetic,
    pictures: usize,
    skipped: usize,
    accuracy: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    f1: Option<f64>,
    loss: f64,
    beyond_range: usize,
}

/// Measures.
pub fn run(args: &EvaluateArgs) -> Result<()> {
    let interrupted = interruptible()?;
    let classifier = inputs::classifier(Some(&args.adapter))?;
    let named = args.data.backbone.as_deref();
    let preparation = Preparation::new(&classifier.config, named)?;
    check_backbone(
        &classifier.config,
        Some(preparation.source()),
        named.unwrap_or("the embedded one"),
    )?;
    let source = preparation.source();
    let labelled = args.data.open_test(source, classifier.config.method.labels())?;
    let noun = labelled.noun();
    check_classes(
        noun,
        classifier.config.method.labels(),
        labelled.examples().classes(),
    )?;
    let arithmetic = args.arithmetic.into();
    let result = measure(
        &args.data,
        &classifier,
        source,
        &labelled,
        arithmetic,
        &interrupted,
    )?;
    let summary = Summary {
        adapter: args.adapter.clone(),
        backbone: args.data.backbone_name(),
        arithmetic,
        pictures: labelled.examples().len(),
        skipped: labelled.skipped,
        accuracy: result.accuracy,
        f1: labelled.f1(&result.predicted),
        loss: result.loss,
        beyond_range: result.beyond,
    };
    print(args.json, &summary, || {
        let beyond = match summary.beyond_range {
            0 => String::new(),
            n => format!("; {n} are beyond a calibrated range and count as wrong"),
        };
        format!(
            "{:.2} % of {} {noun}{}{beyond}\n",
            100.0 * summary.accuracy,
            summary.pictures,
            said(summary.f1)
        )
    })
}

/// F1 as a part of a sentence.
pub fn said(f1: Option<f64>) -> String {
    f1.map_or(String::new(), |f1| format!(", F1 {:.2} %", 100.0 * f1))
}

/// Refuses pictures or texts of other classes than the adapter's, naming the first that differs.
fn check_classes(noun: &str, adapter: &[String], pictures: &[String]) -> Result<()> {
    let label = |of: &[String], i: usize| of.get(i).map_or("no class".into(), |l| format!("{l:?}"));
    let differs = |&i: &usize| adapter.get(i) != pictures.get(i);
    let Some(i) = (0..adapter.len().max(pictures.len())).find(differs) else {
        return Ok(());
    };
    Err(Error::Input(format!(
        "the adapter is for {} classes, the {noun} have {}; class {} is {} there and {} here; give {noun} of the classes \
         that it was trained for to --data",
        adapter.len(),
        pictures.len(),
        i + 1,
        label(adapter, i),
        label(pictures, i)
    )))
}

/// Accuracy on all of them.
pub fn measure(
    data: &DataArgs,
    classifier: &Classifier,
    source: Source,
    labelled: &Labelled,
    arithmetic: Arithmetic,
    interrupted: &AtomicBool,
) -> Result<Evaluation> {
    let method = &classifier.config.method;
    let reads = all_reads(&[method], source.layers().unwrap_or(0))?;
    let states = data.states(labelled, source, &reads, Views::CENTRE, interrupted)?;
    let which: Vec<usize> = (0..states.len()).collect();
    let model = Model {
        method,
        tensors: &classifier.weights,
        backbone: source.backbone(),
    };
    let bar = Bar::new("measuring");
    let result = evaluate(
        &model,
        Pictures {
            states: &states,
            which: &which,
        },
        arithmetic,
        data.threads(),
        &mut |n| bar.at(n, which.len(), ""),
        interrupted,
    );
    Ok(result?)
}
