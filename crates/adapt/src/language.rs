//! Pretraining of a small BERT on short texts: masked words, and a word for what a text is about.
//!
//! A part of the texts come in a wording that names their topic, which is masked more often than other words: so the model learns
//! what such words mean, and can be asked for them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use veiltune_engine::{NormKind, NormSpec, Plain, Range};
use veiltune_hub::tokenizer::Special;
use veiltune_hub::{Array, Tensors};
use veiltune_nn::language::{
    Attention, AttentionRanges, Family, HiddenAct, LanguageCheckpoint, LanguageConfig, LanguageModel,
};

use crate::optim::{Optimizer, Rule, cosine, gradients};
use crate::variables::{normal, usual_init};
use crate::workers::Workers;
use crate::{Error, Result, Variables};

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Words that it knows.
    pub vocabulary: usize,
    /// Width of a hidden state; the MLP is four times as wide.
    pub width: usize,
    /// Layers.
    pub depth: usize,
    /// Heads.
    pub heads: usize,
    /// Most tokens.
    pub tokens: usize,
}

/// A text as tokens.
#[derive(Clone, Debug)]
pub struct Text {
    /// Its words, without special ones.
    pub words: Vec<u32>,
    /// The word for what it is about, if there is one.
    pub topic: Option<u32>,
}

/// A part of a wording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// These words.
    Words(Vec<u32>),
    /// The text.
    Text,
    /// The word for what it is about.
    Topic,
}

/// What to learn from.
pub struct Corpus<'a> {
    /// Long ones are read in windows.
    pub texts: &'a [Text],
    /// Ways to say what a text is about.
    pub wordings: &'a [Vec<Part>],
    /// The tokenizer's; beginning, end, mask and padding are needed.
    pub special: Special,
}

/// How to pretrain.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Steps.
    pub steps: usize,
    /// Texts a step, over all threads.
    pub batch: usize,
    /// Peak learning rate.
    pub rate: f32,
    /// Threads.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
}

/// Share of the words that are to be predicted.
const MASKED: f32 = 0.2;
/// Share of the topics that are.
const TOPIC_MASKED: f32 = 0.8;
/// How much a topic counts against another word.
const TOPIC_WEIGHT: f32 = 6.0;
/// Share of the texts of a known topic that come in a wording.
const WORDED: f32 = 0.9;
/// Share of a wording's words that are left out.
const LEFT_OUT: f32 = 0.1;
/// Share of the texts that do not follow their beginning at once.
const MOVED: f32 = 0.5;
/// No target.
const NONE: u32 = u32::MAX;

/// The architecture of a model of that size.
pub fn architecture(size: Size) -> LanguageConfig {
    let norm = NormSpec {
        kind: NormKind::Layer,
        eps: EPS,
        sigma: (1e-9, 1e9),
    };
    let mut config = LanguageConfig {
        family: Family::Bert,
        vocab_size: size.vocabulary,
        embedding_size: size.width,
        hidden_size: size.width,
        num_hidden_layers: size.depth,
        num_attention_heads: size.heads,
        num_key_value_heads: size.heads,
        head_dim: size.width / size.heads.max(1),
        intermediate_size: 4 * size.width,
        hidden_act: HiddenAct::Relu,
        max_positions: size.tokens,
        position_offset: 0,
        type_vocab_size: 1,
        norm_eps: EPS,
        rope_theta: 1e4,
        attention_bias: true,
        tied: true,
        has_head: true,
        attention: Attention::Softmax,
        embedding_norm: norm,
        layers: Vec::new(),
        final_norm: norm,
        head_activation: Range::Exact,
        head_norm: norm,
        folded: false,
    }
    .with_attention(Attention::Softmax);
    for layer in &mut config.layers {
        // What is not calibrated would compute each softmax twice.
        layer.attention = AttentionRanges::Softmax {
            bound: 1e3,
            mask: 1e4,
        };
    }
    config
}

const EPS: f64 = 1e-6;

/// `config.json` as the `transformers` library has it.
pub fn description(config: &LanguageConfig) -> serde_json::Value {
    serde_json::json!({
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    })
}

/// Pretrains, calling `progress(step, loss)`; the weights by the names of the `transformers` library.
///
/// # Errors
/// If sizes or settings make no sense, a special word is missing, there is no text, or training diverges.
pub fn pretrain(
    config: &LanguageConfig,
    corpus: &Corpus,
    settings: &Settings,
    mut progress: impl FnMut(usize, f32),
) -> Result<Tensors> {
    config.check()?;
    let shard = settings.batch.checked_div(settings.threads).unwrap_or(0);
    if shard == 0 {
        return Err(Error::Settings(format!(
            "a batch of {} cannot be shared by {} threads",
            settings.batch, settings.threads
        )));
    }
    let source = Source::new(config, corpus)?;
    let workers = Workers::new(settings.threads)?;
    let mut rng = StdRng::seed_from_u64(settings.seed);
    let mut shapes = LanguageCheckpoint::inventory(config)?;
    shapes.push((WORDS.into(), vec![config.vocab_size, config.embedding_size]));
    shapes.push((BIAS.into(), vec![config.vocab_size]));
    let vectors = vectors(config, corpus.texts, &mut rng);
    let vars = Variables::new(&shapes, |name, dims| match name {
        WORDS => vectors.clone(),
        _ if is_gain(name) => vec![1.0; dims.iter().product()],
        _ => usual_init(&mut rng, name, dims),
    })?;
    let mut optimizer = Optimizer::new(Rule::AdamW { betas: (0.9, 0.98) }, 0.02, 1.0, &vars);
    let weights = vec![1.0 / settings.threads as f32; settings.threads];
    for step in 0..settings.steps {
        let seeds: Vec<u64> = (0..settings.threads).map(|_| rng.random()).collect();
        let (loss, grads, _) = gradients(&workers, &vars, &seeds, &weights, |seed| {
            let batch = source.batch(shard, &mut StdRng::seed_from_u64(*seed));
            Ok((batch.loss(config, &vars)?, ()))
        })?;
        let rate = cosine(settings.rate, step, settings.steps, settings.steps / 20);
        optimizer.step(&vars, &grads, rate)?;
        progress(step + 1, loss);
    }
    let mut tensors = Tensors::new();
    for (name, Array { dims, values }) in vars.tensors()? {
        // Models multiply by gains as rows; files have them as vectors.
        let dims = if is_gain(&name) { vec![values.len()] } else { dims };
        tensors.insert(stored(&name), Array { dims, values });
    }
    let types = Array {
        dims: vec![1, config.embedding_size],
        values: vec![0.0; config.embedding_size],
    };
    tensors.insert("bert.embeddings.token_type_embeddings.weight".into(), types);
    Ok(tensors)
}

const WORDS: &str = "embeddings.words";
const BIAS: &str = "head.bias";

/// Word vectors to start from, `[vocabulary, width]`: latent semantic analysis, which is what a small model would first spend most of
/// its steps on. Words, and what a text is about, are neighbours of the words around them; of the positive pointwise mutual
/// information (Levy and Goldberg, NIPS 2014) the strongest directions are kept, found by subspace iteration.
fn vectors(config: &LanguageConfig, texts: &[Text], rng: &mut StdRng) -> Vec<f32> {
    let (words, width) = (config.vocab_size, config.embedding_size);
    let mut together = BTreeMap::<[u32; 2], f32>::new();
    let mut meet = |a: u32, b: u32| {
        *together.entry([a, b]).or_default() += 1.0;
        *together.entry([b, a]).or_default() += 1.0;
    };
    for text in texts {
        for (i, &a) in text.words.iter().enumerate() {
            text.words[i + 1..].iter().take(NEAR).for_each(|&b| meet(a, b));
            text.topic.into_iter().for_each(|topic| meet(a, topic));
        }
    }
    let mut often = vec![0.0; words];
    together.iter().for_each(|([a, _], n)| often[*a as usize] += n);
    let total: f32 = often.iter().sum();
    let mut rows = vec![Vec::new(); words];
    for ([a, b], n) in together {
        let information = (n * total / (often[a as usize] * often[b as usize])).ln();
        if information > 0.0 {
            rows[a as usize].push((b as usize, information));
        }
    }
    // `[width][words]`.
    let mut basis: Vec<Vec<f32>> = (0..width).map(|_| normal(rng, words, 1.0)).collect();
    let mut strength = vec![0.0; width];
    for _ in 0..ITERATIONS {
        for column in &mut basis {
            let product = |row: &Vec<(usize, f32)>| row.iter().map(|(b, m)| m * column[*b]).sum();
            *column = rows.iter().map(product).collect();
        }
        for (i, strength) in strength.iter_mut().enumerate() {
            let (before, rest) = basis.split_at_mut(i);
            let column = &mut rest[0];
            for other in before {
                let along: f32 = column.iter().zip(&*other).map(|(a, b)| a * b).sum();
                column.iter_mut().zip(other).for_each(|(a, b)| *a -= along * *b);
            }
            *strength = column.iter().map(|a| a * a).sum::<f32>().sqrt().max(1e-9);
            column.iter_mut().for_each(|a| *a /= *strength);
        }
    }
    let mut vectors = normal(rng, words * width, SPREAD);
    for (word, vector) in vectors.chunks_mut(width).enumerate() {
        let own: Vec<f32> = (0..width).map(|i| basis[i][word] * strength[i].sqrt()).collect();
        let length = own.iter().map(|v| v * v).sum::<f32>().sqrt();
        // Words without neighbours, special ones for instance, stay random.
        if length > 1e-6 {
            let scale = SPREAD * (width as f32).sqrt() / length;
            vector.iter_mut().zip(own).for_each(|(v, o)| *v = scale * o);
        }
    }
    vectors
}

/// How far apart neighbours are at most.
const NEAR: usize = 10;
const ITERATIONS: usize = 8;
/// Deviation of the first word vectors' entries.
const SPREAD: f32 = 0.1;

fn is_gain(name: &str) -> bool {
    name.ends_with("norm.weight")
}

/// The name of a parameter in a checkpoint.
fn stored(name: &str) -> String {
    let name = match name {
        WORDS => "embeddings.word_embeddings.weight".into(),
        "embeddings.positions" => "embeddings.position_embeddings.weight".into(),
        BIAS => return "cls.predictions.bias".into(),
        _ => name.to_owned(),
    };
    if let Some(rest) = name.strip_prefix("head.") {
        let rest = rest.replace("norm.", "LayerNorm.");
        return format!("cls.predictions.transform.{rest}");
    }
    let pairs = [
        ("layers.", "encoder.layer."),
        (".attention_norm.", ".attention.output.LayerNorm."),
        (".mlp_norm.", ".output.LayerNorm."),
        ("embeddings.norm.", "embeddings.LayerNorm."),
        (".attention.query.", ".attention.self.query."),
        (".attention.key.", ".attention.self.key."),
        (".attention.value.", ".attention.self.value."),
        (".mlp.up.", ".intermediate.dense."),
        (".mlp.down.", ".output.dense."),
    ];
    let mut name = pairs
        .iter()
        .fold(name, |name, (ours, theirs)| name.replace(ours, theirs));
    for part in ["weight", "bias"] {
        name = name.replace(
            &format!(".attention.output.{part}"),
            &format!(".attention.output.dense.{part}"),
        );
    }
    format!("bert.{name}")
}

/// Where examples come from.
struct Source<'a> {
    corpus: &'a Corpus<'a>,
    /// Texts, as often as they have windows.
    windows: Vec<usize>,
    tokens: usize,
    vocabulary: u32,
    /// The first word that is not special.
    ordinary: u32,
    cls: u32,
    sep: u32,
    mask: u32,
    pad: u32,
}

impl<'a> Source<'a> {
    fn new(config: &LanguageConfig, corpus: &'a Corpus) -> Result<Self> {
        let longest = corpus.wordings.iter().map(|w| extra(w)).max().unwrap_or(0);
        let Some(room) = config.max_positions.checked_sub(2 + longest).filter(|r| *r > 0) else {
            return Err(Error::Settings("no room for a text beside the wordings".into()));
        };
        let missing = || Error::Settings("the tokenizer lacks one of [CLS], [SEP], [MASK] and [PAD]".into());
        let windows: Vec<usize> = corpus
            .texts
            .iter()
            .enumerate()
            .flat_map(|(i, text)| std::iter::repeat_n(i, text.words.len().div_ceil(room)))
            .collect();
        if windows.is_empty() {
            return Err(Error::Settings("no text to learn from".into()));
        }
        let s = corpus.special;
        let ordinary = [s.cls, s.sep, s.mask, s.pad, s.unknown]
            .into_iter()
            .flatten()
            .max();
        Ok(Source {
            corpus,
            windows,
            tokens: config.max_positions,
            vocabulary: config.vocab_size as u32,
            ordinary: ordinary.map_or(0, |last| last + 1),
            cls: s.cls.ok_or_else(missing)?,
            sep: s.sep.ok_or_else(missing)?,
            mask: s.mask.ok_or_else(missing)?,
            pad: s.pad.ok_or_else(missing)?,
        })
    }

    fn batch(&self, count: usize, rng: &mut StdRng) -> Batch {
        let mut batch = Batch {
            count,
            tokens: self.tokens,
            ids: Vec::with_capacity(count * self.tokens),
            keep: Vec::with_capacity(count * self.tokens),
            places: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
        };
        for _ in 0..count {
            self.row(&mut batch, rng);
        }
        if batch.places.is_empty() {
            // Rare, and only in tiny batches: the first row's beginning is then to be told.
            batch.places.push(0);
            batch.targets.push(self.cls);
            batch.weights.push(1.0);
        }
        batch
    }

    /// A text, perhaps in a wording, perhaps after a gap.
    fn row(&self, batch: &mut Batch, rng: &mut StdRng) {
        let text = &self.corpus.texts[self.windows[rng.random_range(0..self.windows.len())]];
        let plain = vec![Part::Text];
        let wording = match text.topic {
            Some(_) if !self.corpus.wordings.is_empty() && rng.random::<f32>() < WORDED => {
                &self.corpus.wordings[rng.random_range(0..self.corpus.wordings.len())]
            }
            _ => &plain,
        };
        let room = (self.tokens - 2 - extra(wording)).min(text.words.len());
        let start = rng.random_range(0..=text.words.len() - room);
        // What is written, and what is to be predicted there with which weight.
        let mut row: Vec<(u32, u32, f32)> = Vec::with_capacity(self.tokens);
        for part in wording {
            match part {
                Part::Words(words) => {
                    let kept = words.iter().filter(|_| rng.random::<f32>() >= LEFT_OUT);
                    row.extend(kept.map(|&w| (w, NONE, 0.0)));
                }
                Part::Text => {
                    let words = &text.words[start..start + room];
                    row.extend(words.iter().map(|&word| match rng.random::<f32>() < MASKED {
                        true => (self.hidden(word, rng), word, 1.0),
                        false => (word, NONE, 0.0),
                    }));
                }
                Part::Topic => {
                    let topic = text.topic.unwrap_or(self.mask);
                    row.push(match rng.random::<f32>() < TOPIC_MASKED {
                        true => (self.mask, topic, TOPIC_WEIGHT),
                        false => (topic, NONE, 0.0),
                    });
                }
            }
        }
        let spare = self.tokens - 2 - row.len();
        let gap = match rng.random::<f32>() < MOVED {
            true => rng.random_range(0..=spare),
            false => 0,
        };
        let at = batch.ids.len();
        batch.ids.push(self.cls);
        batch.ids.extend(std::iter::repeat_n(self.pad, gap));
        for (i, (word, target, weight)) in row.iter().enumerate() {
            batch.ids.push(*word);
            if *target != NONE {
                batch.places.push((at + 1 + gap + i) as u32);
                batch.targets.push(*target);
                batch.weights.push(*weight);
            }
        }
        batch.ids.push(self.sep);
        batch.ids.extend(std::iter::repeat_n(self.pad, spare - gap));
        let keep = batch.ids[at..]
            .iter()
            .map(|&id| if id == self.pad { 0.0 } else { 1.0 });
        batch.keep.extend(keep);
    }

    /// A word that is to be predicted: mostly masked, sometimes another or itself, as Devlin et al. do.
    fn hidden(&self, word: u32, rng: &mut StdRng) -> u32 {
        match rng.random::<f32>() {
            r if r < 0.8 => self.mask,
            r if r < 0.9 => rng.random_range(self.ordinary..self.vocabulary),
            _ => word,
        }
    }
}

/// Tokens of a wording beside the text.
fn extra(wording: &[Part]) -> usize {
    let tokens = |part: &Part| match part {
        Part::Words(words) => words.len(),
        Part::Text => 0,
        Part::Topic => 1,
    };
    wording.iter().map(tokens).sum()
}

/// Rows of texts with words to predict.
struct Batch {
    count: usize,
    tokens: usize,
    /// `[count, tokens]`.
    ids: Vec<u32>,
    /// 1 where there is a token.
    keep: Vec<f32>,
    /// Positions in all rows.
    places: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Batch {
    /// Weighted mean of the cross-entropies.
    fn loss(&self, config: &LanguageConfig, vars: &Variables) -> Result<Tensor> {
        let (b, cpu) = (Plain::new(), Device::Cpu);
        // Its weights are the variables themselves.
        let model = LanguageModel::load(&vars.params(), config)?;
        let d = config.hidden_size;
        let get = |name: &str| {
            let var = vars.get(name).map(|v| v.as_tensor().clone());
            var.ok_or_else(|| Error::Settings(format!("no parameter {name}")))
        };
        let (table, bias) = (get(WORDS)?, get(BIAS)?);
        let ids = Tensor::from_slice(&self.ids, self.ids.len(), &cpu)?;
        let words = table
            .index_select(&ids, 0)?
            .reshape((self.count, self.tokens, d))?;
        let keep = Tensor::from_slice(&self.keep, (self.count, self.tokens), &cpu)?;
        let hidden = model.hidden(&b, &model.embed(&b, &words)?, Some(&keep))?;
        let places = Tensor::from_slice(&self.places, self.places.len(), &cpu)?;
        let there = hidden
            .reshape((self.count * self.tokens, d))?
            .index_select(&places, 0)?;
        let logits = model.logits(&b, &there.unsqueeze(0)?, &table, Some(&bias))?;
        let targets = Tensor::from_slice(&self.targets, (self.targets.len(), 1), &cpu)?;
        let own = logits.gather(&targets, 1)?.squeeze(1)?;
        let weights = Tensor::from_slice(&self.weights, self.weights.len(), &cpu)?;
        let total: f32 = self.weights.iter().sum();
        let losses = (logits.log_sum_exp(1)? - own)?;
        Ok(((losses * weights)?.sum_all()? * (1.0 / f64::from(total)))?)
    }
}

#[cfg(test)]
mod tests {
    use veiltune_engine::{Backend, Owner};
    use veiltune_hub::{Precision, safetensors};

    use super::*;

    const SIZE: Size = Size {
        vocabulary: 24,
        width: 8,
        depth: 2,
        heads: 2,
        tokens: 16,
    };
    const SETTINGS: Settings = Settings {
        steps: 60,
        batch: 16,
        rate: 2e-2,
        threads: 2,
        seed: 3,
    };
    const SPECIAL: Special = Special {
        pad: Some(0),
        cls: Some(1),
        sep: Some(2),
        mask: Some(3),
        unknown: None,
        bos: None,
        eos: None,
    };

    /// Each word is followed by the next; every other text is about word 22, the others about word 23.
    fn texts() -> Vec<Text> {
        let text = |i: u32| Text {
            words: (0..20).map(|k| 4 + (9 * (i % 2) + (i + k) % 9)).collect(),
            topic: Some(22 + i % 2),
        };
        (0..32).map(text).collect()
    }

    fn corpus<'a>(texts: &'a [Text], wordings: &'a [Vec<Part>]) -> Corpus<'a> {
        Corpus {
            texts,
            wordings,
            special: SPECIAL,
        }
    }

    #[test]
    fn the_loss_falls_and_the_same_seed_gives_the_same_model() {
        let (texts, wordings) = (texts(), [vec![Part::Topic, Part::Words(vec![4]), Part::Text]]);
        let run = || {
            let mut losses = Vec::new();
            let config = architecture(SIZE);
            let tensors = pretrain(&config, &corpus(&texts, &wordings), &SETTINGS, |_, loss| {
                losses.push(loss)
            });
            (losses, tensors.unwrap())
        };
        let (losses, tensors) = run();
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
        assert!(mean(&losses[50..]) < 0.7 * mean(&losses[..10]), "{losses:?}");
        assert!(run().1 == tensors);
    }

    #[test]
    fn a_pretrained_model_is_a_checkpoint() {
        let texts = texts();
        let settings = Settings { steps: 1, ..SETTINGS };
        let config = architecture(SIZE);
        let tensors = pretrain(&config, &corpus(&texts, &[]), &settings, |_, _| ()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        safetensors::write(&dir.path().join("model.safetensors"), &tensors, Precision::F32).unwrap();
        std::fs::write(dir.path().join("config.json"), description(&config).to_string()).unwrap();
        std::fs::write(
            dir.path().join("vocab.txt"),
            "[PAD]\n[CLS]\n[SEP]\n[MASK]\n[UNK]\n",
        )
        .unwrap();
        let checkpoint = LanguageCheckpoint::open(dir.path()).unwrap();
        assert_eq!(
            checkpoint.config,
            architecture(SIZE).with_attention(Attention::Softmax)
        );
        for (name, dims) in LanguageCheckpoint::inventory(&checkpoint.config).unwrap() {
            checkpoint
                .parameter(&checkpoint.config, &name, &dims)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        assert!(checkpoint.label_bias(&[23]).unwrap().is_some());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let texts = texts();
        let refused = |corpus: &Corpus, settings: &Settings| {
            pretrain(&architecture(SIZE), corpus, settings, |_, _| ())
                .unwrap_err()
                .to_string()
        };
        let whole = corpus(&texts, &[]);
        let threads = Settings {
            threads: 0,
            ..SETTINGS
        };
        assert!(refused(&whole, &threads).contains("cannot be shared"));
        assert!(refused(&corpus(&[], &[]), &SETTINGS).contains("no text"));
        let long = [vec![Part::Words(vec![4; 14]), Part::Text]];
        assert!(refused(&corpus(&texts, &long), &SETTINGS).contains("no room"));
        let special = Special {
            mask: None,
            ..SPECIAL
        };
        assert!(refused(&Corpus { special, ..whole }, &SETTINGS).contains("lacks"));
    }

    #[test]
    fn the_embedded_model_guesses_words_and_topics_of_texts_that_it_never_saw() {
        let checkpoint = LanguageCheckpoint::from_bytes(
            include_bytes!("../../../assets/demo-text/config.json"),
            include_bytes!("../../../assets/demo-text/tokenizer.json"),
            include_bytes!("../../../assets/demo-text/model.safetensors"),
        )
        .unwrap();
        let (b, c) = (Plain::new(), &checkpoint.config);
        let model = checkpoint.load(&b, Owner::Public, c).unwrap();
        let special = checkpoint.tokenizer.special();
        let [cls, sep, mask] = [special.cls, special.sep, special.mask].map(Option::unwrap);
        // Logits of `labels` where the mask stands.
        let logits = |ids: &[u32], labels: &[u32]| -> Vec<f32> {
            let input = |dims: &[usize], values: &[f32]| b.input(Owner::Public, dims, Some(values)).unwrap();
            let x = input(
                &[1, ids.len(), c.embedding_size],
                &checkpoint.embeddings(ids).unwrap(),
            );
            let answer = ids.iter().position(|&id| id == mask).unwrap();
            let x = model.embed(&b, &x).unwrap();
            let at = model.forward(&b, &x, None, answer).unwrap();
            let rows = input(
                &[labels.len(), c.embedding_size],
                &checkpoint.label_rows(labels).unwrap(),
            );
            let bias = input(&[labels.len()], &checkpoint.label_bias(labels).unwrap().unwrap());
            let logits = model.logits(&b, &at, &rows, Some(&bias)).unwrap();
            logits.flatten_all().unwrap().to_vec1().unwrap()
        };
        let best = |logits: &[f32]| {
            (0..logits.len())
                .max_by(|&i, &j| logits[i].total_cmp(&logits[j]))
                .unwrap()
        };

        let topics = ["computers", "food", "politics"];
        let words = topics.map(|topic| checkpoint.tokenizer.id(topic).unwrap());
        let all: Vec<u32> = (0..c.vocab_size as u32).collect();
        let [mut asked, mut told, mut texts, mut placed] = [0; 4];
        for line in include_str!("../../../assets/demo-text/test.tsv").lines() {
            let (text, topic) = line.split_once('\t').unwrap();
            let mut ids = vec![cls];
            ids.extend(checkpoint.tokenizer.encode(text).unwrap().iter().take(24));
            ids.push(sep);
            // A word from the middle, and what the text is about.
            let at = ids.len() / 2;
            let word = std::mem::replace(&mut ids[at], mask);
            asked += 1;
            let fits = logits(&ids, &all);
            let better = fits.iter().filter(|fit| **fit > fits[word as usize]).count();
            told += usize::from(better < all.len() / 20);
            ids[at] = word;
            let mut worded = vec![cls, mask];
            worded.extend(checkpoint.tokenizer.encode(":").unwrap());
            worded.extend(&ids[1..]);
            texts += 1;
            placed += usize::from(topics[best(&logits(&worded, &words))] == topic);
        }
        // Chance is 1 in 20 and 1 in 3.
        assert!(texts >= 90 && told * 4 > asked, "{told} of {asked} words");
        assert!(placed * 2 > texts, "{placed} of {texts} topics");
    }
}
