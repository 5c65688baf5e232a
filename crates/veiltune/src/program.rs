//! The private program: what the client's hidden states and the provider's adapter become.

use std::num::NonZeroUsize;
use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use veiltune_engine::session::{Plan, Program, cheapest_comparison, plan};
use veiltune_engine::{Backend, Comparison, Error as EngineError, Owner, Party, Plain, Revealed};
use veiltune_hub::Tensors;
use veiltune_nn::load::Backbone;
use veiltune_nn::{Owc, OwcConfig, Vit, load};
use veiltune_wire::Network;

use crate::Result;

/// The party that has the images.
pub const CLIENT: Party = Party::P0;
/// The party that has the adapter.
pub const PROVIDER: Party = Party::P1;

/// The hidden states of one image that the adapter reads, the last at the class token alone.
pub type Hidden = Vec<Vec<f32>>;

/// How many images there are, and how many of them share each forward pass. A pass takes as many rounds for many images as for
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batches {
    /// All images.
    pub images: usize,
    /// Images a pass; the last pass has what is left.
    pub batch: NonZeroUsize,
}

impl Batches {
    /// Number of passes.
    pub fn passes(self) -> usize {
        self.images.div_ceil(self.batch.get())
    }

    /// The images of pass `index`.
    pub fn pass(self, index: usize) -> Range<usize> {
        let start = index.saturating_mul(self.batch.get()).min(self.images);
        start..start.saturating_add(self.batch.get()).min(self.images)
    }
}

/// Which comparison a run shall use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Compare {
    /// The one that is sooner through the run's network.
    #[default]
    Auto,
    /// Function secret sharing: fewer rounds, more bytes from the dealer.
    Fss,
    /// Masked bits: more rounds, fewer bytes from the dealer.
    MaskedBits,
}

impl Compare {
    /// For a run of `program` over `network`.
    pub fn over(self, network: &Network, program: &Classification) -> Result<Comparison> {
        match self {
            Compare::Auto => Ok(cheapest_comparison(program, program.batches.passes(), network)?),
            Compare::Fss => Ok(Comparison::Fss),
            Compare::MaskedBits => Ok(Comparison::MaskedBits),
        }
    }
}

/// Adapter and head on hidden states; logits to the client.
///
/// The same value serves every interpreter: with neither secret it deals and plans, with one it is a party's, with both it
/// is the plain-float reference.
pub struct Classification<'a> {
    /// Architecture and calibration, public.
    pub config: &'a OwcConfig,
    /// Number of images, and of images a pass, public.
    pub batches: Batches,
    /// How the parties compare numbers, public.
    pub comparison: Comparison,
    /// The adapter's weights, at the provider.
    pub weights: Option<&'a Tensors>,
    /// Each image's hidden states, at the client.
    pub images: Option<&'a [Hidden]>,
}

impl<'a> Classification<'a> {
    /// What everybody knows of it, with the default comparison.
    pub fn public(config: &'a OwcConfig, batches: Batches) -> Self {
        Classification {
            config,
            batches,
            comparison: Comparison::default(),
            weights: None,
            images: None,
        }
    }

    /// Its exact cost.
    pub fn plan(&self) -> Result<Plan> {
        Ok(plan(self, self.batches.passes())?)
    }
}

impl Program for Classification<'_> {
    type Model<B: Backend> = Owc<B>;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn load<B: Backend>(&self, backend: &B) -> Result<Owc<B>, EngineError> {
        let owner = Owner::Party(PROVIDER);
        let params = match self.weights {
            Some(weights) => load::params(backend, owner, weights),
            None => load::shapes(backend, owner),
        };
        Owc::load(&params, self.config).map_err(|e| match e {
            veiltune_nn::Error::Engine(e) => e,
            e => EngineError::program("adapter", e.to_string()),
        })
    }

    fn forward<B: Backend>(
        &self,
        backend: &B,
        model: &Owc<B>,
        index: usize,
    ) -> Result<Option<Revealed>, EngineError> {
        let OwcConfig {
            scope,
            tokens,
            hidden_size,
            ..
        } = *self.config;
        let pass = self.batches.pass(index);
        let images = self.images.and_then(|images| images.get(pass.clone()));
        let states = (0..=scope).map(|i| {
            let dims = [pass.len(), if i < scope { tokens } else { 1 }, hidden_size];
            let values: Option<Vec<f32>> = images.map(|images| {
                images
                    .iter()
                    .filter_map(|states| states.get(i))
                    .flatten()
                    .copied()
                    .collect()
            });
            backend.input(Owner::Party(CLIENT), &dims, values.as_deref())
        });
        let logits = model.forward(backend, &states.collect::<Result<Vec<_>, _>>()?)?;
        backend.reveal(&logits, CLIENT)
    }
}

/// Runs the public backbone on one prepared image, and keeps what an adapter of this scope reads.
pub fn hidden_states(backbone: &Backbone, vit: &Vit<Plain>, pixels: &[f32], scope: usize) -> Result<Hidden> {
    let b = Plain::new();
    let (channels, size) = (backbone.config.num_channels, backbone.config.image_size);
    let image = b.input(Owner::Public, &[1, channels, size, size], Some(pixels))?;
    let states = vit.forward(&b, &image)?;
    let read = states[states.len() - 1 - scope..].iter().enumerate();
    let keep = read.map(|(i, state)| {
        let state = if i < scope {
            state.clone()
        } else {
            b.narrow(state, 1, 0, 1)?
        };
        let values = b.reveal(&state, CLIENT)?.map_or_else(Vec::new, |r| r.values);
        Ok(values.into_iter().map(|v| v as f32).collect())
    });
    keep.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_in_one_pass() {
        for (images, batch) in [(0, 1), (1, 4), (4, 4), (9, 4), (3, usize::MAX)] {
            let batches = Batches {
                images,
                batch: NonZeroUsize::new(batch).unwrap(),
            };
            let all: Vec<usize> = (0..batches.passes()).flat_map(|i| batches.pass(i)).collect();
            assert_eq!(all, (0..images).collect::<Vec<_>>());
            assert!((0..batches.passes()).all(|i| !batches.pass(i).is_empty()));
        }
    }
}
