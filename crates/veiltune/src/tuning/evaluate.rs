//! The forward pass as the optimiser sees it: in the clear, in floating point or in the protocols' fixed point, or on the servers.

use std::sync::{Mutex, Once, PoisonError};

use veiltune_engine::session::Program;
use veiltune_engine::{Backend, Error as EngineError};
use veiltune_tune::{Cause, Evaluate, Prompt, Split};

use super::owner::Remote;
use super::program::{Known, Loaded, Pass, Shape, Texts, Tuning};
use crate::{Error, Result};

/// Texts, and the prompts whose turn it is.
pub struct Holder {
    texts: Texts,
    prompts: Mutex<Vec<f32>>,
}

impl Holder {
    /// Without prompts yet.
    pub fn new(texts: Texts) -> Holder {
        Holder {
            texts,
            prompts: Mutex::default(),
        }
    }

    fn set(&self, prompts: Vec<f32>) {
        *self.prompts.lock().unwrap_or_else(PoisonError::into_inner) = prompts;
    }
}

impl Known for Holder {
    fn texts(&self) -> &Texts {
        &self.texts
    }

    fn prompts(&self) -> Vec<f32> {
        self.prompts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A clear interpreter's pass.
pub struct Clear<'a, B: Backend> {
    backend: &'a B,
    program: Tuning<'a>,
    holder: &'a Holder,
    loaded: Loaded<B>,
}

impl<'a, B: Backend> Clear<'a, B> {
    /// `program` with its weights; `holder` has the texts.
    pub fn new(backend: &'a B, program: Tuning<'a>, holder: &'a Holder) -> Result<Self> {
        let program = Tuning {
            known: Some(holder),
            ..program
        };
        let loaded = program.load(backend)?;
        program.forward(backend, &loaded, Pass::Texts.number().into())?;
        Ok(Clear {
            backend,
            program,
            holder,
            loaded,
        })
    }
}

/// Something that runs passes of a [`Shape`].
trait Passes {
    fn shape(&self) -> &Shape;
    fn pass(&mut self, pass: Pass, prompts: Vec<f32>) -> Result<Vec<f32>>;
}

impl<B: Backend> Passes for Clear<'_, B> {
    fn shape(&self) -> &Shape {
        self.program.shape
    }

    fn pass(&mut self, pass: Pass, prompts: Vec<f32>) -> Result<Vec<f32>> {
        self.holder.set(prompts);
        let revealed = self
            .program
            .forward(self.backend, &self.loaded, pass.number().into())?
            .ok_or_else(|| EngineError::program("tuning", "no logits came out"))?;
        Ok(revealed.values.into_iter().map(|v| v as f32).collect())
    }
}

impl Passes for Remote {
    fn shape(&self) -> &Shape {
        self.shape()
    }

    fn pass(&mut self, pass: Pass, prompts: Vec<f32>) -> Result<Vec<f32>> {
        self.logits(pass, &prompts)
    }
}

/// Whether it was said that prompts may leave the ranges of fixed point.
static TOLD: Once = Once::new();

/// A generation in one pass; prompts to validate one by one. NaN where fixed point leaves its ranges.
fn logits(passes: &mut impl Passes, split: Split, prompts: &[Prompt]) -> Result<Vec<f32>> {
    let shape = passes.shape().clone();
    let validates = split != Split::Train && shape.validation > 0;
    let (pass, at_once, texts) = match validates {
        true => (Pass::Validation, 1, shape.validation),
        false => (Pass::Generation, shape.candidates, shape.texts),
    };
    let mut all = Vec::new();
    for some in prompts.chunks(at_once) {
        let mut values: Vec<f32> = some.iter().flat_map(|p| p.0.iter().copied()).collect();
        // A pass has as many prompts as was agreed.
        for _ in some.len()..at_once {
            values.extend_from_slice(&some[0].0);
        }
        let wanted = some.len() * texts * shape.labels;
        match passes.pass(pass, values) {
            Ok(mut logits) => {
                logits.truncate(wanted);
                all.extend(logits);
            }
            // One prompt out of range must not take the others with it. On the servers its logits would be noise.
            Err(Error::Engine(e @ EngineError::Range { .. })) => match some {
                [_] => {
                    TOLD.call_once(|| {
                        eprintln!("a prompt that leaves the calibrated ranges counts as the worst; --margin widens them: {e}");
                    });
                    all.resize(all.len() + wanted, f32::NAN);
                }
                some => {
                    for prompt in some.chunks(1) {
                        all.extend(logits(passes, split, prompt)?);
                    }
                }
            },
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

fn boxed(e: Error) -> Cause {
    Box::new(e)
}

impl<B: Backend> Evaluate for Clear<'_, B> {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause> {
        logits(self, split, prompts).map_err(boxed)
    }
}

impl Evaluate for Remote {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause> {
        logits(self, split, prompts).map_err(boxed)
    }
}
