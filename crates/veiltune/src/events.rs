//! What a role tells the process that started it: one JSON object a line on its standard output.

use std::io::Write;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use veiltune_engine::{Party, session::Report};

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The role accepts calls here.
    Listening {
        /// Address and port.
        address: SocketAddr,
    },
    /// So much of a stage is done.
    Progress {
        /// Which stage.
        stage: Stage,
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
    },
    /// An image's result. Only the client has one to tell.
    Classified(Classified),
    /// The role has done its work.
    Finished(Measured),
    /// The role gives up.
    Failed {
        /// One line.
        message: String,
        /// Exit code that follows.
        code: u8,
        /// How close to the first cause.
        rank: Rank,
    },
}

impl Event {
    /// Tells. If nobody listens any more, the role ends for that reason elsewhere.
    pub fn emit(&self) {
        if let Ok(line) = serde_json::to_string(self) {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }
}

/// The parts of a run that take time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The client runs the public backbone.
    Backbone,
    /// The dealer makes material.
    Offline,
    /// The two parties compute.
    Online,
    /// The plain-float computation that results are compared with.
    Reference,
}

/// How close to the first cause of a failed run a role's error is; the closest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rank {
    /// It went wrong here.
    Cause,
    /// A peer vanished before this role's eyes.
    Witness,
    /// Another role gave up and said so.
    Echo,
}

/// One image's result, as the client sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Classified {
    /// Which image.
    pub index: usize,
    /// Number of the class with the largest logit.
    pub class: usize,
    /// Its softmax share.
    pub confidence: f64,
    /// One a class.
    pub logits: Vec<f64>,
}

impl Classified {
    /// Largest logit and its share; None if there are no logits.
    pub fn new(index: usize, logits: Vec<f64>) -> Option<Classified> {
        let class = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))?;
        let confidence = 1.0 / logits.iter().map(|l| (l - logits[class]).exp()).sum::<f64>();
        Some(Classified {
            index,
            class,
            confidence,
            logits,
        })
    }
}

/// What a compute party measured. Byte counts are pairs: client to provider, provider to client.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Images of the session.
    pub images: usize,
    /// Seconds of the backbone; zero at the provider.
    pub backbone: f64,
    /// Seconds for opening the parameters.
    pub setup: f64,
    /// Seconds of the offline phase.
    pub offline: f64,
    /// Seconds of the online phase.
    pub online: f64,
    /// Bytes of the set-up.
    pub setup_bytes: [u64; 2],
    /// Bytes of the online phase.
    pub online_bytes: [u64; 2],
    /// Rounds of the online phase.
    pub rounds: u64,
    /// Bytes of material that came from the dealer, or its file.
    pub dealer_bytes: u64,
}

impl Measured {
    /// From what `party` saw.
    pub fn new(party: Party, report: &Report, images: usize, backbone: f64) -> Measured {
        let pair = |sent, received| {
            if party == Party::P0 {
                [sent, received]
            } else {
                [received, sent]
            }
        };
        Measured {
            images,
            backbone,
            setup: report.setup.as_secs_f64(),
            offline: report.offline.as_secs_f64(),
            online: report.online.as_secs_f64(),
            setup_bytes: pair(report.setup_meter.sent, report.setup_meter.received),
            online_bytes: pair(report.online_meter.sent, report.online_meter.received),
            rounds: report.online_meter.rounds,
            dealer_bytes: report.dealer_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_logits_wins() {
        let c = Classified::new(3, vec![-1.0, 2.0, 2.0, 0.0]).unwrap();
        assert_eq!((c.index, c.class), (3, 1));
        let rest = (-3f64).exp() + 1.0 + (-2f64).exp();
        assert!((c.confidence - 1.0 / (1.0 + rest)).abs() < 1e-12);
        assert!(Classified::new(0, vec![]).is_none());
        assert_eq!(Classified::new(0, vec![1e4, -1e4]).unwrap().confidence, 1.0);
    }

    #[test]
    fn an_event_is_one_line_and_reads_back() {
        let event = Event::Failed {
            message: "two\nlines".into(),
            code: 2,
            rank: Rank::Witness,
        };
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n'));
        let Event::Failed {
            message,
            code: 2,
            rank: Rank::Witness,
        } = serde_json::from_str(&line).unwrap()
        else {
            panic!("{line}")
        };
        assert_eq!(message, "two\nlines");
    }
}
