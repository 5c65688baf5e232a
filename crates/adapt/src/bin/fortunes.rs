//! The embedded demonstration of prompt tuning, from the texts to the weights: a small BERT pretrained on sayings from Debian's
//! `fortunes`, and a few sayings of three topics that it never saw.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, decoders};
use veiltune_adapt::language::{self, Corpus, Part, Size, Text};
use veiltune_adapt::{Error, Result};
use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{Precision, Tokenizer, files, safetensors};
use veiltune_nn::language::{LanguageCheckpoint, LanguageModel};
use veiltune_tune::{
    Cause, Encoder, Evaluate, Example, Family, Labels, Projection, Prompt, Settings, Shots, Slot, Specials,
    Split, Task, Tokenize, Tuner, score,
};

/// Trains and measures the embedded demonstration of prompt tuning.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw the demonstration's texts, learn the vocabulary and pretrain the model.
    Make(Make),
    /// Accuracy on the held-out texts before and after tuning, in floating point.
    Evaluate(Measure),
}

#[derive(Args)]
struct Make {
    /// Folder of the package's text files, `usr/share/games/fortunes` in it.
    #[arg(long)]
    data: PathBuf,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Seed of what is drawn, and of training; the vocabulary's numbering varies from run to run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Words of the vocabulary.
    #[arg(long, default_value_t = 2500)]
    vocabulary: usize,
    /// Width of the hidden states.
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// Layers.
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// Attention heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Steps.
    #[arg(long, default_value_t = 1500)]
    steps: usize,
    /// Texts a step.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    rate: f32,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Draw texts and learn the vocabulary, but do not train.
    #[arg(long)]
    texts_only: bool,
}

#[derive(Args)]
struct Measure {
    /// Folder that was written.
    #[arg(long)]
    out: PathBuf,
    /// The task [default: the one in the folder].
    #[arg(long)]
    task: Option<PathBuf>,
    /// Runs, each with its own texts and random numbers.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Texts of each class to tune on, and as many others to validate on.
    #[arg(long, default_value_t = 16)]
    shots: usize,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 5)]
    prompt_tokens: usize,
    /// Coordinates that the optimiser moves.
    #[arg(long, default_value_t = 30)]
    dimension: usize,
    /// Prompts of a generation.
    #[arg(long, default_value_t = 20)]
    population: usize,
    /// Prompts to evaluate in all.
    #[arg(long, default_value_t = 300)]
    budget: usize,
    /// The optimiser's first step.
    #[arg(long, default_value_t = 1.0)]
    sigma: f64,
}

/// The files that are read, each a topic by its word; those of the demonstration first.
const TOPICS: [&str; 12] = [
    "computers",
    "food",
    "politics",
    "art",
    "education",
    "law",
    "literature",
    "love",
    "medicine",
    "science",
    "sports",
    "work",
];
/// How many of them the demonstration tells apart.
const CLASSES: usize = 3;
/// Files without a topic.
const OTHERS: [&str; 4] = ["kids", "pets", "platitudes", "wisdom"];
/// Sayings with one of these are left out of everything.
const COARSE: [&str; 66] = [
    "aliens",
    "anorexia",
    "arse",
    "ass",
    "assassination",
    "bastard",
    "bitch",
    "black",
    "boob",
    "bra",
    "breast",
    "catholic",
    "chinese",
    "christian",
    "cocaine",
    "condom",
    "dammit",
    "damn",
    "damned",
    "damsel",
    "drunk",
    "dumber",
    "fat",
    "fattening",
    "fuck",
    "gay",
    "girl",
    "god",
    "goddamn",
    "groupie",
    "hell",
    "hitler",
    "housewife",
    "idiot",
    "jew",
    "jewish",
    "jews",
    "kill",
    "lesbian",
    "mexico",
    "miniskirts",
    "murder",
    "naked",
    "nasally",
    "naughty",
    "nazi",
    "nude",
    "penalty",
    "penis",
    "piss",
    "pope",
    "puberty",
    "rape",
    "screw",
    "senility",
    "sex",
    "sexual",
    "shit",
    "suicide",
    "tart",
    "virgin",
    "white",
    "whore",
    "wife",
    "woman",
    "women",
];
/// Texts of each class to draw shots from, and held out.
const POOL: usize = 32;
const HELD_OUT: usize = 36;
/// Words of a drawn text.
const SHORTEST: usize = 6;
const LONGEST: usize = 16;
/// Most tokens of a row, in training and in the demonstration.
const TOKENS: usize = 32;

/// Ways in which pretraining says what a text is about, with nothing before them.
const WORDINGS: [&str; 8] = [
    "{topic} : {text}",
    "{text} ( {topic} )",
    "{text} -- from a book on {topic}",
    "a saying on {topic} : {text}",
    "{text} . that was {topic}",
    "more {topic} . {text}",
    "{text} see also : {topic} .",
    "the {topic} page : {text}",
];
/// The demonstration's template, which is no such way, and words for its topics, of which two are no names that pretraining gave.
const TEMPLATE: &str = "{prompt} {text} subject : {mask} .";
const LABELS: [&str; CLASSES] = ["computer", "food", "government"];

fn main() {
    veiltune_adapt::workers::restart_with(&[veiltune_adapt::workers::UNSPLIT]);
    let done = match Cli::parse().command {
        Command::Make(make) => make.run(),
        Command::Evaluate(measure) => measure.run(),
    };
    if let Err(e) = done {
        eprintln!("fortunes: {e}");
        std::process::exit(1);
    }
}

/// An error of a library that has its own.
fn other(e: impl std::fmt::Display) -> Error {
    Error::Settings(e.to_string())
}

impl Make {
    fn run(&self) -> Result<()> {
        let sayings = Sayings::read(&self.data, self.seed)?;
        let tokenizer = sayings.vocabulary(self.vocabulary)?;
        let json = tokenizer.to_json()?;
        files::write_json(&self.out.join("tokenizer.json"), &json)?;
        for (name, drawn) in [("shots.tsv", &sayings.pool), ("test.tsv", &sayings.held_out)] {
            let lines = drawn.iter().map(|(text, topic)| format!("{text}\t{topic}\n"));
            files::write_atomic(&self.out.join(name), lines.collect::<String>().as_bytes())?;
        }
        let words = TOPICS.iter().zip(LABELS);
        let words = words
            .map(|(topic, word)| (topic.to_string(), json!(word)))
            .collect();
        let task =
            json!({"name": "topics", "masked": TEMPLATE, "verbalizer": serde_json::Value::Object(words)});
        files::write_json(&self.out.join("task.json"), &task)?;
        let topics: Vec<u32> = TOPICS
            .iter()
            .map(|topic| match tokenizer.encode(topic)?[..] {
                [word] => Ok(word),
                _ => Err(other(format!("{topic} is not one word: enlarge the vocabulary"))),
            })
            .collect::<Result<_>>()?;
        let texts: Vec<Text> = sayings
            .training
            .iter()
            .map(|(text, topic)| {
                let words = tokenizer.encode(text)?;
                let topic = topic.map(|t| topics[t]);
                Ok(Text { words, topic })
            })
            .collect::<Result<_>>()?;
        println!(
            "{} texts of {} tokens to learn from, {} words",
            texts.len(),
            texts.iter().map(|t| t.words.len()).sum::<usize>(),
            tokenizer.len()
        );
        if self.texts_only {
            return Ok(());
        }
        let wordings = WORDINGS
            .iter()
            .map(|w| wording(&tokenizer, w))
            .collect::<Result<Vec<_>>>()?;
        let size = Size {
            vocabulary: tokenizer.len(),
            width: self.width,
            depth: self.depth,
            heads: self.heads,
            tokens: TOKENS,
        };
        let config = language::architecture(size);
        let corpus = Corpus {
            texts: &texts,
            wordings: &wordings,
            special: tokenizer.special(),
        };
        let settings = language::Settings {
            steps: self.steps,
            batch: self.batch,
            rate: self.rate,
            threads: self.threads,
            seed: self.seed,
        };
        let (start, mut sum) = (Instant::now(), 0.0);
        let tensors = language::pretrain(&config, &corpus, &settings, |step, loss| {
            sum += loss;
            if step.is_multiple_of(100) || step == self.steps {
                let mean = sum / ((step - 1) % 100 + 1) as f32;
                eprintln!("step {step}: loss {mean:.3}, {} s", start.elapsed().as_secs());
                sum = 0.0;
            }
        })?;
        safetensors::write(&self.out.join("model.safetensors"), &tensors, Precision::F16)?;
        files::write_json(&self.out.join("config.json"), &language::description(&config))?;
        let count: usize = tensors.values().map(|a| a.values.len()).sum();
        println!("{count} parameters");
        Ok(())
    }
}

/// The texts by their use.
struct Sayings {
    /// With the number of their topic.
    training: Vec<(String, Option<usize>)>,
    /// With their topic.
    pool: Vec<(String, &'static str)>,
    held_out: Vec<(String, &'static str)>,
}

impl Sayings {
    fn read(dir: &Path, seed: u64) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut training, mut pool, mut held_out) = (Vec::new(), Vec::new(), Vec::new());
        let mut seen = BTreeSet::new();
        for (number, topic) in TOPICS.iter().chain(&OTHERS).enumerate() {
            let mut sayings = entries(&dir.join(topic))?;
            // What stands in two files belongs to the first; what ends as another is a variant of it.
            sayings.retain(|text| {
                let words = plain(text);
                let words: Vec<&str> = words.split(' ').collect();
                seen.insert(words[words.len().saturating_sub(4)..].join(" "))
            });
            if number < CLASSES {
                sayings.shuffle(&mut rng);
                let short = |text: &String| (SHORTEST..=LONGEST).contains(&plain(text).split(' ').count());
                let (drawn, rest): (Vec<_>, Vec<_>) = sayings.into_iter().partition(short);
                let mut drawn = drawn.into_iter();
                pool.extend(drawn.by_ref().take(POOL).map(|text| (text, *topic)));
                held_out.extend(drawn.by_ref().take(HELD_OUT).map(|text| (text, *topic)));
                sayings = drawn.chain(rest).collect();
            }
            let number = (number < TOPICS.len()).then_some(number);
            training.extend(sayings.into_iter().map(|text| (text, number)));
        }
        let drawn: Vec<String> = pool
            .iter()
            .chain(&held_out)
            .map(|(text, _)| plain(text))
            .collect();
        // A longer text may quote a drawn one.
        training.retain(|(text, _)| {
            let text = plain(text);
            !drawn
                .iter()
                .any(|d| text.contains(d.as_str()) || d.contains(&text))
        });
        Ok(Sayings {
            training,
            pool,
            held_out,
        })
    }

    /// WordPiece, lower case, learnt from what the model learns from.
    fn vocabulary(&self, words: usize) -> Result<Tokenizer> {
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
        let special = special.map(|word| AddedToken::from(word, true)).to_vec();
        let model = WordPiece::builder()
            .unk_token("[UNK]".into())
            .build()
            .map_err(other)?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        let normalizer = BertNormalizer::new(true, true, None, true);
        tokenizer.with_normalizer(Some(normalizer)).map_err(other)?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        tokenizer.with_decoder(Some(decoders::wordpiece::WordPiece::default()));
        let mut trainer: TrainerWrapper = WordPieceTrainer::builder()
            .vocab_size(words)
            .show_progress(false)
            .special_tokens(special)
            .build()
            .into();
        let texts = self.training.iter().map(|(text, _)| text.as_str());
        // Topics and wordings are to be single words.
        let often = TOPICS
            .iter()
            .chain(&WORDINGS)
            .cycle()
            .take(50 * (TOPICS.len() + WORDINGS.len()));
        tokenizer
            .train(&mut trainer, texts.chain(often.copied()))
            .map_err(other)?;
        let json = tokenizer.to_string(false).map_err(other)?;
        Ok(Tokenizer::from_json("tokenizer.json", json.as_bytes())?)
    }
}

/// The sayings of a file, each on one line and without its source; none that is coarse, or not plain English text.
fn entries(path: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(files::read(path, 1 << 22)?).map_err(other)?;
    let mut all = Vec::new();
    for entry in text.split("\n%\n") {
        let lines = entry
            .lines()
            .take_while(|line| !line.trim_start().starts_with("-- "));
        let text: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
        let text = text.join(" ");
        let words = plain(&text);
        let coarse = words.split(' ').any(|word| COARSE.contains(&word));
        if !coarse && text.chars().all(|c| (' '..='~').contains(&c)) && words.split(' ').count() > 2 {
            all.push(text);
        }
    }
    Ok(all)
}

/// Lower-case words alone, by which texts are compared.
fn plain(text: &str) -> String {
    let words = text
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}

fn wording(tokenizer: &Tokenizer, text: &str) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for piece in text.split_inclusive('}') {
        let (words, part) = match piece.split_once('{') {
            Some((words, "text}")) => (words, Some(Part::Text)),
            Some((words, _)) => (words, Some(Part::Topic)),
            None => (piece, None),
        };
        let words = tokenizer.encode(words)?;
        parts.extend((!words.is_empty()).then_some(Part::Words(words)));
        parts.extend(part);
    }
    Ok(parts)
}

impl Measure {
    fn run(&self) -> Result<()> {
        let checkpoint = LanguageCheckpoint::open(&self.out)?;
        let task = self.task.clone().unwrap_or_else(|| self.out.join("task.json"));
        let task = Task::open(&task).map_err(other)?;
        let read = |name: &str| task.examples(&self.out.join(name)).map_err(other);
        let (pool, held_out) = (read("shots.tsv")?, read("test.tsv")?);
        let classes: Vec<usize> = pool.iter().map(|e| e.label).collect();
        let words = Words(&checkpoint.tokenizer);
        let usual = format!(
            "Which of these words fits the text best: {}?",
            task.words.join(", ")
        );
        let initial = checkpoint.tokenizer.encode(&usual)?;
        let slot = Slot::Add(initial.iter().copied().cycle().take(self.prompt_tokens).collect());
        let encoder = Encoder::new(&words, &task, Family::Masked, slot, TOKENS).map_err(other)?;
        let labels = encoder.words().map_err(other)?;
        let mut all = [0.0; 2];
        for seed in 0..self.seeds {
            let shots = Shots {
                train: self.shots,
                validation: self.shots,
            };
            let drawn = shots.draw(&classes, &task.labels, seed).map_err(other)?;
            let pick = |which: &[usize]| which.iter().map(|&i| &pool[i]).collect::<Vec<_>>();
            let splits = [
                pick(&drawn.train),
                pick(&drawn.validation),
                held_out.iter().collect(),
            ];
            let answers = splits
                .each_ref()
                .map(|s| s.iter().map(|e| e.label).collect::<Vec<_>>());
            let mut float = Float::new(&checkpoint, &encoder, &labels, &splits)?;
            let settings = Settings {
                population: self.population,
                sigma: self.sigma,
                budget: self.budget,
                seed,
                ..Settings::default()
            };
            let (loss, metric) = (settings.loss, settings.metric);
            let width = checkpoint.config.hidden_size;
            let projection =
                Projection::new(self.prompt_tokens, width, self.dimension, float.deviation, seed)
                    .map_err(other)?;
            let zero = Prompt(vec![0.0; self.prompt_tokens * width]);
            let own = Labels {
                classes: task.labels.len(),
                train: answers[0].clone(),
                validation: answers[1].clone(),
            };
            let start = Instant::now();
            let mut tuner = Tuner::new(settings, projection, own).map_err(other)?;
            let outcome = tuner
                .run(&mut float, &AtomicBool::new(false), &mut |_| ())
                .map_err(other)?;
            let prompts = [zero, outcome.prompt];
            let scores = score(
                &mut float,
                Split::Test,
                &prompts,
                &answers[2],
                task.labels.len(),
                loss,
                metric,
            );
            let scores = scores.map_err(other)?;
            println!(
                "seed {seed}: validation {:.3} -> {:.3}, held-out {:.3} -> {:.3} ({} texts), {:.1} s",
                outcome.initial.metric,
                outcome.best.score.metric,
                scores[0].metric,
                scores[1].metric,
                answers[2].len(),
                start.elapsed().as_secs_f64()
            );
            all.iter_mut()
                .zip(&scores)
                .for_each(|(sum, s)| *sum += s.metric / self.seeds as f64);
        }
        println!("mean: held-out {:.3} -> {:.3}", all[0], all[1]);
        Ok(())
    }
}

struct Words<'a>(&'a Tokenizer);

impl Tokenize for Words<'_> {
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, Cause> {
        self.0.encode(text).map_err(|e| Box::new(e) as Cause)
    }

    fn specials(&self) -> Specials {
        let s = self.0.special();
        Specials {
            cls: s.cls,
            sep: s.sep,
            mask: s.mask,
            bos: s.bos,
            pad: s.pad,
            unknown: s.unknown,
        }
    }
}

/// The model in floating point, on texts whose embeddings are at hand.
struct Float {
    model: LanguageModel<Plain>,
    splits: [Rows; 3],
    /// Of the labels' words.
    rows: Vec<f32>,
    bias: Vec<f32>,
    deviation: f64,
}

/// Texts whose prompts begin at one position and whose answers stand at another, with padding between and after.
struct Rows {
    count: usize,
    answer: usize,
    /// What enters the first layer, `[count, TOKENS, width]`.
    states: Vec<f32>,
    /// 1 where there is a token.
    keep: Vec<f32>,
}

impl Float {
    fn new(
        checkpoint: &LanguageCheckpoint,
        encoder: &Encoder<Words>,
        labels: &[u32],
        splits: &[Vec<&Example>; 3],
    ) -> Result<Self> {
        let b = Plain::new();
        let model = checkpoint.load(&b, Owner::Public, &checkpoint.config)?;
        let rows = |examples: &Vec<&Example>| -> Result<Rows> {
            let sequences = examples
                .iter()
                .map(|e| encoder.sequence(e).map_err(other))
                .collect::<Result<Vec<_>>>()?;
            let answer = sequences.iter().map(|s| s.answer).max().unwrap_or(0);
            let pad = checkpoint.tokenizer.special().pad.unwrap_or(0);
            let (mut ids, mut keep) = (Vec::new(), Vec::new());
            for s in &sequences {
                let (head, tail) = s.tokens.split_at(s.prompt.end);
                let gap = answer - s.answer;
                for (tokens, is) in [(head, 1.0), (&vec![pad; gap][..], 0.0), (tail, 1.0)] {
                    ids.extend_from_slice(tokens);
                    keep.extend(std::iter::repeat_n(is, tokens.len()));
                }
                let filled = ids.len().next_multiple_of(TOKENS);
                ids.resize(filled, pad);
                keep.resize(filled, 0.0);
            }
            let words = checkpoint.embeddings(&ids)?;
            let dims = [sequences.len(), TOKENS, checkpoint.config.embedding_size];
            let words = b.input(Owner::Public, &dims, Some(&words))?;
            let states = model.embed(&b, &words)?.flatten_all()?.to_vec1()?;
            Ok(Rows {
                count: sequences.len(),
                answer,
                states,
                keep,
            })
        };
        let splits = [rows(&splits[0])?, rows(&splits[1])?, rows(&splits[2])?];
        let states = &splits[0].states;
        let mean = states.iter().sum::<f32>() / states.len() as f32;
        let variance = states.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / states.len() as f32;
        Ok(Float {
            model,
            splits,
            rows: checkpoint.label_rows(labels)?,
            bias: checkpoint
                .label_bias(labels)?
                .unwrap_or_else(|| vec![0.0; labels.len()]),
            deviation: f64::from(variance.sqrt()),
        })
    }

    /// `[prompt, example, label]`.
    fn run(&self, rows: &Rows, prompts: &[Prompt]) -> Result<Vec<f32>> {
        let (b, d, labels) = (Plain::new(), self.model.config().hidden_size, self.bias.len());
        let mut states = rows.states.repeat(prompts.len());
        for (text, states) in states.chunks_mut(TOKENS * d).enumerate() {
            // The first token begins the text.
            let prompt = &prompts[text / rows.count].0;
            states[d..].iter_mut().zip(prompt).for_each(|(s, p)| *s += p);
        }
        let count = rows.count * prompts.len();
        let x = b.input(Owner::Public, &[count, TOKENS, d], Some(&states))?;
        let keep = b.input(
            Owner::Public,
            &[count, TOKENS],
            Some(&rows.keep.repeat(prompts.len())),
        )?;
        let at = self.model.forward(&b, &x, Some(&keep), rows.answer)?;
        let table = b.input(Owner::Public, &[labels, d], Some(&self.rows))?;
        let bias = b.input(Owner::Public, &[labels], Some(&self.bias))?;
        Ok(self
            .model
            .logits(&b, &at, &table, Some(&bias))?
            .flatten_all()?
            .to_vec1()?)
    }
}

impl Evaluate for Float {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause> {
        let rows = match split {
            Split::Train => &self.splits[0],
            Split::Validation => &self.splits[1],
            Split::Test => &self.splits[2],
        };
        self.run(rows, prompts).map_err(|e| Box::new(e) as Cause)
    }
}
