//! `veiltune tune`: the data owner's side of prompt tuning, on the servers or, for who has the model, in the clear.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use veiltune_engine::session::cheapest_comparison;
use veiltune_engine::{Comparison, Fixed, Plain};
use veiltune_hub::files;
use veiltune_nn::language::LanguageConfig;
use veiltune_tune::{
    Artefact, Ended, Evaluate, Example, Loss, Outcome, Projection, Settings, Slot, Tuner, subset,
};
use veiltune_wire::Network;

use super::args::{Interpreter, RunArgs};
use super::evaluate::{Clear, InTheClear, loaded, texts};
use super::ground::{Chosen, Ground};
use super::layout::{Rows, tune};
use super::measure::{linear, measure};
use super::model;
use super::owner::{Encoded, Remote};
use super::program::{Shape, Tuning};
use super::servers::{Role, Run};
use super::store::PublicModel;
use crate::progress::tell;
use crate::report::print;
use crate::session::hex;
use crate::{Error, Result};

/// What `veiltune tune` takes.
#[derive(Args, Debug)]
pub struct TuneArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Folder for the tuned prompt, the checkpoint and the tuning curve; an interrupted run goes on from there
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// How a model at hand is run
    #[arg(long, value_enum, default_value = "float")]
    interpreter: Interpreter,
    /// Coordinates that the optimiser moves
    #[arg(long, default_value_t = 500, value_name = "N")]
    dimension: usize,
    /// The optimiser's first step
    #[arg(long, default_value_t = 1.0)]
    sigma: f64,
    /// Stop after so many validations without a better prompt [default: go on]
    #[arg(long, value_name = "N")]
    patience: Option<usize>,
    /// Hinge loss with a margin of 2 instead of the cross-entropy
    #[arg(long)]
    hinge: bool,
    /// Labelled texts to measure the initial and the tuned prompt on, with a model at hand
    #[arg(long, value_name = "FILE", conflicts_with = "servers")]
    test: Option<PathBuf>,
    /// Most texts to measure on, drawn by the seed
    #[arg(long, default_value_t = 1000, value_name = "N")]
    test_limit: usize,
    /// A JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// What the command answers.
#[derive(Serialize)]
struct Answer {
    task: String,
    model: String,
    attention: serde_json::Value,
    interpreter: &'static str,
    seed: u64,
    shots: usize,
    evaluations: usize,
    metric: &'static str,
    initial_validation: f64,
    best_validation: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    initial_test: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuned_test: Option<f64>,
    /// Of a linear classifier on pooled features of the same texts, without a prompt, in float.
    #[serde(skip_serializing_if = "Option::is_none")]
    linear_test: Option<f64>,
    test_texts: usize,
    seconds: f64,
    ended: String,
    /// To and from the data owner, on the servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<[u64; 2]>,
    output: String,
}

/// Runs it.
pub fn run(args: &TuneArgs) -> Result<()> {
    let drawn = Chosen::draw(&args.run)?;
    match args.run.servers.servers.is_empty() {
        false => remote(args, &drawn),
        true => match args.interpreter {
            Interpreter::Float => local::<Plain>(args, &drawn),
            Interpreter::Fixed => local::<Fixed>(args, &drawn),
        },
    }
}

fn remote(args: &TuneArgs, chosen: &Chosen) -> Result<()> {
    let servers = &args.run.servers;
    let (addresses, station) = (servers.addresses()?, servers.station(Role::DataOwner)?);
    let public = args.run.on_servers(&station, &addresses)?;
    let words = public.words()?;
    let (ground, rows, shape) = args.run.lay_out(&public.config, &words, chosen)?;
    let comparison = comparison(&public.config, &shape, &servers.network)?;
    let run = new_run(&public, shape, comparison)?;
    let mut ids = rows.ids.clone();
    ids.extend(ground.labels()?);
    let texts = Encoded {
        ids,
        keep: rows.keep.clone(),
    };
    let (checkpoint, _lock) = open_output(&args.output)?;
    let mut remote = Remote::begin(
        &station,
        &addresses,
        &run,
        super::program::table_rows(&public.config),
        &texts,
    )?;
    let bytes = remote.counter();
    let answer = optimise(
        args,
        &ground,
        &rows,
        chosen.train,
        (&public.name, &public.fingerprint, public.deviation),
        ("servers", &checkpoint, &|| Some(bytes())),
        &mut remote,
    );
    match answer {
        Ok((mut answer, outcome)) => {
            answer.bytes = Some(bytes());
            remote.end()?;
            say(args, &answer, &outcome)
        }
        Err(e) => {
            remote.abort(&e.for_peer());
            Err(match e {
                Error::Wire(_) | Error::Engine(_) => Error::Input(format!(
                    "{e}; what was tuned so far is kept: once the cause is mended, the same command goes on"
                )),
                e => e,
            })
        }
    }
}

/// How comparisons are cheaper over this network.
pub fn comparison(config: &LanguageConfig, shape: &Shape, network: &Network) -> Result<Comparison> {
    let program = Tuning::public(config, shape, Comparison::Fss);
    Ok(cheapest_comparison(&program, shape.kinds().len(), network)?)
}

/// A run with a number of its own.
pub fn new_run(public: &PublicModel, shape: Shape, comparison: Comparison) -> Result<Run> {
    let mut number = [0; 16];
    getrandom::fill(&mut number)
        .map_err(|e| Error::io("drawing a run's number")(std::io::Error::other(e)))?;
    Ok(Run {
        number,
        model: public.fingerprint.clone(),
        shape,
        masked_bits: comparison == Comparison::MaskedBits,
    })
}

fn local<B: InTheClear>(args: &TuneArgs, chosen: &Chosen) -> Result<()> {
    let test = args.test.as_ref().map(|path| chosen.task.examples(path));
    let test = test.transpose().map_err(tune)?;
    let (checkpoint_file, _lock) = open_output(&args.output)?;
    let checkpoint = args.run.open()?;
    let attention = args.run.attention.attention();
    let ready = args
        .run
        .calibration
        .ready(&checkpoint, attention, args.run.tokens)?;
    let fingerprint = hex(&checkpoint.fingerprint()?);
    let (ground, rows, shape) = args.run.lay_out(&ready.config, &checkpoint.tokenizer, chosen)?;
    let model = loaded::<B>(&ready)?;
    let program = ready.program(&shape);
    let mut evaluate = Clear::new(program, &model, &texts(&ready, &rows, &ground.labels()?)?)?;
    let name = args.run.model.as_deref().unwrap_or_default();
    let identity = (name, fingerprint.as_str(), ready.deviation);
    let (mut answer, outcome) = optimise(
        args,
        &ground,
        &rows,
        chosen.train,
        identity,
        (args.interpreter.name(), &checkpoint_file, &|| None),
        &mut evaluate,
    )?;
    drop(evaluate);
    if let Some(all) = test.filter(|_| outcome.ended != Ended::Interrupted) {
        let some: Vec<&Example> = subset(all.len(), args.test_limit, args.run.seed)
            .into_iter()
            .map(|i| &all[i])
            .collect();
        let start = args.run.start(ready.config.hidden_size, ready.deviation);
        let prompts = [start, outcome.prompt.clone()];
        let scores = measure(&ground, &ready, &model, &some, &prompts)?;
        (answer.initial_test, answer.tuned_test) = (Some(scores[0]), Some(scores[1]));
        answer.linear_test = Some(linear(&ground, &ready, &shape, chosen, &some)?);
        answer.test_texts = some.len();
    }
    say(args, &answer, &outcome)
}

/// Makes the folder of a run; its checkpoint, which may not be there yet, and what keeps other runs out. Prompt and losses are the data owner's alone.
fn open_output(output: &Path) -> Result<(PathBuf, File)> {
    let checkpoint = output.join("checkpoint.json");
    crate::learn::check_adapter(output, &checkpoint, "--output")?;
    files::private_folder(output)?;
    let path = output.join("lock");
    let failed = |e| Error::io(path.display().to_string())(e);
    let lock = File::create(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok((checkpoint, lock)),
        Err(TryLockError::WouldBlock) => Err(Error::Input(format!(
            "another `veiltune tune` runs in {}; wait for it, or give another folder to --output",
            output.display()
        ))),
        Err(TryLockError::Error(e)) => Err(failed(e)),
    }
}

fn optimise(
    args: &TuneArgs,
    ground: &Ground,
    rows: &Rows,
    train: usize,
    (name, fingerprint, deviation): (&str, &str, f64),
    (interpreter, checkpoint, bytes): (&'static str, &Path, &dyn Fn() -> Option<[u64; 2]>),
    evaluate: &mut dyn Evaluate,
) -> Result<(Answer, Outcome)> {
    let mut tuner = tuner(args, ground, rows, train, (fingerprint, deviation), checkpoint)?;
    if tuner.evaluations() > 0 {
        tell(&format!("going on after {} evaluations", tuner.evaluations()));
    }
    if rows.cut > 0 {
        tell(&ground.cut(rows));
    }
    let stop = stop_after_this_generation()?;
    let metric = ground.task.metric.name();
    let mut last = std::time::Instant::now() - Duration::from_secs(60);
    let outcome = tuner.run(evaluate, &stop, &mut |p| {
        let done = p.record.evaluations >= p.budget;
        if last.elapsed() < Duration::from_secs(2) && !done && p.record.validation.is_none() {
            return;
        }
        last = std::time::Instant::now();
        let left = p.left.map_or(String::new(), |s| format!(", {s:.0} s left"));
        let loss = p
            .train
            .map_or(String::new(), |b| format!("loss {:.3}, ", b.score.loss));
        let passed = bytes().map_or(String::new(), |[sent, received]| {
            format!(", {:.1} MB", (sent + received) as f64 / 1e6)
        });
        tell(&format!(
            "{} of {} evaluations: {loss}best in validation {metric} {:.3}{passed}{left}",
            p.record.evaluations, p.budget, p.best.score.metric
        ));
    });
    let outcome = outcome.map_err(tune)?;
    let artefact = artefact(args, ground, &outcome, (name, fingerprint));
    artefact.write(&args.output).map_err(tune)?;
    let history = tuner.history();
    let curve = veiltune_tune::plot::svg(history, metric).map_err(tune)?;
    files::write_private(&args.output.join("curve.svg"), curve.as_bytes())?;
    let answer = Answer {
        task: ground.task.name.clone(),
        model: name.to_owned(),
        attention: artefact.attention,
        interpreter,
        seed: args.run.seed,
        shots: args.run.shots,
        evaluations: tuner.evaluations(),
        metric,
        initial_validation: outcome.initial.metric,
        best_validation: outcome.best.score.metric,
        initial_test: None,
        tuned_test: None,
        linear_test: None,
        test_texts: 0,
        seconds: history.last().map_or(0.0, |r| r.seconds),
        ended: format!("{:?}", outcome.ended).to_lowercase(),
        bytes: None,
        output: args.output.display().to_string(),
    };
    if outcome.ended == Ended::Interrupted {
        tell(&format!(
            "interrupted after {} evaluations; start the same command again to go on",
            tuner.evaluations()
        ));
    }
    Ok((answer, outcome))
}

/// As it begins, or as the checkpoint has it.
fn tuner(
    args: &TuneArgs,
    ground: &Ground,
    rows: &Rows,
    train: usize,
    model: (&str, f64),
    checkpoint: &Path,
) -> Result<Tuner> {
    let settings = Settings {
        sigma: args.sigma,
        patience: args.patience,
        loss: match args.hinge {
            true => Loss::Hinge { margin: 2.0 },
            false => Loss::CrossEntropy,
        },
        metric: ground.task.metric,
        ..args.run.settings()
    };
    let (hidden, (_, deviation), run) = (ground.config.hidden_size, model, &args.run);
    let projection = Projection::new(run.prompt_tokens, hidden, args.dimension, deviation, run.seed)
        .and_then(|p| p.starting_at(run.start(hidden, deviation)))
        .map_err(tune)?;
    let labels = rows.split(train, ground.task.labels.len());
    let identity = identity(args, ground, rows, train, model)?;
    Tuner::open(settings, projection, labels, &identity, checkpoint).map_err(tune)
}

/// Set by Ctrl-C; a second one ends the process.
fn stop_after_this_generation() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = ctrlc::set_handler(move || {
        if flag.swap(true, Relaxed) {
            std::process::exit(130);
        }
        tell("stopping after this generation; press Ctrl-C again to stop at once");
    });
    handler.map_err(|e| Error::io("catching interruptions")(std::io::Error::other(e)))?;
    Ok(stop)
}

/// The prompt, and what has to be known to use it.
fn artefact(
    args: &TuneArgs,
    ground: &Ground,
    outcome: &Outcome,
    (model, fingerprint): (&str, &str),
) -> Artefact {
    Artefact {
        base_model: model.to_owned(),
        base_model_sha256: Some(fingerprint.to_owned()),
        prompt: outcome.prompt.clone(),
        tokens: args.run.prompt_tokens,
        mode: match &ground.slot {
            Slot::Add(tokens) => veiltune_tune::Mode::Add {
                tokens: tokens.clone(),
            },
            Slot::Concatenate(_) => veiltune_tune::Mode::Concatenate,
        },
        task: ground.task.clone(),
        family: model::template(ground.config),
        attention: json!(ground.config.attention),
    }
}

/// What a checkpoint belongs to, beside its settings: model, texts, labels and words as the model reads them, and the projection.
fn identity(
    args: &TuneArgs,
    ground: &Ground,
    rows: &Rows,
    train: usize,
    (fingerprint, deviation): (&str, f64),
) -> Result<String> {
    let added: &[u32] = match &ground.slot {
        Slot::Add(tokens) => tokens,
        Slot::Concatenate(_) => &[],
    };
    let model = json!([fingerprint, ground.config.attention, deviation]);
    let texts = json!([
        rows.tokens,
        rows.answer,
        rows.start,
        train,
        rows.ids,
        rows.keep,
        rows.labels
    ]);
    let answers = json!([ground.labels()?, ground.task.metric]);
    let prompt = json!([args.run.prompt_tokens, added, args.dimension, args.run.seed]);
    let all = json!([model, texts, answers, prompt]).to_string();
    Ok(hex(&Sha256::digest(all)))
}

/// Prints it. An interrupted run is whole as far as it came, but a script has to know.
fn say(args: &TuneArgs, answer: &Answer, outcome: &Outcome) -> Result<()> {
    print(args.json, answer, || summary(answer))?;
    match outcome.ended {
        Ended::Interrupted => Err(Error::Interrupted),
        _ => Ok(()),
    }
}

fn summary(a: &Answer) -> String {
    let mut text = format!(
        "{} evaluations in {:.1} s ({})\n",
        a.evaluations, a.seconds, a.ended
    );
    text += &format!(
        "{} in validation: {:.3} with the initial prompt, {:.3} with the tuned one\n",
        a.metric, a.initial_validation, a.best_validation
    );
    if let (Some(before), Some(after)) = (a.initial_test, a.tuned_test) {
        let linear = a.linear_test.map_or(String::new(), |v| {
            format!(", {v:.3} by a linear classifier on pooled features")
        });
        text += &format!(
            "{} on {} test texts: {before:.3} with the initial prompt, {after:.3} with the tuned one{linear}\n",
            a.metric, a.test_texts
        );
    }
    if let Some([sent, received]) = a.bytes {
        text += &format!(
            "sent {:.2} MB, received {:.2} MB\n",
            sent as f64 / 1e6,
            received as f64 / 1e6
        );
    }
    text + &format!("the prompt is in {}\n", a.output)
}
