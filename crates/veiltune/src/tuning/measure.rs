//! What a prompt is worth on texts, for who has the model: in float or in the protocols' fixed point.

use std::sync::Arc;

use veiltune_engine::Plain;
use veiltune_engine::session::Program;
use veiltune_nn::language::LanguageModel;
use veiltune_tune::{Evaluate, Example, Labelled, Linear, Loss, Prompt, Score, Split};

use super::evaluate::{Clear, InTheClear, texts};
use super::ground::{Chosen, Ground};
use super::layout::tune;
use super::model::{self, Ready};
use super::program::{Shape, table_width};
use crate::progress::tell;
use crate::{Error, Result};

/// Texts that are measured at a time.
const AT_ONCE: usize = 32;

/// The task's metric of each prompt on these texts, of which those count as wrong that leave the ranges of fixed point.
pub fn measure<B: InTheClear>(
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
pub fn linear(
    ground: &Ground,
    ready: &Ready,
    shape: &Shape,
    chosen: &Chosen,
    test: &[&Example],
) -> Result<f64> {
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
    let program = ready.program(shape);
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
    let program = ready.program(&shape);
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
