//! What the commands of prompt tuning take.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use veiltune_hub::Tokenizer;
use veiltune_nn::language::{Attention, LanguageCheckpoint, LanguageConfig};
use veiltune_tune::{Prompt, Settings, Slot, Task};
use veiltune_wire::Network;

use super::ground::{Chosen, Ground, initial};
use super::layout::Rows;
use super::model::{self, Calibration, Ready};
use super::owner::{self, Addresses};
use super::program::{Mode, Shape};
use super::servers::{Role, Station};
use super::store::PublicModel;
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
    /// Its name, as in `--interpreter`.
    pub fn name(self) -> &'static str {
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
    pub task: String,
    /// Labelled texts, `text<TAB>label` a line or in the layout of the task
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    #[command(flatten)]
    pub servers: Servers,
    /// Which of the servers' models, by its name [default: the only one]; or, without --servers, the folder of a model to tune on in
    /// the clear
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    #[command(flatten)]
    pub attention: AttentionArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Texts of each class to tune on, and as many others to validate on
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub shots: usize,
    /// Texts of each class to validate on [default: as --shots]
    #[arg(long, value_name = "N")]
    pub validation_shots: Option<usize>,
    /// Which texts are drawn, and what the optimiser tries
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub prompt_tokens: usize,
    /// How the prompt meets a text
    #[arg(long, value_enum, default_value = "add")]
    pub mode: Mode,
    /// Text whose tokens stand where the prompt is added [default: the task's, or one that names its words]
    #[arg(long, value_name = "TEXT")]
    pub initial_text: Option<String>,
    /// Most tokens of a row, prompt and template included; longer texts are cut
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub tokens: usize,
    /// Rows are as long as the longest, rounded up to a multiple of this: servers see no more of a text's length
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub bucket: usize,
    /// Prompts of a generation
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub population: usize,
    /// Prompts that share a forward pass: fewer need less memory and more rounds [default: all of a generation]
    #[arg(long, value_name = "N")]
    pub together: Option<usize>,
    /// Prompts to evaluate in all
    #[arg(long, default_value_t = 8000, value_name = "N")]
    pub budget: usize,
    /// Evaluations between validations
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub validate_every: usize,
}

impl RunArgs {
    /// What stands where the prompt goes.
    pub fn slot(&self, words: &Tokenizer, task: &Task) -> Result<Slot> {
        Ok(match self.mode {
            Mode::Add => {
                let text = self.initial_text.as_deref();
                Slot::Add(initial(words, task, text, self.prompt_tokens)?)
            }
            Mode::Concatenate => Slot::Concatenate(self.prompt_tokens),
        })
    }

    /// What its cost depends on.
    pub fn settings(&self) -> Settings {
        Settings {
            population: self.population,
            budget: self.budget,
            validate_every: self.validate_every,
            seed: self.seed,
            ..Settings::default()
        }
    }

    /// The one of the servers' models that is asked for.
    pub fn on_servers(&self, station: &Station, addresses: &Addresses) -> Result<PublicModel> {
        let fingerprint = owner::find(&owner::models(station, addresses)?, self.model.as_deref())?;
        owner::model(station, addresses, &fingerprint)
    }

    /// The model that is at hand.
    pub fn open(&self) -> Result<LanguageCheckpoint> {
        let name = self.model.as_deref().ok_or_else(|| {
            Error::Input(
                "give --servers and --assistant to tune privately, or --model to tune in the clear".into(),
            )
        })?;
        model::open(name)
    }

    /// The texts as rows for a model, and what its owner's servers are told of them.
    pub fn lay_out<'a>(
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
    pub fn start(&self, hidden: usize, deviation: f64) -> Prompt {
        match self.mode {
            Mode::Add => Prompt(vec![0.0; self.prompt_tokens * hidden]),
            Mode::Concatenate => Prompt::random(self.prompt_tokens, hidden, deviation, self.seed),
        }
    }
}
