//! The model's forward pass, as tuning sees it.

use crate::{Cause, Error, Loss, Metric, Prompt, Result, Score};

/// Which examples to evaluate on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Those that prompts are tuned on.
    Train,
    /// Those that choose among tuned prompts.
    Validation,
    /// Those that a tuned prompt is measured on; tuning itself never asks for them.
    Test,
}

/// The model's forward pass, wherever it runs.
pub trait Evaluate {
    /// The logits of the label words at the answer positions, `[prompt, example, label]`, of all examples of `split` with
    /// each of `prompts`, in one batch.
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause>;
}

/// How well each of `prompts` does on the examples of `split`, of which these are the `labels`, numbers below `classes`.
///
/// # Errors
/// If the evaluation fails, or returns another number of logits.
pub fn score(
    evaluate: &mut dyn Evaluate,
    split: Split,
    prompts: &[Prompt],
    labels: &[usize],
    classes: usize,
    loss: Loss,
    metric: Metric,
) -> Result<Vec<Score>> {
    let logits = evaluate.logits(split, prompts).map_err(Error::Evaluation)?;
    let each = labels.len() * classes;
    if logits.len() != prompts.len() * each {
        return Err(Error::Logits {
            found: logits.len(),
            wanted: prompts.len() * each,
        });
    }
    let scores = logits.chunks_exact(each.max(1));
    Ok(scores
        .map(|l| Score::of(l, labels, classes, loss, metric))
        .collect())
}
