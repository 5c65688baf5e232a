//! Texts as rows of equal length in which prompt and answer stand at the same positions: so positions are public, and say
//! nothing of how long a text is. What is added in between is masked, and only the data owner knows where.

use veiltune_tune::{Encoder, Example, Labels, Sequence, Tokenize};

use crate::{Error, Result};

/// Rows of one length. Holds texts and labels, and so has no `Debug`.
pub struct Rows {
    /// Tokens of a row.
    pub tokens: usize,
    /// Position at which every row is answered.
    pub answer: usize,
    /// First position of every row's prompt.
    pub start: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// `[rows, tokens]`.
    pub ids: Vec<u32>,
    /// 1 where there is a token, 0 where there is padding, `[rows, tokens]`.
    pub keep: Vec<f32>,
    /// Of each row.
    pub labels: Vec<usize>,
    /// Rows of which something was cut to fit.
    pub cut: usize,
}

impl Rows {
    /// Lays out `examples` in rows of the longest, rounded up to a multiple of `bucket` within `limit`. Padding that brings prompts to one
    /// position goes behind the token that begins a text, what brings answers there behind the prompt, the rest to the end.
    pub fn new<T: Tokenize + ?Sized>(
        encoder: &Encoder<T>,
        examples: &[&Example],
        padding: u32,
        bucket: usize,
        limit: usize,
    ) -> Result<Rows> {
        let encode = |most: [usize; 2]| {
            let one = |e: &&Example| encoder.sequence_within(e, most).map_err(tune);
            examples.iter().map(one).collect::<Result<Vec<Sequence>>>()
        };
        let mut sequences = encode([usize::MAX; 2])?;
        let Some(first) = sequences.first() else {
            return Err(Error::Input("there are no texts".into()));
        };
        if sequences.iter().any(|s| s.answer < s.prompt.end) {
            return Err(Error::Input(
                "the template has its answer before its prompt: put {prompt} first".into(),
            ));
        }
        let prompt = first.prompt.len();
        let mut places = Places::of(&sequences);
        if places.needed > limit {
            // One pair has a long first text, another a long second one: each text gets what all have room for.
            let longest = |which: usize| sequences.iter().map(|s| s.texts[which]).max().unwrap_or(0);
            sequences = encode(encoder.common([longest(0), longest(1)]).map_err(tune)?)?;
            places = Places::of(&sequences);
        }
        let Places {
            start,
            answer,
            needed,
        } = places;
        let tokens = needed.next_multiple_of(bucket.max(1)).min(limit).max(needed);
        let mut rows = Rows {
            tokens,
            answer,
            start,
            prompt,
            ids: Vec::with_capacity(tokens * sequences.len()),
            keep: Vec::with_capacity(tokens * sequences.len()),
            labels: examples.iter().map(|e| e.label).collect(),
            cut: sequences.iter().filter(|s| s.cut > 0).count(),
        };
        for s in &sequences {
            let begin = s.prompt.start.min(1);
            let before = start - s.prompt.start;
            let between = answer - (s.answer + before);
            let mut put = |tokens: &[u32], keep: f32| {
                rows.ids.extend_from_slice(tokens);
                rows.keep.extend(std::iter::repeat_n(keep, tokens.len()));
            };
            put(&s.tokens[..begin], 1.0);
            put(&vec![padding; before], 0.0);
            put(&s.tokens[begin..s.prompt.end], 1.0);
            put(&vec![padding; between], 0.0);
            put(&s.tokens[s.prompt.end..], 1.0);
            let rest = tokens - before - between - s.tokens.len();
            put(&vec![padding; rest], 0.0);
        }
        Ok(rows)
    }

    /// The same rows, at most so many at a time.
    pub fn batches(&self, most: usize) -> impl Iterator<Item = Rows> {
        let width = self.tokens;
        let ids = self.ids.chunks(most * width).zip(self.keep.chunks(most * width));
        ids.zip(self.labels.chunks(most))
            .map(|((ids, keep), labels)| Rows {
                ids: ids.to_vec(),
                keep: keep.to_vec(),
                labels: labels.to_vec(),
                ..*self
            })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The labels of the first `train` rows and of the rest.
    pub fn split(&self, train: usize, classes: usize) -> Labels {
        let (train, validation) = self.labels.split_at(train.min(self.labels.len()));
        Labels {
            classes,
            train: train.to_vec(),
            validation: validation.to_vec(),
        }
    }
}

/// Where prompts and answers stand when they are brought to one position in every row.
struct Places {
    start: usize,
    answer: usize,
    /// Tokens of a row.
    needed: usize,
}

impl Places {
    fn of(sequences: &[Sequence]) -> Places {
        let most = |of: &dyn Fn(&Sequence) -> usize| sequences.iter().map(of).max().unwrap_or(0);
        let start = most(&|s| s.prompt.start);
        let answer = start + most(&|s| s.answer - s.prompt.start);
        Places {
            start,
            answer,
            needed: answer + most(&|s| s.tokens.len() - s.answer),
        }
    }
}

/// An error of the data owner's own part.
pub fn tune(e: veiltune_tune::Error) -> Error {
    match e {
        // What the evaluation itself said.
        veiltune_tune::Error::Evaluation(cause) => match cause.downcast::<Error>() {
            Ok(e) => *e,
            Err(e) => Error::Input(e.to_string()),
        },
        e => Error::Input(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use veiltune_tune::{Cause, Family, Slot, Specials, Task};

    struct Letters;

    impl Tokenize for Letters {
        fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, Cause> {
            Ok(text.bytes().filter(|b| *b != b' ').map(u32::from).collect())
        }

        fn specials(&self) -> Specials {
            Specials {
                cls: Some(1),
                sep: Some(2),
                mask: Some(3),
                bos: Some(4),
                pad: Some(0),
                unknown: None,
            }
        }
    }

    fn example(text: &str, label: usize) -> Example {
        Example {
            text_a: text.into(),
            text_b: None,
            label,
        }
    }

    #[test]
    fn positions_are_the_same_in_every_row_and_padding_is_masked() {
        let file = br#"{"name": "t", "masked": "{prompt} . {text} ? {mask} .", "causal": "{text} . {prompt} = {mask}",
            "verbalizer": {"a": "x", "b": "y"}}"#;
        let task = Task::parse("t", file).unwrap();
        let examples = [example("abc", 0), example("abcdefgh", 1), example("q", 0)];
        let examples: Vec<&Example> = examples.iter().collect();
        for family in [Family::Masked, Family::Causal] {
            let encoder = Encoder::new(&Letters, &task, family, Slot::Add(vec![9, 8]), 40).unwrap();
            let rows = Rows::new(&encoder, &examples, 0, 4, 40).unwrap();
            assert_eq!((rows.len(), rows.tokens % 4), (3, 0));
            for (i, example) in examples.iter().enumerate() {
                let ids = &rows.ids[i * rows.tokens..][..rows.tokens];
                let keep = &rows.keep[i * rows.tokens..][..rows.tokens];
                assert_eq!(&ids[rows.start..rows.start + 2], [9, 8]);
                assert_eq!(
                    ids[rows.answer],
                    if family == Family::Masked {
                        3
                    } else {
                        u32::from(b'=')
                    }
                );
                // What is kept is the sequence itself.
                let kept: Vec<u32> = ids
                    .iter()
                    .zip(keep)
                    .filter(|(_, k)| **k == 1.0)
                    .map(|(t, _)| *t)
                    .collect();
                assert_eq!(kept, encoder.sequence(example).unwrap().tokens);
            }
        }
    }

    #[test]
    fn pairs_of_which_each_fits_fit_together() {
        let file = br#"{"name": "t", "masked": "{prompt} {text_a} ? {mask} , {text_b}", "verbalizer": {"a": "x", "b": "y"}}"#;
        let task = Task::parse("t", file).unwrap();
        let pair = |a: &str, b: &str| Example {
            text_b: Some(b.into()),
            ..example(a, 0)
        };
        let examples = [pair("abcdefghijkl", "m"), pair("a", "mnopqrstuv")];
        let examples: Vec<&Example> = examples.iter().collect();
        for (limit, cut) in [(30, 0), (20, 2)] {
            let encoder =
                Encoder::new(&Letters, &task, Family::Masked, Slot::Add(vec![9, 8]), limit).unwrap();
            assert!(examples.iter().all(|e| encoder.sequence(e).unwrap().cut == 0));
            let rows = Rows::new(&encoder, &examples, 0, 4, limit).unwrap();
            assert!(rows.tokens <= limit, "{} of {limit}", rows.tokens);
            assert_eq!(rows.cut, cut);
            assert!((0..2).all(|i| rows.ids[i * rows.tokens + rows.answer] == 3));
        }
    }
}
