//! `veiltune demo tune`: a whole tuning run with the five roles as processes on this machine, and what the tuned prompt is worth
//! on texts that it has not seen.
//!
//! This process plays no part in the protocol: it starts the commands that five people would give on five machines, and holds
//! the true labels against what the data owner's process answers.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use veiltune_engine::Plain;
use veiltune_nn::language::{Attention, LanguageCheckpoint};
use veiltune_tune::{Artefact, Example, Family, Mode, Prompt, Task};
use veiltune_wire::Network;
use veiltune_wire::pki::Authority;

use super::layout::tune;
use super::servers::Role;
use super::tune::initial;
use crate::report::{aligned, print};
use crate::{Error, Result};

/// The embedded model, made by `fortunes` of the crate that trains; see `assets/demo-text/README.md`.
const MODEL: [(&str, &[u8]); 3] = [
    (
        "config.json",
        include_bytes!("../../../../assets/demo-text/config.json"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../../assets/demo-text/tokenizer.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../../assets/demo-text/model.safetensors"),
    ),
];
const TASK: &[u8] = include_bytes!("../../../../assets/demo-text/task.json");
/// Labelled texts to tune and validate on, and others to measure on.
const SHOTS: &[u8] = include_bytes!("../../../../assets/demo-text/shots.tsv");
const TEST: &[u8] = include_bytes!("../../../../assets/demo-text/test.tsv");

/// What `veiltune demo tune` takes.
#[derive(Args, Debug)]
pub struct DemoTuneArgs {
    /// Network to emulate on every link: none, lan, wan, secp-lan, secp-wan-a, secp-wan-b, or RATE_MBIT:DELAY_US
    #[arg(long, default_value = "none", value_name = "NETWORK")]
    network: Network,
    /// Prompts to evaluate
    #[arg(long, default_value_t = 160, value_name = "N")]
    budget: usize,
    /// Prompts that share a forward pass: fewer take less memory and more rounds
    #[arg(long, default_value_t = 2, value_name = "N")]
    together: usize,
    /// Which texts are drawn, and what the optimiser tries
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// A JSON object on standard output instead of the text
    #[arg(long)]
    json: bool,
}

/// Sizes of the demonstration: the model is small, and two minutes are enough.
const PROMPT: usize = 5;
const DIMENSION: usize = 30;
const TOKENS: usize = 32;

/// What it shows.
#[derive(Serialize)]
struct Report {
    topics: Vec<String>,
    shots: usize,
    test_texts: usize,
    evaluations: usize,
    /// Shares of the test texts that were answered right.
    accuracy_before: f64,
    accuracy_after: f64,
    /// Test texts on which the private answers and those of plain float are the same, before and after.
    agree: usize,
    agree_of: usize,
    share_seconds: f64,
    tune_seconds: f64,
    classify_seconds: f64,
    /// To and from the data owner while tuning.
    bytes: [u64; 2],
}

/// A process that ends with this one.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Stage<'a> {
    dir: &'a Path,
    network: Network,
    servers: Vec<Running>,
    addresses: Vec<String>,
}

impl Stage<'_> {
    fn command(&self, name: &str, role: Role) -> Result<Command> {
        let own = std::env::current_exe().map_err(Error::io("finding this program"))?;
        let mut command = Command::new(own);
        command
            .arg(name)
            .arg("--keys")
            .arg(self.dir.join(role.name()))
            .arg("--network")
            .arg(self.network.to_string());
        Ok(command)
    }

    /// Starts a server or the assistant, and waits until it can be called.
    fn start(&mut self, name: &str, role: Role, more: &[&str]) -> Result<()> {
        let mut command = self.command(name, role)?;
        command
            .args(["--listen", "127.0.0.1:0", "--with-parent", "--store"])
            .arg(self.dir.join(format!("{}-store", role.name())))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(Error::io(format!("starting the {}", role.name())))?;
        let out = child.stdout.take();
        self.servers.push(Running(child));
        let mut line = String::new();
        if let Some(out) = out {
            BufReader::new(out)
                .read_line(&mut line)
                .map_err(Error::io("hearing of a server"))?;
        }
        match line.trim().strip_prefix("listening at ") {
            Some(address) => self.addresses.push(address.to_owned()),
            None => {
                return Err(Error::Input(format!("the {} did not start", role.name())));
            }
        }
        Ok(())
    }

    /// Runs a command that calls all three to its end; its standard output.
    fn call(&self, name: &str, role: Role, more: &[&std::ffi::OsStr], quiet: bool) -> Result<String> {
        let [assistant, first, second] = &self.addresses[..] else {
            return Err(Error::Input("a server is missing".into()));
        };
        let mut command = self.command(name, role)?;
        command
            .arg("--servers")
            .arg(format!("{first},{second}"))
            .arg("--assistant")
            .arg(assistant)
            .args(more);
        if quiet {
            command.stderr(Stdio::null());
        }
        let output = command
            .stdout(Stdio::piped())
            .spawn()
            .and_then(Child::wait_with_output)
            .map_err(Error::io(format!("running `veiltune {name}`")))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(Error::Input(format!(
                "`veiltune {name}` failed ({})",
                output.status
            ))),
        }
    }
}

#[derive(Deserialize)]
struct Tuned {
    evaluations: usize,
    bytes: [u64; 2],
}

#[derive(Deserialize)]
struct Classified {
    results: Vec<Label>,
}

#[derive(Deserialize)]
struct Label {
    label: String,
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(Error::io(path.display().to_string()))?;
    Ok(path)
}

/// Runs it.
pub fn run(args: &DemoTuneArgs) -> Result<()> {
    let dir = TempDir::new().map_err(Error::io("a folder for the demonstration"))?;
    let at = dir.path();
    let model = at.join("model");
    std::fs::create_dir(&model).map_err(Error::io("a folder for the model"))?;
    for (name, bytes) in MODEL {
        put(&model, name, bytes)?;
    }
    let task_file = put(at, "task.json", TASK)?;
    let shots_file = put(at, "shots.tsv", SHOTS)?;
    let task = Task::parse("the demonstration", TASK).map_err(tune)?;
    let test = task.examples(&put(at, "test.tsv", TEST)?).map_err(tune)?;
    let texts: String = test.iter().map(|e| format!("{}\n", e.text_a)).collect();
    let texts = put(at, "texts.txt", texts.as_bytes())?;
    let authority = Authority::new()?;
    for role in Role::ALL {
        let keys = at.join(role.name());
        veiltune_hub::files::private_folder(&keys)?;
        authority.issue(&role.identity())?.save(&keys)?;
    }

    let mut stage = Stage {
        dir: at,
        network: args.network,
        servers: Vec::new(),
        addresses: Vec::new(),
    };
    let say = |text: &str| eprintln!("{text}");
    say("starting the assistant and two servers");
    stage.start("assistant", Role::Assistant, &[])?;
    let assistant = stage.addresses[0].clone();
    stage.start(
        "server",
        Role::Server0,
        &["--number", "0", "--assistant", &assistant],
    )?;
    let first = stage.addresses[1].clone();
    let more = ["--number", "1", "--assistant", &assistant, "--peer", &first];
    stage.start("server", Role::Server1, &more)?;

    say("the model's owner shares its model between the servers");
    let start = Instant::now();
    let tokens = TOKENS.to_string();
    let shared = stage.call(
        "share",
        Role::ModelOwner,
        &[
            "--model".as_ref(),
            model.as_ref(),
            "--tokens".as_ref(),
            tokens.as_ref(),
        ],
        true,
    )?;
    let share_seconds = start.elapsed().as_secs_f64();
    let fingerprint = shared.trim().rsplit(' ').next().unwrap_or_default().to_owned();

    // The prompt before tuning: nothing is added to the initial tokens.
    let checkpoint = LanguageCheckpoint::open(&model)?;
    let untuned = Artefact {
        base_model: "model".into(),
        base_model_sha256: Some(fingerprint),
        prompt: Prompt(vec![0.0; PROMPT * checkpoint.config.hidden_size]),
        tokens: PROMPT,
        mode: Mode::Add {
            tokens: initial(&checkpoint.tokenizer, &task, None, PROMPT)?,
        },
        task: task.clone(),
        family: Family::Masked,
        attention: serde_json::json!(Attention::Softmax),
    };
    let (before, after) = (at.join("untuned"), at.join("tuned"));
    untuned.write(&before).map_err(tune)?;

    say("the data owner tunes a prompt on the servers");
    let start = Instant::now();
    let (prompt, dimension) = (PROMPT.to_string(), DIMENSION.to_string());
    let (budget, seed, together) = (
        args.budget.to_string(),
        args.seed.to_string(),
        args.together.to_string(),
    );
    let tuned = stage.call(
        "tune",
        Role::DataOwner,
        &[
            "--task".as_ref(),
            task_file.as_ref(),
            "--data".as_ref(),
            shots_file.as_ref(),
            "--output".as_ref(),
            after.as_ref(),
            "--tokens".as_ref(),
            tokens.as_ref(),
            "--prompt-tokens".as_ref(),
            prompt.as_ref(),
            "--dimension".as_ref(),
            dimension.as_ref(),
            "--budget".as_ref(),
            budget.as_ref(),
            "--together".as_ref(),
            together.as_ref(),
            "--seed".as_ref(),
            seed.as_ref(),
            "--json".as_ref(),
        ],
        args.json,
    )?;
    let tune_seconds = start.elapsed().as_secs_f64();
    let parse = |e: serde_json::Error| Error::Mismatch(format!("an answer is not understood ({e})"));
    let tuned: Tuned = serde_json::from_str(&tuned).map_err(parse)?;

    say(
        "the data owner classifies texts that it has not tuned on, with the initial and with the tuned prompt",
    );
    let start = Instant::now();
    let mut answers = Vec::new();
    for prompt in [&before, &after] {
        let answer = stage.call(
            "classify",
            Role::DataOwner,
            &[
                "--text".as_ref(),
                texts.as_ref(),
                "--prompt".as_ref(),
                prompt.as_ref(),
                "--tokens".as_ref(),
                tokens.as_ref(),
                "--json".as_ref(),
            ],
            args.json,
        )?;
        let answer: Classified = serde_json::from_str(&answer).map_err(parse)?;
        answers.push(answer.results.into_iter().map(|r| r.label).collect::<Vec<_>>());
    }
    let classify_seconds = start.elapsed().as_secs_f64();
    let plain = plainly(&checkpoint, &task, &test, &[&before, &after])?;
    let right = |labels: &[String]| {
        let right = labels
            .iter()
            .zip(&test)
            .filter(|(l, e)| **l == task.labels[e.label]);
        right.count() as f64 / test.len().max(1) as f64
    };
    let agree = answers.iter().flatten().zip(plain.iter().flatten());
    let report = Report {
        topics: task.labels.clone(),
        shots: SHOTS.split(|b| *b == b'\n').filter(|l| !l.is_empty()).count(),
        test_texts: test.len(),
        evaluations: tuned.evaluations,
        accuracy_before: right(&answers[0]),
        accuracy_after: right(&answers[1]),
        agree: agree.filter(|(a, b)| a == b).count(),
        agree_of: 2 * test.len(),
        share_seconds,
        tune_seconds,
        classify_seconds,
        bytes: tuned.bytes,
    };
    print(args.json, &report, || report.text())
}

/// The labels that plain float gives with each prompt.
fn plainly(
    checkpoint: &LanguageCheckpoint,
    task: &Task,
    test: &[Example],
    prompts: &[&PathBuf],
) -> Result<Vec<Vec<String>>> {
    let how = super::model::Calibration {
        texts: &[],
        tokens: TOKENS,
        margin: 1.5,
    };
    let ready = super::model::ready(checkpoint, Attention::Softmax, &how)?;
    let model = super::evaluate::loaded::<Plain>(&ready)?;
    let examples: Vec<&Example> = test.iter().collect();
    let mut labels = Vec::new();
    for dir in prompts {
        let artefact = Artefact::read(dir).map_err(tune)?;
        let ground = super::tune::Ground {
            config: &ready.config,
            words: &checkpoint.tokenizer,
            task,
            slot: artefact.slot(),
            tokens: TOKENS,
            bucket: 8,
        };
        let logits = super::tune::logits(
            &ground,
            &ready,
            &model,
            &examples,
            std::slice::from_ref(&artefact.prompt),
        )?
        .remove(0);
        let each = logits.chunks(task.labels.len());
        labels.push(
            each.map(|l| task.labels[veiltune_tune::answer(l)].clone())
                .collect(),
        );
    }
    Ok(labels)
}

impl Report {
    fn text(&self) -> String {
        let percent = |v: f64| format!("{:.1} %", 100.0 * v);
        let rows = vec![
            ["", "right"].map(String::from),
            ["initial prompt".into(), percent(self.accuracy_before)],
            ["tuned prompt".into(), percent(self.accuracy_after)],
        ];
        let mut text = format!(
            "{} held-out texts on {}, answered privately:\n",
            self.test_texts,
            self.topics.join(", ")
        );
        text += &aligned(&rows, &[1]);
        text += &format!(
            "{} of {} answers are those of plain float\n",
            self.agree, self.agree_of
        );
        text += &format!(
            "shared the model in {:.1} s; {} evaluations in {:.1} s; classified in {:.1} s\n",
            self.share_seconds, self.evaluations, self.tune_seconds, self.classify_seconds
        );
        text + &format!(
            "the data owner sent {:.2} MB and received {:.2} MB while tuning\n",
            self.bytes[0] as f64 / 1e6,
            self.bytes[1] as f64 / 1e6
        )
    }
}
