//! Trainable parameters by name.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use rand::rngs::StdRng;
use veiltune_engine::{Error as EngineError, Params, Plain};
use veiltune_hub::{Array, Tensors};

use crate::Result;

/// Trainable parameters by dotted name.
pub struct Variables(BTreeMap<String, Var>);

impl Variables {
    /// One variable for each name and shape, its values from `init`.
    pub fn new(
        shapes: &[(String, Vec<usize>)],
        mut init: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        let one = |(name, dims): &(String, Vec<usize>)| {
            let values = Tensor::from_vec(init(name, dims), dims.as_slice(), &Device::Cpu)?;
            Ok((name.clone(), Var::from_tensor(&values)?))
        };
        Ok(Variables(shapes.iter().map(one).collect::<Result<_>>()?))
    }

    /// What a model is loaded from in training: gradients reach the variables.
    pub fn params(&self) -> Params<'_, Plain> {
        Params::new(|name, dims| {
            let var = self
                .0
                .get(name)
                .ok_or_else(|| EngineError::program("variables", "no such variable"))?;
            if var.dims() != dims {
                return Err(EngineError::program(
                    "variables",
                    format!("is {:?}, not {dims:?}", var.dims()),
                ));
            }
            Ok(var.as_tensor().clone())
        })
    }

    /// The variables in the order of their names.
    pub fn vars(&self) -> Vec<&Var> {
        self.0.values().collect()
    }

    /// Number of trainable values.
    pub fn count(&self) -> usize {
        self.0.values().map(|v| v.elem_count()).sum()
    }

    /// Current values.
    pub fn tensors(&self) -> Result<Tensors> {
        let one = |(name, var): (&String, &Var)| {
            let values = var.as_tensor().flatten_all()?.to_vec1()?;
            Ok((
                name.clone(),
                Array {
                    dims: var.dims().to_vec(),
                    values,
                },
            ))
        };
        self.0.iter().map(one).collect()
    }
}

/// Usual initial values: gains of norms one, biases zero, embeddings small, matrices scaled to keep the variance.
pub fn usual_init(rng: &mut StdRng, name: &str, dims: &[usize]) -> Vec<f32> {
    let count = dims.iter().product();
    let is_matrix = dims.len() == 2;
    match name.rsplit('.').next() {
        Some("bias") => vec![0.0; count],
        Some("weight") if is_matrix => normal(rng, count, (2.0 / (dims[0] + dims[1]) as f32).sqrt()),
        Some("weight") => vec![1.0; count],
        _ => normal(rng, count, 0.02),
    }
}

/// Independent normal values of mean zero.
pub fn normal(rng: &mut StdRng, count: usize, deviation: f32) -> Vec<f32> {
    // Box and Muller: a radius and an angle, one value each.
    let mut one = || {
        let (u, v): (f32, f32) = (1.0 - rng.random::<f32>(), rng.random());
        deviation * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    };
    (0..count).map(|_| one()).collect()
}
