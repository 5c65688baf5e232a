//! A language model as its owner has it: calibrated on sample texts, in the form that is run privately.

use std::path::Path;

use veiltune_engine::{Backend, Owner, Party};
use veiltune_hub::{Tensors, Tokenizer};
use veiltune_nn::language::{Attention, Family, LanguageCheckpoint, LanguageConfig};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_tune::{Cause, Specials, Tokenize};

use super::program::table_width;
use crate::{Error, Result};

/// A model ready to be shared, or to be run in the clear.
pub struct Ready {
    /// Architecture and calibration, of the folded form.
    pub config: LanguageConfig,
    /// Parameters of that form.
    pub weights: Tensors,
    /// The table that words are looked up in, `[rows, width]`: see [`super::program::table_rows`].
    pub table: Vec<f32>,
    /// Standard deviation of what enters the first layer.
    pub deviation: f64,
}

/// Sample texts for calibration where none are given: their words hardly matter, their ranges do.
const SAMPLES: [&str; 8] = [
    "The film is a slow but rewarding story about two sisters who run a small hotel by the sea.",
    "I have been to this restaurant twice. The food was cold and the waiter never came back.",
    "Oil prices rose for a third day on Tuesday as producers agreed to cut output next year.",
    "Researchers said the new telescope will look for planets around more than 1,000 nearby stars.",
    "The home team won 3-1 after extra time, and its captain scored twice in the last ten minutes.",
    "What a complete waste of time! Terrible acting, no plot at all, and far too long.",
    "The ministers of both countries met in Geneva to discuss the peace agreement they had signed.",
    "He who laughs last thinks slowest; the early bird gets the worm, but the second mouse gets the cheese.",
];

/// How calibration goes.
pub struct Calibration<'a> {
    /// Sample texts; none: the built-in ones.
    pub texts: &'a [String],
    /// Tokens of a sample.
    pub tokens: usize,
    /// Ranges are widened by this factor.
    pub margin: f64,
}

/// Calibrates a checkpoint with the given attention.
///
/// Each text is run with padding, as it is and with random prompts of one and three times the spread of its embeddings added
/// at its first half: tuned prompts go beyond what texts do.
pub fn ready(checkpoint: &LanguageCheckpoint, attention: Attention, how: &Calibration) -> Result<Ready> {
    // Only the positions that texts can have become part of the program.
    let tokens = how.tokens.clamp(1, checkpoint.config.max_positions);
    let config = LanguageConfig {
        max_positions: tokens,
        ..checkpoint.config.clone()
    }
    .with_attention(attention);
    let samples: Vec<&str> = match how.texts {
        [] => SAMPLES.to_vec(),
        texts => texts.iter().take(32).map(String::as_str).collect(),
    };
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    let padding = checkpoint.tokenizer.special().pad.unwrap_or(0);
    for text in &samples {
        let mut row = checkpoint.tokenizer.encode(text)?;
        // The last token is always real: the answer is read there.
        row.truncate(tokens);
        let filled = tokens - row.len();
        ids.extend(std::iter::repeat_n(padding, filled));
        keep.extend(std::iter::repeat_n(0.0, filled));
        keep.extend(std::iter::repeat_n(1.0, row.len()));
        ids.extend(row);
    }
    let (n, d) = (samples.len(), config.hidden_size);
    let words = checkpoint.embeddings(&ids)?;
    let labels: Vec<u32> = (0..8.min(config.vocab_size as u32)).collect();
    let rows = checkpoint.label_rows(&labels)?;
    let mut spread = 0.0;
    let config = checkpoint.calibrate(&config, how.margin, |b, model| {
        b.rewind();
        let words = b.input(Owner::Public, &[n, tokens, config.embedding_size], Some(&words))?;
        let x = model.embed(b, &words)?;
        let values = b.reveal(&x, Party::P0)?.map_or_else(Vec::new, |r| r.values);
        spread = deviation(&values);
        let (mut all, mut keeps) = (Vec::new(), Vec::new());
        for (i, size) in [0.0, 1.0, 3.0].into_iter().enumerate() {
            let noise = Prg::new(&Seed::from_bytes(*b"veiltune prompts"), i as u64, 0).vec(values.len());
            for (at, (v, w)) in values.iter().zip(noise).enumerate() {
                let uniform = w as i64 as f64 / 2f64.powi(63) * 3f64.sqrt();
                let prompted = at / d % tokens < tokens / 2;
                all.push((v + if prompted { size * spread * uniform } else { 0.0 }) as f32);
            }
            keeps.extend_from_slice(&keep);
        }
        let x = b.input(Owner::Public, &[3 * n, tokens, d], Some(&all))?;
        let keep = b.input(Owner::Public, &[3 * n, tokens], Some(&keeps))?;
        let at = model.forward(b, &x, Some(&keep), tokens - 1)?;
        let rows = b.input(Owner::Public, &[labels.len(), config.embedding_size], Some(&rows))?;
        model.logits(b, &at, &rows, None)?;
        Ok(())
    })?;
    let config = config.served();
    let mut weights = Tensors::new();
    for (name, dims) in LanguageCheckpoint::inventory(&config)? {
        let array = checkpoint.parameter(&config, &name, &dims)?;
        weights.insert(name, array);
    }
    Ok(Ready {
        weights,
        table: table(checkpoint, &config)?,
        deviation: spread,
        config,
    })
}

fn deviation(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// The words' rows; a decoder's bias is the last entry of each; a table of the logits' own follows below.
fn table(checkpoint: &LanguageCheckpoint, config: &LanguageConfig) -> Result<Vec<f32>> {
    let (width, all) = (
        table_width(config),
        (0..config.vocab_size as u32).collect::<Vec<_>>(),
    );
    let bias = checkpoint.label_bias(&all)?;
    let mut table = Vec::new();
    let mut add = |rows: &[f32]| {
        for (i, row) in rows.chunks(config.embedding_size).enumerate() {
            table.extend_from_slice(row);
            if width > config.embedding_size {
                table.push(bias.as_ref().map_or(0.0, |b| b[i]));
            }
        }
    };
    add(checkpoint.words()?);
    if !config.tied {
        add(&checkpoint.label_rows(&all)?);
    }
    Ok(table)
}

/// Rows of [`Ready::table`], as the private lookup gives them.
pub fn rows(table: &[f32], width: usize, ids: &[u32]) -> Result<Vec<f32>> {
    let mut rows = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        let at = id as usize * width;
        let row = table
            .get(at..at + width)
            .ok_or_else(|| Error::Input(format!("there is no word number {id} in the model")))?;
        rows.extend_from_slice(row);
    }
    Ok(rows)
}

/// Number of the row that gives a word's logit.
pub fn label_row(config: &LanguageConfig, id: u32) -> u32 {
    match config.tied {
        true => id,
        false => id + config.vocab_size as u32,
    }
}

/// Which kind of template a model takes.
pub fn template(config: &LanguageConfig) -> veiltune_tune::Family {
    match config.family {
        Family::Llama => veiltune_tune::Family::Causal,
        _ => veiltune_tune::Family::Masked,
    }
}

/// A model's tokenizer, as encoding texts for it takes it.
pub struct Words<'a>(pub &'a Tokenizer);

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
        }
    }
}

/// Opens a checkpoint.
pub fn open(name: &str) -> Result<LanguageCheckpoint> {
    let path = Path::new(name);
    let found = match path.is_dir() {
        true => LanguageCheckpoint::open(path),
        false => LanguageCheckpoint::find(name),
    };
    found.map_err(|e| {
        Error::Input(format!(
            "{e}; give the folder of a language model, or its name in the hub"
        ))
    })
}
