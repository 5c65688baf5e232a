//! `preprocessor_config.json`: how a checkpoint of the model hub wants its pictures.

use serde::Deserialize;

use crate::image::{Filter, Fit, Preprocess, Resize};
use crate::{Error, Result, files};

/// The file's name.
pub const FILE: &str = "preprocessor_config.json";

/// The fields that matter; others are ignored.
#[derive(Deserialize)]
struct Config {
    #[serde(default = "yes")]
    do_resize: bool,
    size: Size,
    /// Number of a filter in the Python Imaging Library.
    #[serde(default = "bilinear")]
    resample: u8,
    #[serde(default)]
    do_center_crop: bool,
    crop_size: Option<Size>,
    #[serde(default = "yes")]
    do_rescale: bool,
    #[serde(default = "byte")]
    rescale_factor: f64,
    #[serde(default = "yes")]
    do_normalize: bool,
    image_mean: Option<Vec<f32>>,
    image_std: Option<Vec<f32>>,
}

/// A size, as it is written by old and new versions of the library.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Number(usize),
    Sides { height: usize, width: usize },
    Shorter { shortest_edge: usize },
}

fn yes() -> bool {
    true
}

fn bilinear() -> u8 {
    2
}

fn byte() -> f64 {
    1.0 / 255.0
}

/// Parses the file; `file` is its name in errors. `shorter` says whether a bare number as `size` is the shorter side
/// (as in CLIP) or both (as elsewhere).
pub fn parse(file: &str, bytes: &[u8], shorter: bool) -> Result<(Preprocess, Fit)> {
    let c: Config = files::parse_json(file, bytes)?;
    let refuse = |detail: &str| Err(Error::corrupt(file, detail));
    if !c.do_resize || !c.do_rescale || (c.rescale_factor * 255.0 - 1.0).abs() > 1e-6 {
        return refuse("pictures that are not resized, or not rescaled by 1/255, are not supported");
    }
    let filter = match c.resample {
        2 => Filter::Bilinear,
        3 => Filter::Bicubic,
        _ => return refuse("resample must be 2 (bilinear) or 3 (bicubic)"),
    };
    let resize = match c.size {
        Size::Number(n) if shorter => Resize::Shorter(n),
        Size::Number(n) => Resize::Sides(n),
        Size::Shorter { shortest_edge } => Resize::Shorter(shortest_edge),
        Size::Sides { height, width } if height == width => Resize::Sides(height),
        Size::Sides { .. } => return refuse("size is no square"),
    };
    let size = match (c.do_center_crop, c.crop_size, resize) {
        (true, Some(Size::Number(n)), _) => n,
        (true, Some(Size::Sides { height, width }), _) if height == width => height,
        (true, ..) => return refuse("crop_size is no square"),
        (false, _, Resize::Sides(n)) => n,
        (false, _, Resize::Shorter(_)) => return refuse("the input is no square: do_center_crop is false"),
    };
    let (image_mean, image_std) = match (c.do_normalize, c.image_mean, c.image_std) {
        (true, Some(mean), Some(std)) => (mean, std),
        (true, ..) => return refuse("image_mean or image_std is missing"),
        (false, ..) => (vec![0.0; 3], vec![1.0; 3]),
    };
    let centre_crop = matches!(resize, Resize::Shorter(_));
    let preprocess = Preprocess {
        size,
        centre_crop,
        image_mean,
        image_std,
    };
    let fit = Fit { resize, filter };
    preprocess.check(file, fit)?;
    Ok((preprocess, fit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, shorter: bool) -> Result<(Preprocess, Fit)> {
        parse(FILE, json.as_bytes(), shorter)
    }

    #[test]
    fn old_and_new_files_are_understood() {
        let vit = r#"{"do_normalize": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "size": 224}"#;
        let (p, fit) = read(vit, false).unwrap();
        assert_eq!(
            (p.size, p.centre_crop, &p.image_mean[..]),
            (224, false, &[0.5; 3][..])
        );
        assert_eq!((fit.resize, fit.filter), (Resize::Sides(224), Filter::Bilinear));

        let crop = r#"{"crop_size": {"height": 224, "width": 224}, "do_center_crop": true, "do_normalize": false,
            "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256}}"#;
        let (p, fit) = read(crop, false).unwrap();
        assert_eq!(
            (p.size, p.centre_crop, &p.image_std[..]),
            (224, true, &[1.0; 3][..])
        );
        assert_eq!((fit.resize, fit.filter), (Resize::Shorter(256), Filter::Bicubic));

        let number = r#"{"crop_size": 224, "do_center_crop": true, "do_normalize": false, "size": 256}"#;
        assert_eq!(read(number, false).unwrap().1.resize, Resize::Sides(256));
        assert_eq!(read(number, true).unwrap().1.resize, Resize::Shorter(256));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (json, word) in [
            (r#"{"do_normalize": false}"#, "size"),
            (
                r#"{"do_normalize": false, "size": {"height": 1, "width": 2}}"#,
                "square",
            ),
            (
                r#"{"do_normalize": false, "size": {"shortest_edge": 8}}"#,
                "do_center_crop",
            ),
            (
                r#"{"do_normalize": false, "size": 8, "do_center_crop": true}"#,
                "crop_size",
            ),
            (
                r#"{"do_normalize": false, "size": 8, "do_center_crop": true, "crop_size": 9}"#,
                "prepared",
            ),
            (r#"{"do_normalize": false, "size": 8, "resample": 1}"#, "resample"),
            (
                r#"{"do_normalize": false, "size": 8, "rescale_factor": 1}"#,
                "1/255",
            ),
            (r#"{"size": 8}"#, "image_mean"),
            (
                r#"{"size": 8, "image_mean": [0, 0, 0], "image_std": [1, 1, 0]}"#,
                "prepared",
            ),
            (r#"{"do_normalize": false, "size": 99999999999}"#, "prepared"),
        ] {
            let text = read(json, false).unwrap_err().to_string();
            assert!(text.contains(word) && text.contains(FILE), "{json}: {text}");
        }
    }
}
