//! LoRA as the PEFT library has it: what it wrote is taken over, and ours has its names.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{AdapterConfig, Array, Checkpoint, Precision, Tensors, safetensors};
use veiltune_nn::attention::AttentionKind;
use veiltune_nn::encoder::{EncoderConfig, Tuning};
use veiltune_nn::load::{Classifier, params};
use veiltune_nn::method::State;
use veiltune_nn::{Backbone, Method, Vit, peft};

fn backbone(case: &str) -> Backbone {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    Backbone::open(&vectors.join(case)).unwrap()
}

fn array(dims: &[usize], seed: usize) -> Array {
    let count = dims.iter().product();
    let values = (0..count).map(|i| ((i * 37 + seed * 101) as f32).sin() * 0.4);
    Array {
        dims: dims.to_vec(),
        values: values.collect(),
    }
}

const RANK: usize = 3;
const CLASSES: usize = 4;

/// Names of modules in the transformers library: of the blocks, and of query and value within one.
type Names = (&'static str, [&'static str; 2]);
/// From 5.9 on.
const PRESENT: Names = ("layers", ["attention.q_proj", "attention.v_proj"]);
/// Before.
const EARLIER: Names = (
    "encoder.layer",
    ["attention.attention.query", "attention.attention.value"],
);

fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap()
}

/// What PEFT writes for a ViT classifier of width 12 with two blocks, query and value changed, the head trained whole.
fn foreign((blocks, changed): Names) -> (Value, Tensors) {
    let config = json!({
        "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "google/vit-tiny", "bias": "none",
        "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layers_pattern": null,
        "layers_to_transform": null, "lora_alpha": 6, "lora_dropout": 0.1, "modules_to_save": ["classifier"],
        "peft_type": "LORA", "r": RANK, "rank_pattern": {}, "revision": null,
        "target_modules": [last(changed[1]), last(changed[0])],
        "task_type": null, "use_dora": false, "use_rslora": false
    });
    let mut tensors = Tensors::new();
    for layer in 0..2 {
        for (i, module) in changed.into_iter().enumerate() {
            let at = format!("base_model.model.vit.{blocks}.{layer}.{module}");
            let seed = 4 * layer + 2 * i;
            tensors.insert(format!("{at}.lora_A.weight"), array(&[RANK, 12], seed));
            tensors.insert(format!("{at}.lora_B.weight"), array(&[12, RANK], seed + 1));
        }
    }
    tensors.insert(
        "base_model.model.classifier.weight".into(),
        array(&[CLASSES, 12], 90),
    );
    tensors.insert("base_model.model.classifier.bias".into(), array(&[CLASSES], 91));
    (config, tensors)
}

fn write(config: &Value, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    safetensors::write(&path, tensors, Precision::F32).unwrap();
    dir
}

fn picture(b: &Plain) -> <Plain as Backend>::Tensor {
    let pixels = array(&[1, 3, 16, 16], 7);
    b.input(Owner::Public, &pixels.dims, Some(&pixels.values))
        .unwrap()
}

fn logits(classifier: &Classifier, backbone: &Backbone) -> Vec<f32> {
    let b = Plain::new();
    let hidden = backbone.load(&b).unwrap().forward(&b, &picture(&b)).unwrap();
    let served = classifier.serve(Some(backbone)).unwrap();
    let reads = served.method.reads(2).unwrap();
    let inputs: Vec<_> = reads
        .iter()
        .map(|read| match read.state {
            State::Hidden(i) => read.prepare(&b, &hidden[i]).unwrap(),
            State::Patches => panic!("hidden states are read"),
        })
        .collect();
    let model = served.load(&b, Owner::Public).unwrap();
    let logits = model.forward(&b, &inputs).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// By the definition: the changed weights in the backbone itself, its norm, and the head on the class token. Checkpoints
/// have the earlier names.
fn reference(factor: f32, tensors: &Tensors) -> Vec<f32> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/vit");
    let stored = Checkpoint::open(&dir.join("model.safetensors"))
        .unwrap()
        .arrays()
        .unwrap();
    let mut weights = Tensors::new();
    for (name, mut array) in stored {
        let Some(name) = name.strip_prefix("vit.") else {
            continue;
        };
        let part = |part: &str| {
            let module = name.strip_suffix(".weight")?;
            tensors.get(&format!("base_model.model.vit.{module}.{part}.weight"))
        };
        if let (Some(a), Some(b)) = (part("lora_A"), part("lora_B")) {
            for (i, w) in array.values.iter_mut().enumerate() {
                let (row, column) = (i / 12, i % 12);
                let term = |k: usize| b.values[row * RANK + k] * a.values[k * 12 + column];
                *w += factor * (0..RANK).map(term).sum::<f32>();
            }
        }
        // The convolution as a linear layer.
        if let [out, rest @ ..] = &array.dims[..]
            && rest.len() == 3
        {
            array.dims = vec![*out, rest.iter().product()];
        }
        weights.insert(name.to_owned(), array);
    }
    let (b, original) = (Plain::new(), backbone("vit"));
    let vit = Vit::load_variant(
        &params(&b, Owner::Public, &weights),
        &original.config,
        original.variant,
    )
    .unwrap();
    let hidden = vit.forward(&b, &picture(&b)).unwrap();
    let class = vit.features(&b, &hidden).unwrap();
    let class: Vec<f32> = class.flatten_all().unwrap().to_vec1().unwrap();
    let (w, bias) = (
        &tensors["base_model.model.classifier.weight"],
        &tensors["base_model.model.classifier.bias"],
    );
    let row =
        |(i, row): (usize, &[f32])| bias.values[i] + row.iter().zip(&class).map(|(w, x)| w * x).sum::<f32>();
    w.values.chunks(12).enumerate().map(row).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_lora_of_peft_is_taken_over_and_computes_what_it_says() {
    let backbone = backbone("vit");
    let (mut config, tensors) = foreign(EARLIER);
    let classifier = peft::import(write(&config, &tensors).path(), &backbone, None).unwrap();
    let (present, renamed) = foreign(PRESENT);
    let of_present = peft::import(write(&present, &renamed).path(), &backbone, None).unwrap();
    assert_eq!(of_present.weights, classifier.weights);
    assert_eq!(logits(&of_present, &backbone), logits(&classifier, &backbone));
    assert_eq!(classifier.config.base_model_name_or_path, "google/vit-tiny");
    assert_eq!(classifier.config.method.labels()[3], "LABEL_3");
    let got = logits(&classifier, &backbone);
    let want = reference(2.0, &tensors);
    assert!(distance(&got, &want) < 1e-4, "{got:?} {want:?}");
    // The changes are not so small that this says nothing.
    assert!(distance(&want, &reference(0.0, &tensors)) > 0.05);

    // Scaled by the root of the rank; the head with the name that it has within a model; names of the classes.
    config["use_rslora"] = true.into();
    let named = tensors.iter().map(|(name, array)| {
        (
            name.replace("classifier", "classifier.modules_to_save"),
            array.clone(),
        )
    });
    let labels = ["a", "b", "c", "d"].map(String::from).to_vec();
    let dir = write(&config, &named.collect());
    let classifier = peft::import(dir.path(), &backbone, Some(labels.clone())).unwrap();
    assert_eq!(classifier.config.method.labels(), labels);
    let want = reference(6.0 / (RANK as f32).sqrt(), &tensors);
    assert!(distance(&logits(&classifier, &backbone), &want) < 1e-4);
}

#[test]
fn ours_has_the_names_of_peft_and_reads_back() {
    let backbone = backbone("vit");
    let (config, tensors) = foreign(EARLIER);
    let classifier = peft::import(write(&config, &tensors).path(), &backbone, None).unwrap();
    // Whatever the names of what was taken over.
    let (_, tensors) = foreign(PRESENT);
    let dir = tempfile::tempdir().unwrap();
    classifier.write(dir.path()).unwrap();
    let stored = Checkpoint::open(&dir.path().join("adapter_model.safetensors")).unwrap();
    let stored = stored.arrays().unwrap();
    for (name, array) in &tensors {
        assert_eq!(stored.get(name), Some(array), "{name}");
    }
    let extra: Vec<_> = stored
        .keys()
        .filter(|name| !tensors.contains_key(*name))
        .collect();
    assert_eq!(
        extra,
        [
            "base_model.model.vit.layernorm.bias",
            "base_model.model.vit.layernorm.weight"
        ]
    );
    let text = fs::read(dir.path().join("adapter_config.json")).unwrap();
    let written: Value = serde_json::from_slice(&text).unwrap();
    for (field, value) in [
        ("peft_type", json!("LORA")),
        ("r", json!(3)),
        ("lora_alpha", json!(6.0)),
        ("target_modules", json!(["q_proj", "v_proj"])),
        ("modules_to_save", json!(["layernorm", "classifier"])),
    ] {
        assert_eq!(written[field], value, "{field}");
    }
    let back = Classifier::open(dir.path()).unwrap();
    assert_eq!(back.weights, classifier.weights);
    assert_eq!(logits(&back, &backbone), logits(&classifier, &backbone));

    // As earlier releases wrote them: with our own names, or those of PEFT with an earlier transformers library.
    let path = dir.path().join("adapter_model.safetensors");
    let as_was = |name: &str| {
        let name = name.replace("vit.layers", "vit.encoder.layer");
        name.replace(".q_proj", ".attention.query")
            .replace(".v_proj", ".attention.value")
    };
    let earlier: Tensors = stored.iter().map(|(name, t)| (as_was(name), t.clone())).collect();
    assert!(
        earlier.contains_key("base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight")
    );
    let mut written = written;
    for stored in [&classifier.weights, &earlier] {
        written["target_modules"] = json!(["value", "query"]);
        fs::write(dir.path().join("adapter_config.json"), written.to_string()).unwrap();
        safetensors::write(&path, stored, Precision::F32).unwrap();
        let back = Classifier::open(dir.path()).unwrap();
        assert_eq!(back.weights, classifier.weights);
        assert_eq!(logits(&back, &backbone), logits(&classifier, &backbone));
    }

    // What PEFT wrote cannot be opened as it is, and the way is named.
    let e = Classifier::open(write(&config, &tensors).path())
        .unwrap_err()
        .to_string();
    assert!(e.contains("veiltune import"), "{e}");
}

#[test]
fn modules_are_named_as_in_each_layout() {
    let plain = "encoder.layer.1.attention.attention.key";
    for (case, in_checkpoint, module) in [
        ("vit", plain, "vit.layers.1.attention.k_proj"),
        ("deit", plain, "deit.layers.1.attention.k_proj"),
        ("dinov2", plain, "dinov2.encoder.layer.1.attention.k_proj"),
        (
            "clip",
            "encoder.layers.1.self_attn.k_proj",
            "vision_model.encoder.layers.1.self_attn.k_proj",
        ),
    ] {
        let backbone = backbone(case);
        let projections = backbone.variant.layout.projections();
        let tuning = Tuning::Lora {
            r: 1,
            lora_alpha: 1.0,
            target_modules: vec![projections[1].to_owned()],
        };
        let (vit, kind) = (&backbone.config, AttentionKind::Softmax);
        let labels = vec!["one".to_owned(), "two".to_owned()];
        let config = EncoderConfig::new(tuning, vit, backbone.variant, vit.num_hidden_layers, kind, labels);
        let config = AdapterConfig {
            base_model_name_or_path: case.into(),
            base_model_sha256: None,
            text: None,
            method: Method::Encoder(config),
        };
        let name = |module: &str| format!("{module}.lora_B.weight");
        let weights = Tensors::from([(name(in_checkpoint), array(&[vit.hidden_size, 1], 3))]);
        let dir = tempfile::tempdir().unwrap();
        Classifier { config, weights }.write(dir.path()).unwrap();
        let stored = Checkpoint::open(&dir.path().join("adapter_model.safetensors")).unwrap();
        let stored: Vec<_> = stored.arrays().unwrap().into_keys().collect();
        assert_eq!(stored, [name(&format!("base_model.model.{module}"))]);
    }
}

/// What a test does to an artefact.
type Change = fn(&mut Value, &mut Tensors);

#[test]
fn what_is_not_adapted_here_is_named() {
    let backbone = backbone("vit");
    let query = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight";
    assert!(foreign(EARLIER).1.contains_key(query));
    let changes: [(Change, &str); 13] = [
        (
            |c, _| c["target_modules"] = json!(["query", "dense"]),
            "\"dense\"",
        ),
        (
            |c, _| c["target_modules"] = json!(["query", "value", "key"]),
            "key.lora_A.weight",
        ),
        (|c, _| c["target_modules"] = "all-linear".into(), "all-linear"),
        (|c, _| c["peft_type"] = "IA3".into(), "IA3"),
        (|c, _| c["use_dora"] = true.into(), "use_dora"),
        (|c, _| c["bias"] = "all".into(), "bias"),
        (|c, _| c["rank_pattern"] = json!({"query": 2}), "rank_pattern"),
        (
            |c, _| c["layers_to_transform"] = json!([1]),
            "layers_to_transform",
        ),
        (|c, _| c["r"] = 4.into(), "not [4, 12]"),
        (|c, _| c["r"] = 0.into(), "rank 0"),
        (
            |_, t| {
                let name = "base_model.model.vit.encoder.layer.0.output.dense.lora_A.weight";
                t.insert(name.into(), array(&[RANK, 24], 1));
            },
            "encoder.layer.0.output.dense.lora_A.weight",
        ),
        (
            |_, t| t.retain(|name, _| !name.contains("layer.1.attention.attention.value.lora_B")),
            "base_model.model.vit.encoder.layer.1.attention.attention.value.lora_B.weight",
        ),
        (
            |_, t| t.retain(|name, _| !name.contains("classifier")),
            "modules_to_save",
        ),
    ];
    for (change, complaint) in changes {
        let (mut config, mut tensors) = foreign(EARLIER);
        change(&mut config, &mut tensors);
        let dir = write(&config, &tensors);
        let e = peft::import(dir.path(), &backbone, None).unwrap_err().to_string();
        assert!(e.contains(complaint), "{complaint}: {e}");
    }
    // Tensors are called what they would be called beside the others of the file.
    let (config, mut tensors) = foreign(PRESENT);
    tensors.retain(|name, _| !name.contains("layers.1.attention.v_proj.lora_B"));
    let dir = write(&config, &tensors);
    let e = peft::import(dir.path(), &backbone, None).unwrap_err().to_string();
    assert!(
        e.contains("no tensor base_model.model.vit.layers.1.attention.v_proj.lora_B.weight"),
        "{e}"
    );
    let (config, tensors) = foreign(EARLIER);
    let dir = write(&config, &tensors);
    let labels = Some(vec!["one".to_owned()]);
    let e = peft::import(dir.path(), &backbone, labels)
        .unwrap_err()
        .to_string();
    assert!(e.contains("1 labels for 4 classes"), "{e}");
    let e = peft::import(dir.path(), &self::backbone("dinov2"), None)
        .unwrap_err()
        .to_string();
    assert!(e.contains("ViT and DeiT"), "{e}");
    fs::rename(
        dir.path().join("adapter_model.safetensors"),
        dir.path().join("adapter_model.bin"),
    )
    .unwrap();
    let e = peft::import(dir.path(), &backbone, None).unwrap_err().to_string();
    assert!(e.contains("pickle"), "{e}");
}
