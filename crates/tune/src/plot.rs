//! The tuning curve as a picture: loss and metric against evaluations.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::{Error, Record, Result, Score};

const SIZE: (u32, u32) = (960, 400);
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALIDATION: RGBColor = RGBColor(214, 96, 20);

/// Loss on the left, and on the right `metric`, which is its name: each generation's best candidate on the training
/// examples, and the better of the prompts that were validated. An SVG document, which tells the losses.
pub fn svg(history: &[Record], metric: &str) -> Result<String> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let (left, right) = root.split_horizontally(SIZE.0 / 2);
        panel(&left, "loss", history, |score| score.loss)?;
        panel(&right, metric, history, |score| score.metric)?;
        root.present().map_err(failed)?;
    }
    Ok(out)
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    history: &[Record],
    of: impl Fn(Score) -> f64,
) -> Result<()> {
    let line = |score: &dyn Fn(&Record) -> Option<Score>| -> Vec<(f64, f64)> {
        let points = history
            .iter()
            .filter_map(|r| Some((r.evaluations as f64, of(score(r)?))));
        points.filter(|(_, y)| y.is_finite()).collect()
    };
    let (train, validation) = (line(&|r| r.train), line(&|r| r.validation));
    let values = || train.iter().chain(&validation).map(|(_, y)| *y);
    let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), y| {
        (l.min(y), h.max(y))
    });
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let room = (0.05 * (high - low)).max(1e-3);
    let last = history.last().map_or(0, |r| r.evaluations) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..last.max(1.0), low - room..high + room)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("evaluations")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_labels(6)
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (name, points, colour) in [("training", train, TRAIN), ("validation", validation, VALIDATION)] {
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))
            .map_err(failed)?
            .label(name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(failed)
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Settings(format!("the tuning curve cannot be drawn: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: usize, validated: bool) -> Record {
        let score = |loss| Score {
            loss,
            metric: 0.1 * generation as f64,
        };
        Record {
            evaluations: 20 * generation,
            train: (generation > 0).then(|| score(1.0 / generation as f64)),
            validation: validated.then(|| score(f64::NAN)),
            sigma: 1.0,
            seconds: 0.0,
        }
    }

    #[test]
    fn a_history_is_drawn_whatever_it_lacks() {
        let with: Vec<Record> = (0..6).map(|g| record(g, g % 2 == 0)).collect();
        let without: Vec<Record> = (0..6).map(|g| record(g, false)).collect();
        let lines = |svg: &str| svg.matches("<polyline").count();
        let (with, without) = (svg(&with, "F1").unwrap(), svg(&without, "F1").unwrap());
        assert!(with.contains("F1") && with.contains("validation") && with.contains("evaluations"));
        assert!(!without.contains("validation") && lines(&without) < lines(&with));
        assert!(svg(&[], "accuracy").unwrap().contains("loss"));
        assert!(svg(&[record(0, true)], "accuracy").is_ok());
    }
}
