//! Gradient descent: SGD with momentum, AdamW, a cosine schedule, and gradients over several threads.

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use veiltune_hub::Array;

use crate::workers::Workers;
use crate::{Error, Result, Variables};

/// Which update.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Stochastic gradient descent; weight decay is part of the gradient.
    Sgd {
        /// Share of the last step that is kept.
        momentum: f32,
    },
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    AdamW {
        /// Decay rates of the first and second moments.
        betas: (f32, f32),
    },
}

impl Rule {
    /// With the momentum of the paper.
    pub const SGD: Rule = Rule::Sgd { momentum: 0.9 };
    /// With the usual decay rates.
    pub const ADAMW: Rule = Rule::AdamW { betas: (0.9, 0.999) };

    /// Running averages that it keeps of each variable.
    fn moments(self) -> usize {
        match self {
            Rule::Sgd { .. } => 1,
            Rule::AdamW { .. } => 2,
        }
    }
}

/// An optimiser and its state. Weight decay applies to matrices alone, not to biases, gains and embeddings.
pub struct Optimizer {
    rule: Rule,
    decay: f32,
    clip: f32,
    state: Vec<[Vec<f32>; 2]>,
    steps: i32,
}

impl Optimizer {
    /// `clip` bounds the norm of the whole gradient.
    pub fn new(rule: Rule, decay: f32, clip: f32, vars: &Variables) -> Self {
        let zeros = |v: &&Var| [vec![0.0; v.elem_count()], vec![0.0; v.elem_count()]];
        Optimizer {
            rule,
            decay,
            clip,
            state: vars.vars().iter().map(zeros).collect(),
            steps: 0,
        }
    }

    /// The moments that the rule keeps: number, name of the variable, values.
    pub fn moments(&self, vars: &Variables) -> Vec<(usize, String, Array)> {
        let mut all = Vec::new();
        for ((name, var), state) in vars.names().zip(vars.vars()).zip(&self.state) {
            for (i, values) in state.iter().enumerate().take(self.rule.moments()) {
                let (dims, values) = (var.dims().to_vec(), values.clone());
                all.push((i, name.clone(), Array { dims, values }));
            }
        }
        all
    }

    /// Goes on after `steps` steps with these moments.
    pub fn restore<'a>(
        &mut self,
        vars: &Variables,
        steps: i32,
        moments: impl Fn(usize, &str) -> Result<&'a Array>,
    ) -> Result<()> {
        self.steps = steps;
        for (name, state) in vars.names().zip(&mut self.state) {
            for (i, values) in state.iter_mut().enumerate().take(self.rule.moments()) {
                let saved = moments(i, name)?;
                if saved.values.len() != values.len() {
                    return Err(Error::Settings(format!(
                        "the saved state of {name} has another size"
                    )));
                }
                values.copy_from_slice(&saved.values);
            }
        }
        Ok(())
    }

    /// Applies gradients, given in the order of [`Variables::vars`], at the learning rate `rate`.
    pub fn step(&mut self, vars: &Variables, grads: &[Vec<f32>], rate: f32) -> Result<()> {
        self.steps += 1;
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f32>().sqrt();
        let shrink = if norm > self.clip { self.clip / norm } else { 1.0 };
        for ((var, grad), [m, v]) in vars.vars().into_iter().zip(grads).zip(&mut self.state) {
            let decay = if var.rank() == 2 { self.decay } else { 0.0 };
            let mut w: Vec<f32> = var.as_tensor().flatten_all()?.to_vec1()?;
            for (((w, g), m), v) in w.iter_mut().zip(grad).zip(m).zip(v) {
                let g = g * shrink;
                match self.rule {
                    Rule::Sgd { momentum } => {
                        *m = momentum * *m + g + decay * *w;
                        *w -= rate * *m;
                    }
                    Rule::AdamW { betas: (b1, b2) } => {
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        let (m, v) = (*m / (1.0 - b1.powi(self.steps)), *v / (1.0 - b2.powi(self.steps)));
                        *w -= rate * (m / (v.sqrt() + 1e-8) + decay * *w);
                    }
                }
            }
            var.set(&Tensor::from_vec(w, var.dims(), &Device::Cpu)?)?;
        }
        Ok(())
    }
}

/// The learning rate at `step` of `steps`: linear warm-up over the first `warm` steps, then half a cosine down to zero.
pub fn cosine(peak: f32, step: usize, steps: usize, warm: usize) -> f32 {
    if step < warm {
        return peak * (step + 1) as f32 / warm as f32;
    }
    let done = (step - warm) as f32 / (steps - warm).max(1) as f32;
    peak * 0.5 * (1.0 + (std::f32::consts::PI * done.min(1.0)).cos())
}

/// Mean loss and gradient over `pieces`, of which each counts with its weight; the weights sum to one. `loss` also gives
/// something of its own, which comes back in the order of the pieces.
pub fn gradients<S: Sync, T: Send>(
    workers: &Workers,
    vars: &Variables,
    pieces: &[S],
    weights: &[f32],
    loss: impl Fn(&S) -> Result<(Tensor, T)> + Sync,
) -> Result<(f32, Vec<Vec<f32>>, Vec<T>)> {
    let results = workers.map(pieces, |piece| -> Result<(f32, Vec<Vec<f32>>, T)> {
        let (loss, extra) = loss(piece)?;
        let store = loss.backward()?;
        let grad = |var: &Var| match store.get(var.as_tensor()) {
            Some(g) => g.flatten_all()?.to_vec1(),
            None => Ok(vec![0.0; var.elem_count()]),
        };
        let grads = vars.vars().into_iter().map(grad);
        Ok((
            loss.to_scalar()?,
            grads.collect::<candle_core::Result<_>>()?,
            extra,
        ))
    });
    let mut sum: Vec<Vec<f32>> = vars.vars().iter().map(|v| vec![0.0; v.elem_count()]).collect();
    let (mut total, mut extras) = (0.0, Vec::new());
    for (result, &weight) in results.into_iter().zip(weights) {
        let (loss, grads, extra) = result?;
        total += weight * loss;
        for (sum, grad) in sum.iter_mut().zip(grads) {
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += weight * g);
        }
        extras.push(extra);
    }
    match total.is_finite() {
        true => Ok((total, sum, extras)),
        false => Err(Error::Diverged(total)),
    }
}

/// Pictures a thread and step, and steps an epoch.
pub fn steps(pictures: usize, batch: usize, threads: usize) -> Result<(usize, usize)> {
    if threads == 0 || batch < threads {
        return Err(Error::Settings(format!(
            "a batch of {batch} cannot be shared by {threads} threads"
        )));
    }
    let shard = batch / threads;
    match pictures / (shard * threads) {
        0 => Err(Error::Settings(format!(
            "{pictures} pictures are fewer than a batch of {batch}"
        ))),
        per_epoch => Ok((shard, per_epoch)),
    }
}

/// Mean cross-entropy of `logits [batch, classes]` with the classes `labels [batch]`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
    let own = logits.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
    (logits.log_sum_exp(1)? - own)?.mean_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: f32) -> Variables {
        Variables::new(&[("x".into(), vec![1, 1])], |_, _| vec![value]).unwrap()
    }

    fn value(vars: &Variables) -> f32 {
        vars.vars()[0].flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
    }

    #[test]
    fn both_rules_find_a_minimum() {
        let workers = Workers::new(2).unwrap();
        for rule in [Rule::Sgd { momentum: 0.9 }, Rule::AdamW { betas: (0.9, 0.99) }] {
            let vars = one(3.0);
            let mut optimizer = Optimizer::new(rule, 0.0, 10.0, &vars);
            for step in 0..400 {
                let (_, grads, given) = gradients(&workers, &vars, &[1.0, 2.0], &[0.5; 2], |target| {
                    let loss = vars.vars()[0].affine(1.0, -target)?.sqr()?.sum_all()?;
                    Ok((loss, *target))
                })
                .unwrap();
                assert_eq!(given, [1.0, 2.0]);
                optimizer
                    .step(&vars, &grads, cosine(0.05, step, 400, 10))
                    .unwrap();
            }
            assert!((value(&vars) - 1.5).abs() < 1e-2, "{rule:?}: {}", value(&vars));
        }
    }

    #[test]
    fn decay_and_clipping_do_what_they_say() {
        let vars = one(1.0);
        let mut sgd = Optimizer::new(Rule::Sgd { momentum: 0.0 }, 0.1, 1.0, &vars);
        sgd.step(&vars, &[vec![0.0]], 0.5).unwrap();
        assert!((value(&vars) - 0.95).abs() < 1e-6);
        let vars = one(0.0);
        sgd.step(&vars, &[vec![100.0]], 0.5).unwrap();
        assert!((value(&vars) + 0.5).abs() < 1e-6);
    }

    #[test]
    fn the_schedule_rises_and_falls() {
        assert!(cosine(1.0, 0, 100, 10) < cosine(1.0, 9, 100, 10));
        assert_eq!(cosine(1.0, 10, 100, 10), 1.0);
        assert!(cosine(1.0, 99, 100, 10) < 1e-2);
    }

    #[test]
    fn cross_entropy_is_the_negative_log_likelihood() {
        let logits = Tensor::new(&[[0f32, 1.0, 2.0], [3.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        let loss = cross_entropy(&logits, &labels)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        let nll = |row: &[f32], own: usize| row.iter().map(|v| v.exp()).sum::<f32>().ln() - row[own];
        let want = (nll(&[0.0, 1.0, 2.0], 2) + nll(&[3.0, 0.0, 0.0], 0)) / 2.0;
        assert!((loss - want).abs() < 1e-6);
    }

    #[test]
    fn batches_that_cannot_be_are_refused() {
        assert_eq!(steps(1000, 129, 2).unwrap(), (64, 7));
        for (pictures, batch, threads) in [(10, 4, 0), (10, 1, 2), (10, 0, 1), (10, 16, 2)] {
            assert!(matches!(steps(pictures, batch, threads), Err(Error::Settings(_))));
        }
    }

    #[test]
    fn divergence_is_an_error() {
        let vars = one(f32::INFINITY);
        let workers = Workers::new(1).unwrap();
        let diverged = gradients(&workers, &vars, &[()], &[1.0], |()| {
            Ok((vars.vars()[0].sqr()?.sum_all()?, ()))
        });
        assert!(matches!(diverged, Err(Error::Diverged(_))));
    }
}
