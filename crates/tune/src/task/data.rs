//! Data files: a line is an example, its columns stand between tabs.

use std::fmt;
use std::path::Path;

use veiltune_hub::files;

use super::{Task, refused};
use crate::{Error, Result};

/// Longest data file, bytes.
const MAX_FILE: u64 = 1 << 31;

/// A labelled text, or pair of texts. The data owner's secret, which its debug print does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Example {
    /// The text, or the first of a pair.
    pub text_a: String,
    /// The second text of a pair.
    pub text_b: Option<String>,
    /// Position in [`Task::labels`].
    pub label: usize,
}

impl fmt::Debug for Example {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Example(..)")
    }
}

/// Where a line has what.
struct Layout {
    columns: usize,
    text_a: usize,
    text_b: Option<usize>,
    label: usize,
    /// Whether the first line names the columns.
    header: bool,
}

impl Layout {
    fn of(task: &Task, first: &[&str]) -> Self {
        let named = task.columns.as_ref().and_then(|names| {
            let find = |name: &str| first.iter().position(|column| *column == name);
            let text_b = match &names.text_b {
                Some(name) => Some(find(name)?),
                None => None,
            };
            Some(Layout {
                columns: first.len(),
                text_a: find(&names.text_a)?,
                text_b,
                label: find(&names.label)?,
                header: true,
            })
        });
        let texts = if task.pairs() { 2 } else { 1 };
        named.unwrap_or(Layout {
            columns: texts + 1,
            text_a: 0,
            text_b: (texts == 2).then_some(1),
            label: texts,
            header: first.last() == Some(&"label"),
        })
    }
}

pub fn read(task: &Task, path: &Path) -> Result<Vec<Example>> {
    let bytes = files::read(path, MAX_FILE)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let mut layout = None;
    let mut examples = Vec::new();
    for (number, line) in bytes.split(|b| *b == b'\n').enumerate() {
        let number = number + 1;
        let bad = |detail: String| Error::Line {
            file: path.to_owned(),
            line: number,
            detail,
        };
        let line = std::str::from_utf8(line)
            .map_err(|_| bad("not UTF-8: convert the file, or remove the line".into()))?;
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let columns: Vec<&str> = line.split('\t').collect();
        if layout.is_none() {
            let first = layout.insert(Layout::of(task, &columns));
            if first.header {
                continue;
            }
        }
        let layout = layout.as_ref().expect("set by the first line");
        if columns.len() != layout.columns {
            let (found, wanted) = (columns.len(), layout.columns);
            let detail = format!(
                "{found} columns, not {wanted}: separate texts and label by tabs, one example a line"
            );
            return Err(bad(detail));
        }
        let text = |at: usize| match columns[at].trim() {
            "" => Err(bad("an empty text: remove the line".into())),
            text => Ok(text.to_owned()),
        };
        let label = columns[layout.label].trim();
        let unknown = || Error::Label {
            file: path.to_owned(),
            line: number,
            label: label.chars().take(80).collect(),
            known: task.labels.join(", "),
        };
        examples.push(Example {
            text_a: text(layout.text_a)?,
            text_b: layout.text_b.map(text).transpose()?,
            label: task.labels.iter().position(|l| l == label).ok_or_else(unknown)?,
        });
    }
    if examples.is_empty() {
        let detail = format!("{} has no example", path.display());
        return Err(refused(&task.name, detail));
    }
    Ok(examples)
}
