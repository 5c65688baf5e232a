//! `veiltune train`: from a backbone and labelled pictures or texts to an adapter that can be served.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use veiltune_adapt::cache::Source;
use veiltune_adapt::evaluate::Arithmetic;
use veiltune_adapt::train::{
    CURVE_FILE, Epoch, Event, Pictures, Report, STATE_FILE, Settings, Task, Trained, train,
};
use veiltune_engine::Comparison;
use veiltune_hub::AdapterConfig;
use veiltune_hub::dataset::Split;
use veiltune_nn::Method;
use veiltune_nn::load::Classifier;
use veiltune_wire::Network;

use super::{
    Bar, DataArgs, FormArgs, Labelled, Views, all_reads, check_adapter, check_classes, check_file, check_out,
    cost_of_one, evaluate, interruptible, left, make, source, warn_of_empty_classes, write_adapter,
    write_json,
};
use crate::methods::{Ground, MethodArgs};
use crate::progress::tell;
use crate::report::{grouped, print};
use crate::{Error, Result};

/// What `veiltune train` takes.
#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Folder to write the adapter to; a run that was interrupted goes on from what is there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Pictures or texts of the same classes to measure on at the end; of pictures the same PATH as --data for its test part
    #[arg(long, value_name = "PATH")]
    test: Option<PathBuf>,
    /// Print one JSON object to standard output instead of text
    ///
    /// Its members: adapter and learning_curve (paths), backbone, peft_type, classes, skipped (unreadable pictures), settings,
    /// parameters (trained values), pictures (or texts), views, epoch (whose parameters are kept, from 1; 0: those that training began
    /// with), train_accuracy, validation_accuracy, seconds, start {validation_loss, validation_accuracy}, curve [{train_loss, train_accuracy, validation_loss, validation_accuracy, seconds}, one an
    /// epoch], test {pictures, skipped, accuracy, loss}; and of one private image, exactly: comparison, rounds, online_bytes
    /// [client to provider, provider to client], dealer_bytes [to client, to provider]. Accuracies are 0 to 1.
    #[arg(long)]
    json: bool,
}

/// How to train.
#[derive(Args, Clone, Debug)]
pub struct Recipe {
    /// Passes over the pictures or texts; 0: what training starts with is kept [default: 20; 60 for a head; 0 in a
    /// search]
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,
    /// End after N epochs of which none is better on the validation pictures than the best before them [default: 3 for
    /// adapters if --epochs is not given, else never]
    ///
    /// Whether or not training ends early, the adapter is that of the best epoch.
    #[arg(long, value_name = "N")]
    pub patience: Option<usize>,
    /// Pictures or texts that a step of training sees [default: 50; 256 for a head]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Peak learning rate [default: 0.01 by SGD; 0.005 by AdamW for a head]
    #[arg(long, value_name = "RATE")]
    pub rate: Option<f32>,
    /// Weight decay, of matrices alone [default: 0.0005; 0.0001 for a head]
    #[arg(long, value_name = "DECAY")]
    pub decay: Option<f32>,
    /// Probability with which a feature of what an adapter adds is left out in training [default: 0.1]
    #[arg(long, value_name = "P")]
    pub dropout: Option<f32>,
    /// Views of each picture: the whole one, and N - 1 random crops, perhaps mirrored; training starts from all of them, and
    /// its epochs take turns [default: 2; texts have one]
    #[arg(long, value_name = "N")]
    pub views: Option<usize>,
    /// Smallest share of a picture's area that a random crop shows; 1: only mirrored
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    pub crop_scale: f64,
    /// Share of each class's training pictures that is not trained on, but validated on
    #[arg(long, default_value_t = 0.1, value_name = "SHARE")]
    pub validation: f64,
    /// Seed of everything random
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    pub seed: u64,
}

impl Recipe {
    /// Refuses what cannot be trained with.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str| Err(Error::Input(what.into()));
        if !(0.0..1.0).contains(&self.validation) {
            return refuse("--validation must be at least 0 and below 1");
        }
        for (count, name) in [
            (self.batch, "--batch"),
            (self.views, "--views"),
            (self.patience, "--patience"),
        ] {
            if count == Some(0) {
                return Err(Error::Input(format!("{name} must be at least 1")));
            }
        }
        if self.views.is_some_and(|views| views > MOST_VIEWS) {
            return Err(Error::Input(format!(
                "--views must be at most {MOST_VIEWS}: the backbone sees every view of every picture, and each takes room on disk"
            )));
        }
        if self.rate.is_some_and(|r| !(r > 0.0 && r.is_finite())) {
            return refuse("--rate must be a positive number");
        }
        if self.decay.is_some_and(|d| !(d >= 0.0 && d.is_finite())) {
            return refuse("--decay must be 0 or a positive number");
        }
        if self.dropout.is_some_and(|p| !(0.0..1.0).contains(&p)) {
            return refuse("--dropout must be at least 0 and below 1");
        }
        if !(self.crop_scale > 0.0 && self.crop_scale <= 1.0) {
            return refuse("--crop-scale must be above 0 and at most 1");
        }
        Ok(())
    }

    /// The views of what `source` sees to train on.
    pub fn views(&self, source: Source) -> Result<Views> {
        let count = match (source, self.views) {
            (Source::Texts(_), None | Some(1)) => 1,
            (Source::Texts(_), Some(_)) => {
                return Err(Error::Input("a text has one view; leave --views out".into()));
            }
            (_, views) => views.unwrap_or(2),
        };
        Ok(Views {
            count,
            smallest: self.crop_scale,
            seed: self.seed,
        })
    }

    /// For `method`: its own defaults where nothing is given.
    pub fn settings(&self, method: &Method) -> Settings {
        let own = Settings::of(method);
        Settings {
            epochs: self.epochs.unwrap_or(own.epochs),
            batch: self.batch.unwrap_or(own.batch),
            rate: self.rate.unwrap_or(own.rate),
            decay: self.decay.unwrap_or(own.decay),
            dropout: self.dropout.unwrap_or(own.dropout),
            patience: self.patience.unwrap_or(match self.epochs {
                Some(_) => 0,
                None => own.patience,
            }),
            seed: self.seed,
            ..own
        }
    }
}

/// Most views of a picture.
const MOST_VIEWS: usize = 1000;

/// What came out.
#[derive(Serialize)]
struct Summary {
    /// Pictures or texts.
    #[serde(skip)]
    noun: &'static str,
    adapter: PathBuf,
    /// If there was an epoch.
    learning_curve: Option<PathBuf>,
    backbone: String,
    peft_type: &'static str,
    classes: usize,
    skipped: usize,
    #[serde(flatten)]
    figures: Figures,
    /// Of one image, exactly.
    comparison: Comparison,
    rounds: u64,
    online_bytes: [u64; 2],
    dealer_bytes: [u64; 2],
}

/// How it was trained, and how good it is.
#[derive(Serialize)]
struct Figures {
    #[serde(flatten)]
    report: Report,
    test: Option<Test>,
}

#[derive(Serialize)]
struct Test {
    pictures: usize,
    skipped: usize,
    accuracy: f64,
    /// Of texts whose task reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    f1: Option<f64>,
    loss: f64,
}

/// Name of the figures beside an adapter.
const REPORT: &str = "report.json";

/// Trains.
pub fn run(args: &TrainArgs) -> Result<()> {
    args.recipe.check()?;
    check_out(&args.out)?;
    check_adapter(&args.out, &args.out.join(STATE_FILE), "--out")?;
    check_file(&args.out.join(REPORT), &args.out.join(STATE_FILE), "--out")?;
    let interrupted = interruptible()?;
    let base = args.data.open_backbone(&args.form)?;
    let base = base.source();
    let views = args.recipe.views(base)?;
    let labelled = args.data.open(base, &args.data.data, Split::Train, "--data")?;
    let tested = args.open_test(base, &labelled)?;
    check_classes(&labelled)?;
    let labels = labelled.examples().classes().to_vec();
    let method = args.method.build(&Ground::of(base), labels)?;
    let settings = args.recipe.settings(&method);
    let source = source(&method, base);
    if settings.epochs == 0 && source.layers().is_none() {
        return Err(Error::Input(
            "--epochs 0 would leave at noise what has no backbone to start from; give at least 1".into(),
        ));
    }
    let reads = all_reads(&[&method], source.layers().unwrap_or(0))?;
    let seed = args.recipe.seed;
    make(&args.out)?;
    let states = args.data.states(&labelled, source, &reads, views, &interrupted)?;
    let (learn, check) = states.split_validation(args.recipe.validation, seed);
    let parts = (&learn[..], &check[..]);
    warn_of_empty_classes(&states, labelled.noun(), parts, args.recipe.validation);

    let task = Task {
        method: &method,
        backbone: source.backbone(),
        train: Pictures {
            states: &states,
            which: &learn,
        },
        validation: Pictures {
            states: &states,
            which: &check,
        },
        settings: &settings,
        threads: args.data.threads(),
        dir: Some(&args.out),
    };
    let bar = Bar::new("training");
    let mut began = Instant::now();
    let trained = train(&task, &mut |event| show(&bar, &mut began, &event), &interrupted)?;
    drop(bar);
    let report = trained.report.clone();
    if let Some((own, head)) = report.below_head(check.len()) {
        tell(&format!(
            "of the {} validation {} the adapter gets {:.2} % right, a head alone {:.2} %: give a smaller --rank, more to train on, or \
             --method head",
            check.len(),
            labelled.noun(),
            100.0 * own,
            100.0 * head
        ));
    }
    let classifier = artefact(trained, source, args.data.backbone_name())?;
    let test = |tested: &Labelled| {
        let float = Arithmetic::Float;
        let result = evaluate::measure(&args.data, &classifier, source, tested, float, &interrupted)?;
        Ok::<_, Error>(Test {
            pictures: tested.examples().len(),
            skipped: tested.skipped,
            accuracy: result.accuracy,
            f1: tested.f1(&result.predicted),
            loss: result.loss,
        })
    };
    let test = tested.as_ref().map(test).transpose()?;
    let figures = Figures { report, test };
    write_json(&args.out.join(REPORT), &figures)?;
    // As `plan` has it unless it is told of a network; what no protocol computes is no adapter.
    let (comparison, cost) = cost_of_one(&classifier.config.method, &Network::NONE).map_err(|e| {
        Error::Input(format!(
            "what was trained cannot be computed privately: {e}; its accuracy is in {}; train with more --epochs, another --rate \
             or --attention, to another --out",
            args.out.join(REPORT).display()
        ))
    })?;
    write_adapter(&args.out, &classifier)?;
    let summary = Summary {
        noun: labelled.noun(),
        adapter: args.out.clone(),
        learning_curve: (!figures.report.curve.is_empty()).then(|| args.out.join(CURVE_FILE)),
        backbone: args.data.backbone_name(),
        peft_type: classifier.config.method.peft_type(),
        classes: labelled.examples().classes().len(),
        skipped: labelled.skipped,
        figures,
        comparison,
        rounds: cost.rounds,
        online_bytes: cost.online_bytes,
        dealer_bytes: cost.dealer_bytes,
    };
    print(args.json, &summary, || summary.text())
}

impl TrainArgs {
    /// What is measured on at the end, which is not what is trained on.
    fn open_test(&self, base: Source, labelled: &Labelled) -> Result<Option<Labelled>> {
        let Some(path) = &self.test else { return Ok(None) };
        let tested = self.data.open(base, path, Split::Test, "--test")?;
        labelled.check_same_classes(&tested)?;
        if labelled.examples().fingerprint() == tested.examples().fingerprint() {
            return Err(Error::Input(format!(
                "--test has the very {} of --data; give others, or put pictures below train/ and test/",
                labelled.noun()
            )));
        }
        Ok(Some(tested))
    }
}

/// Shows how far it is. `began` is when what comes before the epochs did.
fn show(bar: &Bar, began: &mut Instant, event: &Event) {
    match event {
        Event::Starting { what, done, of } => {
            if *done == 0 {
                *began = Instant::now();
            }
            let pace = began.elapsed().as_secs_f64() / *done as f64;
            let note = format!("start: {what}  {}", left(pace * (of - done) as f64));
            bar.at(*done, *of, &note);
        }
        Event::Trained(p) => {
            let (loss, left) = (p.loss, left(p.seconds_left));
            let note = format!("epoch {}/{}  loss {loss:.3}  {left}", p.epoch, p.epochs);
            bar.at(p.step, p.steps, &note);
            if let Some(epoch) = &p.ended {
                bar.say(&line(p.epoch, epoch, p.best));
            }
        }
        Event::Measured {
            done,
            of,
            seconds_left,
        } => {
            let note = format!("calibrating and measuring  {}", left(*seconds_left));
            bar.at(*done, *of, &note);
        }
    }
}

/// An artefact that names its backbone, if the method has one, and how that reads texts.
pub fn artefact(trained: Trained, source: Source, name: String) -> Result<Classifier> {
    let digest = source.fingerprint()?;
    Ok(Classifier {
        config: AdapterConfig {
            base_model_name_or_path: digest.map_or("none".into(), |_| name),
            base_model_sha256: digest.map(|d| crate::session::hex(&d)),
            text: match source {
                Source::Texts(encoder) => Some(encoder.form()),
                Source::Backbone(_) | Source::Pixels { .. } => None,
            },
            method: trained.method,
        },
        weights: trained.tensors,
    })
}

fn line(number: usize, e: &Epoch, best: usize) -> String {
    let mut text = format!(
        "epoch {number}: loss {:.4}, accuracy {:.2} %",
        e.train_loss,
        100.0 * e.train_accuracy
    );
    if let (Some(loss), Some(accuracy)) = (e.validation_loss, e.validation_accuracy) {
        text += &format!("; validation: loss {loss:.4}, accuracy {:.2} %", 100.0 * accuracy);
        text += &match best {
            0 => "; the start is better".to_owned(),
            _ if best == number => ", the best so far".to_owned(),
            _ => format!("; the best is epoch {best}"),
        };
    }
    text
}

impl Summary {
    fn text(&self) -> String {
        let report = &self.figures.report;
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        let epoch = match report.epoch {
            0 => "of the start".to_owned(),
            number => format!("after epoch {number} of {}", report.curve.len()),
        };
        let mut text = format!(
            "{}: {} trained values, {} {} in {} views, {:.0} s\naccuracy {epoch}: training {}",
            self.peft_type,
            grouped(report.parameters as u64),
            report.pictures,
            self.noun,
            report.views,
            report.seconds,
            percent(report.train_accuracy)
        );
        if let Some(accuracy) = report.validation_accuracy {
            text += &format!(", validation {}", percent(accuracy));
        }
        if let Some(test) = &self.figures.test {
            text += &format!(
                ", test {} of {} {}{}",
                percent(test.accuracy),
                test.pictures,
                self.noun,
                evaluate::said(test.f1)
            );
        }
        text += &format!(
            "\none private {}: {} rounds, {} bytes from the client, {} from the provider (`veiltune plan` says more)\n",
            if self.noun == "texts" { "text" } else { "image" },
            self.rounds,
            grouped(self.online_bytes[0]),
            grouped(self.online_bytes[1])
        );
        if let Some(curve) = &self.learning_curve {
            text += &format!("learning curve: {}\n", curve.display());
        }
        text + &format!("adapter: {}\n", self.adapter.display())
    }
}
