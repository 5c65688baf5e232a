//! Public random projections: the same at every role, from a seed.

use sha2::{Digest, Sha256};

/// `[groups, width, features]` for layer `layer`: columns of orthogonal blocks whose lengths are those of normal vectors, which
/// estimates the kernel with less variance than independent ones (Yu et al., NIPS 2016), times sqrt(temperature / width).
pub(crate) fn projections(
    seed: u64,
    layer: usize,
    temperature: &[f64],
    width: usize,
    features: usize,
) -> Vec<f32> {
    let mut out = vec![0.0; temperature.len() * width * features];
    for (group, temperature) in temperature.iter().enumerate() {
        let mut normal = Normal::new(seed, layer, group);
        let scale = (temperature / width as f64).sqrt();
        let mut block: Vec<Vec<f64>> = Vec::new();
        for feature in 0..features {
            if feature % width == 0 {
                block.clear();
            }
            let length = norm(&normal.vector(width));
            let direction = direction(&mut normal, &block, width);
            for (i, v) in direction.iter().enumerate() {
                out[(group * width + i) * features + feature] = (scale * length * v) as f32;
            }
            block.push(direction);
        }
    }
    out
}

/// A random unit vector orthogonal to `others`, which are fewer than its entries.
fn direction(normal: &mut Normal, others: &[Vec<f64>], width: usize) -> Vec<f64> {
    loop {
        let mut v = normal.vector(width);
        for other in others {
            let along: f64 = v.iter().zip(other).map(|(a, b)| a * b).sum();
            v.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
        }
        let length = norm(&v);
        // Else it is next to nothing but rounding errors.
        if length > 1e-6 {
            v.iter_mut().for_each(|a| *a /= length);
            return v;
        }
    }
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|a| a * a).sum::<f64>().sqrt()
}

/// Normal numbers from a hash in counter mode.
struct Normal {
    key: String,
    counter: u64,
}

impl Normal {
    fn new(seed: u64, layer: usize, group: usize) -> Self {
        Normal {
            key: format!("veiltune random features {seed} {layer} {group}"),
            counter: 0,
        }
    }

    fn vector(&mut self, width: usize) -> Vec<f64> {
        (0..width).map(|_| self.next()).collect()
    }

    /// By the method of Box and Muller. Libraries may differ in the last bit of a logarithm or cosine; what the programs use are
    /// 16 fractional bits.
    fn next(&mut self) -> f64 {
        let mut hash = Sha256::new();
        hash.update(self.key.as_bytes());
        hash.update(self.counter.to_le_bytes());
        self.counter += 1;
        let bytes = hash.finalize();
        let uniform = |from: usize| {
            let word = u64::from_le_bytes(std::array::from_fn(|i| bytes[from + i]));
            ((word >> 12) as f64 + 0.5) / (1u64 << 52) as f64
        };
        (-2.0 * uniform(0).ln()).sqrt() * (std::f64::consts::TAU * uniform(8)).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_estimate_the_kernel() {
        let (width, features, temperature) = (16, 512, 1.5);
        let w = projections(7, 0, &[temperature; 2], width, features);
        assert_eq!(w, projections(7, 0, &[temperature; 2], width, features));
        assert_ne!(w, projections(8, 0, &[temperature; 2], width, features));
        // Rows of root mean square 1, as they enter.
        let mut normal = Normal::new(1, 0, 0);
        for group in 0..2 {
            let mut row = || {
                let v = normal.vector(width);
                let scale = (width as f64).sqrt() / norm(&v);
                v.into_iter().map(|a| a * scale).collect::<Vec<f64>>()
            };
            let (x, y) = (row(), row());
            let project = |v: &[f64], f: usize| -> f64 {
                (0..width)
                    .map(|i| v[i] * f64::from(w[(group * width + i) * features + f]))
                    .sum()
            };
            let estimate = (0..features)
                .map(|f| (project(&x, f) - project(&y, f)).cos())
                .sum::<f64>()
                / features as f64;
            let cosine = x.iter().zip(&y).map(|(a, b)| a * b).sum::<f64>() / width as f64;
            let exact = (temperature * (cosine - 1.0)).exp();
            assert!((estimate - exact).abs() < 0.05, "{estimate} {exact}");
        }
    }
}
