//! From texts to word numbers: the tokenizer that lies beside a checkpoint.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BPE;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::{BertNormalizer, unicode::NFC};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::{Error, Gguf, Result, files};

/// The library's own format.
const JSON: &str = "tokenizer.json";
/// WordPiece's list of words.
const VOCABULARY: &str = "vocab.txt";
/// Settings beside either.
const CONFIG: &str = "tokenizer_config.json";
/// All that may belong to a tokenizer.
pub(crate) const FILES: [&str; 3] = [JSON, CONFIG, VOCABULARY];
/// Largest file, bytes.
pub(crate) const MAX_FILE: u64 = 1 << 26;

/// Words with a meaning of their own, where the tokenizer has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Special {
    /// The word to be predicted.
    pub mask: Option<u32>,
    /// Begins a text for an encoder; RoBERTa's `<s>`.
    pub cls: Option<u32>,
    /// Ends or separates texts for an encoder; RoBERTa's `</s>`.
    pub sep: Option<u32>,
    /// Begins a text for a causal model.
    pub bos: Option<u32>,
    /// Ends a text for a causal model.
    pub eos: Option<u32>,
    /// Fills a row up.
    pub pad: Option<u32>,
    /// Stands for what is not in the vocabulary.
    pub unknown: Option<u32>,
}

/// A tokenizer, with the name of its file for errors.
pub struct Tokenizer {
    file: String,
    inner: tokenizers::Tokenizer,
    special: Special,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Tokenizer({})", self.file)
    }
}

/// What is read of `tokenizer_config.json`. Special words are texts, or objects with a text in `content`.
#[derive(Default, Deserialize)]
struct Config {
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
    mask_token: Option<Word>,
    cls_token: Option<Word>,
    sep_token: Option<Word>,
    bos_token: Option<Word>,
    eos_token: Option<Word>,
    pad_token: Option<Word>,
    unk_token: Option<Word>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Word {
    Text(String),
    Object { content: String },
}

impl Word {
    fn text(&self) -> &str {
        match self {
            Word::Text(text) | Word::Object { content: text } => text,
        }
    }
}

impl Tokenizer {
    /// Of the checkpoint in the folder `dir`: `tokenizer.json` or, without one, `vocab.txt` as WordPiece;
    /// `tokenizer_config.json` may add to either.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = dir.join(CONFIG);
        let config: Config = match config.exists() {
            true => files::read_json(&config)?,
            false => Config::default(),
        };
        let (json, vocabulary) = (dir.join(JSON), dir.join(VOCABULARY));
        if json.exists() {
            let file = json.to_string_lossy().into_owned();
            let bytes = files::read(&json, MAX_FILE)?;
            let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::corrupt(&file, e))?;
            return Ok(Self::new(file, inner, &config));
        }
        if vocabulary.exists() {
            let file = vocabulary.to_string_lossy().into_owned();
            let bytes = files::read(&vocabulary, MAX_FILE)?;
            return Self::word_piece(file, bytes, &config);
        }
        Err(Error::corrupt(
            dir.to_string_lossy(),
            format!("neither {JSON} nor {VOCABULARY} is there"),
        ))
    }

    /// From the content of a `tokenizer.json`, embedded for instance; `file` is its name in errors.
    pub fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::corrupt(file, e))?;
        Ok(Self::new(file.to_owned(), inner, &Config::default()))
    }

    /// Of a GGUF file: byte-level BPE.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let file = gguf.file().to_owned();
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let detail = format!("a tokenizer {model} is not supported; gpt2 (byte-level BPE) is");
            return Err(Error::corrupt(file, detail));
        }
        let bad = |e: Box<dyn std::error::Error + Send + Sync>| Error::corrupt(gguf.file(), e);
        let words = gguf.texts("tokenizer.ggml.tokens")?;
        let merges = gguf.texts("tokenizer.ggml.merges")?.iter().map(|merge| {
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| Error::corrupt(gguf.file(), format!("{merge:?} merges nothing")))?;
            Ok((left.to_owned(), right.to_owned()))
        });
        let vocabulary: Vec<(String, u32)> = words.iter().cloned().zip(0..).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(
                vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(),
                merges.collect::<Result<Vec<_>>>()?,
            )
            .build()
            .map_err(bad)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let splits = gguf.text("tokenizer.ggml.pre").unwrap_or("gpt-2");
        let bytes = |regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, regex));
        let by = |pattern: &str| -> Result<PreTokenizerWrapper> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(bad)?;
            Ok(Sequence::new(vec![split.into(), bytes(false)]).into())
        };
        let pre = match splits {
            "gpt-2" | "gpt2" | "default" => bytes(true),
            "smollm" => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            "llama-bpe" | "llama3" | "llama-v3" => by(LLAMA3)?,
            "qwen2" => {
                inner.with_normalizer(Some(NFC)).map_err(bad)?;
                by(QWEN2)?
            }
            other => {
                let detail = format!(
                    "words split as by {other} are not supported; gpt-2, smollm, llama-bpe and qwen2 are"
                );
                return Err(Error::corrupt(file, detail));
            }
        };
        inner.with_pre_tokenizer(Some(pre));
        inner.with_decoder(Some(ByteLevel::default()));
        // Types of words other than normal (1) and single bytes (6).
        if let Ok(types) = gguf.numbers("tokenizer.ggml.token_type") {
            let special = words
                .iter()
                .zip(types)
                .filter(|(_, kind)| (2.0..=5.0).contains(*kind));
            let special = special.map(|(word, _)| AddedToken::from(word.clone(), true));
            inner
                .add_special_tokens(special.collect::<Vec<_>>())
                .map_err(bad)?;
        }
        let id = |name: &str| {
            let id = gguf.size(&format!("tokenizer.ggml.{name}_token_id")).ok()?;
            u32::try_from(id).ok().filter(|_| id < words.len())
        };
        let special = Special {
            mask: id("mask"),
            cls: id("cls"),
            sep: id("seperator").or(id("sep")),
            bos: id("bos"),
            eos: id("eos"),
            pad: id("padding"),
            unknown: id("unknown"),
        };
        Ok(Tokenizer { file, inner, special })
    }

    fn word_piece(file: String, bytes: Vec<u8>, config: &Config) -> Result<Self> {
        let text = String::from_utf8(bytes).map_err(|e| Error::corrupt(&file, e))?;
        let vocabulary = text
            .lines()
            .map(|line| line.trim_end_matches('\r').to_owned())
            .zip(0u32..);
        let unknown = config.unk_token.as_ref().map_or("[UNK]", Word::text);
        let model = WordPiece::builder()
            .vocab(vocabulary.collect::<tokenizers::models::bpe::Vocab>())
            .unk_token(unknown.to_owned())
            .build()
            .map_err(|e| Error::corrupt(&file, e))?;
        let mut inner = tokenizers::Tokenizer::new(model);
        if inner.token_to_id(unknown).is_none() {
            return Err(Error::corrupt(file, format!("no word {unknown}")));
        }
        let lower = config.do_lower_case.unwrap_or(true);
        inner
            .with_normalizer(Some(BertNormalizer::new(
                true,
                config.tokenize_chinese_chars.unwrap_or(true),
                config.strip_accents,
                lower,
            )))
            .map_err(|e| Error::corrupt(&file, e))?;
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        inner.with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            .into_iter()
            .filter(|word| inner.token_to_id(word).is_some())
            .map(|word| AddedToken::from(word, true))
            .collect::<Vec<_>>();
        inner
            .add_special_tokens(special)
            .map_err(|e| Error::corrupt(&file, e))?;
        Ok(Self::new(file, inner, config))
    }

    /// Special words are those of the configuration or, where it has none, the usual ones.
    fn new(file: String, mut inner: tokenizers::Tokenizer, config: &Config) -> Self {
        // Rows are cut and filled by who makes them.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let find = |word: &Option<Word>, usual: &[&str]| match word {
            Some(word) => inner.token_to_id(word.text()),
            None => usual.iter().find_map(|word| inner.token_to_id(word)),
        };
        let special = Special {
            mask: find(&config.mask_token, &["[MASK]", "<mask>"]),
            cls: find(&config.cls_token, &["[CLS]", "<s>"]),
            sep: find(&config.sep_token, &["[SEP]", "</s>"]),
            bos: find(&config.bos_token, &["<s>", "<|im_start|>", "<|endoftext|>"]),
            eos: find(&config.eos_token, &["</s>", "<|im_end|>", "<|endoftext|>"]),
            pad: find(&config.pad_token, &["[PAD]", "<pad>", "<|endoftext|>"]),
            unknown: find(&config.unk_token, &["[UNK]", "<unk>"]),
        };
        Tokenizer { file, inner, special }
    }

    /// As a `tokenizer.json`, for who has only that.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        let text = self
            .inner
            .to_string(false)
            .map_err(|e| Error::corrupt(&self.file, e))?;
        serde_json::from_str(&text).map_err(|e| Error::corrupt(&self.file, e))
    }

    /// The same with these special words, which a `tokenizer.json` does not tell.
    pub fn with_special(mut self, special: Special) -> Self {
        self.special = special;
        self
    }

    /// The numbers of a text's words; special words are known by their text, and none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.inner.encode_fast(text, false);
        Ok(encoded
            .map_err(|e| Error::corrupt(&self.file, e))?
            .get_ids()
            .to_vec())
    }

    /// The text of words; special ones are left out.
    pub fn decode(&self, words: &[u32]) -> Result<String> {
        self.inner
            .decode(words, true)
            .map_err(|e| Error::corrupt(&self.file, e))
    }

    /// The number of a word as the vocabulary spells it.
    pub fn id(&self, word: &str) -> Option<u32> {
        self.inner.token_to_id(word)
    }

    /// The vocabulary's spelling of a word.
    pub fn word(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of words, special ones included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Words with a meaning of their own.
    pub fn special(&self) -> Special {
        self.special
    }

    /// A hash that tells one tokenizer from another, whatever file it came from: of its words, and of how it splits a sample.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        for id in 0..self.len() as u32 {
            hash.update(format!("{id} {}\n", self.word(id).unwrap_or_default()));
        }
        hash.update(format!("{:?} {:?}", self.special, self.encode(SAMPLE)?));
        Ok(hash.finalize().into())
    }
}

/// Letters, accents, cases, marks, numbers and scripts that tokenizers treat differently.
const SAMPLE: &str =
    "The FILM wasn't bad: it's 1,234.5 % Übung, naïve café!? 한국어 漢字 Привет  e-mail_a@b.c \t#x";

/// Where Llama 3 splits a text: contractions, words, up to three digits, marks, line ends, spaces.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2: as Llama 3, but each digit is alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::Writer;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const WORDS: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##aff\n##able\nwas\n.\nÉté\nete\n";

    #[test]
    fn a_list_of_words_is_word_piece() {
        let dir = folder(&[("vocab.txt", WORDS)]);
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        let ids = |text: &str| tokenizer.encode(text).unwrap();
        assert_eq!(ids("Unaffable was [MASK]."), [5, 6, 7, 8, 4, 9]);
        assert_eq!(ids("Été [CLS] xyz"), [11, 2, 1]);
        assert_eq!(tokenizer.decode(&[2, 5, 6, 7, 8]).unwrap(), "unaffable was");
        let special = tokenizer.special();
        assert_eq!(
            (special.mask, special.cls, special.sep, special.pad),
            (Some(4), Some(2), Some(3), Some(0))
        );
        assert_eq!(
            (
                tokenizer.id("##able"),
                tokenizer.word(8).as_deref(),
                tokenizer.len()
            ),
            (Some(7), Some("was"), 12)
        );

        assert_eq!(
            tokenizer.fingerprint().unwrap(),
            Tokenizer::from_json("t", &serde_json::to_vec(&tokenizer.to_json().unwrap()).unwrap())
                .unwrap()
                .fingerprint()
                .unwrap()
        );

        let settings = r#"{"do_lower_case": false, "mask_token": {"content": "."}}"#;
        let dir = folder(&[("vocab.txt", WORDS), ("tokenizer_config.json", settings)]);
        let cased = Tokenizer::open(dir.path()).unwrap();
        assert_eq!(cased.encode("Été").unwrap(), [10]);
        assert_eq!(cased.special().mask, Some(9));
        assert_ne!(cased.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
    }

    #[test]
    fn errors_name_the_file() {
        for (files, word) in [
            (&[][..], "tokenizer.json"),
            (&[("tokenizer.json", "{}")], "tokenizer.json"),
            (&[("vocab.txt", "a\nb\n")], "[UNK]"),
        ] {
            let error = Tokenizer::open(folder(files).path()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    /// Two letters, a pair of them, space and letter, digits.
    fn bpe() -> Writer {
        Writer::new(0, 6)
            .text("tokenizer.ggml.model", "gpt2")
            .texts(
                "tokenizer.ggml.tokens",
                &["<|end|>", "a", "b", "ab", "Ġ", "Ġab", "1", "2", "12"],
            )
            .texts("tokenizer.ggml.merges", &["a b", "Ġ ab", "1 2"])
            .numbers("tokenizer.ggml.token_type", &[3, 1, 1, 1, 1, 1, 1, 1, 1])
            .number("tokenizer.ggml.eos_token_id", 0)
    }

    #[test]
    fn a_gguf_file_has_a_tokenizer() {
        for (splits, digits) in [("gpt-2", &[8][..]), ("smollm", &[6, 7]), ("llama-bpe", &[8])] {
            let gguf = bpe().text("tokenizer.ggml.pre", splits).open().unwrap();
            let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
            let ids = tokenizer.encode("ab ab12<|end|>").unwrap();
            assert_eq!(ids, [&[3, 5], digits, &[0]].concat(), "{splits}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), "ab ab12");
            let special = tokenizer.special();
            assert_eq!((special.eos, special.bos), (Some(0), None));
        }
        for (name, word) in [("pre", "other"), ("model", "llama")] {
            let gguf = bpe()
                .text(&format!("tokenizer.ggml.{name}"), word)
                .open()
                .unwrap();
            let error = Tokenizer::from_gguf(&gguf).unwrap_err().to_string();
            assert!(error.contains("m.gguf") && error.contains(word), "{error}");
        }
    }
}
