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

use super::ground::{Ground, initial};
use super::layout::tune;
use super::servers::Role;
use crate::progress::tell;
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

/// The files that the people of the demonstration have.
struct Files {
    /// The model owner's.
    model: PathBuf,
    /// The data owner's task, labelled texts to tune on, and texts to classify afterwards, one a line.
    task: PathBuf,
    shots: PathBuf,
    texts: PathBuf,
}

impl Files {
    /// Writes them to `dir`, with a folder of keys for each role.
    fn write(dir: &Path, test: &[Example]) -> Result<Files> {
        let model = dir.join("model");
        std::fs::create_dir(&model).map_err(Error::io("a folder for the model"))?;
        for (name, bytes) in MODEL {
            put(&model, name, bytes)?;
        }
        let authority = Authority::new()?;
        for role in Role::ALL {
            let keys = dir.join(role.name());
            veiltune_hub::files::private_folder(&keys)?;
            authority.issue(&role.identity())?.save(&keys)?;
        }
        let texts: String = test.iter().map(|e| format!("{}\n", e.text_a)).collect();
        Ok(Files {
            model,
            task: put(dir, "task.json", TASK)?,
            shots: put(dir, "shots.tsv", SHOTS)?,
            texts: put(dir, "texts.txt", texts.as_bytes())?,
        })
    }
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(Error::io(path.display().to_string()))?;
    Ok(path)
}

/// The assistant and the two servers at work, and what the others ask of them.
struct Stage<'a> {
    dir: &'a Path,
    args: &'a DemoTuneArgs,
    servers: Vec<Running>,
    /// Of the assistant, server 0 and server 1.
    addresses: Vec<String>,
}

impl<'a> Stage<'a> {
    fn open(dir: &'a Path, args: &'a DemoTuneArgs) -> Result<Stage<'a>> {
        let mut stage = Stage {
            dir,
            args,
            servers: Vec::new(),
            addresses: Vec::new(),
        };
        stage.start("assistant", Role::Assistant, &[])?;
        let assistant = stage.addresses[0].clone();
        let first = ["--number", "0", "--assistant", &assistant];
        stage.start("server", Role::Server0, &first)?;
        let peer = stage.addresses[1].clone();
        let second = ["--number", "1", "--assistant", &assistant, "--peer", &peer];
        stage.start("server", Role::Server1, &second)?;
        Ok(stage)
    }

    fn command(&self, name: &str, role: Role) -> Result<Command> {
        let own = std::env::current_exe().map_err(Error::io("finding this program"))?;
        let mut command = Command::new(own);
        command
            .arg(name)
            .arg("--keys")
            .arg(self.dir.join(role.name()))
            .arg("--network")
            .arg(self.args.network.to_string());
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

    /// Runs a command that calls all three to its end; its standard output. A quiet one says only why it failed.
    fn call(
        &self,
        name: &str,
        role: Role,
        quiet: bool,
        more: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<String> {
        let [assistant, first, second] = &self.addresses[..] else {
            return Err(Error::Input("a server is missing".into()));
        };
        let mut command = self.command(name, role)?;
        command
            .arg("--servers")
            .arg(format!("{first},{second}"))
            .arg("--assistant")
            .arg(assistant)
            .args(["--tokens", &TOKENS.to_string()]);
        more(&mut command).stdout(Stdio::piped());
        if quiet {
            command.stderr(Stdio::piped());
        }
        let output = command
            .spawn()
            .and_then(Child::wait_with_output)
            .map_err(Error::io(format!("running `veiltune {name}`")))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(Error::Input(format!(
                "`veiltune {name}` failed ({}) {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ))),
        }
    }

    /// The model owner's command; the model's fingerprint.
    fn share(&self, files: &Files) -> Result<String> {
        let shared = self.call("share", Role::ModelOwner, true, |c| {
            c.arg("--model").arg(&files.model)
        })?;
        Ok(shared.trim().rsplit(' ').next().unwrap_or_default().to_owned())
    }

    /// The data owner's, who gets a prompt in `prompt`.
    fn tune(&self, files: &Files, prompt: &Path) -> Result<Tuned> {
        let number = |option, value: usize| [String::from(option), value.to_string()];
        let numbers = [
            number("--prompt-tokens", PROMPT),
            number("--dimension", DIMENSION),
            number("--budget", self.args.budget),
            number("--together", self.args.together),
        ];
        let tuned = self.call("tune", Role::DataOwner, self.args.json, |c| {
            c.arg("--task")
                .arg(&files.task)
                .arg("--data")
                .arg(&files.shots)
                .arg("--output")
                .arg(prompt)
                .args(numbers.as_flattened())
                .args(["--seed", &self.args.seed.to_string(), "--json"])
        })?;
        understood(&tuned)
    }

    /// The data owner's again: a label for each text.
    fn classify(&self, files: &Files, prompt: &Path) -> Result<Vec<String>> {
        let answer = self.call("classify", Role::DataOwner, self.args.json, |c| {
            c.arg("--text")
                .arg(&files.texts)
                .arg("--prompt")
                .arg(prompt)
                .arg("--json")
        })?;
        let answer: Classified = understood(&answer)?;
        Ok(answer.results.into_iter().map(|r| r.label).collect())
    }
}

fn understood<'a, T: Deserialize<'a>>(answer: &'a str) -> Result<T> {
    serde_json::from_str(answer).map_err(|e| Error::Mismatch(format!("an answer is not understood ({e})")))
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

/// Runs it.
pub fn run(args: &DemoTuneArgs) -> Result<()> {
    let dir = TempDir::new().map_err(Error::io("a folder for the demonstration"))?;
    let at = dir.path();
    let task = Task::parse("the demonstration", TASK).map_err(tune)?;
    let test = task.examples(&put(at, "test.tsv", TEST)?).map_err(tune)?;
    let files = Files::write(at, &test)?;
    tell("starting the assistant and two servers");
    let stage = Stage::open(at, args)?;

    tell("the model's owner shares its model between the servers");
    let start = Instant::now();
    let fingerprint = stage.share(&files)?;
    let share_seconds = start.elapsed().as_secs_f64();

    tell("the data owner tunes a prompt on the servers");
    let (before, after) = (at.join("untuned"), at.join("tuned"));
    let checkpoint = LanguageCheckpoint::open(&files.model)?;
    untuned(&checkpoint, &task, fingerprint)?
        .write(&before)
        .map_err(tune)?;
    let start = Instant::now();
    let tuned = stage.tune(&files, &after)?;
    let tune_seconds = start.elapsed().as_secs_f64();

    tell(
        "the data owner classifies texts that it has not tuned on, with the initial and with the tuned prompt",
    );
    let start = Instant::now();
    let answers = [stage.classify(&files, &before)?, stage.classify(&files, &after)?];
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

/// The prompt before tuning: nothing is added to the initial tokens.
fn untuned(checkpoint: &LanguageCheckpoint, task: &Task, fingerprint: String) -> Result<Artefact> {
    Ok(Artefact {
        base_model: "model".into(),
        base_model_sha256: Some(fingerprint),
        prompt: Prompt(vec![0.0; PROMPT * checkpoint.config.hidden_size]),
        tokens: PROMPT,
        mode: Mode::Add {
            tokens: initial(&checkpoint.tokenizer, task, None, PROMPT)?,
        },
        task: task.clone(),
        family: Family::Masked,
        attention: serde_json::json!(Attention::Softmax),
    })
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
        let ground = Ground {
            config: &ready.config,
            words: &checkpoint.tokenizer,
            task,
            slot: artefact.slot(),
            tokens: TOKENS,
            bucket: 8,
        };
        let logits = super::measure::logits(
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
