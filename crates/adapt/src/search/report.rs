//! What a search leaves behind for people: the front as a table and a plot, and two methods compared.

use std::collections::BTreeMap;
use std::fmt::Write;

use plotters::prelude::*;

use super::run::best;
use super::{Candidate, Goal, Spent, Trial};
use crate::{Error, Result};

/// Seconds of one private inference of each candidate, by the network's name.
pub type Latencies = BTreeMap<String, BTreeMap<Candidate, f64>>;

/// Columns of both tables that do not depend on the network.
const COLUMNS: [&str; 6] = ["heads", "rank", "scope", "norm", "accuracy", "epochs"];

/// The front as a Markdown table: accuracies in percent, a column of seconds for each network.
pub fn markdown(front: &[Trial], latencies: &Latencies) -> String {
    let networks = latencies.keys().map(|n| format!("{}, s", n.replace('|', "\\|")));
    let head: Vec<String> = COLUMNS.map(String::from).into_iter().chain(networks).collect();
    let mut table = format!("| {} |\n|{}\n", head.join(" | "), "---:|".repeat(head.len()));
    for t in front {
        let c = &t.candidate;
        let accuracy = 100.0 * t.accuracy;
        let _ = write!(
            table,
            "| {} | {} | {} | {} | {accuracy:.2} % | {} |",
            c.heads,
            c.rank,
            c.scope,
            c.norm_name(),
            t.epochs
        );
        for of in latencies.values() {
            let _ = match of.get(c) {
                Some(seconds) => write!(table, " {seconds:.4} |"),
                None => write!(table, " |"),
            };
        }
        table.push('\n');
    }
    table
}

/// The front as comma-separated values (RFC 4180): accuracies from 0 to 1, a column of seconds for each network.
pub fn csv(front: &[Trial], latencies: &Latencies) -> String {
    let quoted = |n: &String| format!("\"{} (s)\"", n.replace('"', "\"\""));
    let head: Vec<String> = COLUMNS
        .map(String::from)
        .into_iter()
        .chain(latencies.keys().map(quoted))
        .collect();
    let mut table = head.join(",") + "\r\n";
    for t in front {
        let c = &t.candidate;
        let _ = write!(
            table,
            "{},{},{},{},{},{}",
            c.heads,
            c.rank,
            c.scope,
            c.norm_name(),
            t.accuracy,
            t.epochs
        );
        for of in latencies.values() {
            let _ = match of.get(c) {
                Some(seconds) => write!(table, ",{seconds}"),
                None => write!(table, ","),
            };
        }
        table.push_str("\r\n");
    }
    table
}

/// The front as an SVG picture: accuracy against seconds, a line for each network. `others` (all trials, say) are drawn as
/// faint dots.
///
/// # Errors
/// If no candidate of the front has a latency.
pub fn svg(title: &str, front: &[Trial], others: &[Trial], latencies: &Latencies) -> Result<String> {
    let points = |trials: &[Trial], of: &BTreeMap<Candidate, f64>| -> Vec<(f64, f64)> {
        let at = |t: &Trial| Some((*of.get(&t.candidate)?, 100.0 * t.accuracy));
        let finite = |p: &(f64, f64)| p.0.is_finite() && p.1.is_finite();
        trials.iter().filter_map(at).filter(finite).collect()
    };
    let lines: Vec<_> = latencies
        .iter()
        .map(|(name, of)| (name, points(front, of), points(others, of)))
        .collect();
    let shown: Vec<(f64, f64)> = lines.iter().flat_map(|l| &l.1).copied().collect();
    if shown.is_empty() {
        return Err(Error::Settings(
            "no latency of a trained candidate to plot".into(),
        ));
    }
    let slowest = shown.iter().map(|p| p.0).fold(0.0, f64::max);
    let low = shown.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = shown.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let room = (0.1 * (high - low)).max(0.25);
    let (x, y) = (0.0..(1.08 * slowest).max(1e-6), low - 2.0 * room..high + room);

    let mut picture = String::new();
    let failed = |e: &dyn std::fmt::Display| Error::Settings(format!("plotting: {e}"));
    {
        let area = SVGBackend::with_string(&mut picture, (760, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(x.clone(), y.clone())
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("seconds of one private inference")
            .y_desc("validation accuracy, %")
            .draw()
            .map_err(|e| failed(&e))?;
        for (i, (name, line, dots)) in lines.into_iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            let visible = dots.into_iter().filter(|p| x.contains(&p.0) && y.contains(&p.1));
            let dots = visible.map(|p| Circle::new(p, 2, color.mix(0.3).filled()));
            chart.draw_series(dots).map_err(|e| failed(&e))?;
            let series = LineSeries::new(line, color.stroke_width(2)).point_size(4);
            let key = move |(x, y)| Circle::new((x + 8, y), 4, color.filled());
            chart
                .draw_series(series)
                .map_err(|e| failed(&e))?
                .label(name.as_str())
                .legend(key);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(|e| failed(&e))?;
        area.present().map_err(|e| failed(&e))?;
    }
    Ok(picture)
}

/// What two searches of the same problem took to get equally far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// How far: the accuracy of the search whose best is worse.
    pub accuracy: f64,
    /// How far: that candidate's latency.
    pub latency: f64,
    /// What each took until it had a candidate at least that good by the goal.
    pub until: [Spent; 2],
    /// What each took altogether.
    pub total: [Spent; 2],
}

/// Compares the trials of two searches for `goal`, where a full training has `epochs`. None if one has no trial.
///
/// Looking for utility, equally far means the same accuracy within the latency target. Looking for efficiency it means the
/// same latency at the target accuracy or, if one search does not reach that accuracy, the accuracy that it does reach.
pub fn compare(goal: &Goal, epochs: usize, first: &[Trial], second: &[Trial]) -> Option<Comparison> {
    let (a, b) = (best(first, goal)?, best(second, goal)?);
    let level = if goal.value(a) < goal.value(b) { a } else { b };
    let until = |trials: &[Trial]| {
        // A level below the target accuracy is passed by every candidate that reaches it.
        let far = |t: &Trial| goal.value(t) >= goal.value(level);
        let count = trials.iter().position(far).map_or(trials.len(), |i| i + 1);
        Spent::of(&trials[..count], epochs)
    };
    Some(Comparison {
        accuracy: level.accuracy,
        latency: level.latency,
        until: [until(first), until(second)],
        total: [Spent::of(first, epochs), Spent::of(second, epochs)],
    })
}
