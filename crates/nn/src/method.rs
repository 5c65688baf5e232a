//! A private classifier of any method: what it reads of the public backbone, its parameters, its forward pass.
//!
//! The client runs the backbone in the clear and keeps what [`Method::reads`] names; [`Method::load`] and
//! [`Private::forward`] are the part that runs privately. The same forward pass trains, evaluates, plans and serves.

use serde::{Deserialize, Serialize};
use veiltune_engine::plain::{Site, Verb};
use veiltune_engine::{Backend, NormSpec, Params, Range, Result};
use veiltune_hub::{Array, Tensors};

use crate::encoder::{Encoder, EncoderConfig, Tuning};
use crate::head::{Head, HeadConfig};
use crate::{Error, Owc, OwcConfig, Result as ModelResult, owc};

/// One input of the private part, which the client prepares in the clear.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Read {
    /// From where.
    pub state: State,
    /// Which tokens of it.
    pub tokens: Tokens,
    /// Normalised before it enters: a norm of what the client knows needs no protocol.
    pub norm: Option<NormSpec>,
    /// Less its mean over the last dimension, as folded programs want a residual stream.
    pub centred: bool,
}

/// What the client computes from a picture or a text in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The patches' pixels, `[patches, channels * size * size]`: no backbone is run.
    Patches,
    /// Hidden state number i of the backbone, 0 the embedding: `[tokens, d]`.
    Hidden(usize),
}

/// Tokens of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tokens {
    /// All of them.
    All,
    /// The class token, or what else stands for the whole picture or text: the first.
    Class,
}

/// Public configuration of a private classifier: method, architecture, calibration, class names.
///
/// In JSON an object whose `peft_type` says which method.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum Method {
    /// Adapters in one-way communication with the backbone (CryptPEFT).
    Owc(OwcConfig),
    /// Final norm and head alone: a linear probe.
    Head(HeadConfig),
    /// Blocks of the encoder themselves run privately: two-way LoRA and AdaptFormer, the last k layers, MPCViT.
    Encoder(EncoderConfig),
}

/// A calibrated range of a configuration, in the order in which a forward pass meets the verbs.
pub enum Calibrated<'a> {
    /// Of a norm: its sigma.
    Norm(&'a mut NormSpec),
    /// Of a softmax: the largest score.
    Softmax(&'a mut f64),
    /// Of a reciprocal: smallest and largest input.
    Reciprocal(&'a mut (f64, f64)),
    /// Of an activation.
    Activation(&'a mut Range),
}

impl Read {
    /// A hidden state as it is.
    pub fn hidden(index: usize, tokens: Tokens) -> Read {
        Read {
            state: State::Hidden(index),
            tokens,
            norm: None,
            centred: false,
        }
    }

    /// Applies `tokens`, `norm` and `centred` to the whole state `[batch, tokens, d]`, on the float interpreter.
    pub fn prepare<B: Backend>(&self, b: &B, state: &B::Tensor) -> Result<B::Tensor> {
        let mut x = match self.tokens {
            Tokens::All => state.clone(),
            Tokens::Class => b.narrow(state, 1, 0, 1)?,
        };
        if self.centred {
            let width = b.dims(&x)[2];
            x = b.sub(&x, &b.scale(&b.sum(&x, 2)?, 1.0 / width as f64)?)?;
        }
        match &self.norm {
            Some(norm) => b.normalize(&x, norm),
            None => Ok(x),
        }
    }
}

impl Method {
    /// The method's name in an artefact.
    pub fn peft_type(&self) -> &'static str {
        match self {
            Method::Owc(_) => owc::PEFT_TYPE,
            Method::Head(_) => "HEAD",
            Method::Encoder(c) => c.tuning.peft_type(),
        }
    }

    /// The configuration, if it is two-way LoRA.
    pub(crate) fn lora(&self) -> Option<&EncoderConfig> {
        match self {
            Method::Encoder(c) if matches!(c.tuning, Tuning::Lora { .. }) => Some(c),
            _ => None,
        }
    }

    /// Refuses what no model has.
    pub fn check(&self) -> ModelResult<()> {
        match self {
            Method::Owc(c) => c.check(),
            Method::Head(c) => c.check(),
            Method::Encoder(c) => c.check(),
        }
    }

    /// Names of the classes.
    pub fn labels(&self) -> &[String] {
        match self {
            Method::Owc(c) => &c.labels,
            Method::Head(c) => &c.labels,
            Method::Encoder(c) => &c.labels,
        }
    }

    /// The same with other classes.
    pub fn with_labels(&self, labels: Vec<String>) -> Method {
        let mut method = self.clone();
        match &mut method {
            Method::Owc(c) => c.labels = labels,
            Method::Head(c) => c.labels = labels,
            Method::Encoder(c) => c.labels = labels,
        }
        method
    }

    /// Width of the states that it reads.
    pub fn hidden_size(&self) -> usize {
        match self {
            Method::Owc(c) => c.hidden_size,
            Method::Head(c) => c.hidden_size,
            Method::Encoder(c) => c.vit.hidden_size,
        }
    }

    /// The inputs of [`Private::forward`], in order. `layers` is the number of the backbone's blocks.
    pub fn reads(&self, layers: usize) -> ModelResult<Vec<Read>> {
        match self {
            Method::Owc(c) => c.reads(layers),
            Method::Head(c) => Ok(c.reads(layers)),
            Method::Encoder(c) => c.reads(layers),
        }
    }

    /// Shape of the input for `read` and `batch` pictures.
    pub fn input_dims(&self, read: &Read, batch: usize) -> Vec<usize> {
        let (tokens, width) = match self {
            Method::Owc(c) => (c.tokens, c.hidden_size),
            Method::Head(c) => (1, c.hidden_size),
            Method::Encoder(c) => c.state_shape(read.state),
        };
        match read.tokens {
            Tokens::All => vec![batch, tokens, width],
            Tokens::Class => vec![batch, 1, width],
        }
    }

    /// The model. `private` are the provider's parameters (in training: the variables), `public` those of the backbone, which
    /// every role has (or, in planning and dealing, the shapes of which).
    pub fn load<B: Backend>(&self, private: &Params<B>, public: &Params<B>) -> ModelResult<Private<B>> {
        self.check()?;
        Ok(match self {
            Method::Owc(c) => Private::Owc(Owc::load(private, c)?),
            Method::Head(c) => Private::Head(Head::load(private, c)?),
            Method::Encoder(c) => Private::Encoder(Encoder::load(private, public, c)?),
        })
    }

    /// The configuration of the form in which it is served: see [`Method::fold`].
    pub fn served(&self) -> Method {
        match self {
            Method::Owc(c) => Method::Owc(c.served()),
            Method::Head(c) => Method::Head(c.clone()),
            Method::Encoder(c) => Method::Encoder(c.served()),
        }
    }

    /// The provider's parameters of [`Method::served`] from the trained ones; `backbone` are the backbone's, by their names in
    /// [`crate::Vit`], which methods that run its blocks need.
    pub fn fold(&self, trained: &Tensors, backbone: Fetch) -> ModelResult<Tensors> {
        match self {
            Method::Owc(c) => Ok(owc::fold(c, trained)?.1),
            Method::Head(_) => Ok(trained.clone()),
            Method::Encoder(c) => c.fold_private(trained, backbone),
        }
    }

    /// The public parameters of [`Method::served`], which any role computes from the backbone.
    pub fn fold_public(&self, backbone: Fetch) -> ModelResult<Tensors> {
        match self {
            Method::Owc(_) | Method::Head(_) => Ok(Tensors::new()),
            Method::Encoder(c) => c.fold_public(backbone),
        }
    }

    /// Whether parameters of the backbone are part of the private program, so that whoever runs it needs them.
    pub fn needs_backbone(&self) -> bool {
        matches!(self, Method::Encoder(c) if c.tuning.has_public_blocks())
    }

    /// Sets each range to a usual one, for a prediction of costs before there are data to calibrate on: they depend on ranges a
    /// little.
    pub fn presume(&mut self) {
        for site in self.sites() {
            match site {
                Calibrated::Norm(spec) => spec.sigma = (0.25, 8.0),
                Calibrated::Softmax(bound) => *bound = 16.0,
                Calibrated::Reciprocal(range) => *range = (1.0, 256.0),
                Calibrated::Activation(range) => *range = Range::Within(PLAIN_RANGE),
            }
        }
    }

    fn sites(&mut self) -> Vec<Calibrated<'_>> {
        match self {
            Method::Owc(c) => c.calibrated(),
            Method::Head(_) => Vec::new(),
            Method::Encoder(c) => c.calibrated(),
        }
    }

    /// Sets each range to what `seen` has, widened by `margin` on both sides.
    pub fn calibrate(&mut self, seen: &[Site], margin: f64) -> ModelResult<()> {
        let sites = self.sites();
        if sites.len() != seen.len() {
            return Err(Error::Config(format!(
                "{} calibrated places, {} seen: run the model on some pictures first",
                sites.len(),
                seen.len()
            )));
        }
        for (site, seen) in sites.into_iter().zip(seen) {
            site.set(seen, margin)?;
        }
        Ok(())
    }
}

/// How a backbone's parameter is had: by its name in [`crate::Vit`] and its shape.
pub type Fetch<'a> = &'a dyn Fn(&str, &[usize]) -> ModelResult<Array>;

/// Beyond this an activation is its asymptote; a Fourier sum over a wider range would need too many terms.
const GUARDED: f64 = 8.0;
/// Widest range without that.
const PLAIN_RANGE: f64 = 12.0;

impl Calibrated<'_> {
    fn set(self, seen: &Site, margin: f64) -> ModelResult<()> {
        let widened = || match seen.range {
            Some((low, high)) if low > 0.0 && high.is_finite() => Ok((low / margin, high * margin)),
            range => Err(Error::Config(format!("calibration saw the range {range:?}"))),
        };
        match (self, seen.verb) {
            (Calibrated::Norm(spec), Verb::Normalize) => spec.sigma = widened()?,
            (Calibrated::Reciprocal(range), Verb::Reciprocal) => *range = widened()?,
            (Calibrated::Softmax(bound), Verb::Softmax) => *bound = seen.input * margin,
            (Calibrated::Activation(range), Verb::Activation) => {
                let bound = seen.input * margin;
                *range = match bound <= PLAIN_RANGE {
                    true => Range::Within(bound),
                    false => Range::Guarded(GUARDED),
                };
            }
            (_, verb) => {
                let detail = format!("calibration met {verb:?} where the configuration has another range");
                return Err(Error::Config(detail));
            }
        }
        Ok(())
    }
}

/// The private part on some interpreter.
pub enum Private<B: Backend> {
    /// [`Method::Owc`].
    Owc(Owc<B>),
    /// [`Method::Head`].
    Head(Head<B>),
    /// [`Method::Encoder`].
    Encoder(Encoder<B>),
}

impl<B: Backend> Private<B> {
    /// Logits `[batch, classes]` from the inputs that [`Method::reads`] names, prepared by [`Read::prepare`].
    pub fn forward(&self, b: &B, inputs: &[B::Tensor]) -> Result<B::Tensor> {
        match self {
            Private::Owc(m) => m.forward(b, inputs),
            Private::Head(m) => match inputs {
                [x] => m.forward(b, x),
                _ => Err(veiltune_engine::Error::program(
                    "head",
                    format!("one input wanted, {} given", inputs.len()),
                )),
            },
            Private::Encoder(m) => m.forward(b, inputs),
        }
    }
}

const TYPE: &str = "peft_type";

impl TryFrom<serde_json::Value> for Method {
    type Error = String;

    fn try_from(value: serde_json::Value) -> std::result::Result<Self, String> {
        let kind = value
            .get(TYPE)
            .and_then(|t| t.as_str())
            .unwrap_or_default()
            .to_owned();
        let parsed = match kind.as_str() {
            owc::PEFT_TYPE => serde_json::from_value(value).map(Method::Owc),
            "HEAD" => serde_json::from_value(value).map(Method::Head),
            "LORA" if value.get("vit").is_none() => {
                return Err(format!(
                    "{TYPE} LORA as another program writes it, without architecture and calibrated ranges; `veiltune import` \
                     adds them"
                ));
            }
            kind if crate::encoder::PEFT_TYPES.contains(&kind) => {
                serde_json::from_value(value).map(Method::Encoder)
            }
            other => {
                return Err(format!(
                    "{TYPE} {other:?} is not supported; {}, HEAD, {} are",
                    owc::PEFT_TYPE,
                    crate::encoder::PEFT_TYPES.join(", ")
                ));
            }
        };
        parsed.map_err(|e| format!("{TYPE} {kind}: {e}"))
    }
}

impl From<Method> for serde_json::Value {
    fn from(method: Method) -> Self {
        let value = match &method {
            Method::Owc(c) => serde_json::to_value(c),
            Method::Head(c) => serde_json::to_value(c),
            Method::Encoder(c) => serde_json::to_value(c),
        };
        // Structures of numbers and strings alone always have a JSON form.
        let mut value = value.unwrap_or_default();
        value[TYPE] = method.peft_type().into();
        value
    }
}
