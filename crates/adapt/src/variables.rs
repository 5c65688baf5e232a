//! Trainable parameters by name.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use veiltune_engine::{Error as EngineError, Params, Plain};
use veiltune_hub::{Array, Tensors};

use crate::{Error, Result};

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

    /// One of them.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.0.get(name)
    }

    /// Sets all of them to what `values` has under their names, of the same shapes.
    pub fn set<'a>(&self, values: impl Fn(&str) -> Result<&'a Array>) -> Result<()> {
        for (name, var) in &self.0 {
            let array = values(name)?;
            if array.dims != var.dims() {
                let detail = format!("{name} is {:?}, not {:?}", array.dims, var.dims());
                return Err(Error::Settings(detail));
            }
            var.set(&Tensor::from_slice(&array.values, var.dims(), &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// Their names, in order.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
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

/// A parameter in a pass with dropout: without some of the features that an adapter adds, or that a low-rank change reads, and
/// with the others scaled up as much. Weight and bias of a layer lose the same features.
pub fn dropped(value: &Tensor, name: &str, p: f32, seed: u64) -> candle_core::Result<Tensor> {
    let (stem, dim) = match name.split_once(".up.") {
        Some((stem, _)) => (stem, 0),
        None => match name.split_once(".lora_A.") {
            Some((stem, _)) => (stem, 1),
            None => return Ok(value.clone()),
        },
    };
    let digest = Sha256::new_with_prefix(seed.to_le_bytes())
        .chain_update(stem)
        .finalize();
    let mut rng = StdRng::from_seed(digest.into());
    let count = value.dim(dim)?;
    let mut keep = || {
        if rng.random::<f32>() < p {
            0.0
        } else {
            1.0 / (1.0 - p)
        }
    };
    let mask: Vec<f32> = (0..count).map(|_| keep()).collect();
    let mut dims = vec![1; value.rank()];
    dims[dim] = count;
    value.broadcast_mul(&Tensor::from_vec(mask, dims, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_takes_whole_features_and_keeps_the_mean() {
        let ones = |dims: &[usize]| Tensor::ones(dims, candle_core::DType::F32, &Device::Cpu).unwrap();
        let drop = |x: &Tensor, name: &str, seed| dropped(x, name, 0.25, seed).unwrap();
        let (weight, bias) = (ones(&[4000, 3]), ones(&[4000]));
        let weight = drop(&weight, "a.0.up.weight", 1).to_vec2::<f32>().unwrap();
        let bias = drop(&bias, "a.0.up.bias", 1).to_vec1::<f32>().unwrap();
        for (row, b) in weight.iter().zip(&bias) {
            assert!(row.iter().all(|v| v == b) && (*b == 0.0 || (b - 4.0 / 3.0).abs() < 1e-6));
        }
        let mean = bias.iter().sum::<f32>() / 4000.0;
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
        let a = drop(&ones(&[2, 4000]), "q.lora_A.weight", 1)
            .to_vec2::<f32>()
            .unwrap();
        assert!(a[0] == a[1] && a[0].contains(&0.0) && a[0] != bias);
        let other = drop(&ones(&[4000]), "a.0.up.bias", 2).to_vec1::<f32>().unwrap();
        assert_ne!(other, bias);
        let kept = drop(&ones(&[4000]), "a.0.down.bias", 1).to_vec1::<f32>().unwrap();
        assert!(kept.iter().all(|v| *v == 1.0));
    }
}
