//! Hidden states of a public backbone, computed once and kept on disk.
//!
//! The backbone is frozen and never sees what is trained on its states, so they are computed once for each view of a picture
//! and read again in every epoch, by every training run and every candidate of a search. View 0 is the picture as in
//! testing, the others are random crops, perhaps mirrored. A text has one view.
//!
//! A cache is a folder for one backbone and one data set: a file for each view and state, of records in half precision, one an
//! example, and a manifest that says how many of each are whole. Records are on the disk before the manifest counts them, so
//! that an interruption, of whatever kind, loses no more than the last few batches; the next run goes on from there.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{Augment, Dataset, Fit, Preprocess, augment, files};
use veiltune_nn::method::{State, Tokens};
use veiltune_nn::text::TextModel;
use veiltune_nn::{Backbone, Read, TextEncoder, Vit, VitConfig};

use crate::texts::Texts;
use crate::workers::Workers;
use crate::{Error, Result};

/// Examples that a thread takes through the backbone at once.
const BATCH: usize = 8;
/// Batches between two updates of the manifest.
const FLUSH: usize = 16;
/// Says what is whole.
const MANIFEST: &str = "manifest.json";

/// What computes the states.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// A public backbone: all its hidden states.
    Backbone(&'a Backbone),
    /// None: a model of the provider's own reads the patches' pixels.
    Pixels {
        /// Size of the input and of the patches, and the channels.
        vit: &'a VitConfig,
        /// How pictures are prepared.
        preprocess: &'a Preprocess,
    },
    /// A public text encoder: all its hidden states.
    Texts(&'a TextEncoder),
}

/// What the states are of.
#[derive(Clone, Copy)]
pub enum Examples<'a> {
    /// Pictures, all of which can be read ([`Dataset::verify`]).
    Pictures(&'a Dataset),
    /// Texts, as the words of the source's encoder.
    Texts(&'a Texts),
}

/// States wanted of which examples.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Folder of all caches; this one is a folder within it.
    pub dir: &'a Path,
    /// What computes the states.
    pub source: Source<'a>,
    /// Of what.
    pub examples: Examples<'a>,
    /// Views of each picture; 1: only as in testing, the one view of a text.
    pub views: usize,
    /// How the other views are drawn.
    pub augment: Augment,
    /// Seed of the other views.
    pub seed: u64,
    /// Threads.
    pub threads: usize,
}

/// How far a computation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Examples done, each view counted, those of earlier runs included.
    pub done: usize,
    /// Of so many.
    pub total: usize,
    /// Examples a second in this run.
    pub per_second: f64,
}

impl Progress {
    /// Seconds left at this pace.
    pub fn seconds_left(&self) -> f64 {
        (self.total - self.done) as f64 / self.per_second
    }
}

/// Hidden states on disk.
pub struct States {
    dir: PathBuf,
    files: BTreeMap<(usize, Item), File>,
    views: usize,
    labels: Vec<u32>,
    classes: Vec<String>,
    layers: Option<usize>,
    shapes: Shapes,
    digest: String,
}

/// What a file has of an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Item {
    state: State,
    tokens: Tokens,
}

impl Item {
    fn of(read: &Read) -> Item {
        Item {
            state: read.state,
            tokens: read.tokens,
        }
    }

    /// All tokens of the same state.
    fn whole(self) -> Item {
        Item {
            tokens: Tokens::All,
            ..self
        }
    }

    fn name(self) -> String {
        let tokens = match self.tokens {
            Tokens::All => "",
            Tokens::Class => "-class",
        };
        match self.state {
            State::Patches => format!("patches{tokens}"),
            State::Hidden(i) => format!("hidden-{i}{tokens}"),
        }
    }
}

/// Sizes of the states.
#[derive(Clone, Copy, Debug)]
struct Shapes {
    tokens: usize,
    width: usize,
    patches: usize,
    patch: usize,
}

impl Shapes {
    /// Tokens and width of a record.
    fn of(&self, item: Item) -> (usize, usize) {
        let (tokens, width) = match item.state {
            State::Patches => (self.patches, self.patch),
            State::Hidden(_) => (self.tokens, self.width),
        };
        match item.tokens {
            Tokens::All => (tokens, width),
            Tokens::Class => (1, width),
        }
    }

    /// Bytes of a record.
    fn bytes(&self, item: Item) -> usize {
        let (tokens, width) = self.of(item);
        2 * tokens * width
    }
}

impl<'a> Source<'a> {
    /// The vision backbone, if it is one.
    pub fn backbone(self) -> Option<&'a Backbone> {
        match self {
            Source::Backbone(backbone) => Some(backbone),
            Source::Pixels { .. } | Source::Texts(_) => None,
        }
    }

    /// Number of the backbone's blocks; None without one.
    pub fn layers(self) -> Option<usize> {
        match self {
            Source::Backbone(b) => Some(b.config.num_hidden_layers),
            Source::Texts(encoder) => Some(encoder.layers()),
            Source::Pixels { .. } => None,
        }
    }

    /// Width of a hidden state.
    pub fn width(self) -> usize {
        match self {
            Source::Backbone(b) => b.config.hidden_size,
            Source::Texts(encoder) => encoder.width(),
            Source::Pixels { vit, .. } => vit.hidden_size,
        }
    }

    /// Rows of a hidden state; 0 without a backbone.
    pub fn tokens(self) -> usize {
        match self {
            Source::Backbone(b) => b.tokens(),
            Source::Texts(encoder) => encoder.rows(),
            Source::Pixels { .. } => 0,
        }
    }

    /// Tells one backbone from another; None without one.
    pub fn fingerprint(self) -> Result<Option<[u8; 32]>> {
        Ok(match self {
            Source::Backbone(b) => Some(b.fingerprint()?),
            Source::Texts(encoder) => Some(encoder.fingerprint()?),
            Source::Pixels { .. } => None,
        })
    }

    fn shapes(self) -> Shapes {
        let (patches, patch) = match self {
            Source::Backbone(Backbone { config: vit, .. }) | Source::Pixels { vit, .. } => {
                (vit.tokens() - 1, vit.patch_len())
            }
            Source::Texts(_) => (0, 0),
        };
        Shapes {
            tokens: self.tokens(),
            width: self.width(),
            patches,
            patch,
        }
    }

    /// Distinguishes sources by all that their states depend on.
    fn digest(self, digest: &mut Sha256) -> Result<()> {
        match self {
            Source::Backbone(b) => {
                digest.update(format!("{:?} {:?}", b.preprocess, b.fit));
                digest.update(format!("{:?} {:?}", b.config, b.variant));
            }
            Source::Pixels { vit, preprocess } => {
                digest.update(format!("{preprocess:?} {:?}", preprocess.fit()));
                digest.update(format!("pixels {}", vit.patch_size));
            }
            Source::Texts(encoder) => digest.update(format!("texts {:?}", encoder.form())),
        }
        digest.update(self.fingerprint()?.as_ref().map_or(&[][..], |f| &f[..]));
        Ok(())
    }

    fn load(self) -> Result<Loaded<'a>> {
        let b = Plain::new();
        Ok(match self {
            Source::Backbone(backbone) => Loaded::Pictures {
                vit: Some(Box::new(backbone.load(&b)?)),
                config: &backbone.config,
                preprocess: &backbone.preprocess,
                fit: backbone.fit,
            },
            Source::Pixels { vit, preprocess } => Loaded::Pictures {
                vit: None,
                config: vit,
                preprocess,
                fit: preprocess.fit(),
            },
            Source::Texts(encoder) => Loaded::Texts(Box::new(encoder.load(&b)?)),
        })
    }
}

impl Examples<'_> {
    /// Number of examples.
    pub fn len(&self) -> usize {
        match self {
            Examples::Pictures(pictures) => pictures.len(),
            Examples::Texts(texts) => texts.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The label of each.
    pub fn labels(&self) -> Vec<u32> {
        match self {
            Examples::Pictures(pictures) => (0..pictures.len()).map(|i| pictures.label(i) as u32).collect(),
            Examples::Texts(texts) => texts.labels().to_vec(),
        }
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        match self {
            Examples::Pictures(pictures) => pictures.classes(),
            Examples::Texts(texts) => texts.classes(),
        }
    }

    /// Distinguishes these examples from others.
    pub fn fingerprint(&self) -> [u8; 32] {
        match self {
            Examples::Pictures(pictures) => pictures.fingerprint(),
            Examples::Texts(texts) => texts.fingerprint(),
        }
    }

    fn name(&self, i: usize) -> String {
        match self {
            Examples::Pictures(pictures) => pictures.name(i),
            Examples::Texts(_) => format!("text {}", i + 1),
        }
    }
}

/// Which records are whole.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Manifest {
    /// Of the data set, texts too.
    pictures: usize,
    /// Whole records of each file, from its start.
    whole: BTreeMap<String, usize>,
}

impl States {
    /// Opens the states that `reads` need, computing what is not yet there, example by example.
    ///
    /// # Errors
    /// [`Error::Interrupted`] soon after `interrupted` is set; [`Error::NoSpace`] before anything is computed if it would not fit,
    /// or when the disk is full. Both keep what is whole.
    pub fn open_or_compute(
        request: &Request,
        reads: &[Read],
        progress: &mut dyn FnMut(Progress),
        interrupted: &AtomicBool,
    ) -> Result<States> {
        let texts = matches!(request.source, Source::Texts(_));
        if texts != matches!(request.examples, Examples::Texts(_)) {
            return Err(Error::Settings(
                "pictures for an encoder of texts, or texts for one of pictures".into(),
            ));
        }
        for read in reads {
            match (read.state, request.source.layers()) {
                (State::Hidden(i), Some(layers)) if i > layers => {
                    return Err(Error::Settings(format!("hidden state {i} of {layers} blocks")));
                }
                (State::Hidden(i), None) => {
                    return Err(Error::Settings(format!("hidden state {i} without a backbone")));
                }
                (State::Patches, _) if texts => {
                    return Err(Error::Settings("patches of a text".into()));
                }
                _ => {}
            }
        }
        if request.views == 0 || request.examples.is_empty() {
            return Err(Error::Settings("no view of any example".into()));
        }
        if texts && request.views > 1 {
            return Err(Error::Settings("a text has one view".into()));
        }
        let items: BTreeSet<Item> = reads.iter().map(Item::of).collect();
        let mut digest = Sha256::new_with_prefix("veiltune states 1");
        request.source.digest(&mut digest)?;
        digest.update(request.examples.fingerprint());
        let digest = hex(&digest.finalize()[..16]);
        let dir = request.dir.join(&digest);
        // Hidden states show what pictures and texts are like.
        files::private_folder(&dir)?;
        let mut filling = Filling::open(request, dir.clone(), items.clone())?;
        if (0..request.views).any(|view| !filling.missing(view).is_empty()) {
            // A process that fills the folder has it alone; what is whole others may read meanwhile.
            let lock = dir.join("lock");
            let lock = File::create(&lock).map_err(Error::io(&lock))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let detail = format!(
                        "{}: another process is filling this cache; wait for it, or use another folder",
                        dir.display()
                    );
                    return Err(Error::Settings(detail));
                }
                Err(TryLockError::Error(e)) => return Err(Error::io(&dir)(e)),
            }
            filling = Filling::open(request, dir.clone(), items)?;
            filling.check_space()?;
            filling.fill(progress, interrupted)?;
        }

        let mut opened = BTreeMap::new();
        for view in 0..request.views {
            for item in filling.files_of_view(view) {
                let path = dir.join(file_name(request, view, item));
                opened.insert((view, item), File::open(&path).map_err(Error::io(&path))?);
            }
        }
        Ok(States {
            dir,
            files: opened,
            views: request.views,
            labels: request.examples.labels(),
            classes: request.examples.classes().to_vec(),
            layers: request.source.layers(),
            shapes: request.source.shapes(),
            digest: format!("{digest} {}", drawn(request)),
        })
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none; never so.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Blocks of the backbone that the states are of; None: it has none.
    pub fn layers(&self) -> Option<usize> {
        self.layers
    }

    /// Views of each example.
    pub fn views(&self) -> usize {
        self.views
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// With other names of the classes, where the data's files have none.
    pub fn named(self, classes: Vec<String>) -> Result<States> {
        if classes.len() != self.classes.len() {
            let (given, own) = (classes.len(), self.classes.len());
            return Err(Error::Settings(format!("{given} names of {own} classes")));
        }
        Ok(States { classes, ..self })
    }

    /// The label of each example.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Two parts of the examples, by number, for training and for validation: as [`split`].
    pub fn split_validation(&self, share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
        split(&self.labels, share, seed)
    }

    /// Names the backbone, the examples and their views.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The labels of these examples, `[examples]`.
    pub fn labels_of(&self, which: &[usize]) -> Result<Tensor> {
        let labels = which.iter().map(|&i| self.labels[i]).collect();
        Ok(Tensor::from_vec(labels, which.len(), &Device::Cpu)?)
    }

    /// What `reads` say of one view of these examples, each `[examples, tokens, d]`, prepared.
    pub fn batch(&self, view: usize, which: &[usize], reads: &[Read]) -> Result<Vec<Tensor>> {
        let b = Plain::new();
        let mut raw: BTreeMap<Item, Tensor> = BTreeMap::new();
        let mut batch = Vec::with_capacity(reads.len());
        for read in reads {
            let item = Item::of(read);
            let state = match raw.entry(item) {
                Entry::Occupied(read) => read.into_mut(),
                Entry::Vacant(none) => none.insert(self.read(view, which, item)?),
            };
            batch.push(read.prepare(&b, state)?);
        }
        Ok(batch)
    }

    fn read(&self, view: usize, which: &[usize], item: Item) -> Result<Tensor> {
        let found = [item, item.whole()]
            .into_iter()
            .find_map(|kept| Some((kept, self.files.get(&(view, kept))?)));
        let Some((kept, file)) = found else {
            let detail = format!("view {view} of {} is not in this cache", item.name());
            return Err(Error::Settings(detail));
        };
        let (tokens, width) = self.shapes.of(item);
        let (values, stride) = (tokens * width, self.shapes.bytes(kept));
        let mut bytes = vec![0; 2 * values];
        let mut halves = vec![f16::ZERO; values];
        let mut floats = vec![0.0; which.len() * values];
        for (&i, floats) in which.iter().zip(floats.chunks_exact_mut(values)) {
            // The class token is the first of a record.
            read_at(file, &mut bytes, (i * stride) as u64).map_err(Error::io(&self.dir))?;
            for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                *half = f16::from_le_bytes(*bytes);
            }
            halves.convert_to_f32_slice(floats);
        }
        Ok(Tensor::from_vec(
            floats,
            (which.len(), tokens, width),
            &Device::Cpu,
        )?)
    }
}

/// Two parts of the examples with these labels, by number, in order. Of every class `share` (0 to 1; NaN is 0) of the examples,
/// drawn by `seed`, are in the second, rounded; where a class has two, at least one is in each part unless `share` is 0.
pub fn split(labels: &[u32], share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let share = if share > 0.0 { share.min(1.0) } else { 0.0 };
    let mut classes: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, &label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(i);
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for mut class in classes.into_values() {
        class.shuffle(&mut rng);
        let wanted = (share * class.len() as f64).round() as usize;
        let held = wanted.max(usize::from(share > 0.0)).min(class.len() - 1);
        validation.extend_from_slice(&class[..held]);
        train.extend_from_slice(&class[held..]);
    }
    train.sort_unstable();
    validation.sort_unstable();
    (train, validation)
}

/// Names the way in which random views are drawn.
fn drawn(request: &Request) -> String {
    let digest = Sha256::digest(format!("{:?} {}", request.augment, request.seed));
    hex(&digest[..4])
}

fn file_name(request: &Request, view: usize, item: Item) -> String {
    match view {
        0 => format!("centre.{}.f16", item.name()),
        _ => format!("random-{}-{view}.{}.f16", drawn(request), item.name()),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A cache that is being filled.
struct Filling<'a> {
    request: &'a Request<'a>,
    dir: PathBuf,
    items: BTreeSet<Item>,
    shapes: Shapes,
    manifest: Manifest,
}

/// A batch of one view: its first example, and a record file's content for each missing item.
type Computed = (usize, Result<Vec<Vec<u8>>>);

impl<'a> Filling<'a> {
    fn open(request: &'a Request, dir: PathBuf, items: BTreeSet<Item>) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let mut manifest: Manifest = match path.exists() {
            true => files::read_json(&path)?,
            false => Manifest::default(),
        };
        manifest.pictures = request.examples.len();
        Ok(Filling {
            request,
            dir,
            items,
            shapes: request.source.shapes(),
            manifest,
        })
    }

    /// Whole records of a file; fewer than the manifest says if somebody cut the file.
    fn whole(&self, view: usize, item: Item) -> usize {
        let name = file_name(self.request, view, item);
        let stored = fs::metadata(self.dir.join(&name)).map_or(0, |m| m.len());
        let counted = self.manifest.whole.get(&name).copied().unwrap_or(0);
        counted
            .min(stored as usize / self.shapes.bytes(item))
            .min(self.request.examples.len())
    }

    fn is_whole(&self, view: usize, item: Item) -> bool {
        self.whole(view, item) == self.request.examples.len()
    }

    /// The items of a view that have to be computed: a class token is also in the whole state.
    fn missing(&self, view: usize) -> Vec<Item> {
        let wanted = |item: &&Item| {
            let whole = item.whole();
            let covered = **item != whole && (self.items.contains(&whole) || self.is_whole(view, whole));
            !covered && !self.is_whole(view, **item)
        };
        self.items.iter().filter(wanted).copied().collect()
    }

    /// The files that hold the items of a view.
    fn files_of_view(&self, view: usize) -> BTreeSet<Item> {
        let holder = |item: &Item| match self.is_whole(view, *item) {
            true => *item,
            false => item.whole(),
        };
        self.items.iter().map(holder).collect()
    }

    /// The first picture of a view of which something is missing; a multiple of the batch, so that the same pictures are
    /// always computed together and rounding never depends on interruptions.
    fn start(&self, view: usize, missing: &[Item]) -> usize {
        let whole = missing.iter().map(|item| self.whole(view, *item)).min();
        whole.map_or(self.request.examples.len(), |n| n / BATCH * BATCH)
    }

    fn check_space(&self) -> Result<()> {
        let mut needed = 0;
        for view in 0..self.request.views {
            for item in self.missing(view) {
                let pictures = self.request.examples.len() - self.whole(view, item);
                needed += pictures as u64 * self.shapes.bytes(item) as u64;
            }
        }
        let free = fs4::available_space(&self.dir).map_err(Error::io(&self.dir))?;
        enough(&self.dir, needed, free)
    }

    fn fill(&mut self, progress: &mut dyn FnMut(Progress), interrupted: &AtomicBool) -> Result<()> {
        let views = self.request.views;
        let count = self.request.examples.len();
        let starts: Vec<usize> = (0..views).map(|v| self.start(v, &self.missing(v))).collect();
        if starts.iter().all(|&s| s == count) {
            return Ok(());
        }
        let workers = Workers::new(self.request.threads)?;
        let source = self.request.source.load()?;
        let (total, mut done) = (views * count, starts.iter().sum::<usize>());
        let (began, before) = (Instant::now(), done);
        let mut step = |examples: usize| {
            done += examples;
            progress(Progress {
                done,
                total,
                per_second: (done - before) as f64 / began.elapsed().as_secs_f64(),
            });
        };
        for (view, start) in starts.into_iter().enumerate() {
            if start < count {
                self.fill_view(view, start, &source, &workers, &mut step, interrupted)?;
            }
        }
        Ok(())
    }

    fn fill_view(
        &mut self,
        view: usize,
        start: usize,
        source: &Loaded,
        workers: &Workers,
        step: &mut dyn FnMut(usize),
        interrupted: &AtomicBool,
    ) -> Result<()> {
        let (request, count) = (self.request, self.request.examples.len());
        let missing = self.missing(view);
        let mut records = Vec::new();
        for &item in &missing {
            records.push(Records::open(
                self.dir.join(file_name(request, view, item)),
                self.shapes.bytes(item),
            )?);
        }
        let (next, stop) = (AtomicUsize::new(start), AtomicBool::new(false));
        // Bounded, so that a slow disk does not fill the memory.
        let (send, receive) = mpsc::sync_channel::<Computed>(2 * workers.count());
        let (next, stop, items) = (&next, &stop, &missing);
        let work = move |_| {
            let send = send.clone();
            move || {
                while !stop.load(Relaxed) && !interrupted.load(Relaxed) {
                    let first = next.fetch_add(BATCH, Relaxed);
                    if first >= count {
                        break;
                    }
                    let batch: Vec<usize> = (first..count.min(first + BATCH)).collect();
                    let computed = compute(request, source, view, &batch, items);
                    if send.send((first, computed)).is_err() {
                        break;
                    }
                }
            }
        };
        workers.run(work, || {
            let result = self.receive(view, start, &records, &receive, step);
            stop.store(true, Relaxed);
            // Nobody may wait for room in the channel.
            drop(receive);
            result
        })?;
        match self.start(view, &self.missing(view)) {
            whole if whole >= count => Ok(()),
            _ => Err(Error::Interrupted),
        }
    }

    /// Writes batches, which come in any order, and counts those without a gap before them.
    fn receive(
        &mut self,
        view: usize,
        start: usize,
        records: &[Records],
        receive: &mpsc::Receiver<Computed>,
        step: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let count = self.request.examples.len();
        let (mut whole, mut ahead, mut unflushed) = (start, BTreeSet::new(), 0);
        let mut result = Ok(());
        for (first, computed) in receive {
            let written = computed.and_then(|parts| {
                let mut pairs = records.iter().zip(&parts);
                pairs.try_for_each(|(records, bytes)| records.write(first, bytes))
            });
            if written.is_err() {
                result = written;
                break;
            }
            ahead.insert(first);
            while ahead.remove(&whole) {
                whole += BATCH;
            }
            unflushed += 1;
            if unflushed == FLUSH {
                self.flush(view, whole.min(count), records)?;
                unflushed = 0;
            }
            step(count.min(first + BATCH) - first);
        }
        // What is whole is kept, whatever happened.
        result.and(self.flush(view, whole.min(count), records))
    }

    fn flush(&mut self, view: usize, whole: usize, records: &[Records]) -> Result<()> {
        for records in records {
            records.file.sync_data().map_err(full(&records.path))?;
        }
        for item in self.missing(view) {
            let name = file_name(self.request, view, item);
            let counted = self.manifest.whole.entry(name).or_default();
            *counted = whole.max(*counted);
        }
        let path = self.dir.join(MANIFEST);
        files::write_json(&path, &self.manifest).map_err(|e| match e {
            veiltune_hub::Error::Io { source, .. } => full(&path)(source),
            other => other.into(),
        })
    }
}

/// A file of records.
struct Records {
    path: PathBuf,
    file: File,
    bytes: usize,
}

impl Records {
    fn open(path: PathBuf, bytes: usize) -> Result<Self> {
        let mut options = File::options();
        options.create(true).truncate(false).write(true);
        let file = options.open(&path).map_err(full(&path))?;
        Ok(Records { path, file, bytes })
    }

    /// Writes the records from number `first` on.
    fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        write_at(&self.file, bytes, (first * self.bytes) as u64).map_err(full(&self.path))
    }
}

/// A source with its weights in memory.
enum Loaded<'a> {
    /// Of pictures; without an encoder if nothing but their pixels is read.
    Pictures {
        vit: Option<Box<Vit<Plain>>>,
        config: &'a VitConfig,
        preprocess: &'a Preprocess,
        fit: Fit,
    },
    /// Of texts.
    Texts(Box<TextModel<'a, Plain>>),
}

impl Loaded<'_> {
    /// Patches, and hidden states 0 to `last`, of a view of some examples; patches of texts and states without an encoder are not
    /// there.
    fn states(
        &self,
        request: &Request,
        view: usize,
        batch: &[usize],
        last: usize,
    ) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let b = Plain::new();
        match (self, request.examples) {
            (
                Loaded::Pictures {
                    vit,
                    config,
                    preprocess,
                    fit,
                },
                Examples::Pictures(dataset),
            ) => {
                let mut pixels = Vec::new();
                for &i in batch {
                    let how = request.augment.view(request.seed, view as u64, i as u64);
                    pixels.extend(augment::view(preprocess, *fit, &dataset.picture(i)?, how)?);
                }
                let side = config.image_size;
                let dims = [batch.len(), config.num_channels, side, side];
                let images = b.input(Owner::Public, &dims, Some(&pixels))?;
                let hidden = match vit {
                    Some(vit) => vit.forward_to(&b, &images, last)?,
                    None => Vec::new(),
                };
                Ok((Some(unfold(&images, config.patch_size)?), hidden))
            }
            (Loaded::Texts(model), Examples::Texts(texts)) => {
                // Each alone: a row is what it would be at a client with this one text.
                let each = batch.iter().map(|&i| model.states(&b, texts.words(i), last));
                let each = each.collect::<veiltune_nn::Result<Vec<_>>>()?;
                let together = |state| Tensor::cat(&each.iter().map(|e| &e[state]).collect::<Vec<_>>(), 0);
                let hidden = (0..=last).map(together).collect::<candle_core::Result<_>>()?;
                Ok((None, hidden))
            }
            _ => Err(Error::Settings("examples of another kind".into())),
        }
    }
}

/// The records of some examples, for each item.
fn compute(
    request: &Request,
    source: &Loaded,
    view: usize,
    batch: &[usize],
    items: &[Item],
) -> Result<Vec<Vec<u8>>> {
    let (patches, hidden) = source.states(request, view, batch, last(items))?;
    let record = |item: &Item| {
        let state = match item.state {
            State::Patches => patches.as_ref(),
            State::Hidden(i) => hidden.get(i),
        };
        let state = state.ok_or_else(|| Error::Settings(format!("there is no {}", item.name())))?;
        let state = match item.tokens {
            Tokens::All => state.clone(),
            Tokens::Class => state.narrow(1, 0, 1)?,
        };
        let halves: Vec<f16> = state.to_dtype(DType::F16)?.flatten_all()?.to_vec1()?;
        match halves.iter().all(|v| v.is_finite()) {
            true => Ok(halves.iter().flat_map(|v| v.to_le_bytes()).collect()),
            false => Err(Error::Settings(format!(
                "{} of {} is beyond half precision; this backbone's states cannot be kept",
                item.name(),
                request.examples.name(batch[0])
            ))),
        }
    };
    items.iter().map(record).collect()
}

/// The last hidden state among `items`: no block after it has to be run.
fn last(items: &[Item]) -> usize {
    let index = |item: &Item| match item.state {
        State::Hidden(i) => i,
        State::Patches => 0,
    };
    items.iter().map(index).max().unwrap_or(0)
}

/// `[batch, c, size, size]` to patches `[batch, count, c * p * p]`, in the order of [`Vit::unfold`].
fn unfold(images: &Tensor, p: usize) -> candle_core::Result<Tensor> {
    let (batch, c, side) = (images.dim(0)?, images.dim(1)?, images.dim(2)? / p);
    let x = images.reshape(&[batch, c, side, p, side, p][..])?;
    x.permute([0, 2, 4, 1, 3, 5])?
        .reshape((batch, side * side, c * p * p))
}

fn enough(dir: &Path, needed: u64, free: u64) -> Result<()> {
    if needed <= free {
        return Ok(());
    }
    Err(Error::NoSpace {
        dir: dir.to_owned(),
        needed,
        free,
    })
}

/// An error of writing `path`, a full disk told apart.
fn full(path: &Path) -> impl Fn(io::Error) -> Error {
    |e| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull(path.to_owned()),
        _ => Error::io(path)(e),
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => (bytes, offset) = (&mut bytes[n..], offset + n as u64),
        }
    }
    Ok(())
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        (bytes, offset) = (&bytes[n..], offset + n as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use veiltune_hub::{Pooling, TextForm};
    use veiltune_tune::Example;

    struct World {
        dir: tempfile::TempDir,
        backbone: Backbone,
        dataset: Dataset,
    }

    impl World {
        fn new(pictures: usize) -> Self {
            let dir = tempfile::tempdir().unwrap();
            World {
                backbone: testing::backbone(),
                dataset: testing::dataset(&dir.path().join("data"), pictures),
                dir,
            }
        }

        fn request<'a>(&'a self, cache: &'a Path) -> Request<'a> {
            Request {
                dir: cache,
                source: Source::Backbone(&self.backbone),
                examples: Examples::Pictures(&self.dataset),
                views: 2,
                augment: Augment::default(),
                seed: 7,
                threads: 2,
            }
        }

        fn cache(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
    }

    fn reads() -> Vec<Read> {
        vec![Read::hidden(1, Tokens::All), Read::hidden(2, Tokens::Class)]
    }

    fn open(request: &Request, reads: &[Read]) -> Result<States> {
        States::open_or_compute(request, reads, &mut |_| (), &AtomicBool::new(false))
    }

    /// Every file of a cache but the lock, by name.
    fn content(states: &States) -> BTreeMap<String, Vec<u8>> {
        let files = fs::read_dir(states.dir()).unwrap().map(|f| f.unwrap());
        let pairs = files.map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap()));
        pairs.filter(|(name, _)| name != "lock").collect()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn states_are_those_of_the_backbone_in_every_view() {
        let world = World::new(21);
        let cache = world.cache("cache");
        let request = world.request(&cache);
        let states = open(&request, &reads()).unwrap();
        assert_eq!((states.len(), states.views()), (21, 2));
        let (source, which) = (request.source.load().unwrap(), [20, 3, 3]);
        for view in 0..2 {
            let got = states.batch(view, &which, &reads()).unwrap();
            assert_eq!((got[0].dims(), got[1].dims()), (&[3, 5, 16][..], &[3, 1, 16][..]));
            let own = compute(&request, &source, view, &which, &[Item::of(&reads()[0])]).unwrap();
            let own = own[0]
                .as_chunks()
                .0
                .iter()
                .map(|h| f16::from_le_bytes(*h).to_f32());
            assert_eq!(values(&got[0]), own.collect::<Vec<_>>(), "view {view}");
        }
        let views = [0, 1].map(|view| values(&states.batch(view, &which, &reads()).unwrap()[1]));
        assert_ne!(views[0], views[1]);
        let labels = values(&states.labels_of(&which).unwrap().to_dtype(DType::F32).unwrap());
        assert_eq!(labels, which.map(|i| world.dataset.label(i) as f32));
        assert!(states.batch(2, &which, &reads()).is_err());
        assert!(states.batch(0, &which, &[Read::hidden(0, Tokens::All)]).is_err());
        // A class token is read from the whole state.
        let class = states
            .batch(1, &which, &[Read::hidden(1, Tokens::Class)])
            .unwrap();
        let whole = states.batch(1, &which, &reads()).unwrap();
        assert_eq!(values(&class[0]), values(&whole[0].narrow(1, 0, 1).unwrap()));
    }

    #[test]
    fn an_interrupted_run_goes_on_and_ends_with_the_same_bytes() {
        let world = World::new(300);
        let (one, two) = (world.cache("one"), world.cache("two"));
        let whole = open(&world.request(&one), &reads()).unwrap();
        let (mut runs, mut last) = (0, 0);
        let states = loop {
            let (interrupted, mut calls, mut first) = (AtomicBool::new(false), 0, None);
            let result = States::open_or_compute(
                &world.request(&two),
                &reads(),
                &mut |p| {
                    first.get_or_insert(p.done);
                    calls += 1;
                    last = p.done;
                    interrupted.store(calls >= 20, Relaxed);
                },
                &interrupted,
            );
            runs += 1;
            match result {
                Ok(states) => break states,
                Err(Error::Interrupted) => assert!(runs < 10),
                Err(other) => panic!("{other}"),
            }
            if runs > 1 {
                assert!(first.unwrap() > 40, "it began anew");
            }
        };
        assert!(runs > 2, "{runs} runs");
        assert_eq!(last, 600);
        assert!(content(&states) == content(&whole));
        // Nothing is left to do; other states of the same pictures join them.
        let mut called = false;
        let none = AtomicBool::new(false);
        States::open_or_compute(&world.request(&two), &reads(), &mut |_| called = true, &none).unwrap();
        assert!(!called);
        let more = open(&world.request(&two), &[Read::hidden(0, Tokens::All)]).unwrap();
        assert_eq!(more.dir(), states.dir());
        assert_eq!(content(&more).len(), content(&whole).len() + 2);
    }

    #[test]
    fn another_backbone_data_set_or_seed_does_not_share_states() {
        let (world, other) = (World::new(8), World::new(9));
        let cache = world.cache("cache");
        let request = world.request(&cache);
        let own = open(&request, &reads()).unwrap();
        let elsewhere = open(
            &Request {
                examples: Examples::Pictures(&other.dataset),
                ..request
            },
            &reads(),
        )
        .unwrap();
        assert_ne!(elsewhere.dir(), own.dir());
        let seeded = open(&Request { seed: 8, ..request }, &reads()).unwrap();
        assert_eq!(seeded.dir(), own.dir(), "the centres are the same");
        let view = |states: &States, view| values(&states.batch(view, &[0, 1], &reads()).unwrap()[0]);
        assert_eq!(view(&seeded, 0), view(&own, 0));
        assert_ne!(view(&seeded, 1), view(&own, 1));
        assert_ne!(seeded.digest(), own.digest());
        for bad in [Read::hidden(3, Tokens::All), Read::hidden(99, Tokens::Class)] {
            assert!(open(&request, &[bad]).is_err());
        }
        assert!(open(&Request { views: 0, ..request }, &reads()).is_err());
    }

    #[test]
    fn pixels_need_no_backbone_and_are_cut_as_a_vision_transformer_cuts_them() {
        let world = World::new(4);
        let cache = world.cache("cache");
        let (vit, preprocess) = (&world.backbone.config, &world.backbone.preprocess);
        let request = Request {
            source: Source::Pixels { vit, preprocess },
            ..world.request(&cache)
        };
        let read = Read {
            state: State::Patches,
            ..Read::hidden(0, Tokens::All)
        };
        let states = open(&request, &[read]).unwrap();
        let patches = states.batch(0, &[2], &[read]).unwrap().remove(0);
        let picture = augment::view(
            preprocess,
            preprocess.fit(),
            &world.dataset.picture(2).unwrap(),
            augment::View::Centre,
        );
        let b = Plain::new();
        let picture = b
            .input(Owner::Public, &[1, 1, 28, 28], Some(&picture.unwrap()))
            .unwrap();
        let own = world.backbone.load(&b).unwrap().unfold(&b, &picture).unwrap();
        let apart = (patches - own).unwrap().abs().unwrap().max_all().unwrap();
        assert!(apart.to_scalar::<f32>().unwrap() < 1e-3);
        assert!(open(&request, &[Read::hidden(0, Tokens::All)]).is_err());
    }

    #[test]
    fn texts_have_the_states_that_their_encoder_gives_each_alone() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nn/tests/vectors/language/minilm");
        let encoder = |tokens| {
            let form = TextForm {
                tokens,
                pooling: Pooling::Mean,
                pairs: false,
            };
            TextEncoder::open(&folder, form).unwrap()
        };
        let example = |i: usize| Example {
            text_a: ["ba", "de", "fi", "no"][..1 + i % 4].join(" "),
            text_b: None,
            label: i % 2,
        };
        let examples: Vec<Example> = (0..19).map(example).collect();
        let of = |encoder: &TextEncoder| {
            Texts::new(encoder, &examples, vec!["even".into(), "odd".into()]).unwrap()
        };
        let (own, short) = (encoder(8), encoder(4));
        let (texts, cut) = (of(&own), of(&short));
        assert_eq!((texts.cut(), cut.cut()), (0, 9));
        let dir = tempfile::tempdir().unwrap();
        let (cache, world) = (dir.path().join("cache"), World::new(2));
        let request = Request {
            source: Source::Texts(&own),
            examples: Examples::Texts(&texts),
            views: 1,
            ..world.request(&cache)
        };
        let states = open(&request, &reads()).unwrap();
        assert_eq!((states.layers(), states.classes().len()), (Some(2), 2));
        let model = own.load(&Plain::new()).unwrap();
        let which = [18, 3];
        let got = states.batch(0, &which, &reads()).unwrap();
        for (row, i) in which.into_iter().enumerate() {
            let alone = model.states(&Plain::new(), texts.words(i), 2).unwrap();
            let whole = values(
                &alone[1]
                    .to_dtype(DType::F16)
                    .unwrap()
                    .to_dtype(DType::F32)
                    .unwrap(),
            );
            assert_eq!(values(&got[0].narrow(0, row, 1).unwrap()), whole);
            let apart = (got[1].narrow(0, row, 1).unwrap() - alone[2].narrow(1, 0, 1).unwrap()).unwrap();
            assert!(values(&apart).iter().all(|v| v.abs() < 5e-3));
        }
        // Read in another form, they are others.
        let elsewhere = Request {
            source: Source::Texts(&short),
            examples: Examples::Texts(&cut),
            ..request
        };
        assert_ne!(open(&elsewhere, &reads()).unwrap().dir(), states.dir());
        let patches = Read {
            state: State::Patches,
            ..Read::hidden(0, Tokens::All)
        };
        assert!(open(&request, &[patches]).is_err());
        for bad in [
            Request { views: 2, ..request },
            Request {
                source: Source::Backbone(&world.backbone),
                ..request
            },
            Request {
                examples: Examples::Pictures(&world.dataset),
                ..request
            },
        ] {
            assert!(open(&bad, &reads()).is_err());
        }
    }

    #[test]
    fn a_cache_that_is_being_filled_or_does_not_fit_is_refused() {
        let world = World::new(8);
        let cache = world.cache("cache");
        let request = world.request(&cache);
        let states = open(&request, &reads()).unwrap();
        let lock = File::create(states.dir().join("lock")).unwrap();
        lock.lock().unwrap();
        assert!(open(&request, &reads()).is_ok(), "what is whole can be read");
        let more = Request { views: 3, ..request };
        let refused = open(&more, &reads()).err().unwrap().to_string();
        assert!(refused.contains("another process"), "{refused}");
        assert!(enough(&cache, 5, 5).is_ok());
        let refused = enough(&cache, 3_500_000_000, 1_000_000_000)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("3.50 GB") && refused.contains("1.00 GB"),
            "{refused}"
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_named_and_keeps_what_is_whole() {
        let world = World::new(8);
        let cache = world.cache("cache");
        let request = Request {
            views: 1,
            ..world.request(&cache)
        };
        let states = open(&request, &reads()).unwrap();
        // The second state's file goes where there is never any room.
        let dir = states.dir().to_owned();
        let name = file_name(&request, 0, Item::of(&Read::hidden(0, Tokens::All)));
        std::os::unix::fs::symlink("/dev/full", dir.join(name)).unwrap();
        let refused = open(&request, &[Read::hidden(0, Tokens::All)]).err().unwrap();
        assert!(matches!(refused, Error::DiskFull(_)), "{refused}");
        assert!(open(&request, &reads()).is_ok());
    }

    #[test]
    fn validation_has_its_share_of_every_class() {
        let labels: Vec<u32> = (0..103).map(|i| if i == 102 { 9 } else { i % 3 }).collect();
        let (train, validation) = split(&labels, 0.1, 4);
        let mut all = [train.clone(), validation.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..103).collect::<Vec<_>>());
        for class in 0..3 {
            assert_eq!(validation.iter().filter(|&&i| labels[i] == class).count(), 3);
        }
        assert!(train.contains(&102), "the only one of its class");
        assert_eq!(split(&labels, 0.1, 4).1, validation);
        assert_ne!(split(&labels, 0.1, 5).1, validation);
        assert!(split(&labels, 0.0, 4).1.is_empty() && split(&labels, f64::NAN, 4).1.is_empty());
        assert_eq!(split(&labels, 7.0, 4).0.len(), 4, "one of each class");
    }

    #[test]
    fn a_cut_file_is_completed() {
        let world = World::new(40);
        let cache = world.cache("cache");
        let request = world.request(&cache);
        let states = open(&request, &reads()).unwrap();
        let before = content(&states);
        let path = states.dir().join(file_name(&request, 1, Item::of(&reads()[0])));
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(1000)
            .unwrap();
        assert!(content(&open(&request, &reads()).unwrap()) == before);
    }
}
