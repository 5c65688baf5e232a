//! Data files: a line is an example, its columns stand between tabs.

use std::collections::BTreeSet;
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
        named.unwrap_or(Layout::plain(task.pairs, first))
    }

    /// The texts and then the label.
    fn plain(pairs: bool, first: &[&str]) -> Self {
        let texts = if pairs { 2 } else { 1 };
        Layout {
            columns: texts + 1,
            text_a: 0,
            text_b: pairs.then_some(1),
            label: texts,
            header: first.last() == Some(&"label"),
        }
    }
}

/// The examples of a file.
pub fn read(task: &Task, path: &Path) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    let layout = |first: &[&str]| Ok(Layout::of(task, first));
    lines(path, layout, |line, texts, label| {
        let unknown = || Error::Label {
            file: path.to_owned(),
            line,
            label: label.chars().take(80).collect(),
            known: task.labels.join(", "),
        };
        let [text_a, text_b] = texts;
        examples.push(Example {
            text_a: text_a.unwrap_or_default(),
            text_b,
            label: task.labels.iter().position(|l| l == label).ok_or_else(unknown)?,
        });
        Ok(())
    })?;
    if examples.is_empty() {
        let detail = format!("{} has no example", path.display());
        return Err(refused(&task.name, detail));
    }
    Ok(examples)
}

/// The labels of a file, sorted, and whether it has pairs of texts.
pub fn labels(path: &Path) -> Result<(Vec<String>, bool)> {
    let (mut found, mut pairs) = (BTreeSet::new(), false);
    let layout = |first: &[&str]| match first.len() {
        2 | 3 => {
            pairs = first.len() == 3;
            Ok(Layout::plain(pairs, first))
        }
        n => Err(format!(
            "the number of columns is {n}: give lines of text and label, or two texts and label, between tabs, or name the columns in a task file"
        )),
    };
    lines(path, layout, |_, _, label| {
        if !found.contains(label) {
            found.insert(label.to_owned());
        }
        Ok(())
    })?;
    Ok((found.into_iter().collect(), pairs))
}

/// Calls `each` with the number, texts and label of every line that has them; `layout` says where, from the first line.
fn lines(
    path: &Path,
    layout: impl FnOnce(&[&str]) -> std::result::Result<Layout, String>,
    mut each: impl FnMut(usize, [Option<String>; 2], &str) -> Result<()>,
) -> Result<()> {
    let bytes = files::read(path, MAX_FILE)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let (mut first, mut known) = (Some(layout), None);
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
        if let Some(layout) = first.take() {
            let layout = known.insert(layout(&columns).map_err(bad)?);
            if layout.header {
                continue;
            }
        }
        let layout: &Layout = known.as_ref().expect("set by the first line");
        if columns.len() != layout.columns {
            let (found, wanted) = (columns.len(), layout.columns);
            let detail = format!(
                "{found} instead of {wanted} columns: separate texts and label by tabs, one example a line"
            );
            return Err(bad(detail));
        }
        let text = |at: usize| match columns[at].trim() {
            "" => Err(bad("an empty text: remove the line".into())),
            text => Ok(text.to_owned()),
        };
        let texts = [Some(text(layout.text_a)?), layout.text_b.map(text).transpose()?];
        each(number, texts, columns[layout.label].trim())?;
    }
    Ok(())
}
