//! From the point that the optimiser moves to the prompt: `p = A z + p0`.

use std::fmt;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::{Error, Result};

/// Largest matrix: 16 GiB.
const MAX_ENTRIES: usize = 1 << 32;

/// A prompt, `[tokens, hidden]` row-major: what is added to, or stands before, a text's embeddings. The data owner's
/// secret, which its debug print does not show.
#[derive(Clone, PartialEq)]
pub struct Prompt(pub Vec<f32>);

impl Prompt {
    /// Tokens `[tokens, hidden]` that are spread as a model's embeddings are, `deviation`: what concatenated prompts start from
    /// where the words' own embeddings cannot be seen.
    pub fn random(tokens: usize, hidden: usize, deviation: f64, seed: u64) -> Prompt {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Other numbers than a projection's with the same seed.
        random.set_stream(u64::MAX);
        let normal = (0..tokens * hidden).map(|_| StandardNormal.sample(&mut random));
        Prompt(normal.map(|x: f64| (deviation * x) as f32).collect())
    }
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Prompt[{} values]", self.0.len())
    }
}

/// The fixed random projection of black-box tuning (Sun et al., ICML 2022): `A` has independent normal entries of
/// deviation `deviation / sqrt(dimension)`, so that a `z` with normal coordinates becomes a prompt that is spread as the
/// model's embeddings are. `A` follows from its seed, which is no secret.
pub struct Projection {
    tokens: usize,
    hidden: usize,
    dimension: usize,
    /// `[tokens * hidden, dimension]`.
    matrix: Vec<f32>,
    /// `p0`.
    start: Vec<f32>,
}

impl fmt::Debug for Projection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Projection")
            .field("tokens", &self.tokens)
            .field("hidden", &self.hidden)
            .field("dimension", &self.dimension)
            .finish_non_exhaustive()
    }
}

impl Projection {
    /// To prompts of `[tokens, hidden]`, from `dimension` coordinates. `deviation` is the standard deviation of the model's
    /// token embeddings. Holds the matrix in memory: 100 MB for 50 tokens of 1024 from 500 coordinates.
    ///
    /// # Errors
    /// If a size is zero, the matrix would be too large, or `deviation` is not positive and finite.
    pub fn new(tokens: usize, hidden: usize, dimension: usize, deviation: f64, seed: u64) -> Result<Self> {
        let entries = tokens.checked_mul(hidden).and_then(|n| n.checked_mul(dimension));
        let Some(entries) = entries.filter(|n| (1..=MAX_ENTRIES).contains(n)) else {
            let detail = format!("a prompt of {tokens} tokens of {hidden} from {dimension} coordinates");
            return Err(Error::Settings(format!(
                "{detail}: nothing, or more than memory holds"
            )));
        };
        if !(deviation.is_finite() && deviation > 0.0) {
            let detail = format!("embeddings with a standard deviation of {deviation}; it must be positive");
            return Err(Error::Settings(detail));
        }
        let scale = deviation / (dimension as f64).sqrt();
        let mut matrix = vec![0.0; entries];
        matrix
            .par_chunks_mut(dimension)
            .enumerate()
            .for_each(|(row, entries)| {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(row as u64);
                for entry in entries {
                    let normal: f64 = StandardNormal.sample(&mut random);
                    *entry = (scale * normal) as f32;
                }
            });
        Ok(Projection {
            tokens,
            hidden,
            dimension,
            matrix,
            start: vec![0.0; tokens * hidden],
        })
    }

    /// With the prompt `p0` that `z = 0` gives, `[tokens, hidden]`: a pretrained one, or embeddings of words where prompts
    /// are concatenated. Without, it is zero.
    ///
    /// # Errors
    /// If it has another size, or a value that is not finite.
    pub fn starting_at(mut self, start: Prompt) -> Result<Self> {
        if start.0.len() != self.start.len() || !start.0.iter().all(|x| x.is_finite()) {
            let (tokens, hidden) = (self.tokens, self.hidden);
            let detail = format!("the initial prompt must have {tokens} x {hidden} finite values");
            return Err(Error::Settings(detail));
        }
        self.start = start.0;
        Ok(self)
    }

    /// Tokens of a prompt.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Width of a token.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Coordinates of a point.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// The prompts of `points`, each of [`Projection::dimension`] coordinates: a whole generation in one pass over the
    /// matrix. The same bits whatever the number of threads.
    ///
    /// # Panics
    /// If a point has another number of coordinates.
    pub fn prompts(&self, points: &[Vec<f64>]) -> Vec<Prompt> {
        assert!(
            points.iter().all(|z| z.len() == self.dimension),
            "a point of another dimension"
        );
        if points.is_empty() {
            return Vec::new();
        }
        let single = |z: &Vec<f64>| z.iter().map(|&x| x as f32).collect();
        let points: Vec<Vec<f32>> = points.iter().map(single).collect();
        // `[row, point]`.
        let mut products = vec![0.0; self.start.len() * points.len()];
        let rows = self.matrix.par_chunks(self.dimension).zip(&self.start);
        let outputs = products.par_chunks_mut(points.len());
        outputs.zip(rows).for_each(|(outputs, (row, start))| {
            for (output, z) in outputs.iter_mut().zip(&points) {
                *output = start + dot(row, z);
            }
        });
        let column = |p| products.iter().skip(p).step_by(points.len()).copied().collect();
        (0..points.len()).map(|p| Prompt(column(p))).collect()
    }
}

/// In lanes that the compiler keeps in one register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(count: usize, dimension: usize) -> Vec<Vec<f64>> {
        let point = |p: usize| {
            (0..dimension)
                .map(|i| ((7 * p + 3 * i) % 11) as f64 - 5.0)
                .collect()
        };
        (0..count).map(point).collect()
    }

    #[test]
    fn entries_have_the_deviation_asked_for_and_rows_differ() {
        let projection = Projection::new(8, 32, 500, 0.3, 7).unwrap();
        let count = projection.matrix.len() as f64;
        let mean = projection.matrix.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let square = projection
            .matrix
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>()
            / count;
        let want = 0.3 / 500f64.sqrt();
        assert!((square.sqrt() / want - 1.0).abs() < 0.01, "{square}");
        assert!(mean.abs() < 0.01 * want, "{mean}");
        let rows: Vec<&[f32]> = projection.matrix.chunks(500).collect();
        assert!((1..rows.len()).all(|i| rows[i] != rows[i - 1]));
        let other = Projection::new(8, 32, 500, 0.3, 8).unwrap();
        assert_ne!(other.matrix, projection.matrix);
        assert_eq!(
            Projection::new(8, 32, 500, 0.3, 7).unwrap().matrix,
            projection.matrix
        );
    }

    #[test]
    fn prompts_are_the_product_plus_the_start() {
        let start: Vec<f32> = (0..15).map(|i| i as f32).collect();
        let projection = Projection::new(3, 5, 37, 1.0, 1).unwrap();
        let projection = projection.starting_at(Prompt(start.clone())).unwrap();
        let points = points(4, 37);
        let prompts = projection.prompts(&points);
        for (z, prompt) in points.iter().zip(&prompts) {
            for (row, (&found, start)) in prompt.0.iter().zip(&start).enumerate() {
                let entries = &projection.matrix[row * 37..][..37];
                let product: f64 = entries.iter().zip(z).map(|(a, z)| f64::from(*a) * z).sum();
                assert!((f64::from(found) - product - f64::from(*start)).abs() < 1e-4);
            }
        }
        assert_eq!(
            projection.prompts(&points[2..3])[0],
            prompts[2],
            "a batch changes no bit"
        );
        assert_eq!(projection.prompts(&[vec![0.0; 37]])[0].0, start);
        assert!(projection.prompts(&[]).is_empty());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Projection::new(0, 5, 5, 1.0, 0).is_err());
        assert!(Projection::new(usize::MAX, 5, 5, 1.0, 0).is_err());
        assert!(Projection::new(1 << 20, 1 << 10, 500, 1.0, 0).is_err());
        assert!(Projection::new(5, 5, 5, f64::NAN, 0).is_err());
        let start = |values| {
            Projection::new(2, 2, 2, 1.0, 0)
                .unwrap()
                .starting_at(Prompt(values))
        };
        assert!(start(vec![0.0; 3]).is_err());
        assert!(start(vec![f32::NAN; 4]).is_err());
    }

    #[test]
    fn a_debug_print_does_not_show_a_prompt() {
        assert_eq!(format!("{:?}", Prompt(vec![0.5; 3])), "Prompt[3 values]");
    }
}
