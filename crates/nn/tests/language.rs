//! Language models against the `transformers` library, in float, folded, in fixed point and as a private run.
//!
//! `vectors/language` was made by `tools/reference-language.py`: tiny random models, a batch with padding, last hidden states, logits.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use veiltune_engine::session::{Program, plan, run_local};
use veiltune_engine::{Backend, Fixed, Owner, Party, Plain, Revealed};
use veiltune_hub::{Array, Checkpoint, Precision, Tensors, files, safetensors};
use veiltune_nn::language::{Attention, AttentionRanges, LanguageCheckpoint, LanguageConfig, LanguageModel};
use veiltune_ring::prg::Seed;

const CASES: [&str; 7] = [
    "bert",
    "minilm",
    "roberta",
    "albert",
    "albert-tanh",
    "llama",
    "llama-untied",
];
const BATCH: usize = 3;
const TOKENS: usize = 7;
const RFA: Attention = Attention::Rfa {
    features: 16,
    seed: 5,
};

fn folder(case: &str) -> PathBuf {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/language");
    vectors.join(case)
}

/// A model and what is expected of it.
struct Case {
    model: LanguageCheckpoint,
    expected: Checkpoint,
}

impl Case {
    fn open(name: &'static str) -> Self {
        Case {
            model: LanguageCheckpoint::open(&folder(name)).unwrap(),
            expected: Checkpoint::open(&folder(name).join("expected.safetensors")).unwrap(),
        }
    }

    fn array(&self, name: &str) -> Array {
        self.expected.array(name).unwrap()
    }

    /// Word vectors of the batch.
    fn words(&self) -> (Vec<usize>, Vec<f32>) {
        let ids: Vec<u32> = self.array("ids").values.iter().map(|v| *v as u32).collect();
        let dims = vec![BATCH, TOKENS, self.model.config.embedding_size];
        (dims, self.model.embeddings(&ids).unwrap())
    }

    /// Rows and bias of all words.
    fn labels(&self) -> (Vec<f32>, Option<Vec<f32>>) {
        let ids: Vec<u32> = (0..40).collect();
        (
            self.model.label_rows(&ids).unwrap(),
            self.model.label_bias(&ids).unwrap(),
        )
    }

    /// Hidden states of all positions, with padding masked.
    fn hidden<B: Backend>(&self, b: &B, config: &LanguageConfig, owner: Owner) -> B::Tensor {
        let model = self.model.load(b, owner, config).unwrap();
        let (x, keep) = self.inputs(b, &model, owner);
        model.hidden(b, &x, Some(&keep)).unwrap()
    }

    /// What enters the first layer, and the mask.
    fn inputs<B: Backend>(&self, b: &B, model: &LanguageModel<B>, owner: Owner) -> (B::Tensor, B::Tensor) {
        let (dims, words) = self.words();
        let words = b.input(owner, &dims, Some(&words)).unwrap();
        let keep = self.array("keep").values;
        let keep = b.input(owner, &[BATCH, TOKENS], Some(&keep)).unwrap();
        (model.embed(b, &words).unwrap(), keep)
    }

    /// Largest distance at positions that are no padding; both are `[batch, tokens, ..]`.
    fn distance(&self, a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        let keep = self.array("keep").values;
        let width = a.len() / keep.len();
        let rows = a.chunks(width).zip(b.chunks(width)).zip(&keep);
        rows.filter(|(_, keep)| **keep > 0.0)
            .flat_map(|((a, b), _)| a.iter().zip(b).map(|(a, b)| (a - b).abs()))
            .fold(0.0, f64::max)
    }

    /// With ranges of the texts of this case.
    fn calibrated(&self, attention: Attention) -> LanguageConfig {
        let config = self.model.config.clone().with_attention(attention);
        let pass = |b: &Plain, model: &LanguageModel<Plain>| {
            b.rewind();
            let (x, keep) = self.inputs(b, model, Owner::Public);
            let hidden = model.hidden(b, &x, Some(&keep))?;
            if config.has_head {
                logits(self, b, model, &hidden, Owner::Public);
            }
            Ok(())
        };
        self.model.calibrate(&config, 1.2, pass).unwrap()
    }
}

/// `[batch, tokens, words]` from hidden states.
fn logits<B: Backend>(
    case: &Case,
    b: &B,
    model: &LanguageModel<B>,
    hidden: &B::Tensor,
    owner: Owner,
) -> B::Tensor {
    let (rows, bias) = case.labels();
    let rows = b
        .input(owner, &[40, model.config().embedding_size], Some(&rows))
        .unwrap();
    let bias = bias.map(|bias| b.input(owner, &[40], Some(&bias)).unwrap());
    model.logits(b, hidden, &rows, bias.as_ref()).unwrap()
}

fn flat(x: &Tensor) -> Vec<f64> {
    wide(&x.flatten_all().unwrap().to_vec1::<f32>().unwrap())
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

fn values<B: Backend>(b: &B, x: &B::Tensor) -> Vec<f64> {
    b.reveal(x, Party::P0).unwrap().unwrap().values
}

#[test]
fn every_family_gives_the_hidden_states_and_logits_of_the_reference() {
    let b = Plain::new();
    for name in CASES {
        let case = Case::open(name);
        // The tanh form of GELU is computed as the exact one.
        let bound = if name == "albert-tanh" { 3e-3 } else { 1e-4 };
        let config = &case.model.config;
        let model = case.model.load(&b, Owner::Public, config).unwrap();
        let (x, keep) = case.inputs(&b, &model, Owner::Public);
        let hidden = model.hidden(&b, &x, Some(&keep)).unwrap();
        let apart = case.distance(&flat(&hidden), &wide(&case.array("hidden").values));
        assert!(apart < bound, "{name}: {apart} off");
        let whole = flat(&model.hidden(&b, &x, None).unwrap());
        let want = wide(&case.array("whole").values);
        let apart = whole
            .iter()
            .zip(&want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(apart < bound, "{name}: {apart} off without a mask");
        // The mask matters.
        assert!(case.distance(&whole, &flat(&hidden)) > 0.05, "{name}");
        if name != "minilm" {
            let logits = logits(&case, &b, &model, &hidden, Owner::Public);
            let apart = case.distance(&flat(&logits), &wide(&case.array("logits").values));
            assert!(apart < bound, "{name}: logits are {apart} off");
        }
    }
}

#[test]
fn a_single_answer_is_that_of_all() {
    let b = Plain::new();
    for name in CASES {
        for attention in [Attention::Softmax, RFA] {
            let case = Case::open(name);
            let config = case.model.config.clone().with_attention(attention);
            let model = case.model.load(&b, Owner::Public, &config).unwrap();
            let (x, keep) = case.inputs(&b, &model, Owner::Public);
            let all = flat(&model.hidden(&b, &x, Some(&keep)).unwrap());
            for answer in [3, TOKENS - 1] {
                let one = flat(&model.forward(&b, &x, Some(&keep), answer).unwrap());
                for (text, one) in one.chunks(32).enumerate() {
                    if text == 1 && answer >= 5 {
                        continue; // padding
                    }
                    let row = (text * TOKENS + answer) * 32;
                    let apart = one.iter().zip(&all[row..]).map(|(a, b)| (a - b).abs());
                    let apart = apart.fold(0.0, f64::max);
                    assert!(apart < 1e-4, "{name} {attention:?} {answer}: {apart} off");
                }
            }
        }
    }
}

/// The same without ranges, but with the temperatures.
fn uncalibrated(config: &LanguageConfig) -> LanguageConfig {
    let mut exact = config.clone().with_attention(config.attention);
    for (exact, layer) in exact.layers.iter_mut().zip(&config.layers) {
        if let (
            AttentionRanges::Rfa { temperature, .. },
            AttentionRanges::Rfa {
                temperature: found, ..
            },
        ) = (&mut exact.attention, &layer.attention)
        {
            *temperature = found.clone();
        }
    }
    exact
}

#[test]
fn the_folded_form_in_fixed_point_is_the_same_function() {
    for name in CASES {
        for attention in [Attention::Softmax, RFA] {
            let case = Case::open(name);
            let config = case.calibrated(attention);
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<LanguageConfig>(&text).unwrap(), config);

            // Ranges play no part in float, but for the series of activations.
            let exact = uncalibrated(&config);
            let want = flat(&case.hidden(&Plain::new(), &exact, Owner::Public));
            let served = config.served();
            let float = flat(&case.hidden(&Plain::new(), &served, Owner::Public));
            let apart = case.distance(&float, &want);
            assert!(apart < 2e-3, "{name} {attention:?}: {apart} off in float");

            let fixed = Fixed::with_seeds([1, 2].map(|b| Seed::from_bytes([b; 16])));
            let private = values(&fixed, &case.hidden(&fixed, &served, Owner::Shared));
            let apart = case.distance(&private, &want);
            assert!(apart < 2e-2, "{name} {attention:?}: {apart} off in fixed point");
            eprintln!("{name} {attention:?}: fixed point {apart:.1e}");
        }
    }
}

/// Some models give the first token entries of 100,000 in one layer's MLP (SmolLM2-135M does): fixed point has no room for them beside
/// ordinary ones, unless the stream is divided by more than is free.
#[test]
fn a_token_with_massive_activations_fits_into_fixed_point() {
    let Case { model, expected } = Case::open("llama");
    let layer = model.config.num_hidden_layers - 1;
    assert!(layer > 0, "a stream that is not the input");
    // The token `id` alone has entry 0, which alone drives neuron 0 of the last layer, which alone drives entry 1.
    let id = expected.array("ids").unwrap().values[TOKENS - 1] as usize;
    let tensors = |t: &mut Tensors| {
        // A norm's largest deviation may be a thousand times its smallest.
        let words = t.get_mut("model.embed_tokens.weight").unwrap();
        words.values.iter_mut().for_each(|v| *v *= 400.0);
        let mut only = |name: &str, along: usize, index: usize, keep: Option<(usize, f32)>| {
            let array = t.get_mut(name).unwrap();
            let columns = array.dims[1];
            for (i, v) in array.values.iter_mut().enumerate() {
                let place = [i / columns, i % columns];
                if place[along] == index {
                    *v = keep
                        .filter(|(at, _)| *at == place[1 - along])
                        .map_or(0.0, |k| k.1);
                }
            }
        };
        only("model.embed_tokens.weight", 1, 0, Some((id, 60.0)));
        for i in 0..=layer {
            only(&format!("model.layers.{i}.self_attn.o_proj.weight"), 0, 0, None);
            only(&format!("model.layers.{i}.mlp.down_proj.weight"), 0, 0, None);
        }
        let mlp = format!("model.layers.{layer}.mlp");
        only(&format!("{mlp}.gate_proj.weight"), 0, 0, Some((0, 4.0)));
        only(&format!("{mlp}.up_proj.weight"), 0, 0, Some((0, 4.0)));
        only(&format!("{mlp}.down_proj.weight"), 1, 0, Some((1, 4000.0)));
    };
    let model = changed("llama", tensors, |_| ()).unwrap();
    let case = Case { model, expected };
    let config = case.calibrated(Attention::Softmax);
    let divided: Vec<u32> = config.layers.iter().map(|l| l.stream).collect();
    assert!(divided[layer] > 4 && divided[0] == 0, "{divided:?}");
    let want = flat(&case.hidden(&Plain::new(), &uncalibrated(&config), Owner::Public));
    let fixed = Fixed::with_seeds([1, 2].map(|b| Seed::from_bytes([b; 16])));
    let private = values(&fixed, &case.hidden(&fixed, &config.served(), Owner::Shared));
    let apart = case.distance(&private, &want);
    assert!(apart < 2e-2, "{apart} off in fixed point");
}

/// The Llama of the vectors as llama.cpp's converter stores it.
fn as_gguf(dir: &Path) {
    let case = Checkpoint::open(&folder("llama").join("model.safetensors")).unwrap();
    let name = |ours: &str| {
        let ours = ours.trim_start_matches("model.");
        let renamed = [
            ("layers.", "blk."),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("embed_tokens", "token_embd"),
        ];
        let all = renamed.iter().fold(ours.to_owned(), |n, (a, b)| n.replace(a, b));
        if all == "norm.weight" {
            "output_norm.weight".into()
        } else {
            all
        }
    };
    let tensors: Vec<(String, QTensor)> = case
        .names()
        .iter()
        .map(|ours| {
            let array = case.array(ours).unwrap();
            let mut t = Tensor::from_vec(array.values, array.dims, &Device::Cpu).unwrap();
            let heads = match ours {
                n if n.contains("q_proj") => 4,
                n if n.contains("k_proj") => 2,
                _ => 0,
            };
            if heads > 0 {
                // The halves of a head as pairs.
                let (rows, columns) = t.dims2().unwrap();
                t = t.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
                t = t.transpose(1, 2).unwrap().contiguous().unwrap();
                t = t.reshape((rows, columns)).unwrap();
            }
            (name(ours), QTensor::quantize(&t, GgmlDType::F32).unwrap())
        })
        .collect();
    let text = |t: &str| Value::String(t.to_owned());
    let list = |v: Vec<String>| Value::Array(v.into_iter().map(Value::String).collect());
    let key = |k: &str| format!("llama.{k}");
    let properties = [
        ("general.architecture".into(), text("llama")),
        (key("block_count"), Value::U32(2)),
        (key("context_length"), Value::U32(12)),
        (key("embedding_length"), Value::U32(32)),
        (key("feed_forward_length"), Value::U32(48)),
        (key("attention.head_count"), Value::U32(4)),
        (key("attention.head_count_kv"), Value::U32(2)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
        (key("rope.freq_base"), Value::F32(100.0)),
        ("tokenizer.ggml.model".into(), text("gpt2")),
        (
            "tokenizer.ggml.tokens".into(),
            list((0..40).map(|i| format!("w{i}")).collect()),
        ),
        ("tokenizer.ggml.merges".into(), list(Vec::new())),
    ];
    let properties: Vec<(&str, &Value)> = properties.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = std::fs::File::create(dir.join("m.gguf")).unwrap();
    gguf_file::write(&mut file, &properties, &tensors).unwrap();
}

#[test]
fn a_gguf_file_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    as_gguf(dir.path());
    let mut case = Case::open("llama");
    let gguf = LanguageCheckpoint::open(dir.path()).unwrap();
    assert_eq!(gguf.config.norm_eps as f32, case.model.config.norm_eps as f32);
    assert_eq!(gguf.fingerprint().unwrap(), case.model.fingerprint().unwrap());
    case.model = gguf;
    let hidden = case.hidden(&Plain::new(), &case.model.config, Owner::Public);
    let apart = case.distance(&flat(&hidden), &wide(&case.array("hidden").values));
    assert!(apart < 1e-4, "{apart}");

    std::fs::copy(dir.path().join("m.gguf"), dir.path().join("n.gguf")).unwrap();
    let error = LanguageCheckpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("several"), "{error}");
}

/// A copy of a case whose files were changed.
fn changed(
    case: &str,
    tensors: impl Fn(&mut Tensors),
    config: impl Fn(&mut serde_json::Value),
) -> Result<LanguageCheckpoint, veiltune_nn::Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder(case).join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let mut json: serde_json::Value = files::read_json(&folder(case).join("config.json")).unwrap();
    config(&mut json);
    files::write_json(&dir.path().join("config.json"), &json).unwrap();
    let stored = Checkpoint::open(&folder(case).join("model.safetensors")).unwrap();
    let mut arrays = stored.arrays().unwrap();
    tensors(&mut arrays);
    safetensors::write(&dir.path().join("model.safetensors"), &arrays, Precision::F32).unwrap();
    LanguageCheckpoint::open(dir.path())
}

#[test]
fn a_missing_or_misshaped_tensor_is_named() {
    let b = Plain::new();
    // Weights of one family under another's configuration.
    let words = "bert.embeddings.word_embeddings.weight";
    let renamed = |t: &mut Tensors| {
        let table = t.remove(words).unwrap();
        t.insert("model.embed_tokens.weight".into(), table);
    };
    let text = changed("bert", renamed, |_| ()).err().unwrap().to_string();
    assert!(
        text.contains("embeddings.word_embeddings.weight") && text.contains("another family"),
        "{text}"
    );
    for (case, name) in [
        ("bert", "bert.encoder.layer.1.attention.self.query.weight"),
        ("minilm", "embeddings.position_embeddings.weight"),
        ("roberta", "lm_head.layer_norm.bias"),
        ("albert", "albert.encoder.embedding_hidden_mapping_in.bias"),
        ("llama", "model.layers.1.mlp.gate_proj.weight"),
    ] {
        let refusal = |model: LanguageCheckpoint| {
            let loaded = model.load(&b, Owner::Public, &model.config);
            loaded.err().unwrap().to_string()
        };
        let missing = changed(case, |t| drop(t.remove(name)), |_| ()).unwrap();
        let text = refusal(missing);
        assert!(text.contains(name) && text.contains("no tensor"), "{text}");
        let misshaped = |t: &mut Tensors| {
            let array = t.get_mut(name).unwrap();
            array.dims = vec![1; 3];
            array.values.truncate(1);
        };
        let text = refusal(changed(case, misshaped, |_| ()).unwrap());
        assert!(text.contains(name) && text.contains("[1, 1, 1]"), "{text}");
    }
}

#[test]
fn other_models_are_refused() {
    for (case, key, value, word) in [
        ("bert", "model_type", "gpt2".into(), "gpt2"),
        (
            "bert",
            "position_embedding_type",
            "relative_key".into(),
            "relative_key",
        ),
        ("bert", "is_decoder", true.into(), "decoder"),
        ("bert", "num_hidden_layers", 0.into(), "num_hidden_layers"),
        ("bert", "num_attention_heads", 0.into(), "num_attention_heads"),
        ("bert", "num_attention_heads", 5.into(), "heads"),
        ("bert", "vocab_size", 39.into(), "tokenizer"),
        ("albert", "num_hidden_groups", 2.into(), "num_hidden_groups"),
        ("llama", "mlp_bias", true.into(), "mlp_bias"),
        ("llama", "num_key_value_heads", 3.into(), "heads"),
        (
            "llama",
            "rope_parameters",
            serde_json::json!({"rope_type": "llama3", "rope_theta": 1e4}),
            "rotary",
        ),
    ] {
        let refused = changed(case, |_| (), |json| json[key] = value.clone());
        let error = refused.err().unwrap_or_else(|| panic!("{key}")).to_string();
        assert!(error.contains(word), "{key}: {error}");
    }
}

#[test]
fn impossible_passes_are_refused() {
    let (b, case) = (Plain::new(), Case::open("bert"));
    let model = case.model.load(&b, Owner::Public, &case.model.config).unwrap();
    let (x, keep) = case.inputs(&b, &model, Owner::Public);
    assert!(model.forward(&b, &x, Some(&keep), TOKENS).is_err());
    let short = b.narrow(&keep, 1, 1, TOKENS - 1).unwrap();
    assert!(model.hidden(&b, &x, Some(&short)).is_err());
    let long = vec![0.0; 13 * 32];
    let long = b.input(Owner::Public, &[1, 13, 32], Some(&long)).unwrap();
    assert!(model.embed(&b, &long).is_err());
    assert!(case.model.embeddings(&[40]).is_err());
    assert!(!format!("{:?}", case.model).contains('['));
    // Calibration needs what the model meets, once.
    let mut config = case.model.config.clone();
    assert!(config.calibrate(&[], 1.0).is_err());
    assert!(case.calibrated(Attention::Softmax).calibrate(&[], 1.0).is_err());
}

#[test]
fn fewer_positions_are_the_first_ones() {
    let (b, case) = (Plain::new(), Case::open("roberta"));
    let mut config = case.model.config.clone();
    config.max_positions = TOKENS;
    let hidden = |config| flat(&case.hidden(&b, config, Owner::Public));
    assert_eq!(hidden(&config), hidden(&case.model.config));
    config.max_positions = 13;
    assert!(case.model.load(&b, Owner::Public, &config).is_err());
}

#[test]
fn pooling_is_the_mean_of_what_is_real() {
    let case = Case::open("minilm");
    let config = case.calibrated(Attention::Softmax).served();
    let keep = case.array("keep").values;
    let want: Vec<f64> = (0..BATCH * 32)
        .map(|i| {
            let (text, d) = (i / 32, i % 32);
            let row = |t: usize| text * TOKENS + t;
            let hidden = case.array("hidden").values;
            let real: Vec<usize> = (0..TOKENS).filter(|&t| keep[row(t)] > 0.0).collect();
            real.iter()
                .map(|&t| f64::from(hidden[row(t) * 32 + d]))
                .sum::<f64>()
                / real.len() as f64
        })
        .collect();
    let fixed = Fixed::new().unwrap();
    let model = case.model.load(&fixed, Owner::Shared, &config).unwrap();
    let (x, keep) = case.inputs(&fixed, &model, Owner::Shared);
    let hidden = model.hidden(&fixed, &x, Some(&keep)).unwrap();
    let pooled = values(&fixed, &model.pooled(&fixed, &hidden, Some(&keep)).unwrap());
    for (got, want) in pooled.iter().zip(&want) {
        assert!((got - want).abs() < 5e-3, "{got} for {want}");
    }
}

/// One party's view of a run: who has values gives them.
struct Run {
    case: Case,
    config: LanguageConfig,
    /// The party whose values are known; None: both.
    role: Option<Party>,
}

impl Run {
    fn known(&self, party: Party, values: Vec<f32>) -> Option<Vec<f32>> {
        self.role.is_none_or(|role| role == party).then_some(values)
    }

    fn bring<B: Backend>(
        &self,
        b: &B,
        party: Party,
        dims: &[usize],
        values: Vec<f32>,
    ) -> veiltune_engine::Result<B::Tensor> {
        let values = self.known(party, values);
        b.input(Owner::Party(party), dims, values.as_deref())
    }
}

impl Program for Run {
    type Model<B: Backend> = LanguageModel<B>;

    fn load<B: Backend>(&self, b: &B) -> veiltune_engine::Result<LanguageModel<B>> {
        let params = veiltune_engine::Params::new(|name, dims: &[usize]| {
            let array = self.case.model.parameter(&self.config, name, dims).unwrap();
            let values = self.known(Party::P1, array.values);
            b.weight(Owner::Party(Party::P1), dims, values.as_deref())
        });
        Ok(LanguageModel::load(&params, &self.config).unwrap())
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &LanguageModel<B>,
        _: usize,
    ) -> veiltune_engine::Result<Option<Revealed>> {
        let (dims, words) = self.case.words();
        let x = model.embed(b, &self.bring(b, Party::P0, &dims, words)?)?;
        let keep = self.bring(b, Party::P0, &[BATCH, TOKENS], self.case.array("keep").values)?;
        let hidden = model.forward(b, &x, Some(&keep), 3)?;
        let (rows, bias) = self.case.labels();
        let width = self.config.embedding_size;
        let rows = self.bring(b, Party::P1, &[2, width], rows[6 * width..8 * width].to_vec())?;
        let bias = bias
            .map(|bias| self.bring(b, Party::P1, &[2], bias[6..8].to_vec()))
            .transpose()?;
        b.reveal(&model.logits(b, &hidden, &rows, bias.as_ref())?, Party::P0)
    }
}

#[test]
fn a_private_run_costs_what_is_planned_and_gives_the_logits() {
    for (name, attention) in [
        ("bert", Attention::Softmax),
        ("albert", RFA),
        ("llama", Attention::Softmax),
        ("llama", RFA),
    ] {
        let config = Case::open(name).calibrated(attention);
        let served = config.served();
        let run = |role| Run {
            case: Case::open(name),
            config: served.clone(),
            role,
        };
        let seeds = [1, 2].map(|b| Seed::from_bytes([b; 16]));
        let programs = [run(Some(Party::P0)), run(Some(Party::P1))];
        let local = run_local(programs.each_ref(), 1, seeds.clone(), Default::default()).unwrap();
        let planned = local.plan.tally.total();
        for (i, report) in local.reports.iter().enumerate() {
            assert_eq!(
                (
                    report.online_meter.rounds,
                    report.online_meter.sent,
                    report.dealer_bytes
                ),
                (planned.rounds, planned.online_bytes[i], planned.dealer_bytes[i]),
                "{name} {attention:?}"
            );
        }
        let all = run(None);
        let fixed = Fixed::with_seeds(seeds);
        let model = all.load(&fixed).unwrap();
        let expected = all.forward(&fixed, &model, 0).unwrap();
        assert_eq!(
            local.outputs[0],
            std::slice::from_ref(&expected),
            "{name} {attention:?}"
        );

        let exact = Run {
            config: uncalibrated(&config),
            ..run(None)
        };
        let plain = Plain::new();
        let model = exact.load(&plain).unwrap();
        let want = exact.forward(&plain, &model, 0).unwrap().unwrap();
        let got = expected.unwrap();
        assert_eq!(got.dims, [BATCH, 2]);
        for (got, want) in got.values.iter().zip(&want.values) {
            assert!(
                (got - want).abs() < 2e-2,
                "{name} {attention:?}: {got} for {want}"
            );
        }
    }
}

/// A model of a published shape without values, and the input's batch and tokens.
struct Shape(LanguageConfig, [usize; 2]);

impl Program for Shape {
    type Model<B: Backend> = LanguageModel<B>;

    fn load<B: Backend>(&self, b: &B) -> veiltune_engine::Result<LanguageModel<B>> {
        Ok(LanguageModel::load(&veiltune_nn::load::shapes(b, Owner::Shared), &self.0).unwrap())
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        model: &LanguageModel<B>,
        _: usize,
    ) -> veiltune_engine::Result<Option<Revealed>> {
        let [batch, tokens] = self.1;
        let x = b.input(Owner::Shared, &[batch, tokens, self.0.hidden_size], None)?;
        b.reveal(&model.hidden(b, &model.embed(b, &x)?, None)?, Party::P0)
    }
}

#[test]
fn published_shapes_cost_what_is_said() {
    let rfa = Attention::Rfa {
        features: 64,
        seed: 0,
    };
    for (name, rows, attention, rounds, megabytes) in [
        ("bert-base", [1, 128], Attention::Softmax, 290, 600),
        ("bert-base", [1, 128], rfa, 330, 650),
        ("roberta-large", [4, 128], Attention::Softmax, 570, 8000),
        ("roberta-large", [4, 128], rfa, 650, 8000),
        ("roberta-large", [1, 512], Attention::Softmax, 570, 8000),
        ("roberta-large", [1, 512], rfa, 650, 8000),
    ] {
        let mut config = LanguageConfig::preset(name).unwrap().with_attention(attention);
        config.presume();
        let cost = plan(&Shape(config.served(), rows), 1).unwrap().tally.total();
        let both: u64 = cost.online_bytes.iter().sum();
        eprintln!(
            "{name} {rows:?} {attention:?}: {} rounds, {} MB both ways, {} MB dealt",
            cost.rounds,
            both / 1_000_000,
            cost.dealer_bytes.iter().sum::<u64>() / 1_000_000
        );
        assert!(cost.rounds <= rounds && both <= megabytes * 1_000_000, "{cost:?}");
    }
    assert!(LanguageConfig::preset("gpt-base").is_err());
}

/// The folder that an environment variable names.
fn real(variable: &str) -> Option<LanguageCheckpoint> {
    let Some(dir) = std::env::var_os(variable) else {
        eprintln!("skipped: {variable} names no folder with that model");
        return None;
    };
    let model = LanguageCheckpoint::open(Path::new(&dir)).unwrap();
    let config = LanguageConfig {
        layers: Vec::new(),
        ..model.config.clone()
    };
    eprintln!("{config:?}");
    Some(model)
}

/// The words that fit best at position `answer` of a text.
fn likely(checkpoint: &LanguageCheckpoint, ids: &[u32], answer: usize) -> Vec<String> {
    let b = Plain::new();
    let c = &checkpoint.config;
    let model = checkpoint.load(&b, Owner::Public, c).unwrap();
    let dims = [1, ids.len(), c.embedding_size];
    let words = b
        .input(Owner::Public, &dims, Some(&checkpoint.embeddings(ids).unwrap()))
        .unwrap();
    let x = model.embed(&b, &words).unwrap();
    let at = model.forward(&b, &x, None, answer).unwrap();
    let all: Vec<u32> = (0..c.vocab_size as u32).collect();
    let rows = checkpoint.label_rows(&all).unwrap();
    let rows = b
        .input(Owner::Public, &[c.vocab_size, c.embedding_size], Some(&rows))
        .unwrap();
    let bias = checkpoint.label_bias(&all).unwrap();
    let bias = bias.map(|bias| b.input(Owner::Public, &[c.vocab_size], Some(&bias)).unwrap());
    let logits = flat(&model.logits(&b, &at, &rows, bias.as_ref()).unwrap());
    let mut order: Vec<u32> = all;
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    order[..5]
        .iter()
        .map(|&id| checkpoint.tokenizer.decode(&[id]).unwrap())
        .collect()
}

#[test]
fn a_real_causal_model_goes_on_sensibly() {
    let Some(model) = real("VEILTUNE_SMOLLM2") else {
        return;
    };
    let ids = model.tokenizer.encode("The capital of France is").unwrap();
    let words = likely(&model, &ids, ids.len() - 1);
    eprintln!("{ids:?} {words:?}");
    assert!(words[0].contains("Paris"), "{words:?}");
}

#[test]
fn a_real_masked_model_fills_sensibly() {
    let Some(model) = real("VEILTUNE_ALBERT_KOR") else {
        return;
    };
    // "This film is really [MASK]." It may well be good.
    let ids = row(&model, "이 영화는 정말 [MASK].");
    // The library's, from the same list of words.
    assert_eq!(ids, [2, 5921, 26090, 14038, 4, 2016, 3]);
    let words = likely(&model, &ids, 4);
    eprintln!("{words:?}");
    assert!(words.iter().any(|w| w == "좋습니다"), "{words:?}");
}

/// A text as its model reads it: with what begins it, and of encoders what ends it.
fn row(checkpoint: &LanguageCheckpoint, text: &str) -> Vec<u32> {
    let special = checkpoint.tokenizer.special();
    let words = checkpoint.tokenizer.encode(text).unwrap();
    match checkpoint.config.family.causal() {
        true => special.bos.into_iter().chain(words).collect(),
        false => [vec![special.cls.unwrap()], words, vec![special.sep.unwrap()]].concat(),
    }
}

#[test]
fn a_real_sentence_encoder_knows_what_is_alike() {
    let Some(checkpoint) = real("VEILTUNE_MINILM") else {
        return;
    };
    let b = Plain::new();
    let model = checkpoint.load(&b, Owner::Public, &checkpoint.config).unwrap();
    let vector = |text: &str| {
        let ids = row(&checkpoint, text);
        let words = checkpoint.embeddings(&ids).unwrap();
        let words = b
            .input(Owner::Public, &[1, ids.len(), 384], Some(&words))
            .unwrap();
        let hidden = model.hidden(&b, &model.embed(&b, &words).unwrap(), None).unwrap();
        let v = flat(&model.pooled(&b, &hidden, None).unwrap());
        let length = v.iter().map(|a| a * a).sum::<f64>().sqrt();
        v.into_iter().map(|a| a / length).collect::<Vec<_>>()
    };
    let cosine = |a: &str, b: &str| -> f64 { vector(a).iter().zip(vector(b)).map(|(a, b)| a * b).sum() };
    let near = cosine("A man is playing a guitar.", "Someone plays an instrument.");
    let far = cosine(
        "A man is playing a guitar.",
        "The bank raised its interest rates.",
    );
    // The library's.
    assert!(
        (near - 0.66745).abs() < 1e-4 && (far + 0.02625).abs() < 1e-4,
        "{near} {far}"
    );
}

/// A real model in fixed point gives what it gives in float, with either attention; and what random features cost in accuracy.
#[test]
fn real_models_run_in_fixed_point() {
    for (variable, texts) in [
        (
            "VEILTUNE_SMOLLM2",
            [
                "The film was a delight from beginning to end, and the music even better. It was",
                "Shares of the company fell sharply on Monday after it cut its forecast for the year. It was",
            ],
        ),
        (
            "VEILTUNE_ALBERT_KOR",
            [
                "이 영화는 정말 재미있고 감동적이다. [MASK].",
                "배우들의 연기가 너무 지루해서 졸았다. [MASK].",
            ],
        ),
        (
            "VEILTUNE_MINILM",
            [
                "A man is playing a guitar.",
                "The bank raised its interest rates again on Monday.",
            ],
        ),
    ] {
        let Some(checkpoint) = real(variable) else {
            continue;
        };
        let ids = texts.map(|text| row(&checkpoint, text));
        let hidden = |b: &Plain, model: &LanguageModel<Plain>, ids: &[u32]| {
            let words = checkpoint.embeddings(ids).unwrap();
            let dims = [1, ids.len(), checkpoint.config.embedding_size];
            let words = b.input(Owner::Public, &dims, Some(&words))?;
            model.hidden(b, &model.embed(b, &words)?, None)
        };
        let mut softmax = Vec::new();
        for attention in [
            Attention::Softmax,
            Attention::Rfa {
                features: 64,
                seed: 1,
            },
        ] {
            let config = checkpoint.config.clone().with_attention(attention);
            let start = std::time::Instant::now();
            let pass = |b: &Plain, model: &LanguageModel<Plain>| {
                for ids in &ids {
                    b.rewind();
                    hidden(b, model, ids)?;
                }
                Ok(())
            };
            let config = match checkpoint.calibrate(&config, 1.25, pass) {
                Ok(config) => config,
                Err(e) => {
                    eprintln!("{variable} {attention:?}: {e}");
                    continue;
                }
            };
            for (i, layer) in config.layers.iter().enumerate() {
                eprintln!("{i} {layer:?}");
            }
            let (plain, fixed) = (Plain::new(), Fixed::new().unwrap());
            let exact = checkpoint
                .load(&plain, Owner::Public, &uncalibrated(&config))
                .unwrap();
            let want = flat(&hidden(&plain, &exact, &ids[1]).unwrap());
            if attention == Attention::Softmax {
                softmax = want.clone();
            }
            let served = config.served();
            let float = checkpoint.load(&plain, Owner::Public, &served).unwrap();
            let float = flat(&hidden(&plain, &float, &ids[1]).unwrap());
            let private = checkpoint.load(&fixed, Owner::Shared, &served).unwrap();
            let words = checkpoint.embeddings(&ids[1]).unwrap();
            let dims = [1, ids[1].len(), checkpoint.config.embedding_size];
            let words = fixed.input(Owner::Shared, &dims, Some(&words)).unwrap();
            let x = private.embed(&fixed, &words).unwrap();
            let out = private.hidden(&fixed, &x, None);
            let relative = |a: &[f64], b: &[f64]| {
                let apart: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
                (apart / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
            };
            eprintln!(
                "{variable} {attention:?}: folded float {:.1e} off, this attention {:.2} off softmax, {:.1} s",
                relative(&float, &want),
                relative(&want, &softmax),
                start.elapsed().as_secs_f64()
            );
            let got = values(&fixed, &out.unwrap());
            let apart = relative(&got, &want);
            eprintln!("{variable} {attention:?}: fixed point {apart:.1e} off");
            assert!(apart < 0.05, "{variable} {attention:?}: {apart}");
        }
    }
}
