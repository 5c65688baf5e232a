//! Tiny random models for tests.

use candle_core::Tensor;
use veiltune_engine::{Backend, Owner, Params, Plain};
use veiltune_hub::{Array, Tensors};

use crate::load::inventory;
use crate::owc::Design;
use crate::vit::HiddenAct;
use crate::{OwcConfig, Result, VitConfig};

/// Five tokens of width 8.
pub fn vit_config() -> VitConfig {
    VitConfig {
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 12,
        hidden_act: HiddenAct::Relu,
        image_size: 8,
        patch_size: 4,
        num_channels: 1,
        layer_norm_eps: 1e-6,
        qkv_bias: true,
        layer_scale: false,
    }
}

/// An adapter for such a backbone.
pub fn owc_config(scope: usize) -> OwcConfig {
    let labels = ["one", "two", "three"].map(str::to_owned).to_vec();
    OwcConfig::new(&Design::new(2, 4, scope), 8, 5, labels)
}

/// Values in -1 .. 1 from a small congruential generator.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A random tensor.
pub fn noise(dims: &[usize], seed: u64) -> Tensor {
    let values = values(dims.iter().product(), seed);
    Plain::new().input(Owner::Public, dims, Some(&values)).unwrap()
}

/// Random values for every parameter of a model: nothing is zero or one that should matter.
pub fn random<M>(model: impl Fn(&Params<Plain>) -> Result<M>) -> Tensors {
    let shapes = inventory(&Plain::new(), model).unwrap();
    let array = |(i, (name, dims)): (usize, (String, Vec<usize>))| {
        let values = values(dims.iter().product(), i as u64);
        (name, Array { dims, values })
    };
    shapes.into_iter().enumerate().map(array).collect()
}
