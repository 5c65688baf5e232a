//! Running a trained model over many pictures: accuracy in floating point, as it was trained and as it is served, and in the
//! protocols' fixed point; and the ranges that it is calibrated with.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use candle_core::{D, DType};
use serde::{Deserialize, Serialize};
use veiltune_engine::plain::Site;
use veiltune_engine::{Backend, Error as EngineError, Fixed, Owner, Party, Plain};
use veiltune_hub::Tensors;
use veiltune_nn::load::params;
use veiltune_nn::{Backbone, Method, Private, Read};

use crate::cache::States;
use crate::optim::cross_entropy;
use crate::train::{self, Pictures};
use crate::workers::Workers;
use crate::{Error, Result};

/// A trained model.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The method, calibrated.
    pub method: &'a Method,
    /// Its private parameters as they were trained.
    pub tensors: &'a Tensors,
    /// The backbone; None for a method that runs none of it itself.
    pub backbone: Option<&'a Backbone>,
}

/// How a model is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arithmetic {
    /// In floating point, as it was trained.
    Float,
    /// In floating point, in the form in which it is served.
    Served,
    /// As it is served, in the fixed point of the protocols.
    Fixed,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Share of the pictures that is right.
    pub accuracy: f64,
    /// Mean cross-entropy; of the pictures within range.
    pub loss: f64,
    /// The class of each picture.
    pub predicted: Vec<u32>,
    /// Pictures whose values leave the range of the fixed point; their class counts as wrong, and is beyond the last one.
    pub beyond: usize,
}

/// Pictures of one pass where no gradient is kept.
const BATCH: usize = 25;
/// Pictures of one pass in fixed point.
const FIXED_BATCH: usize = 5;

/// Runs `model` on the pictures as in testing (view 0) and calls `progress` with the number done.
pub fn evaluate(
    model: &Model,
    pictures: Pictures,
    arithmetic: Arithmetic,
    threads: usize,
    progress: &mut dyn FnMut(usize),
    interrupted: &AtomicBool,
) -> Result<Evaluation> {
    let workers = Workers::new(threads)?;
    let layers = pictures.states.layers().unwrap_or(0);
    if arithmetic == Arithmetic::Float {
        let b = Plain::new();
        let private = train::fixed(&b, model.method, model.tensors, model.backbone)?;
        let reads = model.method.reads(layers)?;
        let work = |which: &[usize]| logits(&private, pictures.states, which, &reads);
        return gather(
            &workers,
            pictures,
            BATCH,
            || Ok(()),
            |_, w| work(w),
            progress,
            interrupted,
        );
    }
    let fetch = |name: &str, dims: &[usize]| match model.backbone {
        Some(backbone) => backbone.parameter(name, dims),
        None => Err(veiltune_nn::Error::Config("the method needs its backbone".into())),
    };
    let served = model.method.served();
    let own = model.method.fold(model.tensors, &fetch)?;
    let public = model.method.fold_public(&fetch)?;
    let reads = served.reads(layers)?;
    if arithmetic == Arithmetic::Served {
        let b = Plain::new();
        let private = served.load(
            &params(&b, Owner::Public, &own),
            &params(&b, Owner::Public, &public),
        )?;
        let work = |which: &[usize]| logits(&private, pictures.states, which, &reads);
        return gather(
            &workers,
            pictures,
            BATCH,
            || Ok(()),
            |_, w| work(w),
            progress,
            interrupted,
        );
    }
    let session = || {
        let b = Fixed::new()?;
        let private = served.load(
            &params(&b, Owner::Party(Party::P1), &own),
            &params(&b, Owner::Public, &public),
        )?;
        Ok((b, private))
    };
    let work = |session: &(Fixed, Private<Fixed>), which: &[usize]| {
        let run = |which| fixed_logits(session, pictures.states, which, &reads);
        match run(which) {
            // One picture out of range must not take the others with it.
            Err(Error::Engine(EngineError::Range { .. })) if which.len() > 1 => {
                let mut all = Vec::new();
                for i in which {
                    match run(std::slice::from_ref(i)) {
                        Err(Error::Engine(EngineError::Range { .. })) => all.push(Vec::new()),
                        rows => all.extend(rows?),
                    }
                }
                Ok(all)
            }
            Err(Error::Engine(EngineError::Range { .. })) => Ok(vec![Vec::new()]),
            rows => rows,
        }
    };
    gather(
        &workers,
        pictures,
        FIXED_BATCH,
        session,
        work,
        progress,
        interrupted,
    )
}

/// Logits of some pictures, a row each; an empty row where there are none.
type Rows = Vec<Vec<f32>>;

fn logits(private: &Private<Plain>, states: &States, which: &[usize], reads: &[Read]) -> Result<Rows> {
    let logits = private.forward(&Plain::new(), &states.batch(0, which, reads)?)?;
    Ok(logits.detach().to_vec2()?)
}

fn fixed_logits(
    (b, private): &(Fixed, Private<Fixed>),
    states: &States,
    which: &[usize],
    reads: &[Read],
) -> Result<Rows> {
    let mut inputs = Vec::new();
    for state in states.batch(0, which, reads)? {
        let values: Vec<f32> = state.flatten_all()?.to_vec1()?;
        inputs.push(b.input(Owner::Party(Party::P0), state.dims(), Some(&values))?);
    }
    let values = b.values(&private.forward(b, &inputs)?);
    let rows = values.chunks(values.len() / which.len());
    Ok(rows.map(|row| row.iter().map(|&v| v as f32).collect()).collect())
}

/// Runs `work` on batches of the pictures, each thread with a session of its own, and compares with the labels.
fn gather<M>(
    workers: &Workers,
    pictures: Pictures,
    batch: usize,
    session: impl Fn() -> Result<M> + Sync,
    work: impl Fn(&M, &[usize]) -> Result<Rows> + Sync,
    progress: &mut dyn FnMut(usize),
    interrupted: &AtomicBool,
) -> Result<Evaluation> {
    let batches: Vec<&[usize]> = pictures.which.chunks(batch).collect();
    let (send, receive) = std::sync::mpsc::channel();
    let next = AtomicUsize::new(0);
    let (next, batches_of, session, work) = (&next, &batches, &session, &work);
    let thread = move |_| {
        let send = send.clone();
        move || {
            let own = session();
            while !interrupted.load(Relaxed) {
                let i = next.fetch_add(1, Relaxed);
                let Some(which) = batches_of.get(i) else { break };
                let rows = match &own {
                    Ok(own) => work(own, which),
                    Err(e) => Err(Error::Settings(e.to_string())),
                };
                if send.send((i, rows)).is_err() {
                    break;
                }
            }
        }
    };
    let mut all: Vec<Option<Rows>> = vec![None; batches.len()];
    let all = workers.run(thread, move || {
        let mut done = 0;
        for (i, rows) in receive {
            let rows = rows?;
            done += rows.len();
            all[i] = Some(rows);
            progress(done);
        }
        Ok::<_, Error>(all)
    })?;
    let Some(all) = all.into_iter().collect::<Option<Vec<Rows>>>() else {
        return Err(Error::Interrupted);
    };
    let labels = pictures.which.iter().map(|&i| pictures.states.labels()[i]);
    Ok(judge(all.into_iter().flatten(), labels))
}

fn judge(rows: impl Iterator<Item = Vec<f32>>, labels: impl Iterator<Item = u32>) -> Evaluation {
    let (mut predicted, mut beyond, mut right, mut loss) = (Vec::new(), 0, 0, 0.0);
    for (row, label) in rows.zip(labels) {
        let best = (0..row.len()).fold(None, |best: Option<usize>, i| match best {
            Some(b) if row[b] >= row[i] => best,
            _ => Some(i),
        });
        let Some(best) = best else {
            beyond += 1;
            predicted.push(u32::MAX);
            continue;
        };
        let max = row[best] as f64;
        let sum: f64 = row.iter().map(|&v| (v as f64 - max).exp()).sum();
        loss += sum.ln() + max - row[label as usize] as f64;
        right += usize::from(best as u32 == label);
        predicted.push(best as u32);
    }
    Evaluation {
        accuracy: right as f64 / predicted.len().max(1) as f64,
        loss: loss / (predicted.len() - beyond).max(1) as f64,
        predicted,
        beyond,
    }
}

/// Loss and accuracy.
pub(crate) struct Score {
    pub loss: f64,
    pub accuracy: f64,
}

/// Who watches a measurement and may end it.
pub(crate) struct Watch<'a> {
    /// Hears of so many pictures more.
    pub seen: &'a mut dyn FnMut(usize),
    pub interrupted: &'a AtomicBool,
}

/// A loaded model on view 0 of these pictures.
pub(crate) fn float(
    private: &Private<Plain>,
    states: &States,
    which: &[usize],
    reads: &[Read],
    workers: &Workers,
    batch: usize,
    watch: Watch,
) -> Result<Score> {
    let batches: Vec<&[usize]> = which.chunks(batch).collect();
    let Watch { seen, interrupted } = watch;
    let score = |which: &&[usize]| -> Result<(f64, u32)> {
        if interrupted.load(Relaxed) {
            return Err(Error::Interrupted);
        }
        let logits = private
            .forward(&Plain::new(), &states.batch(0, which, reads)?)?
            .detach();
        let labels = states.labels_of(which)?;
        let right = logits.argmax(D::Minus1)?.eq(&labels)?;
        let loss: f32 = cross_entropy(&logits, &labels)?.to_scalar()?;
        Ok((
            loss as f64 * which.len() as f64,
            right.to_dtype(DType::U32)?.sum_all()?.to_scalar()?,
        ))
    };
    let scores = workers.watched(&batches, score, |which| seen(which.len()));
    let (mut loss, mut right) = (0.0, 0);
    for score in scores {
        let (l, r) = score?;
        (loss, right) = (loss + l, right + r);
    }
    Ok(Score {
        loss: loss / which.len() as f64,
        accuracy: right as f64 / which.len() as f64,
    })
}

/// Of each view, the pictures that ranges are calibrated on, `limit` in all.
pub(crate) fn calibrated(pictures: Pictures, limit: usize) -> usize {
    limit
        .div_ceil(pictures.states.views())
        .clamp(1, pictures.which.len())
}

/// What each calibrated verb sees on `limit` of the pictures, in all views.
pub(crate) fn sites(
    private: &Private<Plain>,
    pictures: Pictures,
    reads: &[Read],
    workers: &Workers,
    (batch, limit): (usize, usize),
    watch: Watch,
) -> Result<Vec<Site>> {
    let (views, count) = (pictures.states.views(), pictures.which.len());
    let each = calibrated(pictures, limit);
    let Watch { seen, interrupted } = watch;
    let mut batches = Vec::new();
    for view in 0..views {
        // Evenly spread, other ones in each view where not all are taken.
        let which: Vec<usize> = (0..each)
            .map(|i| pictures.which[((i * count + view * count / views) / each).min(count - 1)])
            .collect();
        batches.extend(which.chunks(batch).map(|w| (view, w.to_vec())));
    }
    let record = |(view, which): &(usize, Vec<usize>)| -> Result<Vec<Site>> {
        if interrupted.load(Relaxed) {
            return Err(Error::Interrupted);
        }
        let b = Plain::recording();
        private.forward(&b, &pictures.states.batch(*view, which, reads)?)?;
        Ok(b.sites())
    };
    let mut all: Vec<Site> = Vec::new();
    for sites in workers.watched(&batches, record, |(_, which)| seen(which.len())) {
        let sites = sites?;
        if all.is_empty() {
            all = sites;
            continue;
        }
        for (all, site) in all.iter_mut().zip(sites) {
            all.input = all.input.max(site.input);
            all.range = match (all.range, site.range) {
                (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
                (a, b) => a.or(b),
            };
        }
    }
    Ok(all)
}
