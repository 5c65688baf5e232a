//! Training, measuring and searching adapters: in the clear, at the provider.

pub mod evaluate;
pub mod search;
pub mod train;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use veiltune_adapt::cache::{self, Examples, Request, Source, States};
use veiltune_adapt::texts::Texts;
use veiltune_engine::{Comparison, Cost};
use veiltune_hub::dataset::{OnBad, Split};
use veiltune_hub::{Augment, Dataset, Pooling, TextForm, adapter, files};
use veiltune_nn::encoder::Tuning;
use veiltune_nn::load::{Classifier, Served};
use veiltune_nn::{Backbone, Method, Read, TextEncoder};
use veiltune_tune::{Metric, Task};
use veiltune_wire::Network;

use crate::inputs;
use crate::program::{Batches, Classification, Compare};
use crate::progress::tell;
use crate::{Error, Result};

/// Pictures or texts, and the backbone that sees them.
#[derive(Args, Clone, Debug)]
pub struct DataArgs {
    /// Labelled pictures: an image folder, CIFAR files, or an IDX folder; or a file of labelled texts, .tsv or .txt
    ///
    /// An image folder has a folder of PNG or JPEG files for each class, perhaps once more below train/ and test/ (or val/).
    /// CIFAR-10 and CIFAR-100 are read in their binary format, one file or a folder of them; IDX is the format of MNIST and
    /// Fashion-MNIST. Texts are lines of `text<TAB>label` or `text<TAB>text<TAB>label`, or in the layout of the task.
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// The data are texts of this task, as for `veiltune tune`: sst-2, yelp, ag-news, mrpc, rte, nsmc, or a task file
    ///
    /// Of the task the labels, the columns of its files and the metric are used; templates and words are not. Without it the labels
    /// are those of the file.
    #[arg(long, value_name = "TASK", requires = "backbone")]
    pub task: Option<String>,
    /// The public backbone: a folder, or a model of the hub as OWNER/NAME [default: the embedded one, which sees pictures]
    ///
    /// A folder has config.json, model.safetensors, and preprocessor_config.json for pictures or the tokenizer for texts. Vision
    /// transformers of the kinds vit, deit, dinov2 and clip are known, and text encoders of the kinds bert (MiniLM too), roberta
    /// and albert. A model that is not in the hub's cache is downloaded.
    #[arg(long, value_name = "DIR|NAME")]
    pub backbone: Option<String>,
    /// Use only N pictures or texts, the same share of each class
    #[arg(long, visible_alias = "texts", value_name = "N")]
    pub pictures: Option<usize>,
    /// Leave out pictures that cannot be read, naming and counting them; without this they are an error that names up to ten
    #[arg(long)]
    pub skip_unreadable: bool,
    /// Folder for the backbone's hidden states [default: veiltune in the user's cache folder]
    ///
    /// They are computed once for each view of each picture and read by every later run. An adapter of scope s takes pictures x
    /// views x (s x tokens + 1) x width x 2 bytes: 0.3 MB a picture for each view and scope with ViT-B/16.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DataArgs {
    /// Threads that are meant.
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores).max(1)
    }

    /// What artefacts call the backbone.
    pub fn backbone_name(&self) -> String {
        self.backbone.clone().unwrap_or_else(|| "veiltune/demo".into())
    }

    /// The backbone, downloaded if need be.
    pub fn open_backbone(&self, form: &FormArgs) -> Result<Base> {
        let name = self.backbone.as_deref();
        Ok(match self.task()? {
            Some(task) => Base::Texts(Box::new(inputs::encoder(name, form.form(&task))?)),
            None if form.tokens.is_some() || form.pooling.is_some() => {
                return Err(Error::Input(
                    "--tokens and --pooling are for texts: give a file of them to --data (.tsv or .txt), or their --task".into(),
                ));
            }
            None => Base::Pictures(Box::new(inputs::backbone(name)?)),
        })
    }

    /// The task, if the data are texts.
    fn task(&self) -> Result<Option<Task>> {
        match &self.task {
            Some(name) => Task::named(name)
                .map(Some)
                .map_err(|e| Error::Input(format!("--task: {e}"))),
            None if self.is_text_file() => Task::of_data(&self.data).map(Some).map_err(of_texts("--data")),
            None => Ok(None),
        }
    }

    fn is_text_file(&self) -> bool {
        let extension = self.data.extension().and_then(|e| e.to_str()).unwrap_or_default();
        ["tsv", "txt"].iter().any(|e| extension.eq_ignore_ascii_case(e))
    }

    /// The labelled data at `path`, which came with `option`, as `source` sees them.
    pub fn open(&self, source: Source, path: &Path, split: Split, option: &str) -> Result<Labelled> {
        self.open_as(self.task()?, source, path, split, option)
    }

    /// The labelled data to test an adapter of these labels on.
    pub fn open_test(&self, source: Source, labels: &[String]) -> Result<Labelled> {
        let task = match (&self.task, source) {
            // A file of texts need not have all of the labels.
            (None, Source::Texts(encoder)) if self.is_text_file() => {
                Some(Task::of_labels(labels.to_vec(), encoder.form().pairs))
            }
            _ => self.task()?,
        };
        self.open_as(task, source, &self.data, Split::Test, "--data")
    }

    fn open_as(
        &self,
        task: Option<Task>,
        source: Source,
        path: &Path,
        split: Split,
        option: &str,
    ) -> Result<Labelled> {
        if self.pictures == Some(0) {
            return Err(Error::Input("--pictures (or --texts) must be at least 1".into()));
        }
        match (source, task) {
            (Source::Texts(_), Some(_)) if self.skip_unreadable => Err(Error::Input(
                "--skip-unreadable is for pictures: leave it out".into(),
            )),
            (Source::Texts(encoder), Some(task)) => self.texts(encoder, &task, path, option),
            (Source::Texts(_), None) => Err(Error::Input(
                "the adapter is for texts: give a file of them to --data (.tsv or .txt), or their --task"
                    .into(),
            )),
            (_, Some(_)) => Err(Error::Input(
                "the adapter is for pictures, not for texts: leave --task out, and give pictures to --data"
                    .into(),
            )),
            (_, None) => {
                let (dataset, skipped) = self.pictures(path, split, option)?;
                Ok(Labelled {
                    data: Data::Pictures(dataset),
                    skipped,
                })
            }
        }
    }

    fn texts(&self, encoder: &TextEncoder, task: &Task, path: &Path, option: &str) -> Result<Labelled> {
        let mut examples = task.examples(path).map_err(of_texts(option))?;
        if let Some(n) = self.pictures.filter(|n| *n < examples.len()) {
            let labels: Vec<u32> = examples.iter().map(|e| e.label as u32).collect();
            let share = n as f64 / labels.len() as f64;
            let kept = cache::split(&labels, share, 0).1;
            examples = kept.iter().map(|&i| examples[i].clone()).collect();
        }
        let texts = Texts::new(encoder, &examples, task.labels.clone()).map_err(of_texts(option))?;
        match texts.cut() {
            0 => {}
            cut => tell(&format!(
                "{cut} of {} texts in {} have more than {} tokens and are cut",
                texts.len(),
                path.display(),
                encoder.form().tokens
            )),
        }
        Ok(Labelled {
            data: Data::Texts(texts, task.metric),
            skipped: 0,
        })
    }

    /// The labelled pictures at `path`, which came with `option`, all of which can be read; and how many were left out because
    /// they cannot.
    fn pictures(&self, path: &Path, split: Split, option: &str) -> Result<(Dataset, usize)> {
        let of_data = |e: veiltune_hub::Error| {
            Error::Input(format!(
                "{e}; give labelled pictures to {option}: an image folder, CIFAR files or an IDX folder"
            ))
        };
        let found = Dataset::open(path, split).map_err(of_data)?;
        let found = match self.pictures {
            Some(n) if n < found.len() => {
                let labels: Vec<u32> = (0..found.len()).map(|i| found.label(i) as u32).collect();
                let share = n as f64 / found.len() as f64;
                found.subset(&cache::split(&labels, share, 0).1)
            }
            _ => found,
        };
        let on_bad = match self.skip_unreadable {
            true => OnBad::Skip,
            false => OnBad::Fail,
        };
        let bar = Bar::new("pictures");
        let total = found.len();
        let advice = match on_bad {
            OnBad::Skip => "replace its pictures, or remove the class",
            OnBad::Fail => "replace the picture, or leave out what cannot be read with --skip-unreadable",
        };
        let (read, skipped) = found
            .verify(on_bad, &mut |n| bar.at(n, total, ""))
            .map_err(|e| Error::Input(format!("{e}; {advice}")))?;
        drop(bar);
        for s in &skipped {
            tell(&format!("skipped {}: {}", s.name, s.reason));
        }
        if !skipped.is_empty() {
            tell(&format!(
                "{} of {total} pictures cannot be read and are left out",
                skipped.len()
            ));
        }
        Ok((read, skipped.len()))
    }

    /// The states that `reads` need, from the cache or computed now.
    pub fn states(
        &self,
        labelled: &Labelled,
        source: Source,
        reads: &[Read],
        views: Views,
        interrupted: &AtomicBool,
    ) -> Result<States> {
        let dir = match &self.cache {
            Some(dir) => dir.clone(),
            None => user_cache()?,
        };
        let bar = Bar::new("hidden states");
        let request = Request {
            dir: &dir,
            source,
            examples: labelled.examples(),
            views: views.count,
            augment: Augment {
                scale: [views.smallest, 1.0],
                ..Augment::default()
            },
            seed: views.seed,
            threads: self.threads(),
        };
        let states = States::open_or_compute(
            &request,
            reads,
            &mut |p| bar.at(p.done, p.total, &left(p.seconds_left())),
            interrupted,
        );
        states.map_err(|e| match e {
            veiltune_adapt::Error::Model(e) => {
                inputs::bad_weights(e, self.backbone.as_deref().map(Path::new), "--backbone")
            }
            e @ veiltune_adapt::Error::Io { .. } => {
                Error::Input(format!("{e}; give a folder that can be written to --cache"))
            }
            e => e.into(),
        })
    }
}

/// Which views of each picture.
#[derive(Clone, Copy, Debug)]
pub struct Views {
    /// How many; the first is the picture as in testing.
    pub count: usize,
    /// Smallest share of the picture's area in the others.
    pub smallest: f64,
    /// Seed of the others.
    pub seed: u64,
}

impl Views {
    /// Only as in testing.
    pub const CENTRE: Views = Views {
        count: 1,
        smallest: 1.0,
        seed: 0,
    };
}

/// How a text encoder reads texts.
#[derive(Args, Clone, Debug)]
pub struct FormArgs {
    /// Most tokens of a text, special ones included; longer texts are cut, from shorter ones nobody learns their length [default: 128]
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// What stands for a whole text [default: mean]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub pooling: Option<PoolingArg>,
}

/// What stands for a whole text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PoolingArg {
    /// The mean of its tokens' states, as in sentence encoders
    Mean,
    /// The state of the token that begins it
    Class,
}

impl FormArgs {
    fn form(&self, task: &Task) -> TextForm {
        TextForm {
            tokens: self.tokens.unwrap_or(128),
            pooling: match self.pooling {
                None | Some(PoolingArg::Mean) => Pooling::Mean,
                Some(PoolingArg::Class) => Pooling::Class,
            },
            pairs: task.pairs,
        }
    }
}

/// A public backbone.
pub enum Base {
    /// Of pictures.
    Pictures(Box<Backbone>),
    /// Of texts.
    Texts(Box<TextEncoder>),
}

impl Base {
    /// As what computes states.
    pub fn source(&self) -> Source<'_> {
        match self {
            Base::Pictures(backbone) => Source::Backbone(backbone),
            Base::Texts(encoder) => Source::Texts(encoder),
        }
    }
}

/// Labelled data as they were found.
pub struct Labelled {
    data: Data,
    /// Pictures that were left out because they cannot be read.
    pub skipped: usize,
}

enum Data {
    Pictures(Dataset),
    /// And what is reported of them.
    Texts(Texts, Metric),
}

impl Labelled {
    /// For the cache.
    pub fn examples(&self) -> Examples<'_> {
        match &self.data {
            Data::Pictures(dataset) => Examples::Pictures(dataset),
            Data::Texts(texts, _) => Examples::Texts(texts),
        }
    }

    /// What they are.
    pub fn noun(&self) -> &'static str {
        match self.data {
            Data::Pictures(_) => "pictures",
            Data::Texts(..) => "texts",
        }
    }

    /// F1 of what was predicted, for texts of which that is reported.
    pub fn f1(&self, predicted: &[u32]) -> Option<f64> {
        let Data::Texts(texts, metric @ Metric::F1 { .. }) = &self.data else {
            return None;
        };
        let numbers = |of: &[u32]| -> Vec<usize> { of.iter().map(|&l| l as usize).collect() };
        Some(metric.of(&numbers(predicted), &numbers(texts.labels())))
    }

    /// Refuses data of other classes; those of texts are their task's.
    pub fn check_same_classes(&self, other: &Labelled) -> Result<()> {
        match (&self.data, &other.data) {
            (Data::Pictures(own), Data::Pictures(other)) => own
                .check_same_classes(other)
                .map_err(|e| Error::Input(format!("{e}; give the same classes to --data and --test"))),
            _ => Ok(()),
        }
    }
}

/// What computes the states that `method` reads, on this backbone.
pub fn source<'a>(method: &'a Method, backbone: Source<'a>) -> Source<'a> {
    if let Method::Encoder(c) = method
        && let Tuning::MpcVit { preprocess } = &c.tuning
    {
        return Source::Pixels {
            vit: &c.vit,
            preprocess,
        };
    }
    backbone
}

/// What each of the methods reads, without repetitions.
pub fn all_reads(methods: &[&Method], layers: usize) -> Result<Vec<Read>> {
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for method in methods {
        for read in method
            .reads(layers)?
            .into_iter()
            .chain(method.served().reads(layers)?)
        {
            if seen.insert((read.state, read.tokens)) {
                all.push(read);
            }
        }
    }
    Ok(all)
}

/// The comparison that serves one image soonest over `network`, and the exact cost with it.
pub fn cost_of_one(method: &Method, network: &Network) -> Result<(Comparison, Cost)> {
    let one = Batches {
        images: 1,
        batch: std::num::NonZeroUsize::MIN,
    };
    let served = Served::shapes(method);
    let mut program = Classification::public(&served, one);
    program.comparison = Compare::Auto.over(network, &program)?;
    Ok((program.comparison, program.plan()?.tally.total()))
}

/// Set by Ctrl-C.
pub fn interruptible() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || {
        // Who insists does not wait for the next safe point.
        if set.load(Relaxed) {
            std::process::exit(130);
        }
        // Said first: the safe point may be at once, and what is said there comes last.
        tell("veiltune: stopping at the next safe point; interrupt again to stop at once");
        set.store(true, Relaxed);
    })
    .map_err(|e| Error::io("catching interruptions")(std::io::Error::other(e)))?;
    Ok(flag)
}

/// The error of a file of texts that came with `option`.
fn of_texts<E: std::fmt::Display>(option: &str) -> impl FnOnce(E) -> Error {
    move |e| Error::Input(format!("{e}; give labelled texts to {option}"))
}

/// Seconds as people say them.
pub fn left(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => String::new(),
        s if s < 90.0 => format!("{s:.0} s left"),
        s if s < 5400.0 => format!("{:.0} min left", s / 60.0),
        s => format!("{:.1} h left", s / 3600.0),
    }
}

/// Tells the user how a command of this module was interrupted, which is not how a run of three roles is.
pub fn told(result: Result<()>) -> (Result<()>, bool) {
    let interrupted = matches!(result, Err(Error::Interrupted));
    if interrupted {
        tell("veiltune: interrupted; what is done is kept, and the same command goes on from there");
    }
    (result, interrupted)
}

/// Refuses data in which there is nothing to tell apart.
pub fn check_classes(labelled: &Labelled) -> Result<()> {
    match labelled.examples().classes() {
        [only] => Err(Error::Input(format!(
            "--data has one class, {only}: there is nothing to tell apart; give {} of at least two",
            labelled.noun()
        ))),
        _ => Ok(()),
    }
}

/// Says of how many classes nothing is trained on, or validated on if anything was to be.
pub fn warn_of_empty_classes(states: &States, noun: &str, (learn, check): (&[usize], &[usize]), share: f64) {
    let all = states.classes().len();
    let without = |which: &[usize]| {
        let seen: BTreeSet<u32> = which.iter().map(|&i| states.labels()[i]).collect();
        all - seen.len()
    };
    match without(learn) {
        0 => {}
        count => tell(&format!(
            "no {noun} of {count} of {all} classes are left to train on, so these are never recognised; give more {noun}, or a \
             smaller --validation"
        )),
    }
    match without(check) {
        count if count > 0 && share > 0.0 => tell(&format!(
            "no {noun} of {count} of {all} classes are left to validate on; give more {noun}, or a larger --validation"
        )),
        _ => {}
    }
}

/// Refuses a file in the place of the folder that --out names.
pub fn check_out(out: &Path) -> Result<()> {
    match out.exists() && !out.is_dir() {
        true => Err(Error::Input(format!(
            "{} is a file; give a folder to --out",
            out.display()
        ))),
        false => Ok(()),
    }
}

/// Refuses to write an adapter over another one: that in `dir`, which `option` names, if it is not of a run that left `state`.
pub fn check_adapter(dir: &Path, state: &Path, option: &str) -> Result<()> {
    check_file(&dir.join(adapter::CONFIG_FILE), state, option)
}

/// As [`check_adapter`], of another file.
pub fn check_file(file: &Path, state: &Path, option: &str) -> Result<()> {
    match file.exists() && !state.exists() {
        true => Err(Error::Input(format!(
            "{} is of another run and would be overwritten; give another folder to {option}, or remove that one",
            file.display()
        ))),
        false => Ok(()),
    }
}

/// Makes a folder below the one that --out names, or that one; what is learned from private data is its user's alone.
pub fn make(dir: &Path) -> Result<()> {
    files::private_folder(dir).map_err(|e| Error::Input(format!("{e}; {WRITABLE}")))
}

/// Writes a file below the folder that --out names, whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    files::write_atomic(path, bytes).map_err(|e| Error::Input(format!("{e}; {WRITABLE}")))
}

/// As [`write`], `value` as JSON.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    files::write_json(path, value).map_err(|e| Error::Input(format!("{e}; {WRITABLE}")))
}

/// Writes an artefact, its configuration last.
pub fn write_adapter(dir: &Path, classifier: &Classifier) -> Result<()> {
    classifier
        .write(dir)
        .map_err(|e| Error::Input(format!("{e}; {WRITABLE}")))
}

const WRITABLE: &str = "give a folder with room that can be written to --out, and run the same command again";

fn user_cache() -> Result<PathBuf> {
    let var = |key| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    base.map(|b| b.join("veiltune"))
        .ok_or_else(|| Error::Input("no cache folder of the user is known; give --cache".into()))
}

/// A bar on a terminal; elsewhere a line now and then.
pub struct Bar {
    bar: ProgressBar,
    name: &'static str,
    said: std::cell::Cell<std::time::Instant>,
}

/// Between two lines where there is no terminal.
const QUIET: std::time::Duration = std::time::Duration::from_secs(30);

impl Bar {
    /// Of so far unknown length.
    pub fn new(name: &'static str) -> Bar {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{prefix:16} {bar:30} {pos}/{len}  {elapsed}  {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(name);
        Bar {
            bar,
            name,
            said: std::cell::Cell::new(std::time::Instant::now()),
        }
    }

    /// So much is done; `note` says more.
    pub fn at(&self, done: usize, total: usize, note: &str) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(note.to_owned());
        if self.bar.is_hidden() && self.said.get().elapsed() > QUIET {
            self.say(&format!("{}: {done} of {total}  {note}", self.name));
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        self.said.set(std::time::Instant::now());
        self.bar.suspend(|| tell(line));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
