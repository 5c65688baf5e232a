//! The private program: what the client's prepared pictures and the provider's weights become.

use std::num::NonZeroUsize;
use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use veiltune_engine::session::{Plan, Program, cheapest_comparison, plan};
use veiltune_engine::{Backend, Comparison, Error as EngineError, Owner, Party, Revealed};
use veiltune_nn::load::Served;
use veiltune_nn::{Method, Private, Read};
use veiltune_wire::Network;

use crate::Result;

/// The party that has the images.
pub const CLIENT: Party = Party::P0;
/// The party that has the adapter.
pub const PROVIDER: Party = Party::P1;

/// What the private part reads of one image, or of one pass of images: the values of each of [`Method::reads`].
pub type Inputs = Vec<Vec<f32>>;

/// Where the client's inputs come from.
pub trait Images: Sync {
    /// The inputs for the images of a pass, each read's values image after image. None where shapes are enough.
    fn pass(&self, images: Range<usize>) -> Result<Option<Inputs>, EngineError>;
}

impl Images for Vec<Inputs> {
    fn pass(&self, images: Range<usize>) -> Result<Option<Inputs>, EngineError> {
        Ok(self.get(images).map(|images| together(images.iter())))
    }
}

/// The inputs of several images as those of one pass.
pub fn together<'a>(mut images: impl Iterator<Item = &'a Inputs>) -> Inputs {
    let mut all = images.next().cloned().unwrap_or_default();
    for image in images {
        all.iter_mut()
            .zip(image)
            .for_each(|(all, values)| all.extend_from_slice(values));
    }
    all
}

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
    /// A single picture.
    pub const ONE: Batches = Batches {
        images: 1,
        batch: NonZeroUsize::MIN,
    };

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

/// The private part of a classification on what the client has prepared; logits to the client.
///
/// The same value serves every interpreter: with neither secret it deals and plans, with one it is a party's, with both it
/// is the plain-float reference.
#[derive(Clone, Copy)]
pub struct Classification<'a> {
    /// Method and parameters, as far as they are known here.
    pub served: &'a Served,
    /// How images are divided into passes.
    pub batches: Batches,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    /// The client's.
    pub images: Option<&'a dyn Images>,
}

impl<'a> Classification<'a> {
    /// Without images, with the default comparison.
    pub fn public(served: &'a Served, batches: Batches) -> Self {
        Classification {
            served,
            batches,
            comparison: Comparison::default(),
            images: None,
        }
    }

    /// Its exact cost.
    pub fn plan(&self) -> Result<Plan> {
        Ok(plan(self, self.batches.passes())?)
    }
}

/// What `method` reads, for the shapes alone: which hidden states they are depends on the backbone, their shapes do not.
pub fn shapes_read(method: &Method) -> Result<Vec<Read>, veiltune_nn::Error> {
    method.reads(match method {
        Method::Owc(c) => c.scope,
        Method::Head(_) => 0,
        Method::Encoder(c) => c.vit.num_hidden_layers,
    })
}

impl Program for Classification<'_> {
    type Model<B: Backend> = Private<B>;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn load<B: Backend>(&self, backend: &B) -> Result<Private<B>, EngineError> {
        self.served
            .load(backend, Owner::Party(PROVIDER))
            .map_err(of_model)
    }

    fn forward<B: Backend>(
        &self,
        backend: &B,
        model: &Private<B>,
        index: usize,
    ) -> Result<Option<Revealed>, EngineError> {
        let method = &self.served.method;
        let pass = self.batches.pass(index);
        let values = self
            .images
            .map(|images| images.pass(pass.clone()))
            .transpose()?
            .flatten();
        let reads = shapes_read(method).map_err(of_model)?;
        let inputs = reads.iter().enumerate().map(|(i, read)| {
            let values = values
                .as_ref()
                .and_then(|values| values.get(i))
                .map(Vec::as_slice);
            backend.input(Owner::Party(CLIENT), &method.input_dims(read, pass.len()), values)
        });
        let logits = model.forward(backend, &inputs.collect::<Result<Vec<_>, _>>()?)?;
        backend.reveal(&logits, CLIENT)
    }
}

fn of_model(e: veiltune_nn::Error) -> EngineError {
    match e {
        veiltune_nn::Error::Engine(e) => e,
        e => EngineError::program("adapter", e.to_string()),
    }
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
