//! Checkpoints of the model hub's layouts against the `transformers` library.
//!
//! `vectors/` was made by `tools/reference-backbones.py`: tiny random models, a prepared picture, all hidden states.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{Checkpoint, Precision, files, safetensors};
use veiltune_nn::{Backbone, Layout, Variant};

const CASES: [&str; 6] = ["vit", "vit-bare", "deit", "dinov2", "clip", "clip-tower"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vectors")
        .join(case)
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Hidden states and features of a prepared picture.
fn states(backbone: &Backbone, pixels: &[f32]) -> (Vec<Tensor>, Tensor) {
    let (b, size) = (Plain::new(), backbone.config.image_size);
    let image = b
        .input(
            Owner::Public,
            &[1, backbone.config.num_channels, size, size],
            Some(pixels),
        )
        .unwrap();
    let vit = backbone.load(&b).unwrap();
    let hidden = vit.forward(&b, &image).unwrap();
    let features = vit.features(&b, &hidden).unwrap();
    (hidden, features)
}

#[test]
fn every_layout_gives_the_hidden_states_of_the_reference() {
    for case in CASES {
        let backbone = Backbone::open(&folder(case)).unwrap();
        let expected = Checkpoint::open(&folder(case).join("expected.safetensors")).unwrap();
        let pixels = expected.array("pixels").unwrap();
        let (hidden, features) = states(&backbone, &pixels.values);
        assert_eq!(hidden.len(), 3);
        for (i, state) in hidden.iter().enumerate() {
            let want = expected.array(&format!("hidden.{i}")).unwrap();
            assert_eq!(state.dims(), want.dims, "{case} {i}");
            assert_eq!(want.dims, [1, backbone.tokens(), 12]);
            let apart = distance(&flat(state), &want.values);
            assert!(apart < 1e-4, "{case}: state {i} is {apart} off");
        }
        let apart = distance(&flat(&features), &expected.array("features").unwrap().values);
        assert!(apart < 1e-4, "{case}: features are {apart} off");
    }
}

#[test]
fn pictures_are_prepared_as_the_reference_prepares_them() {
    for case in CASES {
        let backbone = Backbone::open(&folder(case)).unwrap();
        let expected = Checkpoint::open(&folder(case).join("expected.safetensors")).unwrap();
        let pixels = backbone.picture(&folder("picture.png")).unwrap();
        let apart = distance(&pixels, &expected.array("pixels").unwrap().values);
        // One step of a byte, after division by the smallest deviation.
        assert!(apart < 1.01 / 255.0 / 0.224, "{case}: {apart} off");
    }
}

/// A copy of a case whose weights `change` has seen.
fn changed(case: &str, change: impl Fn(&mut veiltune_hub::Tensors)) -> (tempfile::TempDir, Backbone) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "preprocessor_config.json"] {
        std::fs::copy(folder(case).join(name), dir.path().join(name)).unwrap();
    }
    let mut tensors = Checkpoint::open(&folder(case).join("model.safetensors"))
        .unwrap()
        .arrays()
        .unwrap();
    change(&mut tensors);
    safetensors::write(&dir.path().join("model.safetensors"), &tensors, Precision::F32).unwrap();
    let backbone = Backbone::open(dir.path()).unwrap();
    (dir, backbone)
}

#[test]
fn a_missing_or_misshaped_tensor_is_named() {
    for (case, name) in [
        ("vit", "vit.encoder.layer.1.output.dense.weight"),
        ("deit", "deit.embeddings.position_embeddings"),
        ("dinov2", "encoder.layer.0.layer_scale2.lambda1"),
        ("dinov2", "embeddings.position_embeddings"),
        ("clip", "vision_model.encoder.layers.1.self_attn.k_proj.bias"),
        ("clip-tower", "pre_layrnorm.weight"),
    ] {
        let refusal = |backbone: Backbone| backbone.load(&Plain::new()).err().unwrap().to_string();
        let (_dir, missing) = changed(case, |t| drop(t.remove(name)));
        let text = refusal(missing);
        assert!(
            text.contains(name) && text.contains("no tensor"),
            "{case}: {text}"
        );
        let (_dir, misshaped) = changed(case, |t| {
            let array = t.get_mut(name).unwrap();
            array.dims = vec![1; 5];
            array.values.truncate(1);
        });
        let text = refusal(misshaped);
        assert!(
            text.contains(name) && text.contains("[1, 1, 1, 1, 1]"),
            "{case}: {text}"
        );
    }
}

#[test]
fn positions_made_for_the_input_are_preferred() {
    let name = "embeddings.position_embeddings";
    let (_dir, backbone) = changed("dinov2", |t| {
        let mut fitting = t[name].clone();
        fitting.dims = vec![1, 17, 12];
        fitting.values = vec![0.25; 17 * 12];
        t.insert(format!("{name}_16"), fitting);
    });
    let positions = backbone.load(&Plain::new()).unwrap();
    assert!(flat(positions.positions()).iter().all(|v| *v == 0.25));
}

#[test]
fn a_checkpoint_in_parts_is_one_checkpoint() {
    let (dir, whole) = changed("dinov2", |_| ());
    let tensors = whole.weights.arrays().unwrap();
    let parts = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let of = |name: &str| parts[usize::from(name.contains("layer.1."))];
    for part in parts {
        let tensors = tensors.clone().into_iter().filter(|(name, _)| of(name) == part);
        safetensors::write(&dir.path().join(part), &tensors.collect(), Precision::F32).unwrap();
    }
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let map: std::collections::BTreeMap<_, _> = tensors.keys().map(|name| (name, of(name))).collect();
    let index = dir.path().join("model.safetensors.index.json");
    files::write_json(&index, &serde_json::json!({"metadata": {}, "weight_map": map})).unwrap();

    let pixels = vec![0.5; 3 * 16 * 16];
    let (a, b) = (
        states(&whole, &pixels).1,
        states(&Backbone::open(dir.path()).unwrap(), &pixels).1,
    );
    assert_eq!(flat(&a), flat(&b));

    std::fs::remove_file(dir.path().join(parts[1])).unwrap();
    let error = Backbone::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains(parts[1]), "{error}");
    for file in ["../model.safetensors", "/etc/passwd", ""] {
        files::write_json(&index, &serde_json::json!({"weight_map": {"a": file}})).unwrap();
        let error = Backbone::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("index.json"), "{error}");
    }
}

#[test]
fn the_projects_own_backbone_loads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo");
    let backbone = Backbone::open(&dir).unwrap();
    assert_eq!((backbone.variant, backbone.tokens()), (Variant::default(), 50));
    assert_eq!(backbone.preprocess.image_mean, [0.286]);
    assert_eq!(backbone.fit, backbone.preprocess.fit());
    let (hidden, _) = states(&backbone, &[0.5; 28 * 28]);
    assert_eq!(hidden.len(), 5);
}

#[test]
fn a_real_checkpoint_loads() {
    let Some(dir) = std::env::var_os("VEILTUNE_VIT_S14") else {
        eprintln!("skipped: VEILTUNE_VIT_S14 names no folder with a ViT-S/14 in the DINOv2 layout");
        return;
    };
    let start = Instant::now();
    let backbone = Backbone::open(Path::new(&dir)).unwrap();
    eprintln!("opened in {:.3} s", start.elapsed().as_secs_f64());
    assert_eq!(
        (backbone.variant.layout, backbone.tokens()),
        (Layout::Dinov2, 257)
    );
    let picture = backbone.picture(&folder("picture.png")).unwrap();
    assert_eq!(picture.len(), 3 * 224 * 224);

    let b = Plain::new();
    let vit = backbone.load(&b).unwrap();
    let pixels: Vec<f32> = (0..3 * 224 * 224)
        .map(|i| (i * 37 % 256) as f32 / 128.0 - 1.0)
        .collect();
    let image = b.input(Owner::Public, &[1, 3, 224, 224], Some(&pixels)).unwrap();
    let hidden = vit.forward(&b, &image).unwrap();
    assert_eq!(hidden.len(), 13);
    // The library's, for the same pixels.
    let features = flat(&vit.features(&b, &hidden).unwrap());
    let apart = distance(&features[..4], &[-0.026456319, 0.32595354, 1.3364983, -3.7678785]);
    assert!(apart < 1e-3, "features are {apart} off");
    for (i, want) in [(0, 0.12426065), (6, 0.086585127), (12, 1.7635968)] {
        let state = flat(&hidden[i]);
        let mean = state.iter().map(|v| f64::from(v.abs())).sum::<f64>() / state.len() as f64;
        assert!(
            (mean - want).abs() < 1e-4 * want,
            "state {i}: mean magnitude {mean}"
        );
    }

    let mut seconds: Vec<f64> = (0..5)
        .map(|_| {
            let start = Instant::now();
            vit.forward(&b, &image).unwrap();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    eprintln!("one image: median {:.3} s, best {:.3} s", seconds[2], seconds[0]);
}
