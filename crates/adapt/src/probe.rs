//! The baseline: a linear classifier on the class token of the frozen backbone.

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::adapter::{Settings, States};
use crate::optim::{Method, Optimizer, cosine, cross_entropy, gradients, steps};
use crate::{Result, Variables, data};

/// A linear classifier on standardised features.
pub struct Probe {
    mean: Tensor,
    deviation: Tensor,
    vars: Variables,
}

impl Probe {
    /// Fits `classes` classes.
    pub fn fit(states: &States, classes: usize, settings: &Settings) -> Result<Self> {
        let (_, per_epoch) = steps(states.len(), settings.batch, 1)?;
        let x = states.class_token()?;
        let mean = x.mean_keepdim(0)?;
        let deviation = x
            .broadcast_sub(&mean)?
            .sqr()?
            .mean_keepdim(0)?
            .affine(1.0, 1e-6)?
            .sqrt()?;
        let shapes = [
            ("weight".to_owned(), vec![classes, x.dim(1)?]),
            ("bias".to_owned(), vec![classes]),
        ];
        let vars = Variables::new(&shapes, |_, dims| vec![0.0; dims.iter().product()])?;
        let probe = Probe {
            mean,
            deviation,
            vars,
        };
        let x = probe.standardise(&x)?;
        let mut optimizer = Optimizer::new(
            Method::Sgd { momentum: 0.9 },
            settings.decay,
            f32::INFINITY,
            &probe.vars,
        );
        let mut rng = StdRng::seed_from_u64(settings.seed);
        for epoch in 0..settings.epochs {
            let order = data::shuffled(states.len(), &mut rng);
            for (i, which) in order.chunks_exact(settings.batch).enumerate() {
                let index = Tensor::from_vec(
                    which.iter().map(|&i| i as u32).collect(),
                    which.len(),
                    &Device::Cpu,
                )?;
                let (_, grads) = gradients(&probe.vars, vec![x.index_select(&index, 0)?], |x| {
                    Ok(cross_entropy(&probe.logits(&x)?, &states.labels(which)?)?)
                })?;
                let rate = cosine(
                    settings.rate,
                    epoch * per_epoch + i,
                    per_epoch * settings.epochs,
                    0,
                );
                optimizer.step(&probe.vars, &grads, rate)?;
            }
        }
        Ok(probe)
    }

    /// Share of pictures that it gets right.
    pub fn accuracy(&self, states: &States) -> Result<f64> {
        let best = self
            .logits(&self.standardise(&states.class_token()?)?)?
            .argmax(1)?;
        let labels = states.labels(&(0..states.len()).collect::<Vec<_>>())?;
        let right = best
            .eq(&labels)?
            .to_dtype(DType::U32)?
            .sum_all()?
            .to_scalar::<u32>()?;
        Ok(right as f64 / states.len() as f64)
    }

    fn standardise(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_sub(&self.mean)?.broadcast_div(&self.deviation)?)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        // In the order of their names: bias, weight.
        let [bias, weight] = self.vars.vars()[..] else {
            unreachable!("a probe has two variables")
        };
        Ok(x.matmul(&weight.t()?)?.broadcast_add(bias)?)
    }
}
