//! What a run is summed up as: a table for people, a JSON object for programs.

use std::io::{ErrorKind, Write};

use serde::Serialize;
use veiltune_engine::Comparison;
use veiltune_engine::session::Plan;
use veiltune_wire::Network;

use crate::demo::Inputs;
use crate::events::{Classified, Measured};
use crate::session::overlaps;
use crate::{Error, Result};

/// Logits that differ by more than this come from inputs outside the calibrated ranges.
const CALIBRATED: f64 = 0.25;

/// What the private run gave.
pub struct Private {
    /// What the client learned, an image each.
    pub results: Vec<Classified>,
    /// What client and provider measured.
    pub measured: [Measured; 2],
}

/// The whole of it. Byte counts are pairs: client to provider, provider to client; of the dealer's, to the client and to
/// the provider.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Number of images.
    images: usize,
    /// Images whose private label is the plain-float one.
    agree: usize,
    /// Images whose true label is known.
    labelled: usize,
    /// Those of them whose private label is the true one.
    correct: usize,
    /// Largest difference of any logit to plain float.
    max_logit_error: f64,
    /// Images a pass.
    batch: usize,
    network: Network,
    comparison: Comparison,
    #[serde(flatten)]
    counted: Counts,
    /// Whether the offline phase ran during the online phase, and its seconds are part of those.
    overlapped: bool,
    seconds: Seconds,
    predicted: Counts,
    results: Vec<Row>,
    /// The provider's own count.
    #[serde(skip)]
    counted_by_provider: Counts,
}

/// What meters count and `Cost` predicts; of the dealer's bytes those to both parties, or to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counts<D = [u64; 2]> {
    /// Sequential exchanges of the online phase.
    pub rounds: u64,
    /// Bytes of the online phase: client to provider, provider to client.
    pub online_bytes: [u64; 2],
    /// Bytes of the set-up, likewise.
    pub setup_bytes: [u64; 2],
    /// Bytes from the dealer.
    pub dealer_bytes: D,
}

impl<D> Counts<D> {
    /// What a party counted.
    pub fn counted(by: &Measured, dealer_bytes: D) -> Counts<D> {
        Counts {
            rounds: by.rounds,
            online_bytes: by.online_bytes,
            setup_bytes: by.setup_bytes,
            dealer_bytes,
        }
    }

    /// What was planned; `dealer` picks of the bytes to both parties.
    pub fn predicted(plan: &Plan, dealer: impl FnOnce([u64; 2]) -> D) -> Counts<D> {
        let total = plan.tally.total();
        Counts {
            rounds: total.rounds,
            online_bytes: total.online_bytes,
            setup_bytes: plan.tally.setup_bytes,
            dealer_bytes: dealer(total.dealer_bytes),
        }
    }
}

impl<D: PartialEq + std::fmt::Debug> Counts<D> {
    /// An error unless `who` counted exactly this.
    pub fn check(&self, who: &str, counted: &Counts<D>) -> Result<()> {
        if counted == self {
            return Ok(());
        }
        Err(Error::Mismatch(format!(
            "the {who} counted {counted:?}, predicted were {self:?}"
        )))
    }
}

/// What a table of costs is of.
pub fn cost_heading(images: usize, batch: usize, network: &Network, comparison: Comparison) -> String {
    let comparison = comparison_name(comparison);
    format!(
        "\ncost (images: {images}, images a pass: {batch}, network: {network}, comparison: {comparison})\n"
    )
}

/// A row of a table of costs.
type CostRow<'a, D> = (&'a str, fn(&Counts<D>) -> u64);

/// What was counted beside what was predicted.
pub fn cost_table<D>(counted: &Counts<D>, predicted: &Counts<D>, dealer: &[CostRow<D>]) -> String {
    let common: [CostRow<D>; 5] = [
        ("rounds", |c| c.rounds),
        ("online bytes, client to provider", |c| c.online_bytes[0]),
        ("online bytes, provider to client", |c| c.online_bytes[1]),
        ("set-up bytes, client to provider", |c| c.setup_bytes[0]),
        ("set-up bytes, provider to client", |c| c.setup_bytes[1]),
    ];
    let mut rows = vec![["", "counted", "predicted"].map(String::from)];
    rows.extend(
        common
            .iter()
            .chain(dealer)
            .map(|(name, of)| [(*name).to_owned(), grouped(of(counted)), grouped(of(predicted))]),
    );
    aligned(&rows, &[1, 2])
}

/// Where the time of a party went.
#[derive(Debug, Serialize)]
pub struct Seconds {
    backbone: f64,
    setup: f64,
    offline: f64,
    online: f64,
}

impl Seconds {
    /// As `by` measured.
    pub fn new(by: &Measured) -> Seconds {
        Seconds {
            backbone: by.backbone,
            setup: by.setup,
            offline: by.offline,
            online: by.online,
        }
    }

    /// For people.
    pub fn line(&self) -> String {
        format!(
            "seconds: backbone {:.3}, set-up {:.3}, offline {:.3}, online {:.3}\n",
            self.backbone, self.setup, self.offline, self.online
        )
    }
}

/// One image.
#[derive(Debug, Serialize)]
struct Row {
    image: String,
    label: String,
    confidence: f64,
    plain_label: String,
    true_label: Option<String>,
    max_logit_error: f64,
}

impl Report {
    /// From what was planned, what was learned, and what plain float gives.
    pub fn new(inputs: &Inputs, network: Network, private: &Private, plain: &[Classified]) -> Result<Report> {
        let labels = inputs.classifier.config.method.labels();
        let label = |class: usize| {
            labels
                .get(class)
                .cloned()
                .unwrap_or_else(|| format!("class {class}"))
        };
        let mut results = Vec::with_capacity(plain.len());
        for ((got, want), truth) in private.results.iter().zip(plain).zip(&inputs.truth) {
            if got.logits.len() != want.logits.len() {
                return Err(Error::Mismatch(
                    "the client learned another number of logits than there are classes".into(),
                ));
            }
            let differences = got.logits.iter().zip(&want.logits).map(|(a, b)| (a - b).abs());
            results.push(Row {
                image: inputs.pictures.name(got.index),
                label: label(got.class),
                confidence: got.confidence,
                plain_label: label(want.class),
                true_label: truth.map(label),
                max_logit_error: differences.fold(0.0, f64::max),
            });
        }
        let [client, provider] = private.measured;
        let dealer_bytes = [client.dealer_bytes, provider.dealer_bytes];
        Ok(Report {
            images: results.len(),
            agree: results.iter().filter(|r| r.label == r.plain_label).count(),
            labelled: results.iter().filter(|r| r.true_label.is_some()).count(),
            correct: results
                .iter()
                .filter(|r| r.true_label.as_ref() == Some(&r.label))
                .count(),
            max_logit_error: results.iter().map(|r| r.max_logit_error).fold(0.0, f64::max),
            batch: inputs.batches.batch.get(),
            network,
            comparison: inputs.comparison,
            counted: Counts::counted(&client, dealer_bytes),
            counted_by_provider: Counts::counted(&provider, dealer_bytes),
            overlapped: overlaps(&inputs.plan.tally.total()),
            seconds: Seconds::new(&client),
            predicted: Counts::predicted(&inputs.plan, |both| both),
            results,
        })
    }

    /// To standard output.
    pub fn print(&self, json: bool) -> Result<()> {
        print(json, self, || self.table())
    }

    /// Both parties' meters must have counted exactly what was predicted.
    pub fn check(&self) -> Result<()> {
        self.predicted.check("client", &self.counted)?;
        self.predicted.check("provider", &self.counted_by_provider)
    }

    fn table(&self) -> String {
        let head = [
            "image",
            "private label",
            "confidence",
            "plain-float label",
            "true label",
            "logit difference",
        ];
        let mut rows = vec![head.map(String::from)];
        rows.extend(self.results.iter().map(|r| {
            [
                r.image.clone(),
                r.label.clone(),
                format!("{:.1} %", 100.0 * r.confidence),
                r.plain_label.clone(),
                r.true_label.clone().unwrap_or_else(|| "-".into()),
                format!("{:.4}", r.max_logit_error),
            ]
        }));
        let mut text = aligned(&rows, &[2, 5]);
        text += &format!(
            "\n{} of {} private labels are those of plain float; largest logit difference {:.4}\n",
            self.agree, self.images, self.max_logit_error
        );
        if self.labelled > 0 {
            text += &format!("{} of {} are the true labels\n", self.correct, self.labelled);
        }
        if self.max_logit_error > CALIBRATED {
            text += "the logits differ a lot: these pictures are not like those that the adapter was calibrated on\n";
        }

        text += &cost_heading(self.images, self.batch, &self.network, self.comparison);
        text += &cost_table(
            &self.counted,
            &self.predicted,
            &[
                ("dealer bytes, to client", |c| c.dealer_bytes[0]),
                ("dealer bytes, to provider", |c| c.dealer_bytes[1]),
            ],
        );
        text += &self.seconds.line();
        if self.overlapped {
            text += "the offline phase ran during the online phase, because there is too much material to hold at once\n";
        }
        text
    }
}

/// To standard output: one JSON object, or what people read.
pub fn print(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = match json {
        true => serde_json::to_string(value).map_err(|e| Error::io("writing JSON")(e.into()))? + "\n",
        false => text(),
    };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who stops reading has seen enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("writing the result")),
    }
}

/// To standard output; that nobody reads it is no reason to end.
pub fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// As the option `--comparison` calls it.
pub fn comparison_name(comparison: Comparison) -> &'static str {
    match comparison {
        Comparison::Fss => "fss",
        Comparison::MaskedBits => "masked-bits",
    }
}

/// Columns two spaces apart, those in `right` flush right.
pub fn aligned<R: AsRef<[String]>>(rows: &[R], right: &[usize]) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let cell = |row: &R, i: usize| row.as_ref().get(i).map_or(0, |text| text.chars().count());
    let width: Vec<usize> = (0..columns)
        .map(|i| rows.iter().map(|row| cell(row, i)).max().unwrap_or(0))
        .collect();
    let line = |row: &R| {
        let cells = row.as_ref().iter().enumerate();
        let cells = cells.map(|(i, text)| match right.contains(&i) {
            true => format!("{text:>0$}", width[i]),
            false => format!("{text:<0$}", width[i]),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// 1234567 as 1 234 567.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|g| std::str::from_utf8(g).expect("digits are ASCII"))
        .collect();
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_that_was_not_predicted_is_an_error() {
        let counts = Counts {
            rounds: 3,
            online_bytes: [5, 6],
            setup_bytes: [0, 7],
            dealer_bytes: [8, 9],
        };
        let with = |change: fn(&mut Report)| {
            let mut report = Report {
                images: 0,
                agree: 0,
                labelled: 0,
                correct: 0,
                max_logit_error: 0.0,
                batch: 1,
                network: Network::NONE,
                comparison: Comparison::Fss,
                counted: counts.clone(),
                overlapped: false,
                seconds: Seconds {
                    backbone: 0.0,
                    setup: 0.0,
                    offline: 0.0,
                    online: 0.0,
                },
                predicted: counts.clone(),
                results: Vec::new(),
                counted_by_provider: counts.clone(),
            };
            change(&mut report);
            report.check()
        };
        with(|_| {}).unwrap();
        let changes: [fn(&mut Report); 5] = [
            |r| r.counted.rounds += 1,
            |r| r.counted.online_bytes.swap(0, 1),
            |r| r.counted.setup_bytes[1] -= 1,
            |r| r.counted_by_provider.dealer_bytes[0] += 1,
            |r| r.predicted.rounds += 1,
        ];
        for change in changes {
            let e = with(change).unwrap_err();
            assert_eq!(e.exit_code(), 1);
            assert!(e.to_string().contains("predicted"), "{e}");
        }
    }

    #[test]
    fn numbers_and_columns_are_easy_to_read() {
        assert_eq!(
            [0, 999, 1000, 1234567].map(grouped),
            ["0", "999", "1 000", "1 234 567"]
        );
        let rows = [["a", "é"], ["long", "12"]].map(|row| row.map(String::from));
        assert_eq!(aligned(&rows, &[1]), "a      é\nlong  12\n");
    }
}
