//! Random views of a picture for training, and the one view for testing.

use image::{DynamicImage, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::image::{Fit, Preprocess};
use crate::random::Random;
use crate::{Error, Result};

/// Random-resized crop and horizontal flip, as torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` have them:
/// a piece of the picture of random area and proportions is scaled to the input's size, and perhaps mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Augment {
    /// Smallest and largest share of the picture's area; drawn uniformly.
    pub scale: [f64; 2],
    /// Smallest and largest width over height; its logarithm is drawn uniformly.
    pub ratio: [f64; 2],
    /// Probability of mirroring.
    pub flip: f64,
}

impl Default for Augment {
    /// torchvision's defaults: 0.08 to 1 of the area, 3:4 to 4:3, every second picture mirrored.
    fn default() -> Self {
        Augment {
            scale: [0.08, 1.0],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
            flip: 0.5,
        }
    }
}

/// One way to look at a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum View {
    /// What [`Preprocess::load_fitted`] gives: scaled, the centre cut out. For testing.
    Centre,
    /// A random piece, always the same one for the same picture, `seed`, `view` and `index`.
    Random {
        /// What may be drawn.
        augment: Augment,
        /// Of the whole training run.
        seed: u64,
        /// Which of a picture's views.
        view: u64,
        /// Which picture.
        index: u64,
    },
}

/// A rectangle of a picture, pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

impl Augment {
    /// View number `view` of picture `index` for training: number 0 is the centre as in testing, not mirrored, so that
    /// the picture that will be asked about is among those learnt from; the others are random.
    pub fn view(self, seed: u64, view: u64, index: u64) -> View {
        match view {
            0 => View::Centre,
            _ => View::Random {
                augment: self,
                seed,
                view,
                index,
            },
        }
    }

    fn check(&self) -> Result<()> {
        let ordered = |[low, high]: [f64; 2]| 0.0 < low && low <= high && high.is_finite();
        if ordered(self.scale)
            && self.scale[1] <= 1.0
            && ordered(self.ratio)
            && (0.0..=1.0).contains(&self.flip)
        {
            Ok(())
        } else {
            Err(Error::corrupt(
                "augmentation",
                format!("no picture can be cut as {self:?}"),
            ))
        }
    }

    /// Draws a piece of a picture. When ten draws stick out, as they do in narrow pictures, it is the centre, as much
    /// of it as the proportions allow.
    fn piece(&self, random: &mut Random, width: u32, height: u32) -> Piece {
        let (w, h) = (f64::from(width), f64::from(height));
        for _ in 0..10 {
            let area = w * h * random.between(self.scale[0], self.scale[1]);
            let ratio = random.between(self.ratio[0].ln(), self.ratio[1].ln()).exp();
            let (width, height) = (
                (area * ratio).sqrt().round_ties_even(),
                (area / ratio).sqrt().round_ties_even(),
            );
            if (1.0..=w).contains(&width) && (1.0..=h).contains(&height) {
                return Piece {
                    x: random.below((w - width) as u64 + 1) as u32,
                    y: random.below((h - height) as u64 + 1) as u32,
                    width: width as u32,
                    height: height as u32,
                };
            }
        }
        let [low, high] = self.ratio;
        let rounded = |side: f64| (side.round_ties_even() as u32).max(1);
        let (width, height) = match w / h {
            ratio if ratio < low => (width, rounded(w / low).min(height)),
            ratio if ratio > high => (rounded(h * high).min(width), height),
            _ => (width, height),
        };
        Piece {
            x: (w as u32 - width) / 2,
            y: (h as u32 - height) / 2,
            width,
            height,
        }
    }
}

/// A picture as a backbone's input `[channels, size, size]`, normalised as `preprocess` says and scaled with the filter of
/// `fit`.
pub fn view(preprocess: &Preprocess, fit: Fit, picture: &RgbImage, view: View) -> Result<Vec<f32>> {
    preprocess.check("picture", fit)?;
    let View::Random {
        augment,
        seed,
        view,
        index,
    } = view
    else {
        return preprocess.prepared("picture", picture.clone().into(), fit);
    };
    augment.check()?;
    if picture.width() == 0 || picture.height() == 0 {
        return Err(Error::corrupt("picture", "it has no pixel"));
    }
    let mut random = Random::new(&[seed, view, index]);
    let Piece { x, y, width, height } = augment.piece(&mut random, picture.width(), picture.height());
    let piece = imageops::crop_imm(picture, x, y, width, height).to_image();
    let size = preprocess.size as u32;
    let mut scaled =
        preprocess
            .coloured(DynamicImage::ImageRgb8(piece))
            .resize_exact(size, size, fit.filter.into());
    if random.between(0.0, 1.0) < augment.flip {
        scaled = scaled.fliph();
    }
    Ok(preprocess.normalise(scaled.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Filter, Resize, rgb_png};

    const FIT: Fit = Fit {
        resize: Resize::Shorter(8),
        filter: Filter::Bicubic,
    };

    fn rgb() -> Preprocess {
        Preprocess {
            size: 8,
            centre_crop: true,
            image_mean: vec![0.0; 3],
            image_std: vec![1.0 / 255.0; 3],
        }
    }

    /// Red is the column, green the row.
    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 77]))
    }

    fn pieces(augment: Augment, width: u32, height: u32) -> Vec<Piece> {
        (0..20_000)
            .map(|i| augment.piece(&mut Random::new(&[3, i]), width, height))
            .collect()
    }

    /// Share of `values` below `bound`.
    fn below(values: &[f64], bound: f64) -> f64 {
        values.iter().filter(|v| **v < bound).count() as f64 / values.len() as f64
    }

    #[test]
    fn areas_and_proportions_are_spread_as_torchvision_states() {
        // Pieces of at most half the area always fit into a square, so that nothing is drawn again.
        let augment = Augment {
            scale: [0.1, 0.5],
            ..Augment::default()
        };
        let pieces = pieces(augment, 2000, 2000);
        let area: Vec<f64> = pieces
            .iter()
            .map(|p| f64::from(p.width) * f64::from(p.height) / 4e6)
            .collect();
        let ratio: Vec<f64> = pieces
            .iter()
            .map(|p| f64::from(p.width) / f64::from(p.height))
            .collect();
        // 20 000 draws: the standard error of a share is below 0.0036.
        for quantile in [0.1, 0.25, 0.5, 0.75, 0.9] {
            let uniform = 0.1 + 0.4 * quantile;
            assert!(
                (below(&area, uniform) - quantile).abs() < 0.015,
                "area {quantile}"
            );
            let log_uniform = (3.0f64 / 4.0) * (16.0f64 / 9.0).powf(quantile);
            assert!(
                (below(&ratio, log_uniform) - quantile).abs() < 0.015,
                "ratio {quantile}"
            );
        }
        // Every place is as likely: the centres' mean is the picture's.
        let mean = |f: &dyn Fn(&Piece) -> u32| pieces.iter().map(|p| f64::from(f(p))).sum::<f64>() / 20_000.0;
        assert!((mean(&|p| 2 * p.x + p.width) - 2000.0).abs() < 20.0);
        assert!((mean(&|p| 2 * p.y + p.height) - 2000.0).abs() < 20.0);
        assert!(pieces.iter().any(|p| p.x == 0) && pieces.iter().any(|p| p.y + p.height == 2000));
    }

    #[test]
    fn pieces_stay_within_every_picture() {
        for (width, height) in [(1, 1), (2, 1), (32, 32), (500, 375), (3, 900), (900, 3)] {
            for p in pieces(Augment::default(), width, height) {
                assert!(p.width > 0 && p.height > 0, "{p:?}");
                assert!(p.x + p.width <= width && p.y + p.height <= height, "{p:?}");
            }
        }
        // Nothing of the proportions fits into so narrow a picture but its centre.
        let whole = Augment {
            scale: [1.0, 1.0],
            ..Augment::default()
        };
        let centre = Piece {
            x: 0,
            y: 38,
            width: 30,
            height: 40,
        };
        assert_eq!(pieces(whole, 30, 116)[0], centre);
        let lying = Piece {
            x: 38,
            y: 0,
            width: 40,
            height: 30,
        };
        assert_eq!(pieces(whole, 116, 30)[0], lying);
    }

    #[test]
    fn a_view_is_its_seed_number_and_picture() {
        let picture = gradient(40, 30);
        let make = |seed, number, index| {
            let v = Augment::default().view(seed, number, index);
            view(&rgb(), FIT, &picture, v).unwrap()
        };
        assert_eq!(make(1, 2, 3), make(1, 2, 3));
        for other in [make(9, 2, 3), make(1, 9, 3), make(1, 2, 9)] {
            assert_ne!(other, make(1, 2, 3));
        }
        for number in 1..50 {
            let x = make(1, number, 0);
            assert_eq!(x.len(), 3 * 64);
            assert!(x[..64].iter().all(|v| (0.0..40.0).contains(v)));
            assert!(
                x[128..].iter().all(|v| (v - 77.0).abs() < 1e-3),
                "channels stay apart"
            );
        }
    }

    #[test]
    fn the_centre_is_the_view_for_testing() {
        let picture = gradient(40, 30);
        let png = rgb_png(picture.as_raw(), 40, 30).unwrap();
        let grey = Preprocess {
            image_mean: vec![0.5],
            image_std: vec![0.5],
            ..rgb()
        };
        for p in [rgb(), grey] {
            let tested = p.decode_fitted("p", &png, FIT).unwrap();
            for v in [View::Centre, Augment::default().view(5, 0, 6)] {
                assert_eq!(view(&p, FIT, &picture, v).unwrap(), tested);
            }
        }
    }

    #[test]
    fn half_the_views_are_mirrored() {
        let picture = gradient(32, 32);
        let count = |flip| {
            let augment = Augment {
                scale: [0.5, 1.0],
                flip,
                ..Augment::default()
            };
            let mirrored = |i| {
                let x = view(&rgb(), FIT, &picture, augment.view(0, 1, i)).unwrap();
                assert!(x[64] < x[120], "rows stay in order");
                x[0] > x[7]
            };
            (0..1000).filter(|&i| mirrored(i)).count()
        };
        assert_eq!((count(0.0), count(1.0)), (0, 1000));
        assert!((430..570).contains(&count(0.5)));
    }

    #[test]
    fn a_piece_is_scaled_as_it_would_be_alone() {
        // The whole picture, in its own proportions, is what testing makes of it without cutting.
        let whole = Augment {
            scale: [1.0; 2],
            ratio: [1.0; 2],
            flip: 0.0,
        };
        let picture = gradient(24, 24);
        let seen = view(&rgb(), FIT, &picture, whole.view(0, 1, 0)).unwrap();
        assert_eq!(seen, view(&rgb(), FIT, &picture, View::Centre).unwrap());
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        let picture = gradient(4, 4);
        let sound = Augment::default();
        for bad in [
            Augment {
                scale: [0.0, 1.0],
                ..sound
            },
            Augment {
                scale: [0.5, 0.4],
                ..sound
            },
            Augment {
                scale: [0.5, 1.1],
                ..sound
            },
            Augment {
                ratio: [f64::NAN, 1.0],
                ..sound
            },
            Augment {
                ratio: [1.0, f64::INFINITY],
                ..sound
            },
            Augment { flip: -0.1, ..sound },
        ] {
            assert!(view(&rgb(), FIT, &picture, bad.view(0, 1, 0)).is_err(), "{bad:?}");
        }
        let random = sound.view(0, 1, 0);
        assert!(view(&rgb(), FIT, &RgbImage::new(0, 4), random).is_err());
        let channels = Preprocess {
            image_mean: vec![0.0; 2],
            ..rgb()
        };
        assert!(view(&channels, FIT, &picture, random).is_err());
    }
}
