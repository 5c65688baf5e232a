//! `veiltune tune`: the data owner's side of prompt tuning, on the servers or, for who has the model, in the clear.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use veiltune_engine::session::{Program, cheapest_comparison};
use veiltune_engine::{Comparison, Fixed, Plain};
use veiltune_hub::{Tokenizer, files};
use veiltune_nn::language::{Attention, LanguageCheckpoint, LanguageConfig, LanguageModel};
use veiltune_tune::{
    Artefact, Encoder, Ended, Evaluate, Example, Labelled, Linear, Loss, Outcome, Projection, Prompt, Score,
    Settings, Shots, Slot, Split, Task, Tokenize, Tuner, subset,
};
use veiltune_wire::Network;

use super::evaluate::{Clear, InTheClear, loaded};
use super::layout::{Rows, tune};
use super::model::{self, Calibration, Ready, Words};
use super::owner::{self, Addresses, Encoded, Remote};
use super::program::{Mode, Shape, Texts, Tuning, table_width};
use super::servers::{Role, Run, Station};
use super::store::{Listed, PublicModel};
use crate::progress::tell;
use crate::report::print;
use crate::session::hex;
use crate::{Error, Result};

/// Which attention a model runs with.
#[derive(Args, Clone, Debug)]
pub struct AttentionArgs {
    /// Attention: exactly as the model was trained, or by random features
    #[arg(long, value_enum, default_value = "softmax")]
    pub attention: Kind,
    /// Random projections of `--attention rfa`; there are twice as many features
    #[arg(long, default_value_t = 64, value_name = "D")]
    pub features: usize,
}

/// Kinds of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Exact softmax.
    Softmax,
    /// Random feature attention (Peng et al., ICLR 2021).
    Rfa,
}

impl AttentionArgs {
    /// As a model is configured.
    pub fn attention(&self) -> Attention {
        match self.attention {
            Kind::Softmax => Attention::Softmax,
            Kind::Rfa => Attention::Rfa {
                features: self.features,
                seed: 1,
            },
        }
    }
}

/// The servers, and this machine's keys.
#[derive(Args, Clone, Debug)]
pub struct Servers {
    /// Addresses of server 0 and server 1, HOST:PORT,HOST:PORT
    #[arg(long, value_name = "ADDR,ADDR", value_delimiter = ',', num_args = 1)]
    pub servers: Vec<String>,
    /// Address of the assistant, HOST:PORT
    #[arg(long, value_name = "ADDR")]
    pub assistant: Option<String>,
    /// This machine's folder of those that `veiltune keys --tuning` made
    #[arg(long, value_name = "DIR")]
    pub keys: Option<PathBuf>,
    /// Network to emulate on every link: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US; the same on all machines
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    pub network: Network,
    /// Longest time to wait for another machine to answer, seconds
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    pub wait: f64,
}

impl Servers {
    /// Where all three are called.
    pub fn addresses(&self) -> Result<Addresses> {
        let servers = <[String; 2]>::try_from(self.servers.clone()).map_err(|given| {
            Error::Input(format!(
                "{} addresses of servers; give two to --servers, as HOST:PORT,HOST:PORT",
                given.len()
            ))
        })?;
        let assistant = self
            .assistant
            .clone()
            .ok_or_else(|| Error::Input("give the assistant's address to --assistant".into()))?;
        Ok(Addresses { servers, assistant })
    }

    /// This process as `role`.
    pub fn station(&self, role: Role) -> Result<Station> {
        let keys = self.keys.as_deref().ok_or_else(|| {
            Error::Input(format!(
                "give --keys the {} folder that `veiltune keys --tuning` made",
                role.name()
            ))
        })?;
        let wait = Duration::try_from_secs_f64(self.wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
        Station::new(role, keys, self.network, wait)
    }
}

/// How a model is calibrated by who has it.
#[derive(Args, Clone, Debug)]
pub struct CalibrationArgs {
    /// Sample texts to calibrate on, one a line [default: a few that are built in]
    #[arg(long, value_name = "FILE")]
    pub samples: Option<PathBuf>,
    /// Factor by which the ranges that are seen are widened
    #[arg(long, default_value_t = 2.0, value_name = "FACTOR")]
    pub margin: f64,
}

impl CalibrationArgs {
    /// Calibrates a checkpoint for texts of at most `tokens`.
    pub fn ready(
        &self,
        checkpoint: &LanguageCheckpoint,
        attention: Attention,
        tokens: usize,
    ) -> Result<Ready> {
        if !(1.0..=1000.0).contains(&self.margin) {
            return Err(Error::Input(format!(
                "--margin {}: a factor of 1 to 1000, by which ranges are widened",
                self.margin
            )));
        }
        let texts = match &self.samples {
            Some(path) => {
                let lines = crate::inputs::lines(path, false)?;
                lines.into_iter().map(|line| line.first).collect()
            }
            None => Vec::new(),
        };
        model::ready(
            checkpoint,
            attention,
            &Calibration {
                texts: &texts,
                tokens,
                margin: self.margin,
            },
        )
    }
}

/// What interprets the model, where it is at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Interpreter {
    /// Floating point.
    Float,
    /// The protocols' fixed point, bit by bit as on the servers but for the masks that are drawn.
    Fixed,
}

impl Interpreter {
    fn name(self) -> &'static str {
        match self {
            Interpreter::Float => "float",
            Interpreter::Fixed => "fixed",
        }
    }
}

/// What decides the cost of a run.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The task: sst-2, yelp, ag-news, mrpc, rte, nsmc, or a task file
    #[arg(long, value_name = "TASK")]
    task: String,
    /// Labelled texts, `text<TAB>label` a line or in the layout of the task
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    #[command(flatten)]
    servers: Servers,
    /// Which of the servers' models, by its name [default: the only one]; or, without --servers, the folder of a model to tune on in
    /// the clear
    #[arg(long, value_name = "NAME|DIR")]
    model: Option<String>,
    #[command(flatten)]
    attention: AttentionArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Texts of each class to tune on, and as many others to validate on
    #[arg(long, default_value_t = 16, value_name = "N")]
    shots: usize,
    /// Texts of each class to validate on [default: as --shots]
    #[arg(long, value_name = "N")]
    validation_shots: Option<usize>,
    /// Which texts are drawn, and what the optimiser tries
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 50, value_name = "N")]
    prompt_tokens: usize,
    /// How the prompt meets a text
    #[arg(long, value_enum, default_value = "add")]
    mode: Mode,
    /// Text whose tokens stand where the prompt is added [default: the task's, or one that names its words]
    #[arg(long, value_name = "TEXT")]
    initial_text: Option<String>,
    /// Most tokens of a row, prompt and template included; longer texts are cut
    #[arg(long, default_value_t = 128, value_name = "N")]
    tokens: usize,
    /// Rows are as long as the longest, rounded up to a multiple of this: servers see no more of a text's length
    #[arg(long, default_value_t = 8, value_name = "N")]
    bucket: usize,
    /// Prompts of a generation
    #[arg(long, default_value_t = 20, value_name = "N")]
    population: usize,
    /// Prompts that share a forward pass: fewer need less memory and more rounds [default: all of a generation]
    #[arg(long, value_name = "N")]
    together: Option<usize>,
    /// Prompts to evaluate in all
    #[arg(long, default_value_t = 8000, value_name = "N")]
    budget: usize,
    /// Evaluations between validations
    #[arg(long, default_value_t = 100, value_name = "N")]
    validate_every: usize,
}

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

/// What `veiltune plan tune` takes.
#[derive(Args, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    /// A JSON object on standard output
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    /// What stands where the prompt goes.
    fn slot(&self, words: &Tokenizer, task: &Task) -> Result<Slot> {
        Ok(match self.mode {
            Mode::Add => {
                let text = self.initial_text.as_deref();
                Slot::Add(initial(words, task, text, self.prompt_tokens)?)
            }
            Mode::Concatenate => Slot::Concatenate(self.prompt_tokens),
        })
    }

    /// What its cost depends on.
    fn settings(&self) -> Settings {
        Settings {
            population: self.population,
            budget: self.budget,
            validate_every: self.validate_every,
            seed: self.seed,
            ..Settings::default()
        }
    }

    /// The one of the servers' models that is asked for.
    fn on_servers(&self, station: &Station, addresses: &Addresses) -> Result<PublicModel> {
        let fingerprint = find(&owner::models(station, addresses)?, self.model.as_deref())?;
        owner::model(station, addresses, &fingerprint)
    }

    /// The model that is at hand.
    fn open(&self) -> Result<LanguageCheckpoint> {
        let name = self.model.as_deref().ok_or_else(|| {
            Error::Input(
                "give --servers and --assistant to tune privately, or --model to tune in the clear".into(),
            )
        })?;
        model::open(name)
    }

    /// The texts as rows for a model, and what its owner's servers are told of them.
    fn lay_out<'a>(
        &self,
        config: &'a LanguageConfig,
        words: &'a Tokenizer,
        chosen: &'a Chosen,
    ) -> Result<(Ground<'a>, Rows, Shape)> {
        let ground = Ground {
            config,
            words,
            task: &chosen.task,
            slot: self.slot(words, &chosen.task)?,
            tokens: self.tokens,
            bucket: self.bucket,
        };
        let rows = ground.rows(&chosen.examples.iter().collect::<Vec<_>>())?;
        let together = self.together.unwrap_or(self.population);
        let shape = ground.shape(&rows, chosen.train, self.population, together);
        shape.check(config)?;
        // Words that the model cannot answer with are refused before anything is planned or begun.
        ground.labels()?;
        Ok((ground, rows, shape))
    }

    /// The prompt before tuning: nothing that is added, or tokens of no meaning.
    fn start(&self, hidden: usize, deviation: f64) -> Prompt {
        match self.mode {
            Mode::Add => Prompt(vec![0.0; self.prompt_tokens * hidden]),
            Mode::Concatenate => Prompt::random(self.prompt_tokens, hidden, deviation, self.seed),
        }
    }
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

/// What is public of the model, and what follows from it for the texts.
pub struct Ground<'a> {
    /// The model.
    pub config: &'a LanguageConfig,
    /// Its tokenizer.
    pub words: &'a Tokenizer,
    /// The task.
    pub task: &'a Task,
    /// What stands where the prompt goes.
    pub slot: Slot,
    /// Most tokens of a row.
    pub tokens: usize,
    /// Rows are rounded up to it.
    pub bucket: usize,
}

impl Ground<'_> {
    /// Rows of these texts.
    pub fn rows(&self, examples: &[&Example]) -> Result<Rows> {
        let words = Words(self.words);
        let padding = words.specials().pad.unwrap_or(0);
        let limit = self.limit();
        Rows::new(&self.encoder(&words)?, examples, padding, self.bucket, limit)
    }

    /// Rows of the table that give the label words' logits.
    pub fn labels(&self) -> Result<Vec<u32>> {
        let words = Words(self.words);
        let labels = self.encoder(&words)?.words().map_err(tune)?;
        Ok(labels
            .into_iter()
            .map(|id| model::label_row(self.config, id))
            .collect())
    }

    /// Most tokens of a row.
    fn limit(&self) -> usize {
        self.tokens.min(self.config.max_positions)
    }

    /// How many texts are cut, and what can be done about it.
    pub fn cut(&self, rows: &Rows) -> String {
        let (limit, all) = (self.limit(), rows.len());
        let advice = match limit < self.tokens {
            true => "all that the model takes",
            false => "--tokens allows more",
        };
        format!("{} of {all} texts are cut to {limit} tokens: {advice}", rows.cut)
    }

    fn encoder<'w>(&'w self, words: &'w Words<'w>) -> Result<Encoder<'w, Words<'w>>> {
        let family = model::template(self.config);
        Encoder::new(words, self.task, family, self.slot.clone(), self.limit()).map_err(tune)
    }

    /// Sizes of a run on these rows, of which the first `train` are tuned on.
    pub fn shape(&self, rows: &Rows, train: usize, population: usize, together: usize) -> Shape {
        Shape {
            tokens: rows.tokens,
            answer: rows.answer,
            start: rows.start,
            prompt: rows.prompt,
            mode: match self.slot {
                Slot::Add(_) => Mode::Add,
                Slot::Concatenate(_) => Mode::Concatenate,
            },
            texts: train,
            validation: rows.len() - train,
            labels: self.task.labels.len(),
            candidates: population,
            together,
        }
    }
}

/// The tokens whose embeddings the prompt is added to: those of a text, again and again.
pub fn initial(words: &Tokenizer, task: &Task, text: Option<&str>, count: usize) -> Result<Vec<u32>> {
    let usual = format!(
        "Which of these words fits the text best: {}?",
        task.words.join(", ")
    );
    let text = text.or(task.initial.as_deref());
    let tokens = words.encode(text.unwrap_or(&usual))?;
    match tokens.is_empty() {
        true => Err(Error::Input(
            "the initial text has no words that the model knows".into(),
        )),
        false => Ok(tokens.iter().copied().cycle().take(count).collect()),
    }
}

/// A task, and the texts of a run. Holds texts and labels, and so has no `Debug`.
struct Chosen {
    task: Task,
    /// Those to tune on, then those to validate on.
    examples: Vec<Example>,
    /// Number of the former.
    train: usize,
}

impl Chosen {
    /// Draws them by the seed.
    fn draw(run: &RunArgs) -> Result<Chosen> {
        let task = Task::named(&run.task).map_err(tune)?;
        let all = task.examples(&run.data).map_err(tune)?;
        let labels: Vec<usize> = all.iter().map(|e| e.label).collect();
        let shots = Shots {
            train: run.shots,
            validation: run.validation_shots.unwrap_or(run.shots),
        };
        let drawn = shots.draw(&labels, &task.labels, run.seed).map_err(tune)?;
        let which = drawn.train.iter().chain(&drawn.validation);
        Ok(Chosen {
            task,
            examples: which.map(|&i| all[i].clone()).collect(),
            train: drawn.train.len(),
        })
    }
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

/// Says what a run would cost, on the servers' model or on one that is at hand and could be shared.
pub fn plan(args: &PlanArgs) -> Result<()> {
    let (run, drawn) = (&args.run, Chosen::draw(&args.run)?);
    let (config, words) = match run.servers.servers.is_empty() {
        false => {
            let (addresses, station) = (run.servers.addresses()?, run.servers.station(Role::DataOwner)?);
            let public = run.on_servers(&station, &addresses)?;
            let words = public.words()?;
            (public.config, words)
        }
        true => {
            let checkpoint = run.open()?;
            let ready = run
                .calibration
                .ready(&checkpoint, run.attention.attention(), run.tokens)?;
            (ready.config, checkpoint.tokenizer)
        }
    };
    let (_, _, shape) = run.lay_out(&config, &words, &drawn)?;
    let comparison = comparison(&config, &shape, &run.servers.network)?;
    super::plan::print(
        &config,
        &shape,
        comparison,
        &run.settings(),
        &run.servers.network,
        args.json,
    )
}

/// The fingerprint of the model that is asked for, of those that the servers have.
pub fn find(models: &[Listed], name: Option<&str>) -> Result<String> {
    let known = |models: &[&Listed]| -> String {
        let one = |m: &&Listed| {
            format!(
                "{} ({})",
                m.name,
                m.fingerprint.get(..12).unwrap_or(&m.fingerprint)
            )
        };
        models.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let fits = |m: &&Listed| name.is_none_or(|n| m.name == n || m.fingerprint.starts_with(n));
    let fit: Vec<&Listed> = models.iter().filter(fits).collect();
    match fit[..] {
        [model] => Ok(model.fingerprint.clone()),
        [] => Err(Error::Input(format!(
            "both servers have {}; have its owner `veiltune share` the model, or give another name to --model",
            match models.is_empty() {
                true => "no model".into(),
                false => known(&models.iter().collect::<Vec<_>>()),
            }
        ))),
        _ => Err(Error::Input(format!(
            "the servers have {}: say which one with --model, by its name or the beginning of its fingerprint",
            known(&fit)
        ))),
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
    let program = Tuning {
        model: config,
        shape,
        comparison: Comparison::Fss,
        weights: None,
        known: None,
    };
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
    let program = Tuning {
        model: &ready.config,
        shape: &shape,
        comparison: Comparison::Fss,
        weights: Some(&ready.weights),
        known: None,
    };
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

/// The data owner's part as a clear interpreter takes it.
pub fn texts(ready: &Ready, rows: &Rows, labels: &[u32]) -> Result<Texts> {
    let mut ids = rows.ids.clone();
    ids.extend_from_slice(labels);
    Ok(Texts {
        words: model::rows(&ready.table, table_width(&ready.config), &ids)?,
        keep: rows.keep.clone(),
    })
}

/// Texts that are measured at a time.
const AT_ONCE: usize = 32;

/// The task's metric of each prompt on these texts, of which those count as wrong that leave the ranges of fixed point.
fn measure<B: InTheClear>(
    ground: &Ground,
    ready: &Ready,
    model: &Arc<LanguageModel<B>>,
    examples: &[&Example],
    prompts: &[Prompt],
) -> Result<Vec<f64>> {
    let answers: Vec<usize> = examples.iter().map(|e| e.label).collect();
    let (classes, metric) = (ground.task.labels.len(), ground.task.metric);
    let mut logits = logits(ground, ready, model, examples, prompts)?;
    for logits in &mut logits {
        let mut left = 0;
        for (logits, answer) in logits.chunks_mut(classes).zip(&answers) {
            if logits.iter().any(|l| l.is_nan()) {
                logits.fill(0.0);
                logits[(answer + 1) % classes] = 1.0;
                left += 1;
            }
        }
        if left > 0 {
            let of = examples.len();
            tell(&format!(
                "{left} of {of} texts leave the calibrated ranges and count as wrong; --margin widens them"
            ));
        }
    }
    let score = |l: &Vec<f32>| Score::of(l, &answers, classes, Loss::CrossEntropy, metric).metric;
    Ok(logits.iter().map(score).collect())
}

/// The task's metric, on `test`, of a linear classifier that is fitted to the texts that are tuned on: [`Linear`].
fn linear(ground: &Ground, ready: &Ready, shape: &Shape, chosen: &Chosen, test: &[&Example]) -> Result<f64> {
    let all: Vec<&Example> = chosen.examples.iter().collect();
    let (learned, validated) = all.split_at(chosen.train);
    let mut sets = Vec::new();
    for examples in [learned, validated, test] {
        let labels: Vec<usize> = examples.iter().map(|e| e.label).collect();
        sets.push((pooled(ground, ready, shape, examples)?, labels));
    }
    let [learned, validated, test] = [0, 1, 2].map(|i| Labelled {
        features: &sets[i].0,
        labels: &sets[i].1,
    });
    let (classes, metric) = (ground.task.labels.len(), ground.task.metric);
    let linear = Linear::fit(learned, validated, classes, metric).map_err(tune)?;
    let logits = linear.logits(test.features);
    Ok(Score::of(&logits, test.labels, classes, Loss::CrossEntropy, metric).metric)
}

/// Features of the bare texts, `[texts, hidden]`, in float: [`Tuning::pooled`].
fn pooled(ground: &Ground, ready: &Ready, shape: &Shape, examples: &[&Example]) -> Result<Vec<f32>> {
    let b = Plain::new();
    let program = Tuning {
        model: &ready.config,
        shape,
        comparison: Comparison::Fss,
        weights: Some(&ready.weights),
        known: None,
    };
    let loaded = program.load(&b)?;
    let special = ground.words.special();
    let begin = match ready.config.family.causal() {
        true => special.bos,
        false => special.cls,
    };
    let (width, limit) = (table_width(&ready.config), ground.limit());
    let mut features = Vec::new();
    for example in examples {
        let mut ids: Vec<u32> = begin.into_iter().collect();
        for text in std::iter::once(&example.text_a).chain(&example.text_b) {
            ids.extend(ground.words.encode(text)?);
            ids.extend(special.sep);
        }
        ids.truncate(limit);
        if ids.is_empty() {
            return Err(Error::Input("a text without words that the model knows".into()));
        }
        features.extend(program.pooled(&b, &loaded, &model::rows(&ready.table, width, &ids)?)?);
    }
    Ok(features)
}

/// Each prompt's logits `[texts, labels]`, in the clear; NaN of a text that takes a prompt out of the ranges of fixed point.
pub fn logits<B: InTheClear>(
    ground: &Ground,
    ready: &Ready,
    model: &Arc<LanguageModel<B>>,
    examples: &[&Example],
    prompts: &[Prompt],
) -> Result<Vec<Vec<f32>>> {
    let mut logits = vec![Vec::new(); prompts.len()];
    for some in examples.chunks(AT_ONCE) {
        let all = logits_at_once(ground, ready, model, some, prompts)?;
        for (list, mut logits) in logits.iter_mut().zip(all) {
            list.append(&mut logits);
        }
    }
    Ok(logits)
}

fn logits_at_once<B: InTheClear>(
    ground: &Ground,
    ready: &Ready,
    model: &Arc<LanguageModel<B>>,
    examples: &[&Example],
    prompts: &[Prompt],
) -> Result<Vec<Vec<f32>>> {
    let rows = ground.rows(examples)?;
    let shape = ground.shape(&rows, examples.len(), prompts.len(), 1);
    let program = Tuning {
        model: &ready.config,
        shape: &shape,
        comparison: Comparison::Fss,
        weights: Some(&ready.weights),
        known: None,
    };
    let mut clear = Clear::new(program, model, &texts(ready, &rows, &ground.labels()?)?)?;
    let all = clear
        .logits(Split::Train, prompts)
        .map_err(|e| Error::Input(e.to_string()))?;
    let each = examples.len() * ground.task.labels.len();
    let mut logits: Vec<Vec<f32>> = all.chunks(each).map(<[f32]>::to_vec).collect();
    // One text out of range must not take the others with it.
    let (first, second) = examples.split_at(examples.len() / 2);
    for (prompt, logits) in prompts.iter().zip(&mut logits) {
        if logits.iter().any(|l| l.is_nan()) && !first.is_empty() {
            logits.clear();
            for half in [first, second] {
                let one = std::slice::from_ref(prompt);
                logits.extend(logits_at_once(ground, ready, model, half, one)?.concat());
            }
        }
    }
    Ok(logits)
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
