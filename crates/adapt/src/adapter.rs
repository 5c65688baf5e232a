//! Training the private part on a frozen backbone's hidden states.

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use veiltune_engine::{Backend, NormKind, NormSpec, Owner, Plain};
use veiltune_hub::{Preprocess, Tensors};
use veiltune_nn::load::{inventory, params};
use veiltune_nn::owc::AdapterNorms;
use veiltune_nn::{Owc, OwcConfig, Vit};

use crate::data::{self, PIXELS, Pictures, SIDE};
use crate::optim::{Method, Optimizer, cosine, cross_entropy, gradients, steps};
use crate::variables::{normal, usual_init};
use crate::{Error, Result, Variables};

/// Pictures that the backbone takes at once.
const CHUNK: usize = 128;

/// A frozen backbone's last s + 1 hidden states of many pictures, in half precision.
pub struct States {
    /// The first s `[pictures, tokens, d]`, the last `[pictures, 1, d]`.
    states: Vec<Tensor>,
    labels: Vec<u8>,
}

impl States {
    /// Runs the backbone over `pictures`, on two threads, calling `progress(done)`.
    pub fn compute(
        vit: &Vit<Plain>,
        pictures: &Pictures,
        preprocess: &Preprocess,
        scope: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<Self> {
        let mut parts: Vec<Vec<Tensor>> = vec![Vec::new(); scope + 1];
        let chunk = |pixels: &[u8]| -> Result<Vec<Tensor>> {
            let b = Plain::new();
            let dims = [pixels.len() / PIXELS, 1, SIDE, SIDE];
            let hidden = vit.forward(
                &b,
                &b.input(Owner::Public, &dims, Some(&preprocess.normalise(pixels)))?,
            )?;
            if hidden.len() <= scope {
                return Err(Error::Settings(format!(
                    "scope {scope} of {} blocks",
                    hidden.len() - 1
                )));
            }
            let (last, whole) = hidden[hidden.len() - scope - 1..]
                .split_last()
                .expect("there are scope + 1");
            let kept = whole.iter().cloned().chain([last.narrow(1, 0, 1)?]);
            Ok(kept
                .map(|h| h.to_dtype(DType::F16)?.contiguous())
                .collect::<candle_core::Result<_>>()?)
        };
        for pair in pictures.pixels.chunks(2 * CHUNK * PIXELS) {
            let results: Vec<_> = std::thread::scope(|scope| {
                let chunk = &chunk;
                let work: Vec<_> = pair
                    .chunks(CHUNK * PIXELS)
                    .map(|p| scope.spawn(move || chunk(p)))
                    .collect();
                work.into_iter()
                    .map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
                    .collect()
            });
            for result in results {
                parts
                    .iter_mut()
                    .zip(result?)
                    .for_each(|(part, state)| part.push(state));
            }
            progress(pair.len() / PIXELS);
        }
        let join = |p: &Vec<Tensor>| Tensor::cat(p, 0);
        Ok(States {
            states: parts.iter().map(join).collect::<candle_core::Result<_>>()?,
            labels: pictures.labels.clone(),
        })
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Both, one after the other.
    pub fn join(self, other: States) -> Result<States> {
        let pairs = self.states.iter().zip(&other.states);
        let states = pairs
            .map(|(a, b)| Tensor::cat(&[a, b], 0))
            .collect::<candle_core::Result<_>>()?;
        Ok(States {
            states,
            labels: [self.labels, other.labels].concat(),
        })
    }

    /// Hidden states of these pictures in single precision.
    pub fn batch(&self, which: &[usize]) -> Result<Vec<Tensor>> {
        let index = Tensor::from_vec(
            which.iter().map(|&i| i as u32).collect(),
            which.len(),
            &Device::Cpu,
        )?;
        let pick = |s: &Tensor| s.index_select(&index, 0)?.to_dtype(DType::F32);
        Ok(self.states.iter().map(pick).collect::<candle_core::Result<_>>()?)
    }

    /// Labels of these pictures.
    pub fn labels(&self, which: &[usize]) -> Result<Tensor> {
        let labels = which.iter().map(|&i| self.labels[i] as u32).collect();
        Ok(Tensor::from_vec(labels, which.len(), &Device::Cpu)?)
    }

    /// The class token's last state, `[pictures, d]`.
    pub fn class_token(&self) -> Result<Tensor> {
        Ok(self.states[self.states.len() - 1]
            .squeeze(1)?
            .to_dtype(DType::F32)?)
    }
}

/// How to train.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Passes over the pictures.
    pub epochs: usize,
    /// Pictures a step, over all threads.
    pub batch: usize,
    /// Peak learning rate.
    pub rate: f32,
    /// Weight decay.
    pub decay: f32,
    /// Threads.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
}

/// An adapter that is not yet calibrated.
pub fn config(
    hidden_size: usize,
    tokens: usize,
    labels: &[&str],
    scope: usize,
    rank: usize,
    heads: usize,
) -> OwcConfig {
    let spec = NormSpec {
        kind: NormKind::Layer,
        eps: 1e-6,
        sigma: (1e-3, 1e3),
    };
    OwcConfig {
        hidden_size,
        tokens,
        scope,
        rank,
        heads,
        scale: 0.5,
        norms: vec![
            AdapterNorms {
                attention: spec,
                mlp: spec
            };
            scope
        ],
        final_norm: spec,
        labels: labels.iter().map(|&l| l.to_owned()).collect(),
        folded: false,
    }
}

/// Trains with SGD, momentum 0.9 and a cosine schedule, calling `progress(step, steps, loss)`.
pub fn train(
    config: &OwcConfig,
    states: &States,
    settings: &Settings,
    mut progress: impl FnMut(usize, usize, f32),
) -> Result<Tensors> {
    let (shard, per_epoch) = steps(states.len(), settings.batch, settings.threads)?;
    let mut rng = StdRng::seed_from_u64(settings.seed);
    let shapes = inventory(&Plain::new(), |p| Owc::load(p, config))?;
    let vars = Variables::new(&shapes, |name, dims| init(&mut rng, name, dims))?;
    let model = Owc::load(&vars.params(), config)?;
    let mut optimizer = Optimizer::new(Method::Sgd { momentum: 0.9 }, settings.decay, 1.0, &vars);

    let total = per_epoch * settings.epochs;
    for epoch in 0..settings.epochs {
        let order = data::shuffled(states.len(), &mut rng);
        for (i, batch) in order.chunks_exact(shard * settings.threads).enumerate() {
            let (loss, grads) = gradients(&vars, batch.chunks_exact(shard).collect(), |which| {
                let logits = model.forward(&Plain::new(), &states.batch(which)?)?;
                Ok(cross_entropy(&logits, &states.labels(which)?)?)
            })?;
            let step = epoch * per_epoch + i;
            optimizer.step(&vars, &grads, cosine(settings.rate, step, total, total / 50))?;
            progress(step + 1, total, loss);
        }
    }
    vars.tensors()
}

/// An adapter starts as the identity, its attention as a plain mean of the tokens.
fn init(rng: &mut StdRng, name: &str, dims: &[usize]) -> Vec<f32> {
    let count = dims.iter().product();
    match name {
        _ if name.contains(".up.") => vec![0.0; count],
        _ if name.ends_with("mix.weight") => normal(rng, count, 1.0 / dims[1] as f32),
        _ if name.ends_with("mix.bias") => vec![1.0 / dims[1] as f32; count],
        _ => usual_init(rng, name, dims),
    }
}

/// The configuration with each norm's range as seen on `states`, widened by `margin` on both sides.
pub fn calibrate(config: &OwcConfig, tensors: &Tensors, states: &States, margin: f64) -> Result<OwcConfig> {
    let (b, weights) = (Plain::recording(), Plain::new());
    let model = Owc::load(&params(&weights, Owner::Public, tensors), config)?;
    for which in (0..states.len()).collect::<Vec<_>>().chunks(CHUNK) {
        b.rewind();
        model.forward(&b, &states.batch(which)?)?;
    }
    let mut seen = b.sites().into_iter().filter_map(|site| site.sigma);
    let mut range = |spec: &mut NormSpec| match seen.next() {
        Some((low, high)) => {
            spec.sigma = (low / margin, high * margin);
            Ok(())
        }
        None => Err(Error::Settings("no data to calibrate on".into())),
    };
    let mut config = config.clone();
    for norms in &mut config.norms {
        range(&mut norms.attention)?;
        range(&mut norms.mlp)?;
    }
    range(&mut config.final_norm)?;
    Ok(config)
}

/// Share of pictures whose largest logit is that of their label.
pub fn accuracy(config: &OwcConfig, tensors: &Tensors, states: &States) -> Result<f64> {
    let b = Plain::new();
    let model = Owc::load(&params(&b, Owner::Public, tensors), config)?;
    let mut right = 0;
    for which in (0..states.len()).collect::<Vec<_>>().chunks(CHUNK) {
        let best = model.forward(&b, &states.batch(which)?)?.argmax(1)?;
        right += best
            .eq(&states.labels(which)?)?
            .to_dtype(DType::U32)?
            .sum_all()?
            .to_scalar::<u32>()?;
    }
    Ok(right as f64 / states.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Probe;
    use crate::testing::{stripes, vit_config};

    const SETTINGS: Settings = Settings {
        epochs: 30,
        batch: 16,
        rate: 0.05,
        decay: 5e-4,
        threads: 2,
        seed: 1,
    };

    fn states(pictures: &Pictures, scope: usize) -> States {
        let (b, config) = (Plain::new(), vit_config());
        let mut rng = StdRng::seed_from_u64(5);
        let shapes = inventory(&b, |p| Vit::load(p, &config)).unwrap();
        let vars = Variables::new(&shapes, |name, dims| usual_init(&mut rng, name, dims)).unwrap();
        let vit = Vit::load(&vars.params(), &config).unwrap();
        let mut done = 0;
        let states = States::compute(&vit, pictures, &data::preprocess(), scope, |n| done += n).unwrap();
        assert_eq!((done, states.len()), (pictures.len(), pictures.len()));
        assert!(States::compute(&vit, pictures, &data::preprocess(), 3, |_| ()).is_err());
        states
    }

    #[test]
    fn an_adapter_learns_is_calibrated_and_is_served_as_it_was_trained() {
        let train = states(&stripes(128), 2);
        let own = config(16, 5, &["across", "down"], 2, 8, 2);
        let tensors = super::train(&own, &train, &SETTINGS, |_, _, _| ()).unwrap();
        let calibrated = calibrate(&own, &tensors, &train, 1.5).unwrap();
        let reached = accuracy(&calibrated, &tensors, &train).unwrap();
        assert!(reached > 0.9, "{reached}");
        for spec in calibrated
            .norms
            .iter()
            .flat_map(|n| [n.attention, n.mlp])
            .chain([calibrated.final_norm])
        {
            assert!(
                spec.sigma.1 / spec.sigma.0 >= 2.25 && spec.sigma != own.final_norm.sigma,
                "{spec:?}"
            );
        }
        let (folded, served) = veiltune_nn::owc::fold(&calibrated, &tensors).unwrap();
        assert!((accuracy(&folded, &served, &train).unwrap() - reached).abs() < 0.02);
    }

    #[test]
    fn a_probe_learns_what_is_linear() {
        let train = states(&stripes(128), 0);
        let probe = Probe::fit(
            &train,
            2,
            &Settings {
                epochs: 40,
                ..SETTINGS
            },
        )
        .unwrap();
        assert!(probe.accuracy(&train).unwrap() > 0.8);
        assert!(Probe::fit(&train, 2, &Settings { batch: 0, ..SETTINGS }).is_err());
    }

    #[test]
    fn an_untrained_adapter_leaves_the_backbones_state_as_it_is() {
        let b = Plain::new();
        let train = states(&stripes(4), 1);
        let own = config(16, 5, &["across", "down"], 1, 8, 2);
        let mut rng = StdRng::seed_from_u64(1);
        let shapes = inventory(&b, |p| Owc::load(p, &own)).unwrap();
        let vars = Variables::new(&shapes, |name, dims| init(&mut rng, name, dims)).unwrap();
        let logits = |states: &[Tensor]| {
            let model = Owc::load(&vars.params(), &own).unwrap();
            model
                .forward(&b, states)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        let given = train.batch(&[0, 1, 2, 3]).unwrap();
        // Other patches, the same class token: the branch is still zero, so nothing changes.
        let class = given[0].narrow(1, 0, 1).unwrap();
        let patches = given[0].narrow(1, 1, 4).unwrap().affine(3.0, 1.0).unwrap();
        let other = Tensor::cat(&[class, patches], 1).unwrap();
        assert_eq!(logits(&given), logits(&[other, given[1].clone()]));
    }
}
