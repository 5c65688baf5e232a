//! Private encoder methods: what is served equals what is trained, in float and in fixed point, for every layout.

use std::path::Path;

use candle_core::Tensor;
use veiltune_engine::session::{Program, plan};
use veiltune_engine::{Backend, Fixed, Owner, Party, Plain, Revealed};
use veiltune_hub::{Array, Preprocess, Tensors};
use veiltune_nn::attention::AttentionKind;
use veiltune_nn::encoder::{EncoderConfig, Tuning};
use veiltune_nn::load::{self, Served};
use veiltune_nn::method::{State, Tokens};
use veiltune_nn::{Backbone, Method, Private};

fn backbone(case: &str) -> Backbone {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    Backbone::open(&vectors.join(case)).unwrap()
}

/// Values in -1 .. 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed ^ 0x9e3779b97f4a7c15;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn labels() -> Vec<String> {
    ["one", "two", "three"].map(String::from).to_vec()
}

/// Random private parameters: nothing is zero or one that should matter, and activations stay moderate.
fn random(method: &Method, public: &Backbone) -> Tensors {
    let plain = Plain::new();
    let shapes = load::inventory(&plain, |p| {
        let public = veiltune_engine::Params::new(|name, dims| {
            let array = public.parameter(name, dims).unwrap();
            plain.weight(Owner::Public, dims, Some(&array.values))
        });
        method.load(p, &public)
    })
    .unwrap();
    let array = |(i, (name, dims)): (usize, (String, Vec<usize>))| {
        let count = dims.iter().product();
        let size = match dims[..] {
            [_, inputs] => 1.2 / (inputs as f32).sqrt(),
            _ => 0.3,
        };
        let base = if name.contains("norm") && name.ends_with("weight") {
            1.0
        } else {
            0.0
        };
        let values = noise(count, i as u64).iter().map(|v| base + size * v).collect();
        (name, Array { dims, values })
    };
    shapes.into_iter().enumerate().map(array).collect()
}

/// What a client prepares for `count` random pictures.
fn inputs(method: &Method, backbone: &Backbone, count: usize) -> Vec<Tensor> {
    let b = Plain::new();
    let vit = backbone.load(&b).unwrap();
    let (c, size) = (backbone.config.num_channels, backbone.config.image_size);
    let images = b
        .input(
            Owner::Public,
            &[count, c, size, size],
            Some(&noise(count * c * size * size, 77)),
        )
        .unwrap();
    let hidden = vit.forward(&b, &images).unwrap();
    let reads = method.reads(hidden.len() - 1).unwrap();
    reads
        .iter()
        .map(|read| {
            let state = match read.state {
                State::Hidden(i) => hidden[i].clone(),
                State::Patches => {
                    let dims = method.input_dims(read, count);
                    b.input(Owner::Public, &dims, Some(&noise(dims.iter().product(), 5)))
                        .unwrap()
                }
            };
            let x = read.prepare(&b, &state).unwrap();
            assert_eq!(x.dims(), method.input_dims(read, count));
            x
        })
        .collect()
}

fn flat(x: &Tensor) -> Vec<f64> {
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f64::from).collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Trained and calibrated on its own inputs; logits of the trained form.
fn trained(mut method: Method, backbone: &Backbone) -> (Method, Tensors, Vec<f64>) {
    let weights = random(&method, backbone);
    let (b, plain) = (Plain::recording(), Plain::new());
    let private = load::params(&plain, Owner::Public, &weights);
    let public = veiltune_engine::Params::new(|name, dims| {
        let array = backbone.parameter(name, dims).unwrap();
        plain.weight(Owner::Public, dims, Some(&array.values))
    });
    let model = method.load(&private, &public).unwrap();
    let logits = model.forward(&b, &inputs(&method, backbone, 2)).unwrap();
    drop((model, private, public));
    method.calibrate(&b.sites(), 1.3).unwrap();
    (method, weights, flat(&logits))
}

fn served(method: &Method, weights: &Tensors, backbone: &Backbone) -> Served {
    let fetch = |name: &str, dims: &[usize]| backbone.parameter(name, dims);
    Served {
        method: method.served(),
        private: Some(method.fold(weights, &fetch).unwrap()),
        public: method.fold_public(&fetch).unwrap(),
    }
}

fn methods(backbone: &Backbone) -> Vec<Method> {
    let all = backbone.config.num_hidden_layers;
    let lora = |modules: &[&str]| Tuning::Lora {
        r: 2,
        lora_alpha: 3.0,
        target_modules: modules.iter().map(|m| m.to_string()).collect(),
    };
    let projections = backbone.variant.layout.projections();
    let last = |i: usize| projections[i].rsplit('.').next().unwrap().to_owned();
    let new = |tuning, layers, kind| {
        let (vit, variant) = (&backbone.config, backbone.variant);
        Method::Encoder(EncoderConfig::new(tuning, vit, variant, layers, kind, labels()))
    };
    vec![
        new(lora(&[&last(0), &last(2)]), all, AttentionKind::Softmax),
        new(lora(&[projections[1]]), all, AttentionKind::Softmax),
        new(
            Tuning::AdaptFormer {
                bottleneck: 3,
                scale: 0.7,
            },
            all,
            AttentionKind::Softmax,
        ),
        new(Tuning::LastLayers, 1, AttentionKind::Softmax),
        new(Tuning::LastLayers, 2, AttentionKind::TwoQuad),
    ]
}

#[test]
fn what_is_served_is_what_was_trained() {
    for case in ["vit", "deit", "dinov2", "clip"] {
        let backbone = backbone(case);
        for method in methods(&backbone) {
            let (method, weights, want) = trained(method, &backbone);
            let name = format!("{case} {}", method.peft_type());
            let size = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            assert!(size > 0.1, "{name}");

            // Float: exactly the same function, so only rounding and the Fourier sums differ.
            let served = served(&method, &weights, &backbone);
            let private = served.private.as_ref().unwrap();
            assert!(
                !private
                    .keys()
                    .chain(served.public.keys())
                    .any(|n| n.contains("norm")),
                "{name}: {:?}",
                private.keys()
            );
            assert_eq!(method.needs_backbone(), !served.public.is_empty());
            let (b, given) = (Plain::new(), inputs(&served.method, &backbone, 2));
            let model = served.load(&b, Owner::Public).unwrap();
            let float = flat(&model.forward(&b, &given).unwrap());
            let apart = distance(&float, &want);
            assert!(apart < 1e-3 * size.max(1.0), "{name}: {apart} off in float");

            // Fixed point.
            let f = Fixed::new().unwrap();
            let model = served.load(&f, Owner::Party(Party::P1)).unwrap();
            let given: Vec<_> = given
                .iter()
                .map(|x| {
                    let values: Vec<f32> = flat(x).iter().map(|&v| v as f32).collect();
                    f.input(Owner::Party(Party::P0), x.dims(), Some(&values)).unwrap()
                })
                .collect();
            let logits = model.forward(&f, &given).unwrap();
            let revealed = f.reveal(&logits, Party::P0).unwrap().unwrap();
            let apart = distance(&revealed.values, &want);
            assert!(apart < 5e-3 * size.max(1.0), "{name}: {apart} off in fixed point");
        }
    }
}

/// The private program of one picture, without values.
struct Shapes(Served, usize);

impl Program for Shapes {
    type Model<B: Backend> = Private<B>;

    fn load<B: Backend>(&self, b: &B) -> veiltune_engine::Result<Private<B>> {
        Ok(self.0.load(b, Owner::Party(Party::P1)).unwrap())
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &Private<B>,
        _: usize,
    ) -> veiltune_engine::Result<Option<Revealed>> {
        let method = &self.0.method;
        let reads = method.reads(self.1).unwrap();
        let inputs = reads
            .iter()
            .map(|read| b.input(Owner::Party(Party::P0), &method.input_dims(read, 1), None));
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        b.reveal(&model.forward(b, &inputs)?, Party::P0)
    }
}

#[test]
fn a_client_and_a_planner_need_less() {
    let backbone = backbone("vit");
    for method in methods(&backbone) {
        let client = Served::client(&method, &backbone).unwrap();
        assert!(client.private.is_none());
        assert_eq!(client.public.is_empty(), !method.needs_backbone());
        // Shapes alone are enough for the interpreters that count and deal, once ranges are known.
        let (method, ..) = trained(method, &backbone);
        let shapes = Shapes(Served::shapes(&method), backbone.config.num_hidden_layers);
        let cost = plan(&shapes, 1).unwrap().tally.total();
        assert!(cost.rounds > 10 && cost.online_bytes[0] > 1000, "{cost:?}");
    }
}

#[test]
fn mpcvit_is_served_as_it_was_trained() {
    let preprocess = Preprocess {
        size: 8,
        centre_crop: false,
        image_mean: vec![0.5; 3],
        image_std: vec![0.5; 3],
    };
    let kinds = [AttentionKind::ReluSoftmax, AttentionKind::Scaled];
    let kinds: Vec<_> = kinds.into_iter().cycle().take(7).collect();
    let backbone = backbone("vit");
    let method = Method::Encoder(EncoderConfig::mpcvit(preprocess.clone(), &kinds, labels()).unwrap());
    let (method, weights, want) = trained(method, &backbone);
    let served = served(&method, &weights, &backbone);
    assert!(served.public.is_empty());
    let given = inputs(&served.method, &backbone, 2);
    assert_eq!(given.len(), 1);
    let b = Plain::new();
    let float = flat(
        &served
            .load(&b, Owner::Public)
            .unwrap()
            .forward(&b, &given)
            .unwrap(),
    );
    assert!(distance(&float, &want) < 2e-3, "{}", distance(&float, &want));
    assert!(EncoderConfig::mpcvit(preprocess, &kinds[..3], labels()).is_err());
}

#[test]
fn a_method_reads_back_from_json_and_others_are_refused() {
    let backbone = backbone("deit");
    for method in methods(&backbone) {
        let text = serde_json::to_string(&method).unwrap();
        assert!(text.contains(method.peft_type()));
        assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method);
    }
    let error = serde_json::from_str::<Method>(r#"{"peft_type": "IA3"}"#).unwrap_err();
    assert!(error.to_string().contains("LAST_LAYERS"), "{error}");
}

#[test]
fn impossible_configurations_are_refused() {
    let backbone = backbone("vit");
    let good = methods(&backbone);
    let refusal = |change: &dyn Fn(&mut EncoderConfig), which: usize| {
        let Method::Encoder(mut config) = good[which].clone() else {
            panic!("all are encoders")
        };
        change(&mut config);
        Method::Encoder(config).check().unwrap_err().to_string()
    };
    let modules = |c: &mut EncoderConfig, names: &[&str]| {
        if let Tuning::Lora { target_modules, .. } = &mut c.tuning {
            *target_modules = names.iter().map(|n| n.to_string()).collect();
        }
    };
    for (which, change, word) in [
        (
            0,
            &(|c: &mut EncoderConfig| modules(c, &["fc3"])) as &dyn Fn(&mut EncoderConfig),
            "fc3",
        ),
        (0, &|c| modules(c, &[]), "no target"),
        (0, &|c| c.blocks.truncate(1), "all 2 blocks"),
        (3, &|c| c.blocks.clear(), "no block"),
        (3, &|c| c.labels.clear(), "0 classes"),
        (
            4,
            &|c| c.blocks[1].attention = AttentionKind::LinAtten.uncalibrated(),
            "LinAtten",
        ),
    ] {
        let error = refusal(change, which);
        assert!(error.contains(word), "{error}");
    }
    assert!(good[3].reads(3).is_err());
    assert_eq!(good[3].reads(2).unwrap()[0].tokens, Tokens::Class);
    assert!(good[0].clone().calibrate(&[], 1.0).is_err());
}
