//! Adapters of every method with random weights, for any backbone: what they cost and how they are served does not depend on
//! what they have learned.

use std::path::Path;

use veiltune_engine::{Backend, NormKind, NormSpec, Owner, Plain};
use veiltune_hub::{AdapterConfig, Array, Preprocess, Tensors};
use veiltune_nn::attention::AttentionKind;
use veiltune_nn::encoder::{EncoderConfig, Tuning};
use veiltune_nn::layout::Variant;
use veiltune_nn::load::{Backbone, Classifier, Served, inventory};
use veiltune_nn::method::State;
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{HeadConfig, Method, VitConfig};

/// Values in -1 .. 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("class {i}")).collect()
}

/// The method called `name`, not yet calibrated.
fn method(name: &str, backbone: &Backbone) -> Method {
    let vit = &backbone.config;
    // Scores of some large backbones are beyond what the private softmax takes.
    let (name, attention) = match name.strip_suffix("-scaled") {
        Some(name) => (name, AttentionKind::Scaled),
        None => (name, AttentionKind::Softmax),
    };
    let encoder = |tuning, layers| {
        Method::Encoder(EncoderConfig::new(
            tuning,
            vit,
            backbone.variant,
            layers,
            attention,
            labels(10),
        ))
    };
    match name {
        "head" => Method::Head(HeadConfig {
            hidden_size: vit.hidden_size,
            norm: NormSpec {
                kind: NormKind::Layer,
                eps: 1e-6,
                sigma: (1e-3, 1e3),
            },
            labels: labels(10),
        }),
        "lora" => encoder(
            Tuning::Lora {
                r: 4,
                lora_alpha: 4.0,
                target_modules: vec!["q_proj".into(), "v_proj".into()],
            },
            vit.num_hidden_layers,
        ),
        "adaptformer" => encoder(
            Tuning::AdaptFormer {
                bottleneck: 8,
                scale: 0.1,
            },
            vit.num_hidden_layers,
        ),
        "last-layers" => encoder(Tuning::LastLayers, 1),
        "mpcvit" => {
            let preprocess = Preprocess {
                size: 16,
                centre_crop: false,
                image_mean: vec![0.5],
                image_std: vec![0.5],
            };
            let vit = VitConfig {
                hidden_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                intermediate_size: 64,
                hidden_act: HiddenAct::Gelu,
                image_size: 16,
                patch_size: 4,
                num_channels: 1,
                layer_norm_eps: 1e-6,
                qkv_bias: false,
                layer_scale: false,
            };
            let tuning = Tuning::MpcVit { preprocess };
            let attention = AttentionKind::Scaled;
            Method::Encoder(EncoderConfig::new(
                tuning,
                &vit,
                Variant::default(),
                2,
                attention,
                labels(10),
            ))
        }
        other => panic!("no method {other}"),
    }
}

/// Writes an artefact of `name` to `dir`, calibrated on `pictures`.
pub fn write(name: &str, backbone: &Backbone, pictures: &[impl AsRef<Path>], dir: &Path) -> Method {
    let mut method = method(name, backbone);
    let b = Plain::new();
    // What the provider trains is what the served form does not ask of the backbone.
    let mut weights = Tensors::new();
    for (i, (name, dims)) in inventory(&b, |p| method.load(p, p))
        .unwrap()
        .into_iter()
        .enumerate()
    {
        let of_backbone = method.needs_backbone()
            && !["norm.", "head.", ".lora_", ".adapter"]
                .iter()
                .any(|part| name.contains(part) && !name.contains("layernorm"));
        if of_backbone {
            continue;
        }
        let count = dims.iter().product();
        // What is added to a trained model is small, as it is after training.
        let size = if name.contains(".lora_") { 0.1 } else { 1.0 };
        let fan = *dims.last().unwrap_or(&1) as f32;
        let values = match backbone.parameter(&name, &dims) {
            // The last layers start as the backbone has them.
            Ok(stored) if matches!(method, Method::Encoder(_)) && !name.contains("norm.") => stored.values,
            _ if name.contains("norm") && name.ends_with("weight") => vec![1.0; count],
            _ => noise(count, i as u64)
                .iter()
                .map(|v| v * size * (3.0 / fan).sqrt())
                .collect(),
        };
        weights.insert(name, Array { dims, values });
    }
    let mut classifier = Classifier {
        config: AdapterConfig {
            base_model_name_or_path: "a test".into(),
            base_model_sha256: Some(
                backbone
                    .fingerprint()
                    .unwrap()
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect(),
            ),
            text: None,
            method: method.clone(),
        },
        weights,
    };
    if !matches!(method, Method::Head(_)) {
        let seen = Plain::recording();
        let served = classifier.serve(Some(backbone)).unwrap();
        let vit = backbone.load(&b).unwrap();
        let each: Vec<_> = pictures
            .iter()
            .map(|picture| inputs(&served, backbone, &vit, picture.as_ref()))
            .collect();
        let together = |i: usize| {
            b.cat(&each.iter().map(|inputs| &inputs[i]).collect::<Vec<_>>(), 0)
                .unwrap()
        };
        let inputs: Vec<_> = (0..each[0].len()).map(together).collect();
        served
            .load(&seen, Owner::Public)
            .unwrap()
            .forward(&seen, &inputs)
            .unwrap();
        method.calibrate(&seen.sites(), 1.5).unwrap();
        classifier.config.method = method.clone();
    }
    classifier.write(dir).unwrap();
    method
}

fn inputs(
    served: &Served,
    backbone: &Backbone,
    vit: &veiltune_nn::Vit<Plain>,
    picture: &Path,
) -> Vec<<Plain as Backend>::Tensor> {
    let b = Plain::new();
    let reads = served.method.reads(backbone.config.num_hidden_layers).unwrap();
    let tensor = |dims: &[usize], values: &[f32]| b.input(Owner::Public, dims, Some(values)).unwrap();
    if let (Method::Encoder(c), State::Patches) = (&served.method, reads[0].state) {
        let Tuning::MpcVit { preprocess } = &c.tuning else {
            panic!("only MPCViT reads patches")
        };
        let (size, p, side) = (
            c.vit.image_size,
            c.vit.patch_size,
            c.vit.image_size / c.vit.patch_size,
        );
        let pixels = preprocess.load(picture).unwrap();
        let patch = |i: usize| -> Vec<f32> {
            let at = |j: usize| (i / side * p + j / p) * size + i % side * p + j % p;
            (0..p * p).map(|j| pixels[at(j)]).collect()
        };
        let all: Vec<f32> = (0..side * side).flat_map(patch).collect();
        return vec![tensor(&[1, side * side, p * p], &all)];
    }
    let c = &backbone.config;
    let pixels = backbone.picture(picture).unwrap();
    let image = tensor(&[1, c.num_channels, c.image_size, c.image_size], &pixels);
    let states = vit.forward(&b, &image).unwrap();
    let read = |read: &veiltune_nn::Read| match read.state {
        State::Hidden(i) => read.prepare(&b, &states[i]).unwrap(),
        State::Patches => panic!("hidden states only"),
    };
    reads.iter().map(read).collect()
}
