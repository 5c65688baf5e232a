//! What the client computes in the clear: from a picture or a text to what the private part reads of it.

use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use veiltune_adapt::cache::Source;
use veiltune_engine::{Backend, Error as EngineError, Owner, Plain};
use veiltune_hub::{AdapterConfig, Preprocess};
use veiltune_nn::encoder::Tuning;
use veiltune_nn::load::{Backbone, Served};
use veiltune_nn::method::State;
use veiltune_nn::text::TextModel;
use veiltune_nn::{Method, Read, TextEncoder, Vit, VitConfig};

use crate::inputs::{self, Item, Items};
use crate::program::{CLIENT, Images, Inputs, shapes_read, together};
use crate::{Error, Result};

/// How the pictures or texts of one method are prepared.
pub enum Preparation {
    /// By a public backbone.
    Backbone {
        /// Which.
        backbone: Box<Backbone>,
        /// What is read of its hidden states.
        reads: Vec<Read>,
    },
    /// Not at all: the method reads the pixels themselves.
    Pixels {
        /// How pictures are scaled.
        preprocess: Preprocess,
        /// The model's shape.
        vit: VitConfig,
    },
    /// By a public text encoder.
    Texts {
        /// Which.
        encoder: Box<TextEncoder>,
        /// What is read of its hidden states.
        reads: Vec<Read>,
    },
}

impl Preparation {
    /// For this adapter. `backbone` is a folder or a model of the hub, None the embedded one; it is not opened if nothing of it
    /// is read.
    pub fn new(adapter: &AdapterConfig<Method>, backbone: Option<&str>) -> Result<Preparation> {
        if let Method::Encoder(c) = &adapter.method
            && let Tuning::MpcVit { preprocess } = &c.tuning
        {
            return Ok(Preparation::Pixels {
                preprocess: preprocess.clone(),
                vit: c.vit.clone(),
            });
        }
        let served = adapter.method.served();
        if let Some(form) = adapter.text {
            let encoder = Box::new(inputs::encoder(backbone, form)?);
            check_fit(Source::Texts(&encoder), &adapter.method)?;
            return Ok(Preparation::Texts {
                reads: served.reads(encoder.layers())?,
                encoder,
            });
        }
        let backbone = Box::new(inputs::backbone(backbone)?);
        check_fit(Source::Backbone(&backbone), &adapter.method)?;
        Ok(Preparation::Backbone {
            reads: served.reads(backbone.config.num_hidden_layers)?,
            backbone,
        })
    }

    /// What computes hidden states.
    pub fn source(&self) -> Source<'_> {
        match self {
            Preparation::Backbone { backbone, .. } => Source::Backbone(backbone),
            Preparation::Pixels { preprocess, vit } => Source::Pixels { vit, preprocess },
            Preparation::Texts { encoder, .. } => Source::Texts(encoder),
        }
    }

    /// The vision backbone, if there is one.
    pub fn backbone(&self) -> Option<&Backbone> {
        self.source().backbone()
    }

    /// What the client has of the private part: its public parameters.
    pub fn served(&self, method: &Method) -> Result<Served> {
        match self.backbone() {
            Some(backbone) if method.needs_backbone() => Served::client(method, backbone).map_err(|e| {
                Error::Input(format!(
                    "{e}; give the backbone that the adapter was trained on to --backbone"
                ))
            }),
            _ => Ok(Served::shapes(method)),
        }
    }

    /// A picture from a file, scaled and normalised.
    pub fn picture(&self, path: &Path) -> veiltune_nn::Result<Vec<f32>> {
        match self {
            Preparation::Backbone { backbone, .. } => backbone.picture(path),
            Preparation::Pixels { preprocess, .. } => Ok(preprocess.load(path)?),
            Preparation::Texts { .. } => Err(no_picture()),
        }
    }

    /// As [`Preparation::picture`], from a file's content.
    pub fn decode(&self, file: &str, bytes: &[u8]) -> veiltune_nn::Result<Vec<f32>> {
        match self {
            Preparation::Backbone { backbone, .. } => backbone.decode(file, bytes),
            Preparation::Pixels { preprocess, .. } => Ok(preprocess.decode(file, bytes)?),
            Preparation::Texts { .. } => Err(no_picture()),
        }
    }

    /// Ready to prepare pictures.
    pub fn load(&self) -> Result<Preparer<'_>> {
        let damaged = |e| Error::Input(format!("{e}; give a complete, undamaged backbone to --backbone"));
        Ok(match self {
            Preparation::Backbone { backbone, reads } => Preparer::Backbone {
                reads,
                config: &backbone.config,
                vit: Box::new(backbone.load(&Plain::new()).map_err(damaged)?),
            },
            Preparation::Pixels { vit, .. } => Preparer::Pixels { vit },
            Preparation::Texts { encoder, reads } => Preparer::Texts {
                reads,
                model: Box::new(encoder.load(&Plain::new()).map_err(damaged)?),
            },
        })
    }
}

/// A preparation with its weights in memory.
pub enum Preparer<'a> {
    /// As [`Preparation::Backbone`].
    Backbone {
        /// What is read of the hidden states.
        reads: &'a [Read],
        /// The backbone's shape.
        config: &'a VitConfig,
        /// The backbone.
        vit: Box<Vit<Plain>>,
    },
    /// As [`Preparation::Pixels`].
    Pixels {
        /// The model's shape.
        vit: &'a VitConfig,
    },
    /// As [`Preparation::Texts`].
    Texts {
        /// What is read of the hidden states.
        reads: &'a [Read],
        /// The encoder.
        model: Box<TextModel<'a, Plain>>,
    },
}

fn no_picture() -> veiltune_nn::Error {
    veiltune_nn::Error::Config("a text encoder sees no pictures".into())
}

fn hidden(state: State) -> Option<usize> {
    match state {
        State::Hidden(index) => Some(index),
        State::Patches => None,
    }
}

impl Preparer<'_> {
    /// What the private part reads of one picture or text.
    pub fn inputs(&self, item: &Item) -> Result<Inputs> {
        let b = Plain::new();
        // Later blocks are not run: a method that runs the backbone privately reads only the embedding.
        let last = |reads: &[Read]| {
            let last = reads.iter().filter_map(|read| hidden(read.state)).max();
            last.unwrap_or(0)
        };
        let (reads, states) = match (self, item) {
            (Preparer::Backbone { reads, config, vit }, Item::Pixels(pixels)) => {
                let dims = [1, config.num_channels, config.image_size, config.image_size];
                let image = b.input(Owner::Public, &dims, Some(pixels))?;
                (reads, vit.forward_to(&b, &image, last(reads))?)
            }
            (Preparer::Pixels { vit }, Item::Pixels(pixels)) => return Ok(vec![patches(pixels, vit)]),
            (Preparer::Texts { reads, model }, Item::Words(words)) => {
                (reads, model.states(&b, words, last(reads))?)
            }
            _ => return Err(EngineError::program("hidden states", "an item of another kind").into()),
        };
        let read = |read: &Read| -> Result<Vec<f32>> {
            let state = hidden(read.state).and_then(|index| states.get(index));
            let state = state.ok_or_else(|| {
                EngineError::program("hidden states", format!("there is no {:?}", read.state))
            })?;
            let values = b
                .reveal(&read.prepare(&b, state)?, CLIENT)?
                .map_or_else(Vec::new, |r| r.values);
            Ok(values.into_iter().map(|v| v as f32).collect())
        };
        reads.iter().map(read).collect()
    }
}

/// `[channels, size, size]` as patches, each `[channels, y, x]`, row by row.
fn patches(pixels: &[f32], c: &VitConfig) -> Vec<f32> {
    let (size, p) = (c.image_size, c.patch_size);
    let side = size / p;
    let mut out = Vec::with_capacity(pixels.len());
    for patch in 0..side * side {
        for channel in 0..c.num_channels {
            for y in 0..p {
                let row = (channel * size + patch / side * p + y) * size;
                out.extend_from_slice(&pixels[row + patch % side * p..][..p]);
            }
        }
    }
    out
}

/// Refuses an adapter that was not trained for a backbone of this shape.
fn check_fit(backbone: Source, method: &Method) -> Result<()> {
    let (width, tokens, layers) = (
        backbone.width(),
        backbone.tokens(),
        backbone.layers().unwrap_or(0),
    );
    let refuse = |wanted: String| {
        Err(Error::Input(format!(
            "the adapter is for {wanted}, this backbone has width {width}, {tokens} tokens and {layers} blocks; give the pair that \
             was trained together to --backbone and --adapter"
        )))
    };
    if matches!((backbone, method), (Source::Texts(_), Method::Encoder(_))) {
        return refuse("a vision transformer".into());
    }
    if let Err(e) = method.reads(layers) {
        return refuse(format!("another backbone ({e})"));
    }
    let widest = shapes_read(method)?
        .iter()
        .map(|read| method.input_dims(read, 1))
        .max_by_key(|dims| dims[1]);
    match widest.as_deref() {
        Some(&[_, 1, d]) if d != width => refuse(format!("a backbone of width {d}")),
        Some(&[_, n, d]) if d != width || (n != 1 && n != tokens) => {
            refuse(format!("a backbone of width {d} with {n} tokens"))
        }
        _ => Ok(()),
    }
}

/// Bytes of prepared pictures that wait for their pass. With more pictures than that, the rest is prepared while the
/// first are classified.
const HELD: usize = 256 << 20;

/// What the thread does that prepares pictures.
const PREPARING: &str = "preparing the pictures";

/// Items being prepared, for one session.
pub struct Stream {
    ready: Mutex<Receiver<Result<Inputs>>>,
    /// Why a picture could not be prepared, where this came late: the peer is not told names of files.
    failed: Mutex<Option<Error>>,
    /// Who uses the values; elsewhere shapes are enough.
    reader: ThreadId,
}

impl Images for Stream {
    fn pass(&self, images: std::ops::Range<usize>) -> Result<Option<Inputs>, EngineError> {
        // The thread that runs the session uses the values; the one that prepares its material walks the same program with
        // shapes alone, and passes first.
        if thread::current().id() != self.reader {
            return Ok(None);
        }
        let ready = self.ready.lock().unwrap_or_else(|e| e.into_inner());
        let next = |_| match ready.recv() {
            Ok(Ok(inputs)) => Ok(inputs),
            Ok(Err(e)) => {
                *self.failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(e);
                Err(EngineError::File("a picture could not be prepared".into()))
            }
            Err(_) => Err(EngineError::Stopped(PREPARING)),
        };
        let images = images.map(next).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(together(images.iter())))
    }
}

/// Prepares all pictures on a thread of its own, and calls `work` with them on this one, once all of them or as many as are
/// held are there. `work` is also given what tells the time that the preparation has taken so far.
pub fn prepared<T>(
    preparation: &Preparation,
    pictures: &Items,
    method: &Method,
    batch: usize,
    progress: impl Fn(usize) + Send,
    work: impl FnOnce(&Stream, &dyn Fn() -> Duration) -> Result<T>,
) -> Result<T> {
    let each: usize = shapes_read(&method.served())?
        .iter()
        .map(|read| method.input_dims(read, 1).iter().product::<usize>() * size_of::<f32>())
        .sum();
    let held = (HELD / each.max(1)).max(batch).min(pictures.len().max(1));
    let (send, ready) = sync_channel(held);
    let (begin, begun) = sync_channel(1);
    let spent = Mutex::new(Duration::ZERO);
    let preparer = preparation.load()?;
    thread::scope(|scope| {
        let spent = &spent;
        let preparing = scope.spawn(move || {
            for i in 0..pictures.len() {
                let made = pictures.load(i, preparation).and_then(|item| {
                    let start = Instant::now();
                    let made = preparer.inputs(&item);
                    *spent.lock().unwrap_or_else(|e| e.into_inner()) += start.elapsed();
                    made
                });
                let told = match made {
                    // Until the session has begun, a failure keeps it from beginning.
                    Err(e) if i < held => {
                        let _ = begin.send(Some(e));
                        return;
                    }
                    made => send.send(made).is_ok() && (i + 1 != held || begin.send(None).is_ok()),
                };
                if !told {
                    return;
                }
                progress(i + 1);
            }
        });
        let result = match begun.recv() {
            Ok(None) => {
                // Dropped before the thread is waited for, which then ends.
                let stream = Stream {
                    ready: Mutex::new(ready),
                    failed: Mutex::default(),
                    reader: thread::current().id(),
                };
                let result = work(&stream, &|| *spent.lock().unwrap_or_else(|e| e.into_inner()));
                match stream.failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
                    Some(e) => Err(e),
                    None => result,
                }
            }
            Ok(Some(e)) => Err(e),
            // It ended without a word.
            Err(_) => Err(EngineError::Stopped(PREPARING).into()),
        };
        match preparing.join() {
            Ok(()) => result,
            Err(_) => Err(Error::Panicked(PREPARING)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use veiltune_nn::vit::HiddenAct;

    #[test]
    fn a_preparation_that_panics_is_an_error_and_nothing_begins() {
        let adapter = inputs::classifier(None).unwrap().config;
        let preparation = Preparation::new(&adapter, None).unwrap();
        let begun = std::cell::Cell::new(false);
        let work = |_: &Stream, _: &dyn Fn() -> Duration| {
            begun.set(true);
            Ok(())
        };
        let panics = |done| assert!(done < 3, "on purpose");
        let all = prepared(&preparation, &Items::Embedded, &adapter.method, 8, panics, work);
        assert!(matches!(all, Err(Error::Panicked(_))), "{all:?}");
        assert!(!begun.get());
        prepared(&preparation, &Items::Embedded, &adapter.method, 8, drop, work).unwrap();
        assert!(begun.get());
    }

    #[test]
    fn patches_are_those_of_the_backbones_embedding() {
        let config = VitConfig {
            hidden_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 8,
            hidden_act: HiddenAct::Relu,
            image_size: 6,
            patch_size: 2,
            num_channels: 2,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            layer_scale: false,
        };
        let b = Plain::new();
        let zero = veiltune_engine::Params::new(|_, dims: &[usize]| {
            b.weight(Owner::Public, dims, Some(&vec![0.0; dims.iter().product()]))
        });
        let vit = Vit::load(&zero, &config).unwrap();
        let pixels: Vec<f32> = (0..72).map(|v| v as f32).collect();
        let image = b.input(Owner::Public, &[1, 2, 6, 6], Some(&pixels)).unwrap();
        let expected = b
            .reveal(&vit.unfold(&b, &image).unwrap(), CLIENT)
            .unwrap()
            .unwrap();
        let expected: Vec<f32> = expected.values.iter().map(|&v| v as f32).collect();
        assert_eq!(patches(&pixels, &config), expected);
    }
}
