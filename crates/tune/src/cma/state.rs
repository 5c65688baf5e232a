//! What the strategy knows: stored to the bit, and distrusted when it is read.

use serde::{Deserialize, Serialize};

use super::{Cma, MAX_DIMENSION, MAX_POPULATION, Parameters, SIGMA};

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct State {
    pub population: usize,
    pub seed: u64,
    pub generation: u64,
    /// The generation that axes and lengths are of.
    pub decomposed: u64,
    #[serde(with = "bits::scalar")]
    pub sigma: f64,
    #[serde(with = "bits")]
    pub mean: Vec<f64>,
    #[serde(with = "bits")]
    pub sigma_path: Vec<f64>,
    #[serde(with = "bits")]
    pub path: Vec<f64>,
    /// The lower triangle, row by row.
    #[serde(with = "bits")]
    pub covariance: Vec<f64>,
    /// The covariance's eigenvectors, one after the other.
    #[serde(with = "bits")]
    pub axes: Vec<f64>,
    /// Roots of its eigenvalues.
    #[serde(with = "bits")]
    pub lengths: Vec<f64>,
}

impl State {
    pub fn new(n: usize, population: usize, sigma: f64, seed: u64) -> Self {
        let triangle = (0..n).flat_map(|i| (0..=i).map(move |j| f64::from(u8::from(i == j))));
        let square = (0..n * n).map(|at| f64::from(u8::from(at % (n + 1) == 0)));
        State {
            population,
            seed,
            generation: 0,
            decomposed: 0,
            sigma,
            mean: vec![0.0; n],
            sigma_path: vec![0.0; n],
            path: vec![0.0; n],
            covariance: triangle.collect(),
            axes: square.collect(),
            lengths: vec![1.0; n],
        }
    }
}

impl TryFrom<State> for Cma {
    type Error = &'static str;

    fn try_from(state: State) -> Result<Self, Self::Error> {
        let n = state.mean.len();
        if !(2..=MAX_DIMENSION).contains(&n) || !(4..=MAX_POPULATION).contains(&state.population) {
            return Err("the optimiser's sizes are out of bounds");
        }
        let sizes = [
            (&state.sigma_path, n),
            (&state.path, n),
            (&state.covariance, n * (n + 1) / 2),
            (&state.axes, n * n),
            (&state.lengths, n),
        ];
        if sizes.iter().any(|(v, size)| v.len() != *size) || state.decomposed > state.generation {
            return Err("the optimiser's parts do not fit together");
        }
        let finite = sizes.iter().all(|(v, _)| v.iter().all(|x| x.is_finite()));
        let positive = (SIGMA[0]..=SIGMA[1]).contains(&state.sigma) && state.lengths.iter().all(|l| *l > 0.0);
        if !finite || !positive || !state.mean.iter().all(|x| x.is_finite()) {
            return Err("the optimiser holds values that are not possible");
        }
        Ok(Cma {
            parameters: Parameters::new(n, state.population),
            state,
        })
    }
}

/// Doubles as the 16 hexadecimal digits of their bits: exact, and a third of the time and size of decimals.
pub(crate) mod bits {
    use std::fmt::Write;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(values: &[f64], out: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(16 * values.len());
        for value in values {
            write!(text, "{:016x}", value.to_bits()).expect("strings grow");
        }
        out.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        let digits = text.as_bytes();
        if !digits.len().is_multiple_of(16) || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(D::Error::custom("not the bits of doubles"));
        }
        let value = |hex: &[u8]| {
            let hex = std::str::from_utf8(hex).expect("checked above");
            f64::from_bits(u64::from_str_radix(hex, 16).expect("checked above"))
        };
        Ok(digits.chunks_exact(16).map(value).collect())
    }

    pub mod scalar {
        use super::{Deserializer, Error, Serializer};

        pub fn serialize<S: Serializer>(value: &f64, out: S) -> Result<S::Ok, S::Error> {
            super::serialize(&[*value], out)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
            match super::deserialize(from)?[..] {
                [value] => Ok(value),
                _ => Err(D::Error::custom("not the bits of one double")),
            }
        }
    }
}
