//! Training the private part of any method on a frozen backbone's hidden states.
//!
//! The forward pass is the one that is later planned, dealt and served. With V views every picture is seen in each of them in
//! turn, all in the same view in an epoch, in the last one as in testing: what batch norms average then is what they will meet.
//! What comes out are the parameters after the epoch that the validation pictures like best.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use veiltune_engine::{Owner, Params, Plain};
use veiltune_hub::{Array, Tensors};
use veiltune_nn::load::{inventory, params};
use veiltune_nn::{Backbone, Method, Private, Read};

use crate::cache::States;
pub use crate::checkpoint::STATE_FILE;
use crate::checkpoint::{self, Checkpoint};
use crate::optim::{Optimizer, Rule, cosine, cross_entropy, gradients};
pub use crate::plot::CURVE_FILE;
use crate::variables::{dropped, normal, usual_init};
use crate::workers::{Seen, Workers};
use crate::{Error, Result, Variables, evaluate, plot, warm};

/// How to train. The default is the paper's: SGD, 20 epochs, batches of 50.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Passes over the pictures; 0: what training starts with is kept.
    pub epochs: usize,
    /// Training ends after so many epochs without a better one ([`best`]); 0: never before the last.
    pub patience: usize,
    /// Pictures a step.
    pub batch: usize,
    /// How parameters are updated.
    pub rule: Rule,
    /// Peak learning rate; it rises linearly during the first fiftieth of the steps and falls to zero along a cosine.
    pub rate: f32,
    /// Weight decay, of matrices alone.
    pub decay: f32,
    /// Bound on the norm of a whole gradient.
    pub clip: f32,
    /// Whether training starts at a discriminant analysis of what the model reads, or at noise.
    pub warm: bool,
    /// Probability with which a feature of what an adapter adds (in LoRA, of what it reads) is zero in a forward pass of
    /// training. Drawn once for the pictures of a pass, not for each: a pass is [`Settings::shard`] pictures.
    pub dropout: f32,
    /// Pictures of one forward and backward pass, on one thread; a step adds the gradients of its passes up. With the same shard
    /// results do not depend on the number of threads.
    pub shard: usize,
    /// Calibrated ranges are what the training pictures show, widened by this factor on both sides.
    pub margin: f64,
    /// Pictures, each view counted, that ranges are calibrated on; they are spread evenly over all.
    pub calibration: usize,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            epochs: 20,
            patience: 0,
            batch: 50,
            rule: Rule::SGD,
            rate: 0.01,
            decay: 5e-4,
            clip: 1.0,
            warm: true,
            dropout: 0.1,
            shard: 25,
            margin: 1.5,
            calibration: 10_000,
            seed: 1,
        }
    }
}

impl Settings {
    /// The default for `method`: whole encoders take fewer pictures at once, for their memory; a head alone, whose features
    /// differ much in size, learns with AdamW, and so cheaply that it is given more epochs; one-way adapters begin with all that is
    /// linear, so that many epochs without a better one are for nothing.
    pub fn of(method: &Method) -> Settings {
        match method {
            Method::Head(_) => Settings {
                epochs: 60,
                batch: 256,
                rule: Rule::ADAMW,
                rate: 5e-3,
                decay: 1e-4,
                shard: 256,
                ..Settings::default()
            },
            Method::Encoder(_) => Settings {
                shard: 5,
                ..Settings::default()
            },
            Method::Owc(_) => Settings {
                patience: 3,
                ..Settings::default()
            },
        }
    }

    fn check(&self) -> Result<()> {
        let sound = self.batch > 0
            && self.shard > 0
            && self.rate > 0.0
            && self.rate.is_finite()
            && self.decay >= 0.0
            && self.clip > 0.0
            && (0.0..1.0).contains(&self.dropout)
            && self.margin >= 1.0
            && self.margin.is_finite();
        match sound {
            true => Ok(()),
            false => Err(Error::Settings(format!("nothing can be trained with {self:?}"))),
        }
    }
}

/// Some of the pictures of a cache.
#[derive(Clone, Copy)]
pub struct Pictures<'a> {
    /// The cache.
    pub states: &'a States,
    /// Which of its pictures.
    pub which: &'a [usize],
}

/// What is trained on what.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The method, not yet calibrated.
    pub method: &'a Method,
    /// The backbone that the states are of; None for a method that runs none of it itself, as with texts.
    pub backbone: Option<&'a Backbone>,
    /// Pictures to train on; ranges are calibrated on them too.
    pub train: Pictures<'a>,
    /// Pictures to measure on after each epoch; may be none.
    pub validation: Pictures<'a>,
    /// How.
    pub settings: &'a Settings,
    /// Threads.
    pub threads: usize,
    /// Where `curve.json`, `curve.svg` and, after the start and each epoch, all that is needed to go on are written.
    pub dir: Option<&'a Path>,
}

/// One epoch of a learning curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Mean cross-entropy of the training pictures as they were met, dropout included.
    pub train_loss: f64,
    /// Share of them that was right.
    pub train_accuracy: f64,
    /// Mean cross-entropy of the validation pictures afterwards; absent if there are none.
    pub validation_loss: Option<f64>,
    /// Share of them that is right.
    pub validation_accuracy: Option<f64>,
    /// Seconds since training began, interruptions not counted.
    pub seconds: f64,
}

/// What training begins with, where it is more than noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Mean cross-entropy of the validation pictures.
    pub validation_loss: f64,
    /// Share of them that is right.
    pub validation_accuracy: f64,
    /// Share of them that a head alone gets right, fitted likewise; of an adapter that few pictures are trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_accuracy: Option<f64>,
}

/// What is told of training as it goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// Before training, where it starts is computed, in several steps.
    Starting {
        /// This one.
        what: &'static str,
        /// Parts of it that are done.
        done: usize,
        /// In all.
        of: usize,
    },
    /// A step or an epoch.
    Trained(Progress),
    /// After training: of so many passes of a picture, which calibrate ranges and measure accuracies, so many are done.
    Measured {
        /// Done.
        done: usize,
        /// In all.
        of: usize,
        /// Seconds left at this pace.
        seconds_left: f64,
    },
}

/// How far training is; after each step, and after each epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Steps done, of all epochs.
    pub step: usize,
    /// Of so many.
    pub steps: usize,
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// Of so many.
    pub epochs: usize,
    /// Loss of the last step.
    pub loss: f64,
    /// Training pictures a second, validation included.
    pub per_second: f64,
    /// Seconds left at this pace.
    pub seconds_left: f64,
    /// The epoch that has just ended.
    pub ended: Option<Epoch>,
    /// Number of the epoch that is the best so far, from 1; 0: none is better than the start.
    pub best: usize,
}

/// The number, from 1, of the epoch whose parameters are kept, or 0 for those that training began with: those with the highest
/// validation accuracy, of equals the ones with the lowest validation loss; the last ones if nothing is validated.
pub fn best(start: Option<Start>, curve: &[Epoch]) -> usize {
    let start = start.map(|s| (0, Some(s.validation_accuracy), Some(s.validation_loss)));
    let epochs = curve.iter().zip(1..);
    let epochs = epochs.map(|(e, number)| (number, e.validation_accuracy, e.validation_loss));
    let ranked = start.into_iter().chain(epochs).map(|(number, accuracy, loss)| {
        let loss = Some(loss.unwrap_or(0.0)).filter(|loss| loss.is_finite());
        (number, accuracy.unwrap_or(0.0), -loss.unwrap_or(f64::INFINITY))
    });
    let best = ranked.max_by(|a, b| a.1.total_cmp(&b.1).then(a.2.total_cmp(&b.2)));
    best.map_or(0, |(number, ..)| number)
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The method, calibrated.
    pub method: Method,
    /// Its private parameters.
    pub tensors: Tensors,
    /// Figures.
    pub report: Report,
}

/// Figures of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it was trained.
    pub settings: Settings,
    /// Trained values.
    pub parameters: usize,
    /// Pictures trained on.
    pub pictures: usize,
    /// Views of each.
    pub views: usize,
    /// Number of the epoch whose parameters these figures are of, from 1; 0: those that training began with.
    pub epoch: usize,
    /// Share of the training pictures, as in testing, that is right.
    pub train_accuracy: f64,
    /// Share of the validation pictures that is right.
    pub validation_accuracy: Option<f64>,
    /// Seconds of training, interruptions not counted.
    pub seconds: f64,
    /// What it began with.
    pub start: Option<Start>,
    /// Epoch by epoch.
    pub curve: Vec<Epoch>,
}

impl Report {
    /// The validation accuracies of the adapter and of a head alone, if the former is lower by more than chance explains: by more
    /// than two standard errors of the difference, of `validated` pictures.
    pub fn below_head(&self, validated: usize) -> Option<(f64, f64)> {
        let own = self.validation_accuracy?;
        let head = self.start?.head_accuracy?;
        is_below(own, head, validated).then_some((own, head))
    }
}

/// Trains, or goes on where an interrupted run in the same folder stopped, and calibrates.
///
/// # Errors
/// [`Error::Interrupted`] soon after `interrupted` is set; what the last whole epoch left is kept. [`Error::Diverged`] when the loss
/// is no longer finite. [`Error::Settings`] if the folder has another run's state.
pub fn train(task: &Task, progress: &mut dyn FnMut(Event), interrupted: &AtomicBool) -> Result<Trained> {
    let workers = Workers::new(task.threads)?;
    let mut run = Run::start(task, &workers, progress, interrupted)?;
    run.until(task.settings.epochs, progress, interrupted)?;
    run.finish(progress, interrupted)
}

/// As [`train`], but stops after `epochs` of all the epochs that the settings name, whose schedule it follows; a later call goes
/// on from there if the task has a folder. What it began with, and the learning curve so far.
pub fn train_until(
    task: &Task,
    epochs: usize,
    progress: &mut dyn FnMut(Event),
    interrupted: &AtomicBool,
) -> Result<(Option<Start>, Vec<Epoch>)> {
    let workers = Workers::new(task.threads)?;
    let mut run = Run::start(task, &workers, progress, interrupted)?;
    run.until(epochs.min(task.settings.epochs), progress, interrupted)?;
    Ok((run.done.start, run.done.curve))
}

/// A run: what is trained, and its state.
struct Run<'a> {
    task: &'a Task<'a>,
    workers: &'a Workers,
    reads: Vec<Read>,
    model: Model<'a>,
    optimizer: Optimizer,
    done: Checkpoint,
    /// All private parameters after the best epoch.
    kept: Tensors,
    /// When this process began, and after how many steps and seconds of the run.
    began: Instant,
    before: (usize, f64),
    step: usize,
}

/// A model in training.
struct Model<'a> {
    method: &'a Method,
    vars: Variables,
    /// Averages that batch norms keep, `(mean, variance)` in the order of the program; set, not descended.
    running: Vec<[String; 2]>,
    /// By name: the running averages, and the public parameters.
    constants: BTreeMap<String, Tensor>,
}

/// What the last batch weighs in a running average.
const RUNNING: f32 = 0.1;
/// Names of a batch norm's running averages.
const AVERAGES: [&str; 2] = ["running_mean", "running_var"];

impl<'a> Model<'a> {
    fn new(method: &'a Method, backbone: Option<&Backbone>, seed: u64) -> Result<Self> {
        let b = Plain::new();
        let public = RefCell::new(BTreeMap::new());
        let shapes = inventory(&b, |p| {
            let public = Params::new(|name, dims: &[usize]| {
                let tensor = constant(backbone, name, dims)?;
                public.borrow_mut().insert(name.to_owned(), tensor.clone());
                Ok(tensor)
            });
            method.load(p, &public)
        })?;
        let mut constants = public.into_inner();
        let norms = match method {
            Method::Owc(config) => config.batch_norms(),
            Method::Head(_) | Method::Encoder(_) => Vec::new(),
        };
        let running: Vec<_> = norms
            .iter()
            .map(|norm| AVERAGES.map(|a| format!("{norm}.{a}")))
            .collect();
        let mut trained = Vec::new();
        for (name, dims) in shapes {
            match running.iter().flatten().position(|average| *average == name) {
                // Mean 0 and variance 1.
                Some(i) => {
                    let value = Tensor::full((i % 2) as f32, dims.as_slice(), &Device::Cpu)?;
                    constants.insert(name, value);
                }
                None => trained.push((name, dims)),
            }
        }
        let mut rng = StdRng::seed_from_u64(seed);
        let vars = Variables::new(&trained, |name, dims| {
            initial(method, backbone, &mut rng, name, dims)
        })?;
        Ok(Model {
            method,
            vars,
            running,
            constants,
        })
    }

    /// The model; with features dropped at random if there is a `dropout` and a seed.
    fn load(&self, dropout: Option<(f32, u64)>) -> Result<Private<Plain>> {
        let mask = dropout.filter(|(p, _)| *p > 0.0);
        let constant = |name: &str| {
            let found = self.constants.get(name).cloned();
            found.ok_or_else(|| veiltune_engine::Error::program("training", "no such parameter"))
        };
        let private = Params::new(|name, dims: &[usize]| match self.vars.get(name) {
            Some(var) if var.dims() == dims => Ok(match mask {
                Some((p, seed)) => dropped(var.as_tensor(), name, p, seed)?,
                None => var.as_tensor().clone(),
            }),
            _ => constant(name),
        });
        let public = Params::new(|name, _: &[usize]| constant(name));
        Ok(self.method.load(&private, &public)?)
    }

    /// Moves the running averages towards what the batch norms of a step's passes saw.
    fn follow(&mut self, seen: &[(f32, Statistics)]) -> Result<()> {
        for (i, names) in self.running.iter().enumerate() {
            for (j, name) in names.iter().enumerate() {
                let old = self.constants[name].to_vec1::<f32>()?;
                let mut new: Vec<f32> = old.iter().map(|v| (1.0 - RUNNING) * v).collect();
                for (share, statistics) in seen {
                    let (mean, variance) = &statistics[i];
                    let batch = [mean, variance][j];
                    new.iter_mut()
                        .zip(batch)
                        .for_each(|(new, v)| *new += RUNNING * share * v);
                }
                let new = Tensor::from_vec(new, old.len(), &Device::Cpu)?;
                self.constants.insert(name.clone(), new);
            }
        }
        Ok(())
    }

    /// Sets parameters and running averages.
    fn set(&mut self, values: warm::Values) -> Result<()> {
        for (name, value) in values {
            match (self.vars.get(&name), self.constants.get_mut(&name)) {
                (Some(var), _) => var.set(&value)?,
                (_, Some(constant)) => *constant = value,
                _ => return Err(Error::Settings(format!("no parameter {name}"))),
            }
        }
        Ok(())
    }

    /// Running averages by name.
    fn averages(&self) -> Result<Tensors> {
        let array = |name: &String| {
            let values = self.constants[name].to_vec1::<f32>()?;
            let dims = vec![values.len()];
            Ok((name.clone(), Array { dims, values }))
        };
        self.running.iter().flatten().map(array).collect()
    }

    /// All private parameters.
    fn tensors(&self) -> Result<Tensors> {
        let mut tensors = self.vars.tensors()?;
        tensors.extend(self.averages()?);
        Ok(tensors)
    }
}

/// Mean and variance of each batch norm in a pass.
type Statistics = Vec<(Vec<f32>, Vec<f32>)>;

fn constant(backbone: Option<&Backbone>, name: &str, dims: &[usize]) -> veiltune_engine::Result<Tensor> {
    let file = |e: String| veiltune_engine::Error::File(e);
    let backbone = backbone.ok_or_else(|| file("the method needs its backbone".into()))?;
    let array = backbone.parameter(name, dims).map_err(|e| file(e.to_string()))?;
    Ok(Tensor::from_vec(array.values, dims, &Device::Cpu)?)
}

/// Initial values. Adapters start as the identity: what they add is zero. An adapter's attention starts as a plain mean of the
/// tokens, and blocks of the backbone, and the norm after them if it has one, as they are there.
fn initial(
    method: &Method,
    backbone: Option<&Backbone>,
    rng: &mut StdRng,
    name: &str,
    dims: &[usize],
) -> Vec<f32> {
    let count = dims.iter().product();
    let inherited = match (method, backbone) {
        (Method::Encoder(_), Some(backbone)) => {
            let layout = backbone.variant.layout;
            let name = match name.strip_prefix("norm.") {
                Some(part) => &format!("{}.{part}", layout.final_norm()),
                None => name,
            };
            backbone.parameter(name, dims).ok()
        }
        _ => None,
    };
    match name {
        _ if inherited.is_some() => inherited.map(|array| array.values).unwrap_or_default(),
        _ if name.contains(".up.") || name.contains(".lora_B.") => vec![0.0; count],
        _ if name.ends_with("mix.weight") => normal(rng, count, 1.0 / dims[1] as f32),
        _ if name.ends_with("mix.bias") => vec![1.0 / dims[1] as f32; count],
        // Small: the first steps are then those of the features, not of the noise.
        "head.weight" => normal(rng, count, 0.02),
        _ => usual_init(rng, name, dims),
    }
}

/// Whether a share of `count` is below another one by more than two standard errors of their difference.
fn is_below(share: f64, other: f64, count: usize) -> bool {
    let error = ((share * (1.0 - share) + other * (1.0 - other)) / count as f64).sqrt();
    other - share > 2.0 * error
}

/// Pictures for each entry of a hidden state from which on an adapter's start is not compared with a head's.
const FEW: usize = 8;

/// Whether it starts at more than noise.
fn has_start(task: &Task) -> bool {
    task.settings.warm && task.train.states.layers().is_some()
}

/// A seed of its own for each use.
fn seed_of(seed: u64, uses: [u64; 2]) -> u64 {
    // SplitMix64's step, once a number.
    uses.iter().fold(seed, |state, number| {
        let z = (state ^ number).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// What a forward and backward pass gives beside its gradient.
struct Pass {
    right: u32,
    statistics: Statistics,
}

impl<'a> Run<'a> {
    /// Trains until so many epochs are done, or until no better one is expected, and keeps the state after each.
    fn until(
        &mut self,
        epochs: usize,
        progress: &mut dyn FnMut(Event),
        interrupted: &AtomicBool,
    ) -> Result<()> {
        while self.done.curve.len() < epochs && !self.is_out_of_patience() {
            let epoch = self.epoch(progress, interrupted)?;
            self.done.curve.push(epoch);
            if self.best() == self.done.curve.len() {
                self.kept = self.model.tensors()?;
            }
            self.done.seconds = epoch.seconds;
            self.save()?;
            self.report(epoch.train_loss, Some(epoch), progress);
        }
        Ok(())
    }

    fn is_out_of_patience(&self) -> bool {
        let patience = self.task.settings.patience;
        patience > 0 && self.done.curve.len() - self.best() >= patience
    }

    /// See [`best`].
    fn best(&self) -> usize {
        best(self.done.start, &self.done.curve)
    }

    fn start(
        task: &'a Task<'a>,
        workers: &'a Workers,
        progress: &mut dyn FnMut(Event),
        interrupted: &AtomicBool,
    ) -> Result<Self> {
        task.settings.check()?;
        task.method.check()?;
        if task.settings.epochs == 0 && !has_start(task) {
            return Err(Error::Settings(
                "a model that starts at noise has to be trained for at least one epoch".into(),
            ));
        }
        if task.train.which.is_empty() {
            return Err(Error::Settings("no picture to train on".into()));
        }
        let classes = task.train.states.classes();
        if task.method.labels() != classes {
            return Err(Error::Settings(format!(
                "the method is for {} classes, the pictures have {}, or others",
                task.method.labels().len(),
                classes.len()
            )));
        }
        let layers = task.train.states.layers().unwrap_or(0);
        let (reads, seed) = (task.method.reads(layers)?, task.settings.seed);
        let model = Model::new(task.method, task.backbone, seed)?;
        let optimizer = Optimizer::new(
            task.settings.rule,
            task.settings.decay,
            task.settings.clip,
            &model.vars,
        );
        let mut run = Run {
            task,
            workers,
            reads,
            model,
            optimizer,
            done: Checkpoint::new(task)?,
            kept: Tensors::new(),
            began: Instant::now(),
            before: (0, 0.0),
            step: 0,
        };
        if let Some(dir) = task.dir
            && let Some((done, tensors)) = checkpoint::read(dir, &run.done)?
        {
            run.resume(done, &tensors)?;
        } else {
            run.warm_up(progress, interrupted)?;
        }
        Ok(run)
    }

    /// Begins with what a discriminant analysis finds, and keeps that.
    fn warm_up(&mut self, progress: &mut dyn FnMut(Event), interrupted: &AtomicBool) -> Result<()> {
        let task = self.task;
        if !has_start(task) {
            self.kept = self.model.tensors()?;
            return Ok(());
        }
        let progress = RefCell::new(progress);
        let seen = |what, done, of| (progress.borrow_mut())(Event::Starting { what, done, of });
        let few = task.train.which.len() < FEW * task.method.hidden_size();
        let head = match task.method {
            Method::Owc(_) if few && !task.validation.which.is_empty() => {
                // Adapters add nothing so far. All that is set here is set again below.
                let head = self.ground(interrupted, &seen).head(task.method)?;
                self.model.set(head)?;
                self.validate()?
            }
            _ => None,
        };
        let found = self.ground(interrupted, &seen).start(task.method)?;
        self.model.set(found)?;
        self.kept = self.model.tensors()?;
        self.done.start = self.validate()?.map(|v| Start {
            validation_loss: v.loss,
            validation_accuracy: v.accuracy,
            head_accuracy: head.map(|v| v.accuracy),
        });
        self.done.seconds = self.seconds();
        self.save()
    }

    fn ground<'b>(
        &'b self,
        interrupted: &'b AtomicBool,
        seen: &'b Seen<'b>,
    ) -> warm::Ground<'b, impl Fn(&str, &[usize]) -> veiltune_engine::Result<Tensor> + Sync> {
        let model = &self.model;
        let initial = |name: &str, dims: &[usize]| match (model.vars.get(name), model.constants.get(name)) {
            (Some(var), _) if var.dims() == dims => Ok(var.as_tensor().clone()),
            (_, Some(constant)) => Ok(constant.clone()),
            _ => Err(veiltune_engine::Error::program("training", "no such parameter")),
        };
        warm::Ground {
            initial,
            pictures: self.task.train,
            reads: &self.reads,
            workers: self.workers,
            seed: seed_of(self.task.settings.seed, [0, u64::MAX]),
            interrupted,
            seen,
        }
    }

    fn resume(&mut self, done: Checkpoint, tensors: &Tensors) -> Result<()> {
        self.model
            .vars
            .set(|name| checkpoint::find(tensors, checkpoint::VALUE, name))?;
        self.optimizer.restore(&self.model.vars, done.steps, |i, name| {
            checkpoint::find(tensors, checkpoint::MOMENTS[i], name)
        })?;
        for name in self.model.running.clone().iter().flatten() {
            let array = checkpoint::find(tensors, checkpoint::VALUE, name)?;
            let value = Tensor::from_vec(array.values.clone(), array.values.len(), &Device::Cpu)?;
            self.model.constants.insert(name.clone(), value);
        }
        self.step = done.steps as usize;
        self.before = (self.step, done.seconds);
        self.done = done;
        let now = self.model.tensors()?;
        self.kept = match self.best() < self.done.curve.len() {
            true => {
                let kept = now.keys().map(|name| {
                    let array = checkpoint::find(tensors, checkpoint::KEPT, name)?;
                    Ok((name.clone(), array.clone()))
                });
                kept.collect::<Result<_>>()?
            }
            false => now,
        };
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        let Some(dir) = self.task.dir else { return Ok(()) };
        self.done.steps = self.step as i32;
        let mut tensors = Tensors::new();
        for (name, array) in self.model.tensors()? {
            tensors.insert(format!("{}{name}", checkpoint::VALUE), array);
        }
        for (i, name, array) in self.optimizer.moments(&self.model.vars) {
            tensors.insert(format!("{}{name}", checkpoint::MOMENTS[i]), array);
        }
        if self.best() < self.done.curve.len() {
            for (name, array) in &self.kept {
                tensors.insert(format!("{}{name}", checkpoint::KEPT), array.clone());
            }
        }
        checkpoint::write(dir, &self.done, &tensors)?;
        match self.done.curve[..] {
            [] => Ok(()),
            _ => plot::write(dir, &self.done.curve),
        }
    }

    fn per_epoch(&self) -> usize {
        self.task.train.which.len().div_ceil(self.task.settings.batch)
    }

    fn epoch(&mut self, progress: &mut dyn FnMut(Event), interrupted: &AtomicBool) -> Result<Epoch> {
        let (task, settings) = (self.task, self.task.settings);
        let (epoch, states) = (self.done.curve.len(), task.train.states);
        let steps = self.per_epoch() * settings.epochs;
        let mut order = task.train.which.to_vec();
        order.shuffle(&mut StdRng::seed_from_u64(seed_of(
            settings.seed,
            [0, epoch as u64],
        )));
        let (mut loss_sum, mut right) = (0.0, 0);
        for batch in order.chunks(settings.batch) {
            if interrupted.load(Relaxed) {
                return Err(Error::Interrupted);
            }
            let numbered: Vec<_> = batch.chunks(settings.shard).enumerate().collect();
            let weights: Vec<f32> = numbered
                .iter()
                .map(|(_, which)| which.len() as f32 / batch.len() as f32)
                .collect();
            let (step, view) = (self.step as u64, (settings.epochs - 1 - epoch) % states.views());
            let (model, reads) = (&self.model, &self.reads);
            let pass = |(i, which): &(usize, &[usize])| -> Result<(Tensor, Pass)> {
                let seed = seed_of(settings.seed, [1 + step, *i as u64]);
                let b = Plain::training();
                let private = model.load(Some((settings.dropout, seed)))?;
                let logits = private.forward(&b, &states.batch(view, which, reads)?)?;
                let labels = states.labels_of(which)?;
                let best = logits.detach().argmax(1)?;
                let right = best.eq(&labels)?.to_dtype(DType::U32)?.sum_all()?.to_scalar()?;
                let statistics = b.statistics();
                Ok((cross_entropy(&logits, &labels)?, Pass { right, statistics }))
            };
            let (loss, grads, passes) = gradients(self.workers, &self.model.vars, &numbered, &weights, pass)?;
            let rate = cosine(settings.rate, self.step, steps, steps / 50);
            self.optimizer.step(&self.model.vars, &grads, rate)?;
            right += passes.iter().map(|p| p.right).sum::<u32>();
            loss_sum += loss as f64 * batch.len() as f64;
            if !self.model.running.is_empty() {
                let seen = passes.into_iter().map(|p| p.statistics);
                let seen: Vec<_> = weights.into_iter().zip(seen).collect();
                self.model.follow(&seen)?;
            }
            self.step += 1;
            self.report(loss as f64, None, progress);
        }
        let validation = self.validate()?;
        Ok(Epoch {
            train_loss: loss_sum / order.len() as f64,
            train_accuracy: right as f64 / order.len() as f64,
            validation_loss: validation.as_ref().map(|v| v.loss),
            validation_accuracy: validation.as_ref().map(|v| v.accuracy),
            seconds: self.seconds(),
        })
    }

    /// How the validation pictures are classified now, if there are any. Not to be interrupted, which would lose the epoch
    /// before it.
    fn validate(&self) -> Result<Option<evaluate::Score>> {
        let (pictures, shard) = (self.task.validation, self.task.settings.shard);
        if pictures.which.is_empty() {
            return Ok(None);
        }
        let (model, reads) = (self.model.load(None)?, &self.reads);
        evaluate::float(
            &model,
            pictures.states,
            pictures.which,
            reads,
            self.workers,
            shard,
            evaluate::Watch {
                seen: &mut |_| (),
                interrupted: &AtomicBool::new(false),
            },
        )
        .map(Some)
    }

    fn seconds(&self) -> f64 {
        self.before.1 + self.began.elapsed().as_secs_f64()
    }

    fn report(&self, loss: f64, ended: Option<Epoch>, progress: &mut dyn FnMut(Event)) {
        let (settings, count) = (self.task.settings, self.task.train.which.len());
        let steps = self.per_epoch() * settings.epochs;
        let pace = self.began.elapsed().as_secs_f64() / (self.step - self.before.0) as f64;
        let a_step = count as f64 / self.per_epoch() as f64;
        progress(Event::Trained(Progress {
            step: self.step,
            steps,
            epoch: self.step.div_ceil(self.per_epoch()),
            epochs: settings.epochs,
            loss,
            per_second: a_step / pace,
            seconds_left: (steps - self.step) as f64 * pace,
            ended,
            best: self.best(),
        }));
    }

    fn finish(self, progress: &mut dyn FnMut(Event), interrupted: &AtomicBool) -> Result<Trained> {
        let (task, settings) = (self.task, self.task.settings);
        let tensors = self.kept;
        let plain = Plain::new();
        let model = fixed(&plain, task.method, &tensors, task.backbone)?;
        let (shard, states) = (settings.shard, task.train.states);
        let calibrated = states.views() * evaluate::calibrated(task.train, settings.calibration);
        let of = calibrated + task.train.which.len() + task.validation.which.len();
        let (began, mut done) = (Instant::now(), 0);
        let mut seen = |count| {
            done += count;
            let pace = began.elapsed().as_secs_f64() / done as f64;
            let seconds_left = (of - done) as f64 * pace;
            progress(Event::Measured {
                done,
                of,
                seconds_left,
            });
        };
        let sites = evaluate::sites(
            &model,
            task.train,
            &self.reads,
            self.workers,
            (shard, settings.calibration),
            evaluate::Watch {
                seen: &mut seen,
                interrupted,
            },
        )?;
        let mut method = task.method.clone();
        method.calibrate(&sites, settings.margin)?;
        // Measured with the calibrated ranges: what is reported is what is handed over.
        let b = Plain::new();
        let model = fixed(&b, &method, &tensors, task.backbone)?;
        let mut accuracy = |pictures: Pictures| match pictures.which {
            [] => Ok(None),
            which => {
                let (states, reads) = (pictures.states, &self.reads);
                let watch = evaluate::Watch {
                    seen: &mut seen,
                    interrupted,
                };
                evaluate::float(&model, states, which, reads, self.workers, shard, watch)
                    .map(|score| Some(score.accuracy))
            }
        };
        let (train, validation) = (accuracy(task.train)?, accuracy(task.validation)?);
        Ok(Trained {
            report: Report {
                settings: settings.clone(),
                parameters: self.model.vars.count(),
                pictures: task.train.which.len(),
                views: states.views(),
                epoch: best(self.done.start, &self.done.curve),
                train_accuracy: train.unwrap_or_default(),
                validation_accuracy: validation,
                seconds: self.done.seconds,
                start: self.done.start,
                curve: self.done.curve,
            },
            method,
            tensors,
        })
    }
}

/// Parameters of a trained model as constants.
pub(crate) fn fixed<'a>(
    b: &'a Plain,
    method: &Method,
    tensors: &'a Tensors,
    backbone: Option<&'a Backbone>,
) -> Result<Private<Plain>> {
    let public = Params::new(|name, dims: &[usize]| constant(backbone, name, dims));
    Ok(method.load(&params(b, Owner::Public, tensors), &public)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{Examples, Request, Source};
    use crate::evaluate::{Arithmetic, Model as Trainee, evaluate};
    use crate::testing;
    use veiltune_hub::{Augment, Dataset};
    use veiltune_nn::attention::AttentionKind;
    use veiltune_nn::encoder::Tuning;
    use veiltune_nn::owc::{Design, NormChoice};
    use veiltune_nn::{EncoderConfig, HeadConfig, OwcConfig};

    struct World {
        dir: tempfile::TempDir,
        backbone: Backbone,
        dataset: Dataset,
        all: Vec<usize>,
    }

    impl World {
        fn new() -> World {
            let dir = tempfile::tempdir().unwrap();
            let dataset = testing::dataset(&dir.path().join("data"), 96);
            World {
                backbone: testing::backbone(),
                all: (0..dataset.len()).collect(),
                dataset,
                dir,
            }
        }

        fn labels(&self) -> Vec<String> {
            self.dataset.classes().to_vec()
        }

        fn owc(&self, scope: usize, norm: NormChoice) -> Method {
            let design = Design {
                norm,
                ..Design::new(2, 8, scope)
            };
            Method::Owc(OwcConfig::new(&design, 16, 5, self.labels()))
        }

        fn encoder(&self, tuning: Tuning, layers: usize) -> Method {
            let (vit, variant) = (&self.backbone.config, self.backbone.variant);
            let kind = AttentionKind::Softmax;
            Method::Encoder(EncoderConfig::new(
                tuning,
                vit,
                variant,
                layers,
                kind,
                self.labels(),
            ))
        }

        fn states(&self, method: &Method) -> States {
            let request = Request {
                dir: &self.dir.path().join("cache"),
                source: Source::Backbone(&self.backbone),
                examples: Examples::Pictures(&self.dataset),
                views: 2,
                // Stripes keep their direction in a mirror.
                augment: Augment {
                    scale: [0.7, 1.0],
                    ..Augment::default()
                },
                seed: 3,
                threads: 2,
            };
            let reads = method.reads(2).unwrap();
            States::open_or_compute(&request, &reads, &mut |_| (), &AtomicBool::new(false)).unwrap()
        }

        fn task<'a>(&'a self, method: &'a Method, states: &'a States, settings: &'a Settings) -> Task<'a> {
            let (train, validation) = self.all.split_at(72);
            Task {
                method,
                backbone: Some(&self.backbone),
                train: Pictures { states, which: train },
                validation: Pictures {
                    states,
                    which: validation,
                },
                settings,
                threads: 2,
                dir: None,
            }
        }
    }

    fn settings() -> Settings {
        Settings {
            warm: false,
            epochs: 24,
            batch: 12,
            rate: 0.05,
            dropout: 0.05,
            shard: 6,
            seed: 1,
            ..Settings::default()
        }
    }

    fn run(task: &Task) -> Trained {
        train(task, &mut |_| (), &AtomicBool::new(false)).unwrap()
    }

    fn figures(epochs: &[Epoch]) -> Vec<[f64; 3]> {
        let figures = epochs.iter();
        figures
            .map(|e| [e.train_loss, e.train_accuracy, e.validation_loss.unwrap_or(-1.0)])
            .collect()
    }

    fn step(event: Event) -> Option<usize> {
        match event {
            Event::Trained(p) => Some(p.step),
            Event::Starting { .. } | Event::Measured { .. } => None,
        }
    }

    /// Learns, is calibrated, and is the same thing as it is served and in fixed point.
    fn learns(method: Method, settings: &Settings, least: f64) {
        let world = World::new();
        let states = world.states(&method);
        let task = world.task(&method, &states, settings);
        let mut epochs = Vec::new();
        let (mut last, mut measured) = (0, 0);
        // Ranges on every view, then accuracies.
        let passes = (states.views() + 1) * task.train.which.len() + task.validation.which.len();
        let mut starting = Vec::new();
        let watch = &mut |event| {
            let p = match event {
                Event::Trained(p) => p,
                Event::Starting { what, done, of } => {
                    assert_eq!((last, measured), (0, 0));
                    return starting.push((what, done, of));
                }
                Event::Measured { done, of, .. } => {
                    assert!(measured < done && done <= of);
                    measured = done;
                    assert_eq!(of, passes);
                    return;
                }
            };
            assert!(p.step >= last && p.step <= p.steps && p.per_second > 0.0);
            last = p.step;
            epochs.extend(p.ended);
        };
        let trained = train(&task, watch, &AtomicBool::new(false)).unwrap();
        assert_eq!(epochs, trained.report.curve);
        assert_eq!(measured, passes);
        // Each step of the start begins with nothing done and goes on part by part to its end.
        let mut steps = starting.iter();
        while let Some((what, 0, of)) = steps.next() {
            let parts = (1..=*of).map(|done| (*what, done, *of));
            assert!(steps.by_ref().take(*of).copied().eq(parts), "{starting:?}");
        }
        assert!(steps.next().is_none(), "{starting:?}");
        assert_eq!(starting.is_empty(), !has_start(&task));
        let (first, ended) = (epochs[0], epochs[epochs.len() - 1]);
        assert!(ended.train_loss < 0.8 * first.train_loss, "{first:?} {ended:?}");
        assert!(trained.report.train_accuracy >= least, "{:?}", trained.report);
        let model = Trainee {
            method: &trained.method,
            tensors: &trained.tensors,
            backbone: task.backbone,
        };
        let all = Pictures {
            states: &states,
            which: &world.all,
        };
        let run = |arithmetic| {
            let mut done = 0;
            let e = evaluate(
                &model,
                all,
                arithmetic,
                2,
                &mut |n| done = n,
                &AtomicBool::new(false),
            )
            .unwrap();
            assert_eq!((done, e.predicted.len()), (96, 96));
            e
        };
        let float = run(Arithmetic::Float);
        assert!(float.accuracy >= least, "{}", float.accuracy);
        for arithmetic in [Arithmetic::Served, Arithmetic::Fixed] {
            let other = run(arithmetic);
            let same = float
                .predicted
                .iter()
                .zip(&other.predicted)
                .filter(|(a, b)| a == b);
            assert!(same.count() >= 94 && other.beyond == 0, "{arithmetic:?}");
            assert!((other.loss - float.loss).abs() < 0.05, "{arithmetic:?}");
        }
    }

    #[test]
    fn an_adapter_learns_with_either_norm() {
        let world = World::new();
        learns(world.owc(2, NormChoice::Layer), &settings(), 0.9);
        learns(world.owc(1, NormChoice::Batch), &settings(), 0.9);
    }

    #[test]
    fn training_starts_at_what_a_discriminant_analysis_finds() {
        let world = World::new();
        for method in [
            world.owc(1, NormChoice::Layer),
            world.owc(2, NormChoice::Batch),
            world.encoder(Tuning::LastLayers, 1),
        ] {
            let states = world.states(&method);
            let [cold, warm] = [false, true].map(|warm| {
                let settings = Settings {
                    warm,
                    epochs: 1,
                    rate: 1e-6,
                    ..settings()
                };
                run(&world.task(&method, &states, &settings)).report.curve[0].train_loss
            });
            assert!(warm < 0.75 * cold, "{}: {cold} {warm}", method.peft_type());
        }
    }

    #[test]
    fn few_pictures_say_little_of_which_is_better() {
        assert!(is_below(0.1, 0.6, 10) && !is_below(0.4, 0.6, 10));
        assert!(is_below(0.4, 0.6, 100) && !is_below(0.6, 0.4, 100));
        assert!(!is_below(1.0, 1.0, 10) && is_below(0.0, 1.0, 1));
        // Where there are few to train on, the start of adapters is compared with that of a head.
        let world = World::new();
        let method = world.owc(1, NormChoice::Batch);
        let states = world.states(&method);
        let settings = Settings {
            warm: true,
            epochs: 0,
            ..settings()
        };
        let start = run(&world.task(&method, &states, &settings))
            .report
            .start
            .unwrap();
        assert!(start.head_accuracy.unwrap() > 0.5, "{start:?}");
    }

    /// Of linear adapters, one after the other, with what a norm does between them.
    #[test]
    fn a_start_computes_what_its_analysis_says() {
        let world = World::new();
        for (norm, scope, allowed) in [
            (NormChoice::Batch, 1, 0.02),
            (NormChoice::Batch, 2, 0.02),
            (NormChoice::Layer, 1, 0.3),
            (NormChoice::Layer, 2, 0.3),
        ] {
            let method = world.owc(scope, norm);
            let Method::Owc(config) = &method else {
                panic!("an adapter");
            };
            let (states, settings) = (world.states(&method), settings());
            let task = world.task(&method, &states, &settings);
            let (workers, interrupted) = (Workers::new(2).unwrap(), AtomicBool::new(false));
            let mut run = Run::start(&task, &workers, &mut |_| (), &interrupted).unwrap();
            let (analysis, values) = {
                let ground = run.ground(&interrupted, &|_, _, _| ());
                let analysis = ground.analyse(config).unwrap();
                let values = ground.adapters(config, &analysis).unwrap();
                (analysis, values)
            };
            run.model.set(values).unwrap();
            let inputs = states.batch(0, task.train.which, &run.reads).unwrap();
            let logits = run
                .model
                .load(None)
                .unwrap()
                .forward(&Plain::new(), &inputs)
                .unwrap();
            let wanted = analysis.logits.col_iter().flat_map(|column| column.iter());
            let wanted: Vec<f64> = wanted.map(|v| f64::from(*v)).collect();
            let got: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
            // What decides between the two classes.
            let margins = |v: &[f64]| v.chunks(2).map(|v| v[0] - v[1]).collect::<Vec<_>>();
            let got: Vec<f64> = got.into_iter().map(f64::from).collect();
            let (got, wanted) = (margins(&got), margins(&wanted));
            let rms =
                |v: &mut dyn Iterator<Item = f64>| (v.map(|x| x * x).sum::<f64>() / got.len() as f64).sqrt();
            let error = rms(&mut got.iter().zip(&wanted).map(|(a, b)| a - b));
            let size = rms(&mut wanted.iter().copied());
            println!("{norm:?} {scope}: {error} of {size}");
            assert!(error < allowed * size, "{norm:?} {scope}: {error} of {size}");
        }
    }

    #[test]
    fn a_probe_learns_what_is_linear() {
        let norm = veiltune_engine::NormSpec {
            kind: veiltune_engine::NormKind::Layer,
            eps: 1e-6,
            sigma: (1e-3, 1e3),
        };
        let method = Method::Head(HeadConfig {
            hidden_size: 16,
            norm,
            labels: World::new().labels(),
        });
        let settings = Settings {
            rate: 0.3,
            epochs: 30,
            ..settings()
        };
        learns(method, &settings, 0.8);
    }

    #[test]
    fn blocks_of_the_backbone_learn() {
        let world = World::new();
        let lora = Tuning::Lora {
            r: 4,
            lora_alpha: 8.0,
            target_modules: vec!["query".into(), "value".into()],
        };
        let settings = Settings {
            epochs: 10,
            ..settings()
        };
        learns(world.encoder(lora, 2), &settings, 0.8);
        learns(world.encoder(Tuning::LastLayers, 1), &settings, 0.8);
        let adapt = Tuning::AdaptFormer {
            bottleneck: 4,
            scale: 0.5,
        };
        learns(world.encoder(adapt, 2), &settings, 0.8);
    }

    #[test]
    fn an_untrained_method_starts_from_the_backbone() {
        let mut world = World::new();
        for has_norm in [false, true] {
            world.backbone = testing::backbone_with(has_norm);
            let last = world.encoder(Tuning::LastLayers, 1);
            let model = Model::new(&last, Some(&world.backbone), 1).unwrap();
            for (name, array) in model.tensors().unwrap() {
                let own = name.replace("norm.", "layernorm.");
                let own = if name.starts_with("norm.") { &own } else { &name };
                if let Ok(own) = world.backbone.parameter(own, &array.dims) {
                    assert_eq!(array, own, "{name}");
                    continue;
                }
                let is_new = name.starts_with("head.") || (name.starts_with("norm.") && !has_norm);
                assert!(is_new, "{name}");
            }
        }
        // What an adapter adds is zero: other patches change nothing.
        let owc = world.owc(1, NormChoice::Layer);
        let states = world.states(&owc);
        let model = Model::new(&owc, Some(&world.backbone), 1)
            .unwrap()
            .load(None)
            .unwrap();
        let logits = |inputs: &[Tensor]| {
            let logits = model.forward(&Plain::new(), inputs).unwrap();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let given = states.batch(0, &[0, 1], &owc.reads(2).unwrap()).unwrap();
        let class = given[0].narrow(1, 0, 1).unwrap();
        let patches = given[0].narrow(1, 1, 4).unwrap().affine(3.0, 1.0).unwrap();
        let other = Tensor::cat(&[class, patches], 1).unwrap();
        assert_eq!(logits(&given), logits(&[other, given[1].clone()]));
    }

    #[test]
    fn a_start_is_kept_and_not_computed_again() {
        let world = World::new();
        let method = world.owc(1, NormChoice::Batch);
        let states = world.states(&method);
        for epochs in [0, 1] {
            let settings = Settings {
                warm: true,
                epochs,
                ..settings()
            };
            let task = world.task(&method, &states, &settings);
            let whole = run(&task);
            let dir = world.dir.path().join(format!("start-{epochs}"));
            let task = Task {
                dir: Some(&dir),
                ..task
            };
            let until = |interrupted| train_until(&task, 0, &mut |_| (), &AtomicBool::new(interrupted));
            assert!(matches!(until(true), Err(Error::Interrupted)));
            let (start, _) = until(false).unwrap();
            // An analysis would hear of the interruption.
            assert_eq!(until(true).unwrap().0, start);
            let trained = run(&task);
            assert_eq!(
                (trained.report.start, start),
                (whole.report.start, whole.report.start)
            );
            assert!(trained.tensors == whole.tensors && trained.method == whole.method);
        }
    }

    #[test]
    fn an_interrupted_run_goes_on_to_the_same_bits_whatever_the_threads() {
        let world = World::new();
        for (norm, rule, rate) in [
            (NormChoice::Batch, Rule::Sgd { momentum: 0.9 }, 0.05),
            (NormChoice::Layer, Rule::AdamW { betas: (0.9, 0.99) }, 0.005),
        ] {
            let method = world.owc(1, norm);
            let states = world.states(&method);
            let settings = Settings {
                epochs: 4,
                rule,
                rate,
                ..settings()
            };
            let task = world.task(&method, &states, &settings);
            let whole = run(&task);
            let dir = world.dir.path().join(format!("run-{norm:?}"));
            let task = Task {
                dir: Some(&dir),
                threads: 1,
                ..task
            };
            // In the middle of the third epoch.
            let interrupted = AtomicBool::new(false);
            let stop = &mut |event: Event| interrupted.store(step(event) >= Some(15), Relaxed);
            assert!(matches!(
                train(&task, stop, &interrupted),
                Err(Error::Interrupted)
            ));
            let mut first = None;
            let watch = &mut |event: Event| {
                first = first.or(step(event));
            };
            let resumed = train(&task, watch, &AtomicBool::new(false)).unwrap();
            assert_eq!(first, Some(13), "it goes on after two epochs of six steps");
            assert!(resumed.tensors == whole.tensors);
            assert_eq!(resumed.method, whole.method);
            assert_eq!(figures(&resumed.report.curve), figures(&whole.report.curve));
            let curve: Vec<Epoch> = veiltune_hub::files::read_json(&dir.join("curve.json")).unwrap();
            assert_eq!(curve, resumed.report.curve);
            assert!(dir.join("curve.svg").exists());
            assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 4);
            // A finished run is read, not repeated; another one does not take its folder.
            assert!(run(&task).tensors == whole.tensors);
            let other = Settings {
                seed: 2,
                ..settings.clone()
            };
            let task = Task {
                settings: &other,
                ..task
            };
            let refused = train(&task, &mut |_| (), &AtomicBool::new(false)).err().unwrap();
            assert!(refused.to_string().contains("other settings"), "{refused}");
            let task = Task { dir: None, ..task };
            assert!(run(&task).tensors != whole.tensors, "another seed");
        }
    }

    #[test]
    fn the_best_epoch_is_kept_and_training_ends_when_no_better_one_follows() {
        let world = World::new();
        let method = world.owc(1, NormChoice::Batch);
        let states = world.states(&method);
        // Pictures of a class that is never trained on: the longer the training, the less is thought of it.
        let last = world.labels().len() as u32 - 1;
        let (unseen, seen): (Vec<_>, Vec<_>) = world.all.iter().partition(|&&i| states.labels()[i] == last);
        let settings = Settings {
            epochs: 6,
            patience: 2,
            ..settings()
        };
        let task = Task {
            train: Pictures {
                states: &states,
                which: &seen,
            },
            validation: Pictures {
                states: &states,
                which: &unseen,
            },
            ..world.task(&method, &states, &settings)
        };
        let trained = run(&task);
        assert_eq!((trained.report.epoch, trained.report.curve.len()), (1, 3));

        let dir = world.dir.path().join("kept");
        let task = Task {
            dir: Some(&dir),
            ..task
        };
        train_until(&task, 1, &mut |_| (), &AtomicBool::new(false)).unwrap();
        let (_, after_first) = checkpoint::read(&dir, &Checkpoint::new(&task).unwrap())
            .unwrap()
            .unwrap();
        for (name, array) in &trained.tensors {
            let first = checkpoint::find(&after_first, checkpoint::VALUE, name).unwrap();
            assert_eq!(first, array, "{name}");
        }
        // The best one is remembered by a run that goes on after a worse one.
        train_until(&task, 2, &mut |_| (), &AtomicBool::new(false)).unwrap();
        let resumed = run(&task);
        assert!(resumed.tensors == trained.tensors);
        assert_eq!(figures(&resumed.report.curve), figures(&trained.report.curve));
    }

    #[test]
    fn of_equal_epochs_the_surer_one_is_best() {
        let epoch = |accuracy, loss| Epoch {
            train_loss: 0.0,
            train_accuracy: 0.0,
            validation_loss: loss,
            validation_accuracy: accuracy,
            seconds: 0.0,
        };
        let curve = [(0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.7, f64::NAN), (0.6, 0.1)];
        let curve = curve.map(|(accuracy, loss)| epoch(Some(accuracy), Some(loss)));
        assert_eq!(best(None, &curve), 3);
        assert_eq!(best(None, &[epoch(None, None); 3]), 3);
        assert_eq!(best(None, &[]), 0);
        let start = |validation_accuracy, validation_loss| {
            Some(Start {
                head_accuracy: None,
                validation_loss,
                validation_accuracy,
            })
        };
        assert_eq!(best(start(0.8, 9.0), &curve), 0);
        assert_eq!(best(start(0.7, 9.0), &curve), 3);
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let world = World::new();
        let method = world.owc(1, NormChoice::Layer);
        let (states, settings) = (world.states(&method), settings());
        let task = world.task(&method, &states, &settings);
        let refused = |task: &Task| {
            let refused = train(task, &mut |_| (), &AtomicBool::new(false));
            refused.err().unwrap().to_string()
        };
        let other = Method::Owc(OwcConfig::new(&Design::new(2, 8, 1), 16, 5, vec!["one".into()]));
        assert!(
            refused(&Task {
                method: &other,
                ..task
            })
            .contains("classes")
        );
        let none = Pictures {
            which: &[],
            ..task.train
        };
        assert!(refused(&Task { train: none, ..task }).contains("no picture"));
        for bad in [
            Settings {
                batch: 0,
                ..settings.clone()
            },
            Settings {
                rate: f32::NAN,
                ..settings.clone()
            },
            Settings {
                dropout: 1.0,
                ..settings.clone()
            },
        ] {
            assert!(
                refused(&Task {
                    settings: &bad,
                    ..task
                })
                .contains("nothing can be trained")
            );
        }
        let wild = Settings {
            rate: 1e30,
            clip: 1e30,
            ..settings.clone()
        };
        assert!(
            refused(&Task {
                settings: &wild,
                ..task
            })
            .contains("diverged")
        );
        let lora = Tuning::Lora {
            r: 2,
            lora_alpha: 2.0,
            target_modules: vec!["query".into()],
        };
        let without = Task {
            method: &world.encoder(lora, 2),
            backbone: None,
            ..task
        };
        assert!(refused(&without).contains("needs its backbone"));
    }
}
