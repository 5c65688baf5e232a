//! What a task is: a template, a word for each label, and where its data has what.
//!
//! A task file is JSON; this one takes lines of `text<TAB>label`:
//!
//! ```json
//! {
//!   "name": "reviews",
//!   "masked": "{prompt} . {text} . It was {mask} .",
//!   "causal": "{prompt} . {text} . It was {mask}",
//!   "verbalizer": { "negative": "bad", "positive": "great" }
//! }
//! ```
//!
//! `masked` is the template for models with a masked-language-model head, `causal` for those that predict the next word;
//! one of them is enough. `{prompt}` is where the tuned prompt stands, `{mask}` where the answer is read, which must be the
//! end of a causal template. A task on pairs has `{text_a}` and `{text_b}` for `{text}`. Labels are numbered in the order
//! of their names. Three entries may follow: `"columns": { "text": "sentence", "label": "gold" }` names columns of a file
//! with a header, `"metric": { "f1": "positive" }` has F1 for accuracy, and `"initial": "..."` is the text at the prompt's
//! place before tuning, in the model's language.

mod data;
mod template;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use veiltune_hub::files;

pub use data::Example;
pub use template::{Family, Piece, Template};

use crate::{Error, Metric, Result};

/// Longest task file, bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most labels.
const MAX_LABELS: usize = 1024;

/// The tasks that are built in, by the names of their files.
const BUILT_IN: [(&str, &str); 6] = [
    ("sst-2", include_str!("../../tasks/sst-2.json")),
    ("yelp", include_str!("../../tasks/yelp.json")),
    ("ag-news", include_str!("../../tasks/ag-news.json")),
    ("mrpc", include_str!("../../tasks/mrpc.json")),
    ("rte", include_str!("../../tasks/rte.json")),
    ("nsmc", include_str!("../../tasks/nsmc.json")),
];

/// A classification task. Not secret: a template and its words say nothing of the texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Description", into = "Description")]
pub struct Task {
    /// For reports.
    pub name: String,
    /// The labels as data files have them, sorted; elsewhere a label is its position here.
    pub labels: Vec<String>,
    /// Each label's word.
    pub words: Vec<String>,
    /// What is reported.
    pub metric: Metric,
    /// Whether examples are pairs of texts.
    pub pairs: bool,
    /// What stands at the prompt's place before tuning, if the task says.
    pub initial: Option<String>,
    masked: Option<Template>,
    causal: Option<Template>,
    columns: Option<Columns>,
}

/// A task file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    masked: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causal: Option<String>,
    verbalizer: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    columns: Option<Columns>,
    #[serde(default)]
    metric: Reported,
}

/// Names of a data file's columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Columns {
    #[serde(alias = "text")]
    text_a: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    text_b: Option<String>,
    label: String,
}

/// [`Metric`], with the label by name.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reported {
    #[default]
    Accuracy,
    F1(String),
}

impl Task {
    /// The built-in tasks' names: the five of the SecP-Tuning paper, and Korean film reviews.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// The built-in task `name`.
    pub fn built_in(name: &str) -> Option<Self> {
        let (_, text) = BUILT_IN.iter().find(|(n, _)| *n == name)?;
        Some(Self::parse(name, text.as_bytes()).expect("built-in tasks are sound"))
    }

    /// The built-in task of that name, or the one that the file describes.
    ///
    /// # Errors
    /// As [`Task::open`]; one for a file that is not there lists the built-in names.
    pub fn named(name: &str) -> Result<Self> {
        match Self::built_in(name) {
            Some(task) => Ok(task),
            None if !Path::new(name).exists() => {
                let names: Vec<&str> = Self::built_in_names().collect();
                let detail = format!("neither a file nor one of {}", names.join(", "));
                Err(refused(name, detail))
            }
            None => Self::open(Path::new(name)),
        }
    }

    /// Reads a task file.
    ///
    /// # Errors
    /// If it cannot be read or does not make sense: each error says what to do.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&path.to_string_lossy(), &files::read(path, MAX_FILE)?)
    }

    /// Texts of these labels, for a classifier that is trained: there is no template to prompt with, and labels stand for their words.
    pub fn of_labels(labels: Vec<String>, pairs: bool) -> Self {
        Task {
            name: "texts".into(),
            words: labels.clone(),
            labels,
            metric: Metric::Accuracy,
            pairs,
            initial: None,
            masked: None,
            causal: None,
            columns: None,
        }
    }

    /// As [`Task::of_labels`], the labels being those of a data file of `text<TAB>label` or `text<TAB>text<TAB>label`.
    ///
    /// # Errors
    /// As [`Task::examples`]; and if the file has other columns, or not 2 to 1024 labels.
    pub fn of_data(path: &Path) -> Result<Self> {
        let (labels, pairs) = data::labels(path)?;
        check_labels(labels.len()).map_err(|detail| refused(&path.to_string_lossy(), detail))?;
        Ok(Task::of_labels(labels, pairs))
    }

    /// Takes a task file's content; `file` is its name in errors.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let description: Description =
            serde_json::from_slice(bytes).map_err(|e| refused(file, e.to_string()))?;
        Task::try_from(description).map_err(|detail| refused(file, detail))
    }

    /// The template for models of `family`.
    ///
    /// # Errors
    /// If the task has none.
    pub fn template(&self, family: Family) -> Result<&Template> {
        let template = match family {
            Family::Masked => &self.masked,
            Family::Causal => &self.causal,
        };
        let missing = || {
            let name = family.name();
            refused(
                &self.name,
                format!("no template for {name} models: add \"{name}\" to the task"),
            )
        };
        template.as_ref().ok_or_else(missing)
    }

    /// Reads a data file. One with the columns that the task names in its header; or else lines of `text<TAB>label`, or
    /// `text<TAB>text<TAB>label` for pairs, below a header whose last column is `label` or none. Quotes stand for themselves;
    /// a byte-order mark, line ends of either kind and empty lines are passed over.
    ///
    /// # Errors
    /// Naming file and line, if a line is not UTF-8, has another number of columns, an empty text, or a label without a
    /// word; and if the file cannot be read or has no example.
    pub fn examples(&self, path: &Path) -> Result<Vec<Example>> {
        data::read(self, path)
    }
}

fn check_labels(count: usize) -> std::result::Result<(), String> {
    match count {
        2..=MAX_LABELS => Ok(()),
        _ => Err(format!("{count} labels; 2 to {MAX_LABELS} are possible")),
    }
}

fn refused(task: &str, detail: impl Into<String>) -> Error {
    Error::Task {
        task: task.into(),
        detail: detail.into(),
    }
}

impl TryFrom<Description> for Task {
    type Error = String;

    fn try_from(d: Description) -> std::result::Result<Self, String> {
        let template = |family: Family, text: Option<String>| match text {
            Some(text) => Template::parse(&text, family)
                .map(Some)
                .map_err(|e| format!("template \"{}\": {e}", family.name())),
            None => Ok(None),
        };
        let masked = template(Family::Masked, d.masked)?;
        let causal = template(Family::Causal, d.causal)?;
        let pairs: Vec<bool> = masked.iter().chain(&causal).map(Template::pairs).collect();
        let Some(&first) = pairs.first() else {
            return Err("no template: add \"masked\" or \"causal\"".into());
        };
        if pairs.iter().any(|p| *p != first) {
            return Err("one template has two texts, the other one: give both the same".into());
        }
        if d.columns.as_ref().is_some_and(|c| c.text_b.is_some() != first) {
            return Err("the columns do not name the texts that the template has".into());
        }
        check_labels(d.verbalizer.len()).map_err(|e| format!("a verbalizer with {e}"))?;
        for (label, word) in &d.verbalizer {
            if word.trim().is_empty() || word.trim() != word {
                return Err(format!(
                    "the word of label {label:?} is empty, or has space around it"
                ));
            }
        }
        let (labels, words): (Vec<String>, Vec<String>) = d.verbalizer.into_iter().unzip();
        let metric = match d.metric {
            Reported::Accuracy => Metric::Accuracy,
            Reported::F1(label) => Metric::F1 {
                positive: (labels.iter().position(|l| *l == label))
                    .ok_or_else(|| format!("F1 of label {label:?}, which has no word in the verbalizer"))?,
            },
        };
        Ok(Task {
            name: d.name,
            labels,
            words,
            metric,
            pairs: first,
            initial: d.initial,
            masked,
            causal,
            columns: d.columns,
        })
    }
}

impl From<Task> for Description {
    fn from(task: Task) -> Self {
        let metric = match task.metric {
            Metric::Accuracy => Reported::Accuracy,
            Metric::F1 { positive } => Reported::F1(task.labels[positive].clone()),
        };
        Description {
            name: task.name,
            masked: task.masked.map(|t| t.to_string()),
            causal: task.causal.map(|t| t.to_string()),
            verbalizer: task.labels.into_iter().zip(task.words).collect(),
            initial: task.initial,
            columns: task.columns,
            metric,
        }
    }
}

#[cfg(test)]
mod tests;
