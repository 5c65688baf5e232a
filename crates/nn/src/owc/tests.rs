use candle_core::{Device, Tensor, Var};
use veiltune_engine::session::{Program, plan};
use veiltune_engine::{Fixed, Owner, Party, Plain, Revealed};
use veiltune_hub::{Array, Tensors};

use super::attention::{Attention, ClassAttention};
use super::*;
use crate::attention::AttentionKind;
use crate::load::{params, shapes};
use crate::method::{Method, State};
use crate::testing::{noise, owc_config, random};
use crate::{Error, Read};

const KINDS: [AttentionKind; 5] = [
    AttentionKind::LinAtten,
    AttentionKind::Softmax,
    AttentionKind::TwoQuad,
    AttentionKind::ReluSoftmax,
    AttentionKind::Scaled,
];

/// Every choice of norm, branch and attention.
fn designs(scope: usize) -> Vec<OwcConfig> {
    let base = Design::new(2, 4, scope);
    let mut all = Vec::new();
    for norm in [NormChoice::Layer, NormChoice::Batch] {
        let blocks = KINDS.map(|attention| Design {
            norm,
            attention,
            ..base
        });
        let others = [Branch::Linear, Branch::Relu].map(|branch| Design { norm, branch, ..base });
        all.extend(blocks.into_iter().chain(others));
    }
    let labels = owc_config(scope).labels;
    all.iter()
        .map(|d| OwcConfig::new(d, 8, 5, labels.clone()))
        .collect()
}

/// Hidden states of two pictures, all whole.
fn hidden(c: &OwcConfig) -> Vec<Tensor> {
    (0..=c.scope)
        .map(|i| noise(&[2, c.tokens, c.hidden_size], 10 + i as u64))
        .collect()
}

fn inputs(c: &OwcConfig) -> Vec<Tensor> {
    let (b, hidden) = (Plain::new(), hidden(c));
    let prepare = |read: Read| match read.state {
        State::Hidden(i) => read.prepare(&b, &hidden[i]).unwrap(),
        State::Patches => panic!("adapters read hidden states"),
    };
    c.reads(c.scope).unwrap().into_iter().map(prepare).collect()
}

/// Random weights of moderate products; variances are positive.
fn weights(c: &OwcConfig) -> Tensors {
    let mut tensors = random(|p| Owc::load(p, c));
    for (name, array) in &mut tensors {
        if let [_, inputs] = array.dims[..] {
            let size = 1.2 / (inputs as f32).sqrt();
            array.values.iter_mut().for_each(|v| *v *= size);
        }
        if name.ends_with("running_var") {
            array.values.iter_mut().for_each(|v| *v = v.abs() + 0.1);
        }
    }
    tensors
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

fn assert_near(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!(a.dims(), b.dims());
    let (size, apart) = (largest(a), largest(&(a - b).unwrap()));
    assert!(
        size > 0.1 && apart < 1e-4 * size,
        "{what}: {apart} apart at size {size}"
    );
}

fn logits_on(b: &Plain, c: &OwcConfig, tensors: &Tensors) -> Tensor {
    let model = Owc::load(&params(b, Owner::Public, tensors), c).unwrap();
    model.forward(b, &inputs(c)).unwrap()
}

fn logits(c: &OwcConfig, tensors: &Tensors) -> Tensor {
    logits_on(&Plain::new(), c, tensors)
}

#[test]
fn folded_equals_trained() {
    for scope in [1, 2, 3] {
        for config in designs(scope) {
            let tensors = weights(&config);
            let (folded, served) = fold(&config, &tensors).unwrap();
            assert_eq!(folded, config.served());
            assert!(folded.folded && !served.keys().any(|name| name.contains("norm")));
            assert_near(
                &logits(&folded, &served),
                &logits(&config, &tensors),
                &format!("{config:?}"),
            );
            assert_eq!(
                fold(&folded, &served).unwrap(),
                (folded, served),
                "folding again changes nothing"
            );
        }
    }
}

/// What everybody knows of the private program.
struct Shapes<'a>(&'a OwcConfig);

impl Program for Shapes<'_> {
    type Model<B: Backend> = Owc<B>;

    fn load<B: Backend>(&self, b: &B) -> Result<Owc<B>> {
        Owc::load(&shapes(b, Owner::Party(Party::P1)), self.0)
            .map_err(|e| veiltune_engine::Error::File(e.to_string()))
    }

    fn forward<B: Backend>(&self, b: &B, model: &Owc<B>, _: usize) -> Result<Option<Revealed>> {
        let method = Method::Owc(self.0.clone());
        let reads = self.0.reads(self.0.scope).expect("as many blocks as adapters");
        let input = |read: &Read| b.input(Owner::Party(Party::P0), &method.input_dims(read, 1), None);
        let inputs = reads.iter().map(input).collect::<Result<Vec<_>>>()?;
        b.reveal(&model.forward(b, &inputs)?, Party::P0)
    }
}

fn calibrated(config: &OwcConfig, tensors: &Tensors) -> OwcConfig {
    let b = Plain::recording();
    logits_on(&b, config, tensors);
    let mut method = Method::Owc(config.clone());
    method.calibrate(&b.sites(), 1.3).unwrap();
    let Method::Owc(config) = method else {
        unreachable!()
    };
    config
}

#[test]
fn fixed_point_follows_float() {
    for scope in [1, 2, 3] {
        for config in designs(scope) {
            let tensors = weights(&config);
            let config = calibrated(&config, &tensors);
            let want = logits(&config, &tensors);
            let (folded, served) = fold(&config, &tensors).unwrap();

            let f = Fixed::new().unwrap();
            let model = Owc::load(&params(&f, Owner::Party(Party::P1), &served), &folded).unwrap();
            let enter = |x: &Tensor| {
                let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                f.input(Owner::Party(Party::P0), x.dims(), Some(&values)).unwrap()
            };
            let given: Vec<_> = inputs(&folded).iter().map(enter).collect();
            let got = f
                .reveal(&model.forward(&f, &given).unwrap(), Party::P0)
                .unwrap()
                .unwrap();
            let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
            let size = want.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            for (got, want) in got.values.iter().zip(want) {
                let apart = (got - f64::from(want)).abs();
                assert!(apart < 1e-3 * size, "{config:?}: {apart} off at size {size}");
            }
        }
    }
}

#[test]
fn the_class_token_alone_equals_all_tokens() {
    let b = Plain::new();
    for scope in [1, 2] {
        for config in designs(scope)
            .into_iter()
            .filter(|c| c.branch == Branch::Transformer)
        {
            let tensors = weights(&config);
            let Form::Trained(mut model) = Owc::load(&params(&b, Owner::Public, &tensors), &config)
                .unwrap()
                .form
            else {
                panic!("it is the trained form")
            };
            let short = model.forward(&b, &inputs(&config)).unwrap();
            let last = model.adapters.pop().unwrap();
            model.adapters.push(last.of_all_tokens());
            let full = hidden(&config);
            let mut u = full[0].clone();
            for (adapter, next) in model.adapters.iter().zip(&full[1..]) {
                u = b.add(&adapter.forward(&b, &u, 0).unwrap(), next).unwrap();
            }
            let class = b.narrow(&u, 1, 0, 1).unwrap();
            assert_near(
                &short,
                &model.classify(&b, &class).unwrap(),
                &format!("{config:?}"),
            );
        }
    }
}

#[test]
fn without_attention_the_class_token_alone_is_read() {
    let config = &designs(2)[KINDS.len()];
    assert_eq!(config.branch, Branch::Linear);
    let (b, tensors) = (Plain::new(), weights(config));
    let short = logits(config, &tensors);
    // With every token of every state, the class token's row of the result is the same.
    let model = Owc::load(&params(&b, Owner::Public, &tensors), config).unwrap();
    let Form::Trained(model) = model.form else {
        panic!("it is the trained form")
    };
    let all = model.forward(&b, &hidden(config)).unwrap();
    let class = b.reshape(&b.narrow(&all, 1, 0, 1).unwrap(), &[2, 3]).unwrap();
    assert_near(&class, &short, "linear");
}

#[test]
fn attention_is_its_definition() -> candle_core::Result<()> {
    let b = Plain::new();
    for c in designs(1)
        .into_iter()
        .filter(|c| c.norm == NormChoice::Layer && c.branch == Branch::Transformer)
    {
        let (r, n, width) = (c.rank, c.tokens, c.rank / c.heads);
        let tensors = random(|p| Attention::<Plain>::load(p, &c, 0).map_err(Error::from));
        let model = Attention::load(&params(&b, Owner::Public, &tensors), &c, 0).unwrap();
        let x = noise(&[1, n, r], 3);
        let got = model.forward(&b, &x).unwrap();

        let get = |name: &str| {
            Tensor::from_slice(&tensors[name].values, tensors[name].dims.as_slice(), &Device::Cpu)
        };
        let qkv = x.squeeze(0)?.matmul(&get("qkv.weight")?.t()?)?;
        let mut heads = Vec::new();
        for h in 0..c.heads {
            let part = |i: usize| qkv.narrow(1, i * r + h * width, width);
            let scores = (part(0)?.matmul(&part(1)?.t()?)? / (width as f64).sqrt())?;
            let over_sum = |x: Tensor, floor: f64| x.broadcast_div(&(x.sum_keepdim(1)? + floor)?);
            let shares = match c.attention[0].kind() {
                AttentionKind::LinAtten => scores
                    .matmul(&get("mix.weight")?.t()?)?
                    .broadcast_add(&get("mix.bias")?)?,
                AttentionKind::Softmax => over_sum(scores.exp()?, 0.0)?,
                AttentionKind::TwoQuad => over_sum((scores + 5.0)?.sqr()?, 0.0)?,
                AttentionKind::ReluSoftmax => over_sum(scores.relu()?, 0.01)?,
                AttentionKind::Scaled => (scores / n as f64)?,
            };
            heads.push(shares.matmul(&part(2)?.contiguous()?)?);
        }
        let joined = Tensor::cat(&heads, 1)?;
        let want = joined
            .matmul(&get("proj.weight")?.t()?)?
            .broadcast_add(&get("proj.bias")?)?
            .unsqueeze(0)?;
        assert_near(&got, &want, &format!("{:?}", c.attention));
        let class = model.forward_class(&b, &x).unwrap();
        assert_near(
            &class,
            &want.narrow(1, 0, 1)?,
            &format!("{:?}, class token", c.attention),
        );
    }
    Ok(())
}

#[test]
fn gradients_reach_every_parameter_but_running_statistics() {
    let var = |a: &Array| {
        let values = Tensor::from_slice(&a.values, a.dims.as_slice(), &Device::Cpu).unwrap();
        Var::from_tensor(&values).unwrap()
    };
    for config in designs(2) {
        let (b, tensors) = (Plain::training(), weights(&config));
        let vars: std::collections::BTreeMap<_, _> =
            tensors.iter().map(|(n, a)| (n.clone(), var(a))).collect();
        let p = Params::<Plain>::new(|name, _| Ok(vars[name].as_tensor().clone()));
        let model = Owc::load(&p, &config).unwrap();
        let logits = model.forward(&b, &inputs(&config)).unwrap();
        // Not the plain square: over a batch norm its gradient vanishes.
        let weighted = logits.broadcast_mul(&noise(logits.dims(), 5)).unwrap();
        let loss = (weighted.sqr().unwrap() + &weighted).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        for (name, var) in &vars {
            if name.contains("running_") {
                assert!(grads.get(var).is_none());
                continue;
            }
            let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = largest(grad);
            assert!(size.is_finite(), "{name}: {size}");
            // A batch norm hides a shift before it.
            let shift = name.ends_with("bias") && config.norm == NormChoice::Batch;
            assert!(size > 0.0 || shift, "{name}: {size} in {config:?}");
        }
    }
}

#[test]
fn statistics_belong_to_the_batch_norms_by_name() {
    for config in designs(2).into_iter().filter(|c| c.norm == NormChoice::Batch) {
        let (b, mut tensors) = (Plain::training(), weights(&config));
        let training = logits_on(&b, &config, &tensors);
        let (names, seen) = (config.batch_norms(), b.statistics());
        assert_eq!(names.len(), seen.len());
        for (name, (mean, variance)) in names.iter().zip(seen) {
            tensors.get_mut(&format!("{name}.running_mean")).unwrap().values = mean;
            tensors.get_mut(&format!("{name}.running_var")).unwrap().values = variance;
        }
        // With that batch's own statistics, serving is training.
        assert_near(&logits(&config, &tensors), &training, &format!("{config:?}"));
    }
    assert!(designs(2)[0].batch_norms().is_empty());
}

#[test]
fn the_paper_s_adapters_take_few_rounds_and_bytes() {
    // Norm, (h, r, s), rounds, kilobytes both ways: upper bounds.
    for (norm, (heads, rank, scope), rounds, kilobytes) in [
        (NormChoice::Layer, (1, 240, 1), 23, 2800),
        (NormChoice::Layer, (1, 300, 1), 23, 3200),
        (NormChoice::Layer, (1, 240, 2), 45, 17700),
        (NormChoice::Layer, (1, 240, 3), 66, 33300),
        (NormChoice::Batch, (1, 240, 1), 12, 2100),
        (NormChoice::Batch, (1, 240, 2), 26, 15700),
        (NormChoice::Batch, (1, 240, 3), 40, 27900),
    ] {
        let design = Design {
            norm,
            ..Design::new(heads, rank, scope)
        };
        let labels = (0..100).map(|i| i.to_string()).collect();
        let mut config = OwcConfig::new(&design, 768, 197, labels);
        let norms = config
            .norms
            .iter_mut()
            .flat_map(|n| [&mut n.attention, &mut n.mlp]);
        for norm in norms.chain([&mut config.final_norm]) {
            norm.sigma = (0.1, 40.0);
        }
        let total = plan(&Shapes(&config.served()), 1).unwrap().tally.total();
        assert!(total.rounds <= rounds, "{design:?}: {total:?}");
        let bytes: u64 = total.online_bytes.iter().sum();
        assert!(bytes <= 1000 * kilobytes, "{design:?}: {total:?}");
    }
}

#[test]
fn older_configurations_are_the_paper_s() {
    let text = r#"{"hidden_size":8,"tokens":5,"scope":1,"rank":4,"heads":2,"scale":0.5,"norms":[{
        "attention":{"kind":"layer","eps":1e-6,"sigma":[0.001,1000.0]},
        "mlp":{"kind":"layer","eps":1e-6,"sigma":[0.001,1000.0]}}],
        "final_norm":{"kind":"layer","eps":1e-6,"sigma":[0.001,1000.0]},"labels":["one","two","three"]}"#;
    let old: OwcConfig = serde_json::from_str(text).unwrap();
    let new = owc_config(1);
    old.check().unwrap();
    assert_eq!(
        OwcConfig {
            attention: new.attention.clone(),
            ..old.clone()
        },
        new
    );
    let tensors = weights(&new);
    assert_near(&logits(&old, &tensors), &logits(&new, &tensors), "old");
}

#[test]
fn impossible_configurations_and_inputs_are_refused() {
    let good = owc_config(1);
    let softmax = designs(1).remove(1);
    let refused: [&dyn Fn(&mut OwcConfig); 8] = [
        &|c| c.heads = 3,
        &|c| c.scope = 2,
        &|c| c.rank = 0,
        &|c| c.tokens = usize::MAX,
        &|c| c.scale = f64::NAN,
        &|c| c.final_norm.sigma = (1.0, 0.5),
        &|c| c.norm = NormChoice::Batch,
        &|c| c.attention.push(softmax.attention[0]),
    ];
    for change in refused {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(matches!(bad.check(), Err(Error::Config(_))), "{bad:?}");
    }
    let mut bad = softmax.clone();
    bad.attention[0] = crate::attention::AttentionSpec::Softmax { bound: f64::NAN };
    assert!(bad.check().is_err());
    assert!(good.reads(0).is_err());

    let (b, tensors) = (Plain::new(), weights(&good));
    let model = Owc::load(&params(&b, Owner::Public, &tensors), &good).unwrap();
    assert!(model.forward(&b, &[]).is_err());
    assert!(model.forward(&b, &hidden(&good)[..1]).is_err());

    let batch = designs(1)
        .into_iter()
        .find(|c| c.norm == NormChoice::Batch)
        .unwrap();
    let mut tensors = weights(&batch);
    tensors.get_mut("norm.running_var").unwrap().values[0] = -1.0;
    assert!(
        fold(&batch, &tensors)
            .unwrap_err()
            .to_string()
            .contains("norm has a variance")
    );
    let mut tensors = weights(&batch);
    tensors.remove("adapters.0.down.bias");
    assert!(
        fold(&batch, &tensors)
            .unwrap_err()
            .to_string()
            .contains("adapters.0.down.bias")
    );
}

#[test]
fn a_folded_class_attention_keeps_its_shape() {
    let config = owc_config(1).served();
    let b = Plain::new();
    let tensors = random(|p| ClassAttention::<Plain>::load(p, &config, 0).map_err(Error::from));
    let model = ClassAttention::load(&params(&b, Owner::Public, &tensors), &config, 0).unwrap();
    let out = model.forward(&b, &noise(&[2, 5, 4], 1)).unwrap();
    assert_eq!(out.dims(), [2, 1, 5]);
}
