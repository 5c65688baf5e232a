//! Self-supervised pretraining of a small vision transformer. Labels are never used.
//!
//! Each picture gives two random views, of which the encoder sees a random third of the patches (as a masked
//! autoencoder does, He et al., 2022). From each view's class token alone a small decoder restores the whole view, and
//! a projection must tell the picture's other view from those of all other pictures (InfoNCE, van den Oord et al.,
//! 2018). The first makes the class token hold what is there, the second what stays the same. Both helpers are
//! thrown away.

use candle_core::{D, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use veiltune_engine::{Backend, NormKind, NormSpec, Params, Plain};
use veiltune_hub::Tensors;
use veiltune_nn::load::inventory;
use veiltune_nn::{Linear, Vit, VitConfig};

use crate::data::{self, PIXELS, Pictures, SIDE};
use crate::optim::{Optimizer, Rule, cosine, gradients, steps};
use crate::variables::usual_init;
use crate::workers::Workers;
use crate::{Error, Result, Variables};

/// How to pretrain.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Passes over the pictures.
    pub epochs: usize,
    /// Pictures a step, over all threads.
    pub batch: usize,
    /// Peak learning rate.
    pub rate: f32,
    /// Patches of a view that the encoder sees.
    pub visible: usize,
    /// Threads; each contrasts its own part of the batch.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
}

/// Divides the similarities of the contrast.
const TEMPERATURE: f64 = 0.2;
/// Weight of the contrast against the restoration.
const CONTRAST: f64 = 0.3;
/// Width of the contrast's projection.
const PROJECTION: usize = 64;
/// Width of the decoder.
const DECODER: usize = 128;

/// Pretrains, calling `progress(step, steps, loss)`; the backbone's weights under `vit.`.
pub fn pretrain(
    config: &VitConfig,
    pictures: &Pictures,
    settings: &Settings,
    mut progress: impl FnMut(usize, usize, f32),
) -> Result<Tensors> {
    config.check()?;
    if (config.image_size, config.num_channels) != (SIDE, 1) {
        return Err(Error::Settings(format!("the pictures are grey, {SIDE} x {SIDE}")));
    }
    if !(1..config.tokens()).contains(&settings.visible) {
        return Err(Error::Settings(format!(
            "{} of {} patches visible",
            settings.visible,
            config.tokens() - 1
        )));
    }
    let (shard, per_epoch) = steps(pictures.len(), settings.batch, settings.threads)?;
    let workers = Workers::new(settings.threads)?;
    let mut rng = StdRng::seed_from_u64(settings.seed);
    let shapes = inventory(&Plain::new(), |p| Pretrainer::load(p, config))?;
    let vars = Variables::new(&shapes, |name, dims| usual_init(&mut rng, name, dims))?;
    let model = Pretrainer::load(&vars.params(), config)?;
    let mut optimizer = Optimizer::new(Rule::AdamW { betas: (0.9, 0.95) }, 0.05, 1.0, &vars);

    let total = per_epoch * settings.epochs;
    for epoch in 0..settings.epochs {
        let order = data::shuffled(pictures.len(), &mut rng);
        for (i, batch) in order.chunks_exact(shard * settings.threads).enumerate() {
            let shards: Vec<_> = batch
                .chunks_exact(shard)
                .map(|which| (which, rng.random::<u64>()))
                .collect();
            let weights = vec![1.0 / shards.len() as f32; shards.len()];
            let (loss, grads, _) = gradients(&workers, &vars, &shards, &weights, |(which, seed)| {
                let mut rng = StdRng::seed_from_u64(*seed);
                let mut view = || View::new(config, pictures, which, settings.visible, &mut rng);
                Ok((model.loss(&view()?, &view()?)?, ()))
            })?;
            let step = epoch * per_epoch + i;
            optimizer.step(&vars, &grads, cosine(settings.rate, step, total, total / 20))?;
            progress(step + 1, total, loss);
        }
    }
    Ok(vars
        .tensors()?
        .into_iter()
        .filter(|(name, _)| name.starts_with("vit."))
        .collect())
}

/// Encoder, decoder and projection.
struct Pretrainer {
    vit: Vit<Plain>,
    decoder: [Linear<Plain>; 3],
    queries: Tensor,
    projection: [Linear<Plain>; 2],
}

impl Pretrainer {
    fn load(p: &Params<Plain>, config: &VitConfig) -> veiltune_nn::Result<Self> {
        let (d, patches) = (config.hidden_size, config.tokens() - 1);
        let decoder = p.pp("decoder");
        Ok(Pretrainer {
            vit: Vit::load(&p.pp("vit"), config)?,
            decoder: [
                Linear::load(&decoder.pp("class"), d, DECODER, true)?,
                Linear::load(&decoder.pp("hidden"), DECODER, DECODER, true)?,
                Linear::load(&decoder.pp("pixels"), DECODER, config.patch_len(), true)?,
            ],
            queries: decoder.get("queries", &[1, patches, DECODER])?,
            projection: [
                Linear::load(&p.pp("projection.0"), d, d, true)?,
                Linear::load(&p.pp("projection.1"), d, PROJECTION, true)?,
            ],
        })
    }

    fn loss(&self, one: &View, two: &View) -> Result<Tensor> {
        let (a, b) = (self.class(one)?, self.class(two)?);
        let restored = (self.restoration(&a, one)? + self.restoration(&b, two)?)?;
        Ok((restored + (self.contrast(&a, &b)? * CONTRAST)?)?)
    }

    /// The class token `[batch, 1, d]` after the last block, normalised.
    fn class(&self, view: &View) -> Result<Tensor> {
        let b = Plain::new();
        let positions = self.vit.positions();
        let here = positions.index_select(&view.tokens, 1)?;
        let patches = b.add_weight(&self.vit.patch().forward(&b, &view.visible)?, &here)?;
        let class = self.vit.class_token(&b, view.visible.dim(0)?)?;
        let class = b.add_weight(&class, &positions.narrow(1, 0, 1)?)?;
        let states = self.vit.encode(&b, b.cat(&[&class, &patches], 1)?)?;
        let last = b.narrow(&states[states.len() - 1], 1, 0, 1)?;
        Ok(b.normalize(&last, &NORM)?)
    }

    /// Mean squared error of the view's patches as restored from its class token.
    fn restoration(&self, class: &Tensor, view: &View) -> Result<Tensor> {
        let b = Plain::new();
        let [first, hidden, pixels] = &self.decoder;
        let x = b.relu(&first.forward(&b, class)?.broadcast_add(&self.queries)?)?;
        let x = pixels.forward(&b, &b.relu(&hidden.forward(&b, &x)?)?)?;
        Ok((x - &view.all)?.sqr()?.mean_all()?)
    }

    /// InfoNCE in both directions.
    fn contrast(&self, one: &Tensor, two: &Tensor) -> Result<Tensor> {
        let b = Plain::new();
        let project = |x: &Tensor| -> Result<Tensor> {
            let [first, second] = &self.projection;
            let z = second.forward(&b, &b.relu(&first.forward(&b, x)?)?)?.squeeze(1)?;
            let unit = NormSpec {
                kind: NormKind::Rms,
                ..NORM
            };
            Ok((b.normalize(&z, &unit)? * (1.0 / (PROJECTION as f64 * TEMPERATURE).sqrt()))?)
        };
        let (one, two) = (project(one)?, project(two)?);
        let similar = one.matmul(&two.t()?)?;
        let own = (&one * &two)?.sum(D::Minus1)?;
        let rows = (similar.log_sum_exp(1)? - &own)?.mean_all()?;
        let columns = (similar.t()?.contiguous()?.log_sum_exp(1)? - &own)?.mean_all()?;
        Ok((rows + columns)?)
    }
}

const NORM: NormSpec = NormSpec {
    kind: NormKind::Layer,
    eps: 1e-6,
    sigma: (1e-3, f64::INFINITY),
};

/// One random view of a batch of pictures; all have the same patches hidden.
struct View {
    /// Patches that the encoder sees, `[batch, visible, patch]`.
    visible: Tensor,
    /// Their token positions.
    tokens: Tensor,
    /// All patches, `[batch, patches, patch]`.
    all: Tensor,
}

impl View {
    fn new(
        config: &VitConfig,
        pictures: &Pictures,
        which: &[usize],
        visible: usize,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let (p, count, len) = (config.patch_size, config.tokens() - 1, config.patch_len());
        let mut shown = data::shuffled(count, rng);
        shown.truncate(visible);
        let mut all = Vec::<f32>::with_capacity(which.len() * PIXELS);
        for &i in which {
            let view = data::random_view(pictures.picture(i), rng);
            for patch in 0..count {
                let (top, left) = (patch / (SIDE / p) * p, patch % (SIDE / p) * p);
                all.extend((0..p).flat_map(|y| &view[(top + y) * SIDE + left..][..p]));
            }
        }
        let all = Tensor::from_vec(all, (which.len(), count, len), &Device::Cpu)?;
        let index = |offset: u32| {
            let tokens = shown.iter().map(|&i| i as u32 + offset).collect::<Vec<_>>();
            Tensor::from_vec(tokens, shown.len(), &Device::Cpu)
        };
        Ok(View {
            visible: all.index_select(&index(0)?, 1)?,
            tokens: index(1)?,
            all,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{stripes, vit_config};

    const SETTINGS: Settings = Settings {
        epochs: 8,
        batch: 16,
        rate: 5e-3,
        visible: 2,
        threads: 2,
        seed: 3,
    };

    #[test]
    fn the_loss_falls_and_the_same_seed_gives_the_same_backbone() {
        let run = || {
            let mut losses = Vec::new();
            let tensors = pretrain(&vit_config(), &stripes(64), &SETTINGS, |_, _, loss| {
                losses.push(loss)
            })
            .unwrap();
            (losses, tensors)
        };
        let (losses, tensors) = run();
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
        assert_eq!(losses.len(), 32);
        assert!(mean(&losses[24..]) < 0.9 * mean(&losses[..8]), "{losses:?}");
        assert!(tensors.keys().all(|name| name.starts_with("vit.")));
        assert!(run().1 == tensors);
    }

    #[test]
    fn settings_that_cannot_be_are_refused() {
        let refused = |config: &VitConfig, settings: &Settings| {
            assert!(pretrain(config, &stripes(8), settings, |_, _, _| ()).is_err());
        };
        let config = vit_config();
        refused(
            &config,
            &Settings {
                visible: 5,
                batch: 8,
                ..SETTINGS
            },
        );
        refused(
            &config,
            &Settings {
                visible: 0,
                batch: 8,
                ..SETTINGS
            },
        );
        refused(&config, &SETTINGS);
        refused(
            &VitConfig {
                num_channels: 3,
                ..config
            },
            &Settings { batch: 8, ..SETTINGS },
        );
    }
}
