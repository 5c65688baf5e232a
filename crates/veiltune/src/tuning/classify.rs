//! `veiltune classify --text`: private inference with a tuned prompt.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use veiltune_tune::{Artefact, Example, answer};
use veiltune_wire::Network;

use super::ground::Ground;
use super::layout::tune;
use super::owner::{self, Addresses, Encoded, Remote};
use super::program::table_rows;
use super::servers::{Role, Station};
use super::tune::{comparison, new_run};
use crate::inputs;
use crate::report::{aligned, print};
use crate::{Error, Result};

/// What `veiltune classify` takes for texts.
#[derive(Args, Debug)]
pub struct TextArgs {
    /// Texts, one a line (pairs with a tab between), to classify instead of images: with an adapter for texts, or with a --prompt
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Folder of the tuned prompt that `veiltune tune` wrote
    #[arg(long, value_name = "DIR", requires_all = ["text", "servers", "assistant"])]
    pub prompt: Option<PathBuf>,
    /// Of a --prompt: addresses of server 0 and server 1, HOST:PORT,HOST:PORT
    #[arg(
        long,
        value_name = "ADDR,ADDR",
        value_delimiter = ',',
        num_args = 1,
        requires = "prompt"
    )]
    pub servers: Vec<String>,
    /// Of a --prompt: address of the assistant, HOST:PORT
    #[arg(long, value_name = "ADDR", requires = "prompt")]
    pub assistant: Option<String>,
    /// Of a --prompt: most tokens of a text, prompt and template included; longer ones are cut
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub tokens: usize,
    /// Of a --prompt: rows are as long as the longest, rounded up to a multiple of this
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub bucket: usize,
}

/// One text's answer. Its label and confidence are the data owner's.
#[derive(Serialize)]
pub struct Row {
    /// Number of the line, from 1.
    pub line: usize,
    /// The label.
    pub label: String,
    /// Of the label among all, by the softmax of the label words' logits.
    pub confidence: f64,
}

/// The answer.
#[derive(Serialize)]
struct Answer {
    model: String,
    texts: usize,
    cut: usize,
    seconds: f64,
    /// To and from the three others.
    bytes: [u64; 2],
    results: Vec<Row>,
}

/// Runs it.
pub fn run(
    args: &TextArgs,
    keys: &std::path::Path,
    network: Network,
    wait: f64,
    batch: usize,
    json: bool,
) -> Result<()> {
    let (Some(file), Some(dir), Some(assistant)) = (&args.text, &args.prompt, &args.assistant) else {
        return Err(Error::Input(
            "give --text, --prompt, --servers and --assistant together".into(),
        ));
    };
    let servers = <[String; 2]>::try_from(args.servers.clone()).map_err(|given| {
        Error::Input(format!(
            "{} addresses of servers; give two to --servers",
            given.len()
        ))
    })?;
    let addresses = Addresses {
        servers,
        assistant: assistant.clone(),
    };
    let wait = Duration::try_from_secs_f64(wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
    let station = Station::new(Role::DataOwner, keys, network, wait)?;
    let artefact = Artefact::read(dir).map_err(tune)?;
    let lines = inputs::lines(file, artefact.task.pairs)?;
    let example = |line: &inputs::Line| Example {
        text_a: line.first.clone(),
        text_b: line.second.clone(),
        label: 0,
    };
    let examples: Vec<Example> = lines.iter().map(example).collect();
    let start = std::time::Instant::now();
    let labelled = classify(&station, &addresses, &artefact, &examples, args, batch, network)?;
    let answer = Answer {
        model: artefact.base_model.clone(),
        texts: examples.len(),
        cut: labelled.cut,
        seconds: start.elapsed().as_secs_f64(),
        bytes: labelled.bytes,
        results: labelled
            .rows
            .into_iter()
            .zip(&lines)
            .map(|(row, line)| Row {
                line: line.number,
                ..row
            })
            .collect(),
    };
    print(json, &answer, || {
        let mut rows = vec![["line", "label", "confidence"].map(String::from)];
        rows.extend(answer.results.iter().map(|r| {
            [
                r.line.to_string(),
                r.label.clone(),
                format!("{:.1} %", 100.0 * r.confidence),
            ]
        }));
        let mut text = aligned(&rows, &[0, 2]);
        if answer.cut > 0 {
            text += &format!("{}\n", labelled.cutting);
        }
        text + &format!(
            "{:.2} s, sent {:.2} MB, received {:.2} MB\n",
            answer.seconds,
            answer.bytes[0] as f64 / 1e6,
            answer.bytes[1] as f64 / 1e6
        )
    })
}

/// What the data owner learns, and what it took.
pub struct Labelled {
    rows: Vec<Row>,
    /// Texts that were cut.
    cut: usize,
    /// The same in words.
    cutting: String,
    /// To and from the three others.
    bytes: [u64; 2],
}

/// Classifies texts on the servers.
pub fn classify(
    station: &Station,
    addresses: &Addresses,
    artefact: &Artefact,
    examples: &[Example],
    args: &TextArgs,
    batch: usize,
    network: Network,
) -> Result<Labelled> {
    let models = owner::models(station, addresses)?;
    let fingerprint = owner::find(&models, artefact.base_model_sha256.as_deref()).map_err(|_| {
        Error::Input(format!(
            "the prompt was tuned on {} as it was then shared, which the servers do not have; tune it on a model that they \
             have, or have its owner keep the shares",
            artefact.base_model
        ))
    })?;
    let public = owner::model(station, addresses, &fingerprint)?;
    let words = public.words()?;
    let ground = Ground {
        config: &public.config,
        words: &words,
        task: &artefact.task,
        slot: artefact.slot(),
        tokens: args.tokens,
        bucket: args.bucket,
    };
    let all: Vec<&Example> = examples.iter().collect();
    let rows = ground.rows(&all)?;
    let labels = ground.labels()?;
    let (mut logits, mut bytes) = (Vec::new(), [0, 0]);
    // Rows of all batches are of one length, which says nothing of a batch's texts.
    for batch in rows.batches(batch) {
        let shape = ground.shape(&batch, batch.len(), 1, 1);
        shape.check(&public.config)?;
        let comparison = comparison(&public.config, &shape, &network)?;
        let run = new_run(&public, shape, comparison)?;
        let texts = Encoded {
            ids: [&batch.ids[..], &labels].concat(),
            keep: batch.keep,
        };
        let mut remote = Remote::begin(station, addresses, &run, table_rows(&public.config), &texts)?;
        let some = remote
            .logits(super::program::Pass::Generation, &artefact.prompt.0)
            .inspect_err(|e| remote.abort(&e.for_peer()))?;
        logits.extend(some);
        let [sent, received] = remote.counter()();
        bytes = [bytes[0] + sent, bytes[1] + received];
        remote.end()?;
    }
    let classes = artefact.task.labels.len();
    let row = |(i, logits): (usize, &[f32])| {
        let best = answer(logits);
        let sum: f64 = logits.iter().map(|l| f64::from(l - logits[best]).exp()).sum();
        Row {
            line: i + 1,
            label: artefact.task.labels[best].clone(),
            confidence: 1.0 / sum,
        }
    };
    let results = logits.chunks(classes).enumerate().map(row).collect();
    Ok(Labelled {
        rows: results,
        cut: rows.cut,
        cutting: ground.cut(&rows),
        bytes,
    })
}
