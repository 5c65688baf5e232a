//! Where training starts: with a linear probe as the head.
//!
//! Adapters start as the identity and blocks of the backbone as they are there, so the head's features are at first those of
//! the backbone, the same in every epoch. They are computed once, and the head is fitted to them alone, in seconds; training
//! then starts at a linear probe's accuracy instead of spending its epochs on getting there.

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use veiltune_engine::{Params, Plain};
use veiltune_nn::{Method, Private, Read};

use crate::optim::{Optimizer, Rule, cosine, cross_entropy, gradients};
use crate::train::Pictures;
use crate::workers::Workers;
use crate::{Error, Result, Variables};

/// Pictures of one pass.
const PASS: usize = 100;
/// Pictures of one step.
const BATCH: usize = 256;
/// Peak learning rate of AdamW.
const RATE: f32 = 5e-3;
/// Its weight decay.
const DECAY: f32 = 1e-4;

/// The parameters of every method's last layer.
pub const HEAD: [&str; 2] = ["head.weight", "head.bias"];

/// What the head of `method` is given for these pictures, `[pictures, d]`. `initial` has the method's untrained parameters.
pub fn features(
    method: &Method,
    initial: impl Fn(&str, &[usize]) -> veiltune_engine::Result<Tensor> + Sync,
    pictures: Pictures,
    reads: &[Read],
    workers: &Workers,
) -> Result<Tensor> {
    // A head that hands on what it is given.
    let width = method.hidden_size();
    let bare = method.with_labels((0..width).map(|i| i.to_string()).collect());
    let load = |name: &str, dims: &[usize]| -> veiltune_engine::Result<Tensor> {
        match name {
            "head.weight" => Ok(Tensor::eye(width, candle_core::DType::F32, &Device::Cpu)?),
            "head.bias" => Ok(Tensor::zeros(width, candle_core::DType::F32, &Device::Cpu)?),
            _ => initial(name, dims),
        }
    };
    let pass = |which: &&[usize]| -> Result<Tensor> {
        // Batch norms have seen nothing yet: they use what they see.
        let b = Plain::training();
        let params = Params::new(|name, dims: &[usize]| Ok(load(name, dims)?.detach()));
        let model: Private<Plain> = bare.load(&params, &params)?;
        let inputs = pictures.states.batch(0, which, reads)?;
        Ok(model.forward(&b, &inputs)?.detach())
    };
    let passes: Vec<&[usize]> = pictures.which.chunks(PASS).collect();
    let parts = workers
        .map(&passes, pass)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// A head fitted to `features [pictures, d]`: weight `[classes, d]` and bias `[classes]`.
pub fn head(
    features: &Tensor,
    pictures: Pictures,
    classes: usize,
    epochs: usize,
    seed: u64,
    workers: &Workers,
) -> Result<[Tensor; 2]> {
    let (count, width) = features.dims2()?;
    let shapes = [
        (HEAD[0].to_owned(), vec![classes, width]),
        (HEAD[1].to_owned(), vec![classes]),
    ];
    let vars = Variables::new(&shapes, |_, dims| vec![0.0; dims.iter().product()])?;
    let mut optimizer = Optimizer::new(Rule::ADAMW, DECAY, 1.0, &vars);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..count).collect();
    let steps = count.div_ceil(BATCH) * epochs;
    let mut step = 0;
    for _ in 0..epochs {
        order.shuffle(&mut rng);
        for batch in order.chunks(BATCH) {
            let loss = |which: &&[usize]| -> Result<(Tensor, ())> {
                let index: Vec<u32> = which.iter().map(|&i| i as u32).collect();
                let x = features.index_select(&Tensor::from_vec(index, which.len(), &Device::Cpu)?, 0)?;
                let own: Vec<usize> = which.iter().map(|&i| pictures.which[i]).collect();
                let var = |name| {
                    vars.get(name)
                        .ok_or_else(|| Error::Settings(format!("no parameter {name}")))
                };
                let logits = x
                    .matmul(&var(HEAD[0])?.t()?)?
                    .broadcast_add(var(HEAD[1])?.as_tensor())?;
                Ok((cross_entropy(&logits, &pictures.states.labels_of(&own)?)?, ()))
            };
            let (_, grads, _) = gradients(workers, &vars, &[batch], &[1.0], loss)?;
            optimizer.step(&vars, &grads, cosine(RATE, step, steps, steps / 50))?;
            step += 1;
        }
    }
    let value = |name: &str| match vars.get(name) {
        Some(var) => Ok(var.as_tensor().detach()),
        None => Err(Error::Settings(format!("no parameter {name}"))),
    };
    Ok([value(HEAD[0])?, value(HEAD[1])?])
}
