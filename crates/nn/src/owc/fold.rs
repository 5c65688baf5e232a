//! From trained weights to served ones.

use veiltune_hub::{Array, Tensors};

use super::{Branch, NormChoice, OwcConfig};
use crate::affine::Affine;
use crate::attention::AttentionSpec;
use crate::layers::BATCH_NORM_EPS;
use crate::{Error, Result};

/// Turns trained weights into the folded form, and the configuration with them. Folded ones are returned as they are.
pub fn fold(config: &OwcConfig, tensors: &Tensors) -> Result<(OwcConfig, Tensors)> {
    config.check()?;
    if config.folded {
        return Ok((config.clone(), tensors.clone()));
    }
    let from = Source { config, tensors };
    let (d, r, classes) = (config.hidden_size, config.rank, config.labels.len());
    let mut out = Tensors::new();
    let head = from.after(from.map("head", classes, d)?, "norm")?;
    let mut results: Vec<Parts> = Vec::new();
    for i in 0..config.scope {
        let at = format!("adapters.{i}");
        let down = from.map(&format!("{at}.down"), r, d)?;
        for (j, earlier) in results.iter().enumerate() {
            let link = earlier.map(|result| from.stream_of(result.then(&down), i));
            link.store(&mut out, &format!("{at}.links.{j}"));
        }
        from.stream_of(down, i).store(&mut out, &format!("{at}.down"));
        let result = from.result(&at, i)?;
        let class = result.map(|result| match config.norm {
            NormChoice::Layer => result.clone().centred().scaled(config.final_factor()),
            NormChoice::Batch => result.then(&head),
        });
        class.store(&mut out, &format!("{at}.class"));
        results.push(result);
        if config.branch == Branch::Transformer {
            from.block(&format!("{at}.block"), i, &mut out)?;
        }
    }
    head.store(&mut out, "head");
    Ok((config.served(), out))
}

/// An adapter's result, of the backbone's width, as the sum of linear maps of its stream and of its hidden layer.
struct Parts {
    stream: Option<Affine>,
    hidden: Option<Affine>,
}

impl Parts {
    fn map(&self, f: impl Fn(&Affine) -> Affine) -> Parts {
        Parts {
            stream: self.stream.as_ref().map(&f),
            hidden: self.hidden.as_ref().map(&f),
        }
    }

    fn store(self, out: &mut Tensors, name: &str) {
        for (part, map) in [("stream", self.stream), ("hidden", self.hidden)] {
            if let Some(map) = map {
                map.store(out, &format!("{name}.{part}"));
            }
        }
    }
}

/// Trained weights, with their shapes checked.
struct Source<'a> {
    config: &'a OwcConfig,
    tensors: &'a Tensors,
}

impl Source<'_> {
    fn get(&self, name: &str, dims: &[usize]) -> Result<&Array> {
        let array = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::Config(format!("no tensor {name}")))?;
        if array.dims != dims || array.values.len() != dims.iter().product::<usize>() {
            return Err(Error::Config(format!(
                "tensor {name} is {:?}, not {dims:?}",
                array.dims
            )));
        }
        Ok(array)
    }

    fn map(&self, name: &str, rows: usize, columns: usize) -> Result<Affine> {
        let weight = self.get(&format!("{name}.weight"), &[rows, columns])?;
        Ok(Affine::new(
            weight,
            Some(self.get(&format!("{name}.bias"), &[rows])?),
        ))
    }

    /// `map` of what the norm called `norm` gives: all of a batch norm becomes part of it, or the affine part of a LayerNorm.
    fn after(&self, map: Affine, norm: &str) -> Result<Affine> {
        let get = |part: &str| self.get(&format!("{norm}.{part}"), &[map.columns]);
        let (gain, shift) = (get("weight")?, get("bias")?);
        if self.config.norm == NormChoice::Layer {
            return Ok(map.after(gain, shift));
        }
        let (mean, variance) = (get("running_mean")?, get("running_var")?);
        let (mut gain, mut shift) = (gain.clone(), shift.clone());
        for (i, (mean, variance)) in mean.values.iter().zip(&variance.values).enumerate() {
            if *variance < 0.0 || variance.is_nan() {
                return Err(Error::Config(format!("{norm} has a variance of {variance}")));
            }
            gain.values[i] =
                (f64::from(gain.values[i]) / (f64::from(*variance) + BATCH_NORM_EPS).sqrt()) as f32;
            shift.values[i] -= mean * gain.values[i];
        }
        Ok(map.after(&gain, &shift))
    }

    /// A map into the stream of adapter `index`.
    fn stream_of(&self, map: Affine, index: usize) -> Affine {
        match self.config.norms.is_empty() {
            true => map,
            false => map.split().scaled(self.config.stream_factor(index)),
        }
    }

    /// What adapter `index`, called `at`, adds.
    fn result(&self, at: &str, index: usize) -> Result<Parts> {
        let (d, r) = (self.config.hidden_size, self.config.rank);
        let up = self.map(&format!("{at}.up"), d, r)?.scaled(self.config.scale);
        Ok(match self.config.branch {
            Branch::Linear => Parts {
                stream: Some(up),
                hidden: None,
            },
            Branch::Relu => Parts {
                stream: None,
                hidden: Some(up),
            },
            Branch::Transformer => {
                let fc2 = self.map(&format!("{at}.block.fc2"), r, r)?;
                Parts {
                    hidden: Some(fc2.then(&up)),
                    stream: Some(match self.config.norms.is_empty() {
                        true => up,
                        false => up.of_split().of_scaled(1.0 / self.config.stream_factor(index)),
                    }),
                }
            }
        })
    }

    /// Attention and the MLP's first layer of the block called `block`.
    fn block(&self, block: &str, index: usize, out: &mut Tensors) -> Result<()> {
        let c = self.config;
        let (r, n, attn) = (c.rank, c.tokens, format!("{block}.attn"));
        let qkv = Affine::new(self.get(&format!("{attn}.qkv.weight"), &[3 * r, r])?, None);
        let qkv = self
            .after(qkv, &format!("{block}.norm1"))?
            .scaled_rows(0..r, (r as f64 / c.heads as f64).powf(-0.5));
        let proj = self.stream_of(self.map(&format!("{attn}.proj"), r, r)?, index);
        if index + 1 < c.scope {
            qkv.store(out, &format!("{attn}.qkv"));
            proj.store(out, &format!("{attn}.proj"));
        } else {
            query_map(&qkv, c).store(out, &format!("{attn}.query"));
            value_map(&qkv, &proj, c).store(out, &format!("{attn}.value"));
        }
        if c.attention_of(index) == AttentionSpec::LinAtten {
            for (part, dims) in [("weight", [n, n]), ("bias", [1, n])] {
                let name = format!("{attn}.mix.{part}");
                out.insert(name.clone(), self.get(&name, &dims)?.clone());
            }
        }
        let fc1 = self.map(&format!("{block}.fc1"), r, r)?;
        self.after(fc1, &format!("{block}.norm2"))?
            .store(out, &format!("{block}.fc1"));
        Ok(())
    }
}

/// `K^T Q` a head: rank to `[heads, rank]` queries against the rows, then `[heads]` constants from the keys' bias.
fn query_map(qkv: &Affine, c: &OwcConfig) -> Affine {
    let (r, width) = (c.rank, c.rank / c.heads);
    let mut map = Affine::zero(c.heads * (r + 1), r);
    for h in 0..c.heads {
        for row in h * width..(h + 1) * width {
            for j in 0..r {
                map.add_row(h * r + j, qkv, row, qkv.weight[(r + row) * r + j]);
            }
            map.add_row(c.heads * r + h, qkv, row, qkv.bias[r + row]);
        }
    }
    map
}

/// `proj V` a head: `[heads, rank]` mixed rows, then `[heads]` sums of shares for the values' bias, to the stream.
fn value_map(qkv: &Affine, proj: &Affine, c: &OwcConfig) -> Affine {
    let (r, width) = (c.rank, c.rank / c.heads);
    let (out, wide) = (proj.bias.len(), c.heads * (r + 1));
    let mut map = Affine::zero(out, wide);
    map.bias.clone_from(&proj.bias);
    for o in 0..out {
        for row in 0..r {
            let (h, factor) = (row / width, proj.weight[o * r + row]);
            for j in 0..r {
                map.weight[o * wide + h * r + j] += factor * qkv.weight[(2 * r + row) * r + j];
            }
            map.weight[o * wide + c.heads * r + h] += factor * qkv.bias[2 * r + row];
        }
    }
    map
}

impl Affine {
    fn zero(rows: usize, columns: usize) -> Self {
        Affine {
            columns,
            weight: vec![0.0; rows * columns],
            bias: vec![0.0; rows],
        }
    }

    fn add_row(&mut self, to: usize, from: &Affine, row: usize, factor: f64) {
        let source = &from.weight[row * from.columns..][..from.columns];
        self.weight[to * self.columns..]
            .iter_mut()
            .zip(source)
            .for_each(|(w, s)| *w += factor * s);
        self.bias[to] += factor * from.bias[row];
    }

    fn scaled_rows(mut self, rows: std::ops::Range<usize>, by: f64) -> Self {
        let span = rows.start * self.columns..rows.end * self.columns;
        self.weight[span]
            .iter_mut()
            .chain(&mut self.bias[rows])
            .for_each(|v| *v *= by);
        self
    }

    /// What this contributes to the result of `next`, whose own bias stays there.
    fn then(&self, next: &Affine) -> Affine {
        let mut map = Affine::zero(next.bias.len(), self.columns);
        for (to, row) in next.weight.chunks(next.columns).enumerate() {
            for (from, factor) in row.iter().enumerate() {
                map.add_row(to, self, from, *factor);
            }
        }
        map
    }

    /// The result less its mean, then the mean.
    fn split(self) -> Affine {
        let rows = self.bias.len();
        let mut mean = Affine::zero(1, self.columns);
        for row in 0..rows {
            mean.add_row(0, &self, row, 1.0 / rows as f64);
        }
        let mut split = self.centred();
        split.weight.extend(mean.weight);
        split.bias.extend(mean.bias);
        split
    }

    /// The same of an input that comes less its mean, and then the mean.
    fn of_split(self) -> Affine {
        let rows = self.weight.chunks(self.columns);
        let weight = rows
            .flat_map(|row| row.iter().copied().chain([row.iter().sum()]))
            .collect();
        Affine {
            columns: self.columns + 1,
            weight,
            bias: self.bias,
        }
    }
}
