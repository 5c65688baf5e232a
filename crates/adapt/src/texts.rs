//! Labelled texts, as the words that an encoder reads.

use sha2::{Digest, Sha256};
use veiltune_nn::TextEncoder;
use veiltune_nn::text::Words;
use veiltune_tune::Example;

use crate::Result;

/// Labelled texts, as the words of one encoder. Secret of whoever trains, hence without a debug print.
pub struct Texts {
    words: Vec<Words>,
    labels: Vec<u32>,
    classes: Vec<String>,
}

impl Texts {
    /// Labels of `examples` are positions in `classes`.
    ///
    /// # Errors
    /// As [`TextEncoder::words`].
    pub fn new(encoder: &TextEncoder, examples: &[Example], classes: Vec<String>) -> Result<Self> {
        let words = examples
            .iter()
            .map(|e| Ok(encoder.words(&e.text_a, e.text_b.as_deref())?));
        Ok(Texts {
            words: words.collect::<Result<_>>()?,
            labels: examples.iter().map(|e| e.label as u32).collect(),
            classes,
        })
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Words of text `i`.
    pub fn words(&self, i: usize) -> &Words {
        &self.words[i]
    }

    /// The label of each.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Texts of which something was cut.
    pub fn cut(&self) -> usize {
        self.words.iter().filter(|w| w.cut > 0).count()
    }

    /// Distinguishes these texts from others.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for (words, label) in self.words.iter().zip(&self.labels) {
            hash.update(format!("{label} {} {:?}\n", words.first, words.ids));
        }
        hash.finalize().into()
    }
}
