//! What the user sees on standard error while a command works.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::events::Stage;

const STAGES: [(Stage, &str); 4] = [
    (Stage::Backbone, "backbone (client, in the clear)"),
    (Stage::Offline, "offline (dealer's material)"),
    (Stage::Online, "online (client and provider)"),
    (Stage::Reference, "plain float, to compare with"),
];

/// Between two lines of a stage.
const OFTEN: Duration = Duration::from_secs(15);

/// A line to standard error; that nobody reads it any more is no reason to end, nor not to.
pub fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Bars on a terminal, plain lines elsewhere, or nothing.
pub enum Progress {
    /// A bar for each stage.
    Bars(MultiProgress, [ProgressBar; 4]),
    /// A line when a stage is done, and now and then before.
    Lines(Mutex<[Option<(Instant, Instant)>; 4]>),
    /// The log alone.
    Quiet,
}

impl Progress {
    /// As fits standard error, unless `quiet`.
    pub fn new(quiet: bool) -> Progress {
        if quiet {
            return Progress::Quiet;
        }
        if !std::io::stderr().is_terminal() {
            return Progress::Lines(Mutex::default());
        }
        let bars = MultiProgress::new();
        let style =
            ProgressStyle::with_template("{prefix:32} {bar:30} {pos}/{len} images  {elapsed}, {eta} left");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let each = STAGES.map(|(_, name)| ProgressBar::new(0).with_style(style.clone()).with_prefix(name));
        Progress::Bars(bars, each)
    }

    /// So much of a stage is done.
    pub fn at(&self, stage: Stage, done: usize, total: usize) {
        let index = STAGES
            .iter()
            .position(|(s, _)| *s == stage)
            .expect("every stage is listed");
        match self {
            Progress::Bars(bars, each) => {
                let bar = &each[index];
                if bar.length() == Some(0) {
                    bars.add(bar.clone());
                    bar.set_length(total as u64);
                    bar.reset_elapsed();
                }
                bar.set_position(done as u64);
                if done == total {
                    bar.abandon();
                }
            }
            Progress::Lines(told) => {
                let now = Instant::now();
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                let (began, last) = told[index].get_or_insert((now, now));
                if done == total {
                    tell(&format!("{}: {done} of {total} images", STAGES[index].1));
                } else if now - *last >= OFTEN {
                    *last = now;
                    let left = (now - *began).as_secs_f64() / done.max(1) as f64 * (total - done) as f64;
                    tell(&format!(
                        "{}: {done} of {total} images, {left:.0} s left",
                        STAGES[index].1
                    ));
                }
            }
            Progress::Quiet => {}
        }
    }

    /// A line that belongs to no stage.
    pub fn log(&self, line: &str) {
        match self {
            Progress::Bars(bars, _) => bars.suspend(|| tell(line)),
            Progress::Lines(_) | Progress::Quiet => tell(line),
        }
    }
}
