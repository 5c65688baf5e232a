//! Few examples of each class, drawn by a seed.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// How many examples of each class to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shots {
    /// For training.
    pub train: usize,
    /// For validation, none of them also for training.
    pub validation: usize,
}

/// Black-box tuning's 16 and 16.
impl Default for Shots {
    fn default() -> Self {
        Shots {
            train: 16,
            validation: 16,
        }
    }
}

/// Which examples were drawn, as positions in the data; disjoint, class by class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// For training.
    pub train: Vec<usize>,
    /// For validation.
    pub validation: Vec<usize>,
}

impl Shots {
    /// Draws from examples with these `labels`, numbers of `names`. What is drawn of a class depends on the seed and on
    /// where its own examples stand alone.
    ///
    /// # Errors
    /// If no shots are wanted for training, or a class has too few examples.
    pub fn draw(self, labels: &[usize], names: &[String], seed: u64) -> Result<Drawn> {
        if self.train == 0 {
            return Err(Error::Settings(
                "no shots for training: take one a class at least".into(),
            ));
        }
        let mut drawn = Drawn {
            train: Vec::new(),
            validation: Vec::new(),
        };
        for (class, name) in names.iter().enumerate() {
            let mut own: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == class).collect();
            let wanted = self.train.checked_add(self.validation);
            if wanted.is_none_or(|wanted| wanted > own.len()) {
                return Err(Error::Shots {
                    label: name.clone(),
                    found: own.len(),
                    train: self.train,
                    validation: self.validation,
                });
            }
            shuffle(&mut own, seed, class as u64);
            drawn.train.extend_from_slice(&own[..self.train]);
            drawn
                .validation
                .extend_from_slice(&own[self.train..][..self.validation]);
        }
        Ok(drawn)
    }
}

/// At most `limit` of `count` examples, drawn by a seed, in their order: to test on a part of a large file.
pub fn subset(count: usize, limit: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..count).collect();
    if limit < count {
        shuffle(&mut all, seed, u64::MAX);
        all.truncate(limit);
        all.sort_unstable();
    }
    all
}

fn shuffle(positions: &mut [usize], seed: u64, stream: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    positions.shuffle(&mut random);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names() -> Vec<String> {
        ["a", "b", "c"].map(String::from).to_vec()
    }

    #[test]
    fn each_class_has_its_shots_and_none_twice() {
        let labels: Vec<usize> = (0..200).map(|i| i * i % 3).collect();
        let shots = Shots {
            train: 5,
            validation: 7,
        };
        // Squares are 0 or 1 modulo 3.
        let drawn = shots.draw(&labels, &names()[..2], 3).unwrap();
        assert_eq!((drawn.train.len(), drawn.validation.len()), (10, 14));
        for class in 0..2 {
            let count = |of: &[usize]| of.iter().filter(|&&i| labels[i] == class).count();
            assert_eq!((count(&drawn.train), count(&drawn.validation)), (5, 7));
        }
        let all: BTreeSet<usize> = drawn.train.iter().chain(&drawn.validation).copied().collect();
        assert_eq!(all.len(), 24);
        assert_eq!(shots.draw(&labels, &names()[..2], 3).unwrap(), drawn);
        assert_ne!(shots.draw(&labels, &names()[..2], 4).unwrap(), drawn);
    }

    #[test]
    fn a_class_with_too_few_is_named() {
        let error = |labels: &[usize], train, validation| {
            let shots = Shots { train, validation };
            shots.draw(labels, &names(), 0).unwrap_err().to_string()
        };
        let text = error(&[0, 0, 1, 2, 2], 1, 1);
        assert!(
            text.contains("\"b\" has 1 examples, 1 for training and 1"),
            "{text}"
        );
        assert!(error(&[0, 1], 1, 0).contains("\"c\" has 0"));
        assert!(error(&[0, 1, 2], usize::MAX, 1).contains("\"a\""));
        assert!(error(&[0, 1, 2], 0, 1).contains("no shots"));
    }

    #[test]
    fn a_subset_is_sorted_and_no_larger_than_asked() {
        assert_eq!(subset(4, 9, 0), [0, 1, 2, 3]);
        let some = subset(1000, 50, 1);
        assert!(some.len() == 50 && some.is_sorted() && some[49] < 1000);
        assert_ne!(some, subset(1000, 50, 2));
    }
}
