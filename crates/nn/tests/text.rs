//! Text encoders: rows of fixed number from texts of any length, cut and joined as the models expect.

use std::path::{Path, PathBuf};

use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{Checkpoint, Pooling, TextForm};
use veiltune_nn::TextEncoder;
use veiltune_nn::language::LanguageCheckpoint;
use veiltune_nn::text::Words;

const WIDTH: usize = 32;

fn folder(case: &str) -> PathBuf {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/language");
    vectors.join(case)
}

fn form(tokens: usize, pooling: Pooling, pairs: bool) -> TextForm {
    TextForm {
        tokens,
        pooling,
        pairs,
    }
}

fn encoder(case: &str, form: TextForm) -> TextEncoder {
    TextEncoder::open(&folder(case), form).unwrap()
}

/// Rows of each state.
fn states(encoder: &TextEncoder, words: &Words, last: usize) -> Vec<Vec<Vec<f32>>> {
    let b = Plain::new();
    let states = encoder.load(&b).unwrap().states(&b, words, last).unwrap();
    let rows = |state: &candle_core::Tensor| {
        assert_eq!(state.dims(), [1, encoder.rows(), encoder.width()]);
        state.squeeze(0).unwrap().to_vec2().unwrap()
    };
    states.iter().map(rows).collect()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_text_fills_its_rows_over_and_over_and_the_first_stands_for_it() {
    for case in ["minilm", "bert", "roberta", "albert"] {
        let mean = encoder(case, form(12, Pooling::Mean, false));
        let words = mean.words("ba be bi bo", None).unwrap();
        assert_eq!((&words.ids[..], words.cut), (&[2, 5, 6, 7, 8, 3][..], 0));
        let own = states(&mean, &words, 2);
        assert_eq!((own.len(), mean.rows()), (3, 13));
        for rows in &own {
            let tokens = &rows[1..7];
            assert_eq!(tokens, &rows[7..]);
            let average: Vec<f32> = (0..WIDTH)
                .map(|i| tokens.iter().map(|t| t[i]).sum::<f32>() / 6.0)
                .collect();
            assert!(apart(&rows[0], &average) < 1e-5);
        }
        // They are the states of the model itself, which tests/language.rs compares with those of another implementation.
        let checkpoint = LanguageCheckpoint::open(&folder(case)).unwrap();
        let b = Plain::new();
        let model = checkpoint.load(&b, Owner::Public, &checkpoint.config).unwrap();
        let vectors = checkpoint.embeddings(&words.ids).unwrap();
        let dims = [1, 6, vectors.len() / 6];
        let x = b.input(Owner::Public, &dims, Some(&vectors)).unwrap();
        let last = model.hidden(&b, &model.embed(&b, &x).unwrap(), None).unwrap();
        let last: Vec<Vec<f32>> = last.squeeze(0).unwrap().to_vec2().unwrap();
        assert_eq!(own[2][1..7], last);

        // The class token is the first of all; the text does not fill the rows a whole number of times.
        let class = encoder(case, form(8, Pooling::Class, false));
        let other = states(&class, &words, 1);
        assert_eq!(other.len(), 2);
        for (other, own) in other.iter().zip(&own) {
            assert_eq!(other[..6], own[1..7]);
            assert_eq!(other[6..], own[1..3]);
        }
    }
}

#[test]
fn what_does_not_fit_is_cut_from_the_longer_text() {
    let single = encoder("bert", form(5, Pooling::Mean, false));
    let words = single.words(" ba be bi bo bu ", None).unwrap();
    assert_eq!(
        (&words.ids[..], words.first, words.cut),
        (&[2, 5, 6, 7, 3][..], 5, 2)
    );
    let pair = encoder("bert", form(8, Pooling::Mean, true));
    let words = pair.words("ba be bi bo bu", Some("da de")).unwrap();
    assert_eq!(
        (&words.ids[..], words.first, words.cut),
        (&[2, 5, 6, 7, 3, 10, 11, 3][..], 5, 2)
    );
    let words = pair.words("ba be bi bo", Some("da de di do du")).unwrap();
    assert_eq!(words.ids, [2, 5, 6, 7, 3, 10, 11, 3]);
    // RoBERTa separates two texts twice.
    let pair = encoder("roberta", form(8, Pooling::Mean, true));
    let words = pair.words("ba", Some("da")).unwrap();
    assert_eq!((&words.ids[..], words.first), (&[2, 5, 3, 3, 10, 3][..], 4));
}

#[test]
fn the_second_text_of_a_pair_has_the_second_type() {
    let pair = encoder("minilm", form(6, Pooling::Class, true));
    let words = pair.words("ba be", Some("da")).unwrap();
    assert_eq!((&words.ids[..], words.first), (&[2, 5, 6, 3, 10, 3][..], 4));
    let own = &states(&pair, &words, 0)[0];
    let file = Checkpoint::open(&folder("minilm").join("model.safetensors")).unwrap();
    let table = |name: &str, dims: &[usize]| file.tensor(&format!("embeddings.{name}"), dims).unwrap();
    let (vectors, positions, types) = (
        table("word_embeddings.weight", &[40, WIDTH]),
        table("position_embeddings.weight", &[12, WIDTH]),
        table("token_type_embeddings.weight", &[2, WIDTH]),
    );
    let (gain, bias) = (
        table("LayerNorm.weight", &[WIDTH]),
        table("LayerNorm.bias", &[WIDTH]),
    );
    for (i, (id, kind)) in words.ids.iter().zip([0, 0, 0, 0, 1, 1]).enumerate() {
        let of = |table: &[f32], row: usize, j: usize| table[row * WIDTH + j];
        let sum: Vec<f32> = (0..WIDTH)
            .map(|j| of(&vectors, *id as usize, j) + of(&positions, i, j) + of(&types, kind, j))
            .collect();
        let mean = sum.iter().sum::<f32>() / WIDTH as f32;
        let variance = sum.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / WIDTH as f32;
        let normal: Vec<f32> = (0..WIDTH)
            .map(|j| (sum[j] - mean) / (variance + 1e-12).sqrt() * gain[j] + bias[j])
            .collect();
        assert!(apart(&own[i], &normal) < 1e-4, "token {i}");
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let refused = |case: &str, form| {
        let refused = TextEncoder::open(&folder(case), form);
        refused.err().unwrap().to_string()
    };
    let mean = |tokens, pairs| form(tokens, Pooling::Mean, pairs);
    assert!(refused("llama", mean(8, false)).contains("causal"));
    assert!(refused("minilm", mean(2, false)).contains("3 to 12"));
    assert!(refused("minilm", mean(4, true)).contains("5 to 12"));
    assert!(refused("minilm", mean(13, false)).contains("3 to 12"));

    let (single, pair) = (
        encoder("minilm", mean(8, false)),
        encoder("minilm", mean(8, true)),
    );
    let refused = |encoder: &TextEncoder, first, second| {
        let refused = encoder.words(first, second).unwrap_err();
        refused.to_string()
    };
    assert!(refused(&single, "ba", Some("da")).contains("a pair is given"));
    assert!(refused(&pair, "ba", None).contains("one text is given"));
    assert!(refused(&single, "  ", None).contains("without words"));
    assert!(refused(&pair, "ba", Some("")).contains("without words"));
    let shown = format!("{:?} {single:?}", single.words("ba", None).unwrap());
    assert!(!shown.contains('5'), "{shown}");
}

#[test]
fn an_encoder_is_known_by_its_parameters_and_its_tokenizer() {
    let own = encoder("minilm", form(8, Pooling::Mean, false));
    // How texts are read is part of an adapter's configuration.
    let class = encoder("minilm", form(6, Pooling::Class, true));
    assert_eq!(own.fingerprint().unwrap(), class.fingerprint().unwrap());
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(folder("minilm").join(name), dir.path().join(name)).unwrap();
    }
    let copy = || {
        TextEncoder::open(dir.path(), own.form())
            .unwrap()
            .fingerprint()
            .unwrap()
    };
    assert_eq!(copy(), own.fingerprint().unwrap());
    let tokenizer = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    let swapped = text
        .replace("\"ba\"", "\"?\"")
        .replace("\"be\"", "\"ba\"")
        .replace("\"?\"", "\"be\"");
    assert_ne!(text, swapped);
    std::fs::write(&tokenizer, swapped).unwrap();
    assert_ne!(copy(), own.fingerprint().unwrap());
    let other = encoder("bert", form(8, Pooling::Mean, false));
    assert_ne!(other.fingerprint().unwrap(), own.fingerprint().unwrap());
}
