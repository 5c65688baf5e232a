//! What a run is summed up as: a table for people, a JSON object for programs.

use std::io::{ErrorKind, Write};

use serde::Serialize;
use veiltune_wire::Network;

use crate::demo::Inputs;
use crate::events::{Classified, Measured};
use crate::job::overlaps;
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

/// What meters count and `Cost` predicts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Counts {
    rounds: u64,
    online_bytes: [u64; 2],
    setup_bytes: [u64; 2],
    dealer_bytes: [u64; 2],
}

#[derive(Debug, Serialize)]
struct Seconds {
    backbone: f64,
    setup: f64,
    offline: f64,
    online: f64,
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
        let labels = &inputs.classifier.config.labels;
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
        let total = inputs.plan.tally.total();
        let counted = |m: &Measured| Counts {
            rounds: m.rounds,
            online_bytes: m.online_bytes,
            setup_bytes: m.setup_bytes,
            dealer_bytes: [client.dealer_bytes, provider.dealer_bytes],
        };
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
            counted: counted(&client),
            counted_by_provider: counted(&provider),
            overlapped: overlaps(&inputs.plan),
            seconds: Seconds {
                backbone: client.backbone,
                setup: client.setup,
                offline: client.offline,
                online: client.online,
            },
            predicted: Counts {
                rounds: total.rounds,
                online_bytes: total.online_bytes,
                setup_bytes: inputs.plan.tally.setup_bytes,
                dealer_bytes: total.dealer_bytes,
            },
            results,
        })
    }

    /// To standard output.
    pub fn print(&self, json: bool) -> Result<()> {
        let text = match json {
            true => serde_json::to_string(self).map_err(|e| Error::io("writing JSON")(e.into()))? + "\n",
            false => self.table(),
        };
        match std::io::stdout().lock().write_all(text.as_bytes()) {
            // Who stops reading has seen enough.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(Error::io("writing the result")),
        }
    }

    /// Both parties' meters must have counted exactly what was predicted.
    pub fn check(&self) -> Result<()> {
        for (who, counted) in [("client", &self.counted), ("provider", &self.counted_by_provider)] {
            if *counted != self.predicted {
                return Err(Error::Mismatch(format!(
                    "the {who} counted {counted:?}, predicted were {:?}",
                    self.predicted
                )));
            }
        }
        Ok(())
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

        let counts = |name: &str, of: fn(&Counts) -> u64| {
            [
                name.to_owned(),
                grouped(of(&self.counted)),
                grouped(of(&self.predicted)),
            ]
        };
        text += &format!(
            "\ncost (images: {}, images a pass: {}, network: {})\n",
            self.images, self.batch, self.network
        );
        text += &aligned(
            &[
                ["", "counted", "predicted"].map(String::from),
                counts("rounds", |c| c.rounds),
                counts("online bytes, client to provider", |c| c.online_bytes[0]),
                counts("online bytes, provider to client", |c| c.online_bytes[1]),
                counts("set-up bytes, client to provider", |c| c.setup_bytes[0]),
                counts("set-up bytes, provider to client", |c| c.setup_bytes[1]),
                counts("dealer bytes, to client", |c| c.dealer_bytes[0]),
                counts("dealer bytes, to provider", |c| c.dealer_bytes[1]),
            ],
            &[1, 2],
        );
        let Seconds {
            backbone,
            setup,
            offline,
            online,
        } = self.seconds;
        text += &format!(
            "seconds: backbone {backbone:.3}, set-up {setup:.3}, offline {offline:.3}, online {online:.3}\n"
        );
        if self.overlapped {
            text += "the offline phase ran during the online phase, because there is too much material to hold at once\n";
        }
        text
    }
}

/// Columns two spaces apart, those in `right` flush right.
fn aligned<const N: usize>(rows: &[[String; N]], right: &[usize]) -> String {
    let width: [usize; N] =
        std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells: [String; N] = std::array::from_fn(|i| match right.contains(&i) {
            true => format!("{:>1$}", row[i], width[i]),
            false => format!("{:<1$}", row[i], width[i]),
        });
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// 1234567 as 1 234 567.
fn grouped(n: u64) -> String {
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
