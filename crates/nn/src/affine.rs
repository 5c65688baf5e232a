//! x W^T + b in double precision: what trained parameters are folded with.

use veiltune_hub::{Array, Tensors};

/// `W [rows, columns]` and `b [rows]`.
#[derive(Clone)]
pub(crate) struct Affine {
    pub columns: usize,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
}

impl Affine {
    /// From a parameter pair; without a bias it is zero.
    pub fn new(weight: &Array, bias: Option<&Array>) -> Self {
        let columns = weight.dims.last().copied().unwrap_or(1).max(1);
        let wide = |a: &Array| a.values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let weight = wide(weight);
        Affine {
            bias: bias.map_or_else(|| vec![0.0; weight.len() / columns], wide),
            columns,
            weight,
        }
    }

    /// A norm's gain and bias, applied before, become part of this map.
    pub fn after(mut self, gain: &Array, shift: &Array) -> Self {
        for (row, bias) in self.weight.chunks_mut(self.columns).zip(&mut self.bias) {
            *bias += row
                .iter()
                .zip(&shift.values)
                .map(|(w, &s)| w * f64::from(s))
                .sum::<f64>();
            row.iter_mut()
                .zip(&gain.values)
                .for_each(|(w, &g)| *w *= f64::from(g));
        }
        self
    }

    /// The result times `by`.
    pub fn scaled(mut self, by: f64) -> Self {
        self.weight
            .iter_mut()
            .chain(&mut self.bias)
            .for_each(|v| *v *= by);
        self
    }

    /// Entry i of the result times `by[i]`.
    pub fn scaled_each(mut self, by: &Array) -> Self {
        let rows = self.weight.chunks_mut(self.columns).zip(&mut self.bias);
        for ((row, bias), &by) in rows.zip(&by.values) {
            row.iter_mut().chain([bias]).for_each(|v| *v *= f64::from(by));
        }
        self
    }

    /// The input times `by` before.
    pub fn of_scaled(mut self, by: f64) -> Self {
        self.weight.iter_mut().for_each(|v| *v *= by);
        self
    }

    /// The result less its mean.
    pub fn centred(mut self) -> Self {
        let rows = self.bias.len() as f64;
        let mut mean = vec![0.0; self.columns];
        for row in self.weight.chunks(self.columns) {
            mean.iter_mut().zip(row).for_each(|(m, w)| *m += w / rows);
        }
        for row in self.weight.chunks_mut(self.columns) {
            row.iter_mut().zip(&mean).for_each(|(w, m)| *w -= m);
        }
        let mean = self.bias.iter().sum::<f64>() / rows;
        self.bias.iter_mut().for_each(|v| *v -= mean);
        self
    }

    /// W + factor * B A, with `a [rank, columns]` and `b [rows, rank]`.
    pub fn changed(mut self, a: &Array, b: &Array, factor: f64) -> Self {
        let rank = a.dims.first().copied().unwrap_or(1).max(1);
        for (row, b) in self.weight.chunks_mut(self.columns).zip(b.values.chunks(rank)) {
            for (a, &b) in a.values.chunks(self.columns).zip(b) {
                let b = factor * f64::from(b);
                row.iter_mut().zip(a).for_each(|(w, &a)| *w += b * f64::from(a));
            }
        }
        self
    }

    /// As `name.weight` and `name.bias`.
    pub fn store(self, out: &mut Tensors, name: &str) {
        let array = |dims, values: Vec<f64>| Array {
            dims,
            values: values.into_iter().map(|v| v as f32).collect(),
        };
        let rows = self.bias.len();
        out.insert(
            format!("{name}.weight"),
            array(vec![rows, self.columns], self.weight),
        );
        out.insert(format!("{name}.bias"), array(vec![rows], self.bias));
    }
}
