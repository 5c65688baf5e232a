//! The learning curve as numbers and as a picture.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use veiltune_hub::files;

use crate::train::Epoch;
use crate::{Error, Result};

/// The learning curve as a picture.
pub const CURVE_FILE: &str = "curve.svg";

/// Writes `curve.json` and `curve.svg`.
pub fn write(dir: &Path, curve: &[Epoch]) -> Result<()> {
    files::write_json(&dir.join("curve.json"), &curve)?;
    files::write_atomic(&dir.join(CURVE_FILE), svg(curve)?.as_bytes())?;
    Ok(())
}

const SIZE: (u32, u32) = (960, 400);
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALIDATION: RGBColor = RGBColor(214, 96, 20);

/// Loss and accuracy against the epoch, for training and validation.
pub fn svg(curve: &[Epoch]) -> Result<String> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let (left, right) = root.split_horizontally(SIZE.0 / 2);
        panel(&left, "loss", curve, |e| (e.train_loss, e.validation_loss))?;
        panel(&right, "accuracy", curve, |e| {
            (e.train_accuracy, e.validation_accuracy)
        })?;
        root.present().map_err(failed)?;
    }
    Ok(out)
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    curve: &[Epoch],
    of: impl Fn(&Epoch) -> (f64, Option<f64>),
) -> Result<()> {
    let numbered = || curve.iter().enumerate().map(|(i, e)| (i as f64 + 1.0, of(e)));
    let train: Vec<(f64, f64)> = numbered().map(|(x, (y, _))| (x, y)).collect();
    let validation: Vec<(f64, f64)> = numbered().filter_map(|(x, (_, y))| Some((x, y?))).collect();
    let values = || train.iter().chain(&validation).map(|(_, y)| *y);
    let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), y| {
        (l.min(y), h.max(y))
    });
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let room = (0.05 * (high - low)).max(1e-3);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(1.0..(curve.len() as f64).max(1.5), low - room..high + room)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("epoch")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_labels(curve.len().clamp(2, 10))
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
    Error::Settings(format!("the learning curve cannot be drawn: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_drawn_with_and_without_validation() {
        let epoch = |i: usize| Epoch {
            train_loss: 1.0 / (i + 1) as f64,
            train_accuracy: 0.1 * i as f64,
            validation_loss: Some(0.5),
            validation_accuracy: Some(0.05 * i as f64),
            seconds: i as f64,
        };
        let both: Vec<Epoch> = (0..5).map(epoch).collect();
        let alone = both.iter().map(|e| Epoch {
            validation_loss: None,
            validation_accuracy: None,
            ..*e
        });
        let alone: Vec<Epoch> = alone.collect();
        let lines = |svg: &str| svg.matches("<polyline").count();
        let (both, alone) = (svg(&both).unwrap(), svg(&alone).unwrap());
        assert!(both.contains("accuracy") && both.contains("validation"));
        assert!(!alone.contains("validation") && lines(&alone) < lines(&both));
        assert!(svg(&[]).unwrap().contains("loss"));
        assert!(svg(&[epoch(3)]).is_ok());
    }
}
