//! `veiltune search`: which adapter is accurate enough and cheap enough, for the user's data and network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use serde::Serialize;
use veiltune_adapt::cache::{Source, States};
use veiltune_adapt::search::{
    self, Candidate, Comparison, Evaluate, Goal, Latencies, Outcome, Search, Space, Spent, Status, Trial,
};
use veiltune_adapt::train::{Event, Pictures, Task, best, train, train_until};
use veiltune_hub::{dataset::Split, files};
use veiltune_nn::owc::Design;
use veiltune_nn::{Method, OwcConfig};
use veiltune_wire::Network;

use super::train::{Recipe, artefact};
use super::{
    Bar, DataArgs, FormArgs, all_reads, check_adapter, check_classes, check_out, cost_of_one, interruptible,
    left, make, warn_of_empty_classes, write, write_adapter,
};
use crate::report::print;
use crate::{Error, Result};

/// Remembers each training of a search.
const JOURNAL: &str = "journal.jsonl";
/// Folder of the adapter that was found.
const ADAPTER: &str = "adapter";

/// What `veiltune search` takes.
#[derive(Args, Debug)]
pub struct SearchArgs {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    form: FormArgs,
    /// Folder for the journal, the candidates, the Pareto front, and the adapter that was found; a search that was interrupted
    /// goes on from what is there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Efficiency first: the fastest adapter with at least this validation accuracy, 0 to 1
    #[arg(
        long,
        value_name = "ACCURACY",
        required_unless_present = "seconds",
        conflicts_with = "seconds"
    )]
    accuracy: Option<f64>,
    /// Utility first: the most accurate adapter whose private part takes at most so many seconds for one image
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Network between client and provider: none, lan, wan, or RATE_MBIT:DELAY_US
    #[arg(long, default_value = "lan", value_name = "NETWORK")]
    network: Network,
    /// How to choose what is trained
    #[arg(long, value_enum, default_value = "halving", value_name = "HOW")]
    by: By,
    /// Attention heads h to try; only those that divide the rank [default: 1,2,4,6,10,12; without epochs 1, as what training
    /// starts with is the same with any]
    #[arg(long, value_delimiter = ',', value_name = "H,..")]
    heads: Option<Vec<usize>>,
    /// Widths r to try; only those up to the backbone's width
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "60,120,180,240,300",
        value_name = "R,.."
    )]
    ranks: Vec<usize>,
    /// Numbers s of adapters to try; only those up to the backbone's layers
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2,3,4,5,6",
        value_name = "S,.."
    )]
    scopes: Vec<usize>,
    /// Norms to try
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "layer,batch",
        value_name = "NORM,.."
    )]
    norms: Vec<crate::methods::NormArg>,
    /// End before more than N full trainings are spent [default: when no training is expected to pay]
    #[arg(long, value_name = "N")]
    budget: Option<f64>,
    /// Multiply-adds that a party does in a second, in billions, for the predicted seconds
    #[arg(long, default_value_t = 50.0, value_name = "RATE")]
    gmacs: f64,
    #[command(flatten)]
    recipe: Recipe,
    /// Print one JSON object to standard output instead of text
    ///
    /// Its members: network, skipped (unreadable pictures), found [{by, out, summary, reached, best, candidates, trainings,
    /// seconds, trials, front, adapter}, one a way of searching], comparison (of both ways: accuracy and latency that both
    /// reached, and the candidates, trainings and seconds that each took until then). A candidate is {heads, rank, scope, norm};
    /// trials and front list {candidate, epochs, accuracy, latency, seconds, cost}.
    #[arg(long)]
    json: bool,
}

/// How to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// Short trainings first, lengthened for those that may still be the best
    Halving,
    /// The paper's controller, by reinforcement
    Reinforce,
    /// One after the other, each in a folder of its own, and compared
    Both,
}

impl By {
    fn ways(self) -> &'static [(search::Method, &'static str)] {
        match self {
            By::Halving => &[(search::Method::Halving, "halving")],
            By::Reinforce => &[(search::Method::Reinforce, "reinforce")],
            By::Both => &[
                (search::Method::Halving, "halving"),
                (search::Method::Reinforce, "reinforce"),
            ],
        }
    }
}

/// One way of searching and what came of it.
#[derive(Serialize)]
struct Found {
    by: &'static str,
    out: PathBuf,
    summary: String,
    reached: bool,
    best: Option<Candidate>,
    candidates: usize,
    trainings: f64,
    seconds: f64,
    trials: Vec<Trial>,
    front: Vec<Trial>,
    adapter: Option<PathBuf>,
}

#[derive(Serialize)]
struct Summary {
    network: Network,
    skipped: usize,
    found: Vec<Found>,
    comparison: Option<Compared>,
}

/// Until both had a candidate as good as the worse of their best.
#[derive(Serialize)]
struct Compared {
    accuracy: f64,
    latency: f64,
    candidates: [usize; 2],
    trainings: [f64; 2],
    seconds: [f64; 2],
}

impl From<Comparison> for Compared {
    fn from(c: Comparison) -> Self {
        Compared {
            accuracy: c.accuracy,
            latency: c.latency,
            candidates: c.until.map(|s: Spent| s.candidates),
            trainings: c.until.map(|s| s.trainings),
            seconds: c.until.map(|s| s.seconds),
        }
    }
}

/// Searches.
pub fn run(args: &SearchArgs) -> Result<()> {
    let goal = args.check()?;
    let recipe = Recipe {
        epochs: args.recipe.epochs.or(Some(0)),
        ..args.recipe.clone()
    };
    let interrupted = interruptible()?;
    let base = args.data.open_backbone(&args.form)?;
    let source = base.source();
    let views = recipe.views(source)?;
    let (space, candidates) = args.space(source, recipe.epochs)?;

    // The test set is never opened: candidates are measured on a part of the training pictures.
    let labelled = args.data.open(source, &args.data.data, Split::Train, "--data")?;
    check_classes(&labelled)?;
    let labels = labelled.examples().classes().to_vec();
    let largest = candidates
        .iter()
        .max_by_key(|c| c.scope)
        .expect("a space has candidates");
    let deepest = method(source, largest, &labels)?;
    let reads = all_reads(&[&deepest], source.layers().unwrap_or(0))?;
    let seed = args.recipe.seed;
    // Every scope ends with the same state at the class token; a smaller one begins later.
    make(&args.out)?;
    let states = args.data.states(&labelled, source, &reads, views, &interrupted)?;
    let (learn, check) = states.split_validation(args.recipe.validation, seed);
    let parts = (&learn[..], &check[..]);
    warn_of_empty_classes(&states, labelled.noun(), parts, args.recipe.validation);
    let settings = recipe.settings(&deepest);

    let mut found = Vec::new();
    for &(way, name) in args.by.ways() {
        let out = args.out_of(name);
        make(&out)?;
        let mut trainer = Trainer {
            args,
            recipe: &recipe,
            source,
            labels: &labels,
            states: &states,
            learn: &learn,
            check: &check,
            dir: out.join("candidates"),
            interrupted: &interrupted,
        };
        let search = search::Settings {
            method: way,
            space: space.clone(),
            goal,
            epochs: settings.epochs,
            seed,
            fingerprint: format!(
                "{} validation {} network {} gmacs {} recipe {:?}",
                states.digest(),
                args.recipe.validation,
                args.network,
                args.gmacs,
                settings
            ),
            budget: args.budget,
        };
        let bar = Bar::new("search");
        let mut search = Search::open(search, &out.join(JOURNAL))?;
        let outcome = search.run(&mut trainer, &interrupted, &mut |trial, status| {
            bar.say(&line(name, trial, status));
        })?;
        drop(bar);
        if outcome.ended == search::Ended::Interrupted {
            return Err(Error::Interrupted);
        }
        found.push(trainer.conclude(name, &out, outcome)?);
    }
    let comparison = match &found[..] {
        [a, b] => search::compare(&goal, settings.epochs, &a.trials, &b.trials).map(Compared::from),
        _ => None,
    };
    let summary = Summary {
        network: args.network,
        skipped: labelled.skipped,
        found,
        comparison,
    };
    print(args.json, &summary, || summary.text())?;
    match summary.found.iter().find(|f| f.adapter.is_none()) {
        Some(without) => Err(Error::NothingFound(without.by)),
        None => Ok(()),
    }
}

impl SearchArgs {
    /// Refuses what makes no sense, and what would overwrite something else.
    fn check(&self) -> Result<Goal> {
        self.recipe.check()?;
        check_out(&self.out)?;
        let refuse = |why: &str| Err(Error::Input(why.into()));
        if !(self.gmacs > 0.0 && self.gmacs.is_finite()) {
            return refuse("--gmacs must be a positive number");
        }
        if self.recipe.validation == 0.0 {
            return refuse(
                "a search measures on validation pictures: --validation must be above 0 and below 1",
            );
        }
        let of_0_to_1 = |a: f64| a > 0.0 && a <= 1.0;
        if !self.accuracy.is_none_or(of_0_to_1) {
            return refuse("--accuracy must be above 0 and at most 1");
        }
        if self.seconds.is_some_and(|s| !(s > 0.0 && s.is_finite())) {
            return refuse("--seconds must be a positive number");
        }
        for (_, name) in self.by.ways() {
            let out = self.out_of(name);
            check_adapter(&out.join(ADAPTER), &out.join(JOURNAL), "--out")?;
        }
        match (self.accuracy, self.seconds) {
            (Some(accuracy), _) => Ok(Goal::Efficiency { accuracy }),
            (None, Some(seconds)) => Ok(Goal::Utility { seconds }),
            (None, None) => refuse("give --accuracy or --seconds"),
        }
    }

    /// Where a way of searching writes to.
    fn out_of(&self, way: &str) -> PathBuf {
        match self.by.ways().len() {
            1 => self.out.clone(),
            _ => self.out.join(way),
        }
    }

    /// What the backbone allows of the space to search in, and all that is in it.
    fn space(&self, source: Source, epochs: Option<usize>) -> Result<(Space, Vec<Candidate>)> {
        let (layers, width) = (source.layers().unwrap_or(0), source.width());
        let space = Space {
            heads: match (&self.heads, epochs) {
                (Some(heads), _) => heads.clone(),
                // A start in closed form is the same with any number of heads.
                (None, Some(0)) => vec![1],
                (None, _) => Space::default().heads,
            },
            ranks: self.ranks.clone(),
            scopes: self.scopes.clone(),
            norms: self.norms.iter().map(|n| n.choice()).collect(),
        }
        .within(layers, width);
        let candidates = space.candidates().map_err(|e| {
            Error::Input(format!(
                "{e}; give ranks up to {width}, the backbone's width, to --ranks, scopes up to {layers}, its layers, to --scopes, and \
                 divisors of a rank to --heads"
            ))
        })?;
        Ok((space, candidates))
    }
}

/// One candidate, once it has been measured.
fn line(by: &str, trial: &Trial, status: &Status) -> String {
    let again = if status.replayed {
        " (from the journal)"
    } else {
        ""
    };
    format!(
        "{by} {}: {} epochs, {:.2} %, {:.4} s{again}; {} candidates, {:.1} trainings, {}",
        trial.candidate,
        trial.epochs,
        100.0 * trial.accuracy,
        trial.latency,
        status.spent.candidates,
        status.spent.trainings,
        left(status.left)
    )
}

fn method(source: Source, c: &Candidate, labels: &[String]) -> Result<Method> {
    let design = Design {
        norm: c.norm,
        ..Design::new(c.heads, c.rank, c.scope)
    };
    let config = OwcConfig::new(&design, source.width(), source.tokens(), labels.to_vec());
    let method = Method::Owc(config);
    method.check()?;
    Ok(method)
}

/// Trains and costs candidates.
struct Trainer<'a> {
    args: &'a SearchArgs,
    recipe: &'a Recipe,
    source: Source<'a>,
    labels: &'a [String],
    states: &'a States,
    learn: &'a [usize],
    check: &'a [usize],
    dir: PathBuf,
    interrupted: &'a AtomicBool,
}

impl Trainer<'_> {
    fn method(&self, c: &Candidate) -> veiltune_adapt::Result<Method> {
        method(self.source, c, self.labels).map_err(|e| veiltune_adapt::Error::Settings(e.to_string()))
    }

    /// Predicted seconds of one image's private part; ranges that training has yet to calibrate are presumed.
    fn seconds(&self, c: &Candidate, network: &Network) -> Result<f64> {
        let mut method = method(self.source, c, self.labels)?;
        method.presume();
        let (_, cost) = cost_of_one(&method, network)?;
        let macs = cost.macs[0].max(cost.macs[1]) as f64;
        Ok(cost.network_seconds(network) + macs / (self.args.gmacs * 1e9))
    }

    fn with_task<T>(
        &self,
        c: &Candidate,
        work: impl FnOnce(&Task) -> veiltune_adapt::Result<T>,
    ) -> veiltune_adapt::Result<T> {
        let method = self.method(c)?;
        let settings = self.recipe.settings(&method);
        let norm = c.norm_name();
        let dir = self
            .dir
            .join(format!("h{}-r{}-s{}-{norm}", c.heads, c.rank, c.scope));
        files::private_folder(&dir)?;
        work(&Task {
            method: &method,
            backbone: self.source.backbone(),
            train: Pictures {
                states: self.states,
                which: self.learn,
            },
            validation: Pictures {
                states: self.states,
                which: self.check,
            },
            settings: &settings,
            threads: self.args.data.threads(),
            dir: Some(&dir),
        })
    }

    /// The best candidate as an adapter, and the front as tables and a plot.
    fn conclude(&self, by: &'static str, out: &Path, outcome: Outcome) -> Result<Found> {
        let mut networks =
            BTreeMap::from([("lan".to_owned(), Network::LAN), ("wan".to_owned(), Network::WAN)]);
        networks.insert(self.args.network.to_string(), self.args.network);
        let mut latencies = Latencies::new();
        for (name, network) in &networks {
            let of = latencies.entry(name.clone()).or_default();
            for trial in &outcome.trials {
                of.insert(trial.candidate, self.seconds(&trial.candidate, network)?);
            }
        }
        let write = |name: &str, text: String| write(&out.join(name), text.as_bytes());
        write("front.md", search::markdown(&outcome.front, &latencies))?;
        write("front.csv", search::csv(&outcome.front, &latencies))?;
        if !outcome.front.is_empty() {
            let title = format!("adapters found by {by}");
            write(
                "front.svg",
                search::svg(&title, &outcome.front, &outcome.trials, &latencies)?,
            )?;
        }
        let adapter = match &outcome.best {
            Some(best) => {
                let bar = Bar::new("adapter");
                let show = &mut |event| match event {
                    Event::Starting { what, done, of } => bar.at(done, of, &format!("start: {what}")),
                    Event::Measured { done, of, .. } => bar.at(done, of, "calibrating and measuring"),
                    Event::Trained(_) => {}
                };
                let trained = self.with_task(best, |task| train(task, show, self.interrupted))?;
                let dir = out.join(ADAPTER);
                let name = self.args.data.backbone_name();
                write_adapter(&dir, &artefact(trained, self.source, name)?)?;
                Some(dir)
            }
            None => None,
        };
        Ok(Found {
            by,
            out: out.to_owned(),
            summary: outcome.summary,
            reached: outcome.reached,
            best: outcome.best,
            candidates: outcome.spent.candidates,
            trainings: outcome.spent.trainings,
            seconds: outcome.spent.seconds,
            trials: outcome.trials,
            front: outcome.front,
            adapter,
        })
    }
}

impl Evaluate for Trainer<'_> {
    fn latency(&mut self, c: &Candidate) -> veiltune_adapt::Result<f64> {
        self.seconds(c, &self.args.network)
            .map_err(|e| veiltune_adapt::Error::Settings(e.to_string()))
    }

    fn train(&mut self, c: &Candidate, epochs: usize) -> veiltune_adapt::Result<f64> {
        let bar = Bar::new("training");
        let name = c.to_string();
        self.with_task(c, |task| {
            let show = &mut |event| {
                let p = match event {
                    Event::Trained(p) => p,
                    Event::Starting { what, done, of } => {
                        return bar.at(done, of, &format!("{name}  start: {what}"));
                    }
                    Event::Measured { .. } => return,
                };
                bar.at(
                    p.step,
                    p.steps,
                    &format!("{name}  epoch {}/{}  loss {:.3}", p.epoch, p.epochs, p.loss),
                );
            };
            let (start, mut curve) = train_until(task, epochs, show, self.interrupted)?;
            curve.truncate(epochs);
            let kept = match best(start, &curve) {
                0 => start.map(|s| s.validation_accuracy),
                number => curve[number - 1].validation_accuracy,
            };
            kept.ok_or_else(|| veiltune_adapt::Error::Settings("no validation pictures".into()))
        })
    }

    fn training_cost(&self, c: &Candidate) -> f64 {
        // Multiply-adds of a forward pass: projections down and up, and a block on all tokens.
        let (n, d) = (self.source.tokens() as f64, self.source.width() as f64);
        let (r, s) = (c.rank as f64, c.scope as f64);
        s * (n * r * (2.0 * d + 6.0 * r) + 2.0 * n * n * r) / 1e9
    }
}

impl Summary {
    fn text(&self) -> String {
        let mut text = String::new();
        for f in &self.found {
            text += &format!(
                "{}: {}\ncandidates trained: {}, full trainings: {:.1}, {:.0} s\n",
                f.by, f.summary, f.candidates, f.trainings, f.seconds
            );
            for t in &f.front {
                text += &format!(
                    "  {:<24} {:>6.2} %  {:.4} s on {}\n",
                    t.candidate.to_string(),
                    100.0 * t.accuracy,
                    t.latency,
                    self.network
                );
            }
            if !f.front.is_empty() {
                let at = |name| f.out.join(name).display().to_string();
                text += &format!(
                    "front: {}, {}, {}\n",
                    at("front.md"),
                    at("front.csv"),
                    at("front.svg")
                );
            }
            if let Some(dir) = &f.adapter {
                text += &format!("adapter: {}\n", dir.display());
            }
        }
        if let Some(c) = &self.comparison {
            text += &format!(
                "until {:.2} % in {:.4} s: halving {} candidates, {:.1} trainings, {:.0} s; reinforce {}, {:.1}, {:.0} s\n",
                100.0 * c.accuracy,
                c.latency,
                c.candidates[0],
                c.trainings[0],
                c.seconds[0],
                c.candidates[1],
                c.trainings[1],
                c.seconds[1]
            );
        }
        text
    }
}
