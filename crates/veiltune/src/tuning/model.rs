//! A language model as its owner has it: calibrated on sample texts, in the form that is run privately.

use std::path::Path;

use veiltune_engine::{Backend, Comparison, Owner, Party};
use veiltune_hub::{Tensors, Tokenizer};
use veiltune_nn::language::{Attention, Family, LanguageCheckpoint, LanguageConfig};
use veiltune_tune::{Cause, Prompt, Specials, Tokenize};

use super::program::{Shape, Tuning, table_width};
use crate::{Error, Result};

/// A model ready to be shared, or to be run in the clear.
pub struct Ready {
    /// Architecture and calibration, of the folded form.
    pub config: LanguageConfig,
    /// Parameters of that form.
    pub weights: Tensors,
    /// The table that words are looked up in, `[rows, width]`: see [`super::program::table_rows`].
    pub table: Vec<f32>,
    /// Standard deviation of what enters the first layer, without padding.
    pub deviation: f64,
}

impl Ready {
    /// The program of whoever has the model, in the clear, where either comparison gives the same.
    pub fn program<'a>(&'a self, shape: &'a Shape) -> Tuning<'a> {
        Tuning {
            weights: Some(&self.weights),
            ..Tuning::public(&self.config, shape, Comparison::Fss)
        }
    }
}

/// Sample texts for calibration where none are given: what they say hardly matters, but rare words, digits and signs have scores
/// that common words have not.
const SAMPLES: [&str; 24] = [
    "The film is a slow but rewarding story about two sisters who run a small hotel by the sea.",
    "I have been to this restaurant twice. The food was cold and the waiter never came back.",
    "Oil prices rose for a third day on Tuesday as producers agreed to cut output next year.",
    "Researchers said the new telescope will look for planets around more than 1,000 nearby stars.",
    "The home team won 3-1 after extra time, and its captain scored twice in the last ten minutes.",
    "What a complete waste of time! Terrible acting, no plot at all, and far too long.",
    "The ministers of both countries met in Geneva to discuss the peace agreement they had signed.",
    "He who laughs last thinks slowest; the early bird gets the worm, but the second mouse gets the cheese.",
    "a gorgeous , witty , seductive movie . it 's not nearly as dull as it sounds , and it does n't drag",
    "AP - Shares of Acme Corp. (ACM.N) fell 4.7% to $23.10 on Monday after the company cut its outlook.",
    "Does she know? \"I doubt it,\" said Dr. O'Neill -- the hospital's chief surgeon -- in an e-mail.",
    "WARNING!!! DO NOT BUY THIS... it broke after 2 days & customer service NEVER answered my calls :-(",
    "In 1969, Apollo 11 landed on the Moon; Neil Armstrong and Buzz Aldrin stayed for 21.6 hours.",
    "The enzyme hydrolyses adenosine triphosphate, and phosphorylated intermediates accumulate in vitro.",
    "Patient is a 67-year-old woman with type 2 diabetes, hypertension (160/95 mmHg) and chest pain.",
    "Pursuant to section 12(b), the lessee shall indemnify the lessor against any and all such claims.",
    "lol idk what they were thinking tbh, but the new update is sooo much better than the old one",
    "See https://example.org/docs?id=42#top or write to info@example.org; the file is called data_v2.csv.",
    "def area(r): return 3.14159 * r ** 2  # not exact",
    "Die Straße nach Köln war gesperrt, also fuhren wir über Düsseldorf; le café était déjà fermé.",
    "La película es muy buena. 이 영화는 정말 재미있다. Этот фильм очень скучный. この映画は素晴らしい。",
    "Mix 250 g of flour with 2 eggs, a pinch of salt and 1/2 cup of milk; bake for 35 minutes at 180 C.",
    "Yes. No. Maybe? Great, bad, true, false, positive, negative, World, Sports, Business, Technology.",
    "Entailment: a man plays the guitar on stage. Question: is someone making music? Answer: yes, he is.",
];

/// Spreads of the random prompts of a calibration, in units of that of embeddings.
const PROMPTS: [f64; 3] = [0.0, 1.0, 2.0];

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
/// Each text is run with padding, and with the token that begins texts (to which models give values that no other has), as it is and
/// with random prompts of up to twice the spread of its embeddings added at its first half: tuned prompts go beyond what
/// texts do.
pub fn ready(checkpoint: &LanguageCheckpoint, attention: Attention, how: &Calibration) -> Result<Ready> {
    if !checkpoint.config.family.causal() && !checkpoint.config.has_head {
        return Err(Error::Input(
            "the checkpoint has no masked-LM head (cls.predictions, lm_head or predictions), without which an encoder has no words to \
             answer with: give one that was saved with it (`AutoModelForMaskedLM`); sentence encoders and classifiers are for \
             `veiltune train` with --task"
                .into(),
        ));
    }
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
    // And a few words of some of them: denominators of random features are smallest in short texts.
    let short = samples.iter().step_by(2).map(|text| (*text, 4));
    let all: Vec<(&str, usize)> = samples.iter().map(|text| (*text, 1)).chain(short).collect();
    let rows = all
        .iter()
        .map(|(text, part)| sample(&checkpoint.tokenizer, text, tokens, *part))
        .collect::<Result<Vec<_>>>()?
        .concat();
    let ids: Vec<u32> = rows.iter().map(|token| token.id).collect();
    let keep: Vec<f32> = rows
        .iter()
        .map(|token| f32::from(token.part != Part::Padding))
        .collect();
    let (n, d) = (all.len(), config.hidden_size);
    let words = checkpoint.embeddings(&ids)?;
    let labels: Vec<u32> = (0..8.min(config.vocab_size as u32)).collect();
    let label_rows = checkpoint.label_rows(&labels)?;
    let mut spread = 0.0;
    let config = checkpoint.calibrate(&config, how.margin, |b, model| {
        for (i, size) in PROMPTS.into_iter().enumerate() {
            b.rewind();
            let words = b.input(Owner::Public, &[n, tokens, config.embedding_size], Some(&words))?;
            let x = model.embed(b, &words)?;
            let values = b.reveal(&x, Party::P0)?.map_or_else(Vec::new, |r| r.values);
            let real = values.chunks(d).zip(&keep).filter(|(_, keep)| **keep > 0.0);
            spread = deviation(&real.flat_map(|(row, _)| row).copied().collect::<Vec<_>>());
            let mut values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
            let prompt = Prompt::random(n * tokens, d, size * spread, i as u64).0;
            for ((row, prompt), token) in values.chunks_mut(d).zip(prompt.chunks(d)).zip(&rows) {
                if token.part == Part::Prompt {
                    row.iter_mut().zip(prompt).for_each(|(v, p)| *v += p);
                }
            }
            let x = b.input(Owner::Public, &[n, tokens, d], Some(&values))?;
            let keep = b.input(Owner::Public, &[n, tokens], Some(&keep))?;
            let at = model.forward(b, &x, Some(&keep), tokens - 1)?;
            let rows = b.input(
                Owner::Public,
                &[labels.len(), config.embedding_size],
                Some(&label_rows),
            )?;
            model.logits(b, &at, &rows, None)?;
        }
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

/// A token of a sample.
#[derive(Clone, Copy)]
struct Token {
    id: u32,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What prompts are tried on.
    Prompt,
    Text,
    Padding,
}

/// The first of `parts` parts of a text as rows for tuning are: what begins it, padding, words, the mask, what ends it. The last
/// token is never padding: the answer is read there.
fn sample(words: &Tokenizer, text: &str, tokens: usize, parts: usize) -> Result<Vec<Token>> {
    let special = words.special();
    let begin = special.cls.or(special.bos).filter(|_| tokens > 3);
    let end = special.mask.into_iter().chain(special.sep);
    let end: Vec<u32> = if tokens > 3 { end.collect() } else { Vec::new() };
    let room = tokens - usize::from(begin.is_some()) - end.len();
    let mut ids = words.encode(text)?;
    ids.truncate(ids.len().div_ceil(parts).min(room));
    let token = |part| move |id| Token { id, part };
    let padding = std::iter::repeat_n(special.pad.unwrap_or(0), room - ids.len());
    let (prompt, rest) = ids.split_at(ids.len() / 2);
    Ok(begin
        .into_iter()
        .map(token(Part::Text))
        .chain(padding.map(token(Part::Padding)))
        .chain(prompt.iter().copied().map(token(Part::Prompt)))
        .chain(rest.iter().copied().map(token(Part::Text)))
        .chain(end.into_iter().map(token(Part::Text)))
        .collect())
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
            unknown: s.unknown,
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
