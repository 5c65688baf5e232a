//! Which method, on the command line: for training and for benchmarks.

use clap::{Args, ValueEnum};
use veiltune_adapt::cache::Source;
use veiltune_engine::{NormKind, NormSpec};
use veiltune_hub::Preprocess;
use veiltune_nn::attention::AttentionKind;
use veiltune_nn::encoder::{EncoderConfig, Tuning};
use veiltune_nn::layout::Variant;
use veiltune_nn::owc::{Branch, Design, NormChoice};
use veiltune_nn::{HeadConfig, Method, OwcConfig, VitConfig};

use crate::{Error, Result};

/// What is trained, and its sizes.
#[derive(Args, Clone, Debug)]
pub struct MethodArgs {
    /// What is trained: the adapter of CryptPEFT, or what it is compared with
    #[arg(long, value_enum, default_value = "adapter")]
    pub method: Which,
    /// Attention heads h of an adapter; they divide the rank
    #[arg(long, default_value_t = 1, value_name = "H")]
    pub heads: usize,
    /// Width r within an adapter, of LoRA's changes, of AdaptFormer's branches [default: 240; 8 for lora, 64 for adaptformer]
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// Adapters s, at the backbone's last layers; with last-layer the number of layers
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub scope: usize,
    /// Norms of an adapter
    #[arg(long, value_enum, default_value = "layer")]
    pub norm: NormArg,
    /// What an adapter does between its projections
    #[arg(long, value_enum, default_value = "transformer")]
    pub branch: BranchArg,
    /// How scores become weights [default: lin-atten in adapters, softmax in encoders, relu-softmax in MPCViT]
    #[arg(long, value_enum, value_name = "KIND")]
    pub attention: Option<AttentionArg>,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// One-way adapters of CryptPEFT
    Adapter,
    /// The head alone: a linear probe
    Head,
    /// The last layers (--scope) fine-tuned
    LastLayer,
    /// Two-way LoRA on queries and values: all of the backbone runs privately
    Lora,
    /// Two-way AdaptFormer: all of the backbone runs privately
    Adaptformer,
    /// MPCViT's own model of 7 layers for pictures of 32 x 32 pixels
    Mpcvit,
}

/// Norms of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NormArg {
    /// LayerNorm
    Layer,
    /// BatchNorm, which costs nothing when it is served
    Batch,
}

impl NormArg {
    /// As models have it.
    pub fn choice(self) -> NormChoice {
        match self {
            NormArg::Layer => NormChoice::Layer,
            NormArg::Batch => NormChoice::Batch,
        }
    }
}

/// What an adapter does between its projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BranchArg {
    /// A transformer block
    Transformer,
    /// Nothing: LoRA in one-way communication
    Linear,
    /// ReLU: AdaptFormer in one-way communication
    Relu,
}

/// Attention by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AttentionArg {
    /// CryptPEFT's
    LinAtten,
    /// Exact
    Softmax,
    /// MPCFormer's
    TwoQuad,
    /// MPCViT's
    ReluSoftmax,
    /// MPCViT's, without a function of the scores
    Scaled,
}

impl AttentionArg {
    fn kind(self) -> AttentionKind {
        match self {
            AttentionArg::LinAtten => AttentionKind::LinAtten,
            AttentionArg::Softmax => AttentionKind::Softmax,
            AttentionArg::TwoQuad => AttentionKind::TwoQuad,
            AttentionArg::ReluSoftmax => AttentionKind::ReluSoftmax,
            AttentionArg::Scaled => AttentionKind::Scaled,
        }
    }
}

/// What a method must fit: a backbone's sizes.
pub struct Ground<'a> {
    /// Width of a hidden state.
    pub width: usize,
    /// Tokens of one.
    pub tokens: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Architecture, unless it reads texts.
    pub vision: Option<(&'a VitConfig, Variant)>,
}

impl<'a> Ground<'a> {
    /// Of a public backbone.
    pub fn of(source: Source<'a>) -> Ground<'a> {
        Ground {
            width: source.width(),
            tokens: source.tokens(),
            layers: source.layers().unwrap_or(0),
            vision: source.backbone().map(|b| (&b.config, b.variant)),
        }
    }
}

impl MethodArgs {
    /// The width that is meant.
    pub fn rank(&self) -> usize {
        self.rank.unwrap_or(match self.method {
            Which::Lora => 8,
            Which::Adaptformer => 64,
            _ => 240,
        })
    }

    /// The method, not yet calibrated, on this backbone.
    pub fn build(&self, ground: &Ground, labels: Vec<String>) -> Result<Method> {
        let attention = |usual| self.attention.map_or(usual, AttentionArg::kind);
        let (rank, all) = (self.rank(), ground.layers);
        let encoder = |(vit, variant), tuning, layers| {
            let kind = attention(AttentionKind::Softmax);
            Method::Encoder(EncoderConfig::new(
                tuning,
                vit,
                variant,
                layers,
                kind,
                labels.clone(),
            ))
        };
        let method = match (self.method, ground.vision) {
            (Which::Adapter, _) => {
                let design = Design {
                    norm: self.norm.choice(),
                    branch: match self.branch {
                        BranchArg::Transformer => Branch::Transformer,
                        BranchArg::Linear => Branch::Linear,
                        BranchArg::Relu => Branch::Relu,
                    },
                    attention: attention(AttentionKind::LinAtten),
                    ..Design::new(self.heads, rank, self.scope)
                };
                Method::Owc(OwcConfig::new(&design, ground.width, ground.tokens, labels))
            }
            (Which::Head, _) => Method::Head(HeadConfig {
                hidden_size: ground.width,
                norm: NormSpec {
                    kind: NormKind::Layer,
                    eps: 1e-6,
                    sigma: (1e-6, 1e6),
                },
                labels,
            }),
            (_, None) => {
                return Err(Error::Input(
                    "with texts --method is adapter or head: the others run blocks of a vision transformer privately".into(),
                ));
            }
            (Which::LastLayer, _) if self.scope > all => {
                return Err(Error::Input(format!(
                    "--scope {} of a backbone of {all} layers",
                    self.scope
                )));
            }
            (Which::LastLayer, Some(vision)) => encoder(vision, Tuning::LastLayers, self.scope),
            (Which::Lora, Some(_)) if rank > ground.width => {
                return Err(Error::Input(format!(
                    "--rank {rank} of a backbone of width {0}: LoRA's changes have at most that rank; give at most {0}",
                    ground.width
                )));
            }
            (Which::Lora, Some(vision)) => {
                let projections = vision.1.layout.projections();
                let tuning = Tuning::Lora {
                    r: rank,
                    lora_alpha: 2.0 * rank as f64,
                    target_modules: vec![projections[0].into(), projections[2].into()],
                };
                encoder(vision, tuning, all)
            }
            (Which::Adaptformer, Some(vision)) => encoder(
                vision,
                Tuning::AdaptFormer {
                    bottleneck: rank,
                    scale: 0.1,
                },
                all,
            ),
            (Which::Mpcvit, Some(_)) => {
                let preprocess = Preprocess {
                    size: 32,
                    centre_crop: false,
                    image_mean: vec![0.5; 3],
                    image_std: vec![0.5; 3],
                };
                let kind = attention(AttentionKind::ReluSoftmax);
                Method::Encoder(EncoderConfig::mpcvit(preprocess, &[kind], labels)?)
            }
        };
        let fits = method.check().and_then(|()| method.reads(ground.layers));
        match fits {
            Ok(_) => Ok(method),
            Err(e) => Err(Error::Input(format!(
                "{e}; choose others with --heads, --rank, --scope or --attention"
            ))),
        }
    }
}
