//! The forward pass as the optimiser sees it: in the clear, in floating point or in the protocols' fixed point, or on the servers.

use std::sync::{Arc, Mutex, Once, PoisonError};

use veiltune_adapt::workers::Workers;
use veiltune_engine::session::Program;
use veiltune_engine::{Backend, Error as EngineError, Fixed, Plain};
use veiltune_nn::language::LanguageModel;
use veiltune_tune::{Cause, Evaluate, Prompt, Split};

use super::layout::Rows;
use super::model::{self, Ready};
use super::owner::Remote;
use super::program::{Known, Loaded, Pass, Shape, Texts, Tuning, load_model, table_width};
use crate::progress::tell;
use crate::{Error, Result};

/// Texts, and the prompts whose turn it is.
struct Holder {
    texts: Texts,
    prompts: Vec<f32>,
}

impl Known for Holder {
    fn texts(&self) -> &Texts {
        &self.texts
    }

    fn prompts(&self) -> Vec<f32> {
        self.prompts.clone()
    }
}

/// An interpreter that runs in the clear.
pub trait InTheClear: Backend<Tensor: Send + Sync, Weight: Send + Sync> + Sized + Send {
    /// Texts of which it takes no more at a time, on a thread of its own; `None` if it splits its work itself.
    const AT_ONCE: Option<usize>;

    /// A new one.
    fn start() -> Result<Self>;
}

impl InTheClear for Plain {
    const AT_ONCE: Option<usize> = None;

    fn start() -> Result<Self> {
        Ok(Plain::new())
    }
}

impl InTheClear for Fixed {
    // From 2 to 16 take the same time on two cores; all share a product's weights, which are read for some hundred rows here.
    const AT_ONCE: Option<usize> = Some(8);

    fn start() -> Result<Self> {
        Ok(Fixed::new()?)
    }
}

/// A model for an interpreter, once for all that it is asked.
pub fn loaded<B: InTheClear>(ready: &Ready) -> Result<Arc<LanguageModel<B>>> {
    let model = load_model(&B::start()?, &ready.config, Some(&ready.weights))?;
    Ok(Arc::new(model))
}

/// A clear interpreter's pass, each thread with some of the texts.
pub struct Clear<'a, B: Backend> {
    program: Tuning<'a>,
    workers: Option<Workers>,
    parts: Vec<Mutex<Part<B>>>,
}

/// Some of the texts, and who runs their passes.
struct Part<B: Backend> {
    backend: B,
    shape: Shape,
    holder: Holder,
    loaded: Loaded<B>,
}

impl<'a, B: InTheClear> Clear<'a, B> {
    /// `program` on a model that was loaded for it.
    pub fn new(program: Tuning<'a>, model: &Arc<LanguageModel<B>>, texts: &Texts) -> Result<Self> {
        let shape = program.shape;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // As many for each thread.
        let count = match B::AT_ONCE {
            Some(most) => shape
                .texts
                .div_ceil(most)
                .next_multiple_of(threads)
                .min(shape.texts),
            None => 1,
        };
        let cut = |texts: usize, i: usize| texts * i / count..texts * (i + 1) / count;
        let mut parts = Vec::new();
        for i in 0..count {
            let (train, validation) = (cut(shape.texts, i), cut(shape.validation, i));
            let holder = Holder {
                texts: texts.some(shape, &train, &validation),
                prompts: Vec::new(),
            };
            parts.push(Mutex::new(Part {
                backend: B::start()?,
                shape: Shape {
                    texts: train.len(),
                    validation: validation.len(),
                    ..shape.clone()
                },
                holder,
                loaded: Loaded::of(model.clone()),
            }));
        }
        let workers = match count {
            1 => None,
            _ => Some(Workers::new(threads.min(count))?),
        };
        let mut clear = Clear {
            program,
            workers,
            parts,
        };
        clear.each(Pass::Texts, &[])?;
        Ok(clear)
    }

    /// What comes out of each part.
    fn each(&mut self, pass: Pass, prompts: &[f32]) -> Result<Vec<Vec<f32>>> {
        let program = self.program;
        let run = |part: &Mutex<Part<B>>| {
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            part.holder.prompts = prompts.to_vec();
            part.run(program, pass)
        };
        match &self.workers {
            Some(workers) => workers.map(&self.parts, run).into_iter().collect(),
            None => self.parts.iter().map(run).collect(),
        }
    }
}

impl<B: Backend> Part<B> {
    fn run(&self, program: Tuning, pass: Pass) -> Result<Vec<f32>> {
        if pass == Pass::Validation && self.shape.validation == 0 {
            return Ok(Vec::new());
        }
        let program = Tuning {
            shape: &self.shape,
            known: Some(&self.holder),
            ..program
        };
        let revealed = program.forward(&self.backend, &self.loaded, pass.number().into())?;
        let values = revealed.map_or_else(Vec::new, |r| r.values);
        Ok(values.into_iter().map(|v| v as f32).collect())
    }
}

/// Something that runs passes of a [`Shape`].
trait Passes {
    fn shape(&self) -> &Shape;
    fn pass(&mut self, pass: Pass, prompts: Vec<f32>) -> Result<Vec<f32>>;
}

impl<B: InTheClear> Passes for Clear<'_, B> {
    fn shape(&self) -> &Shape {
        self.program.shape
    }

    fn pass(&mut self, pass: Pass, prompts: Vec<f32>) -> Result<Vec<f32>> {
        let parts = self.each(pass, &prompts)?;
        let count = match pass {
            Pass::Validation => 1,
            _ => self.program.shape.candidates,
        };
        // A prompt's logits are those of its texts in each part, one part after the other.
        let logits = (0..count).flat_map(|i| {
            parts.iter().flat_map(move |part| {
                let each = part.len() / count;
                part[i * each..][..each].iter().copied()
            })
        });
        Ok(logits.collect())
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
                        tell(&format!(
                            "a prompt that leaves the calibrated ranges counts as the worst; --margin widens them: {e}"
                        ));
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

impl<B: InTheClear> Evaluate for Clear<'_, B> {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause> {
        logits(self, split, prompts).map_err(boxed)
    }
}

impl Evaluate for Remote {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> std::result::Result<Vec<f32>, Cause> {
        logits(self, split, prompts).map_err(boxed)
    }
}

/// The data owner's part as a clear interpreter takes it.
pub fn texts(ready: &Ready, rows: &Rows, labels: &[u32]) -> Result<Texts> {
    let mut ids = rows.ids.clone();
    ids.extend_from_slice(labels);
    Ok(Texts {
        words: model::rows(&ready.table, table_width(&ready.config), &ids)?,
        keep: rows.keep.clone(),
    })
}
