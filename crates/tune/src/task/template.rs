//! Templates: text with places for the prompt, the example and the answer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a model reads and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Sees the whole text; the answer stands at a mask.
    Masked,
    /// Sees what came before; the answer is the next word.
    Causal,
}

impl Family {
    /// As in a task file.
    pub fn name(self) -> &'static str {
        match self {
            Family::Masked => "masked",
            Family::Causal => "causal",
        }
    }
}

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Words that stand for themselves.
    Words(String),
    /// The example's text, or the first of a pair.
    TextA,
    /// The second text of a pair.
    TextB,
    /// The tuned prompt.
    Prompt,
    /// Where the answer is read.
    Mask,
}

/// A parsed template: exactly one prompt, one mask, and one text or two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

impl Template {
    /// Parses a template for models of `family`; errors say what to do.
    pub fn parse(text: &str, family: Family) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((words, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').ok_or("a brace is not closed")?;
            let piece = match name {
                "text" | "text_a" => Piece::TextA,
                "text_b" => Piece::TextB,
                "prompt" => Piece::Prompt,
                "mask" => Piece::Mask,
                _ => {
                    return Err(format!(
                        "{{{name}}} is none of {{prompt}}, {{text}}, {{text_a}}, {{text_b}} and {{mask}}"
                    ));
                }
            };
            pieces.extend((!words.is_empty()).then(|| Piece::Words(words.to_owned())));
            pieces.push(piece);
            rest = after;
        }
        if rest.contains('}') {
            return Err("a brace is not opened".into());
        }
        pieces.extend((!rest.is_empty()).then(|| Piece::Words(rest.to_owned())));

        for (piece, name) in [
            (Piece::Mask, "{mask}"),
            (Piece::Prompt, "{prompt}"),
            (Piece::TextA, "{text}"),
        ] {
            match pieces.iter().filter(|p| **p == piece).count() {
                0 => return Err(format!("no {name}: add it once")),
                1 => {}
                _ => return Err(format!("{name} more than once")),
            }
        }
        if pieces.iter().filter(|p| **p == Piece::TextB).count() > 1 {
            return Err("{text_b} more than once".into());
        }
        if family == Family::Causal && pieces.last() != Some(&Piece::Mask) {
            return Err("a causal model answers at the end: {mask} must stand last".into());
        }
        Ok(Template {
            text: text.to_owned(),
            pieces,
        })
    }

    /// In their order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether it has two texts.
    pub fn pairs(&self) -> bool {
        self.pieces.contains(&Piece::TextB)
    }
}

/// As it was written.
impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}
