//! Tiny data and models for tests.

use std::fs;
use std::path::Path;

use rand::SeedableRng;
use rand::rngs::StdRng;
use veiltune_engine::Plain;
use veiltune_hub::dataset::Split;
use veiltune_hub::{Dataset, Precision, image, safetensors};
use veiltune_nn::layout::Variant;
use veiltune_nn::load::{BackboneConfig, inventory};
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{Backbone, Vit, VitConfig};

use crate::Variables;
use crate::data::{self, PIXELS, Pictures, SIDE};
use crate::variables::{normal, usual_init};

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

/// A random backbone for such pictures.
pub fn backbone() -> Backbone {
    backbone_with(false)
}

/// The same, perhaps with a norm after the last block.
pub fn backbone_with(final_norm: bool) -> Backbone {
    let (b, vit) = (Plain::new(), vit_config());
    let variant = Variant {
        final_norm,
        ..Variant::default()
    };
    let mut rng = StdRng::seed_from_u64(5);
    let shapes = inventory(&b, |p| Vit::load_variant(&p.pp("vit"), &vit, variant)).unwrap();
    let vars = Variables::new(&shapes, |name, dims| match name.contains("layernorm.") {
        true => normal(&mut rng, dims[0], 1.0),
        false => usual_init(&mut rng, name, dims),
    });
    let vars = vars.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("backbone.safetensors");
    safetensors::write(&path, &vars.tensors().unwrap(), Precision::F32).unwrap();
    let config = BackboneConfig {
        vit,
        preprocess: Some(data::preprocess()),
    };
    Backbone::from_bytes(&serde_json::to_vec(&config).unwrap(), fs::read(path).unwrap()).unwrap()
}

/// Stripes as a folder of class folders.
pub fn dataset(dir: &Path, count: usize) -> Dataset {
    let pictures = stripes(count);
    for i in 0..count {
        let class = dir.join(["across", "down"][pictures.labels[i] as usize]);
        fs::create_dir_all(&class).unwrap();
        let png = image::grey_png(pictures.picture(i), SIDE as u32).unwrap();
        fs::write(class.join(format!("{i:04}.png")), png).unwrap();
    }
    Dataset::open(dir, Split::Train).unwrap()
}
