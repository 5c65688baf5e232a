//! Tiny data and models for tests.

use veiltune_nn::VitConfig;
use veiltune_nn::vit::HiddenAct;

use crate::data::{PIXELS, Pictures, SIDE};

/// Five tokens of width 16.
pub fn vit_config() -> VitConfig {
    VitConfig {
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 32,
        hidden_act: HiddenAct::Relu,
        image_size: SIDE,
        patch_size: 14,
        num_channels: 1,
        layer_norm_eps: 1e-6,
        qkv_bias: true,
        layer_scale: false,
    }
}

/// Pictures of bright stripes, across (label 0) and down (label 1), of various widths and offsets.
pub fn stripes(count: usize) -> Pictures {
    let picture = |i: usize| {
        let (down, width, offset) = (i % 2 == 1, 3 + i / 2 % 4, i / 8 % 5);
        (0..PIXELS).map(move |p| {
            let along = if down { p % SIDE } else { p / SIDE };
            if (along + offset) / width % 2 == 0 {
                220
            } else {
                10
            }
        })
    };
    Pictures {
        pixels: (0..count).flat_map(picture).collect(),
        labels: (0..count).map(|i| (i % 2) as u8).collect(),
    }
}
