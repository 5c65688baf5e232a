//! Pictures as a backbone wants them.

use std::path::Path;

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits, RgbImage};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, files};

/// Largest picture file, bytes.
const MAX_FILE: u64 = 64 << 20;
/// Largest side of a picture, pixels.
pub(crate) const MAX_SIDE: u32 = 8192;
/// Most memory a decoder may take, bytes.
const MAX_MEMORY: u64 = 256 << 20;

/// How pixels become a backbone's input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Side of the square input, pixels.
    pub size: usize,
    /// Scale the shorter side and cut out the centre; otherwise both sides are scaled.
    #[serde(default)]
    pub centre_crop: bool,
    /// A channel's mean in 0 ..= 1; one entry for grey, three for RGB.
    pub image_mean: Vec<f32>,
    /// A channel's standard deviation.
    pub image_std: Vec<f32>,
}

/// How a picture is scaled before the centre of [`Preprocess::size`] is cut out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// To which size.
    pub resize: Resize,
    /// How pixels are weighed. Either way more of them count the more a picture shrinks.
    pub filter: Filter,
}

/// Size of a scaled picture, pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// Both sides.
    Sides(usize),
    /// The shorter side; the proportions stay.
    Shorter(usize),
}

/// Weights of a pixel's neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Falling linearly.
    Bilinear,
    /// Catmull and Rom's cubic.
    Bicubic,
}

impl From<Filter> for FilterType {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Bilinear => FilterType::Triangle,
            Filter::Bicubic => FilterType::CatmullRom,
        }
    }
}

/// Reads and decodes a PNG or JPEG file, within bounds.
pub(crate) fn load(path: &Path) -> Result<DynamicImage> {
    decode(&path.to_string_lossy(), &files::read(path, MAX_FILE)?)
}

fn decode(file: &str, bytes: &[u8]) -> Result<DynamicImage> {
    let bad = |e: image::ImageError| Error::corrupt(file, format!("not a usable PNG or JPEG image: {e}"));
    let mut reader = ImageReader::new(std::io::Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| bad(image::ImageError::IoError(e)))?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    limits.max_alloc = Some(MAX_MEMORY);
    reader.limits(limits);
    reader.decode().map_err(bad)
}

impl Preprocess {
    /// The scaling that the fields imply: bilinear, to the size of the input.
    pub fn fit(&self) -> Fit {
        Fit {
            resize: match self.centre_crop {
                true => Resize::Shorter(self.size),
                false => Resize::Sides(self.size),
            },
            filter: Filter::Bilinear,
        }
    }

    /// Reads a PNG or JPEG file as `[channels, size, size]`, normalised.
    pub fn load(&self, path: &Path) -> Result<Vec<f32>> {
        self.load_fitted(path, self.fit())
    }

    /// As [`Preprocess::load`], scaled as `fit` says.
    pub fn load_fitted(&self, path: &Path, fit: Fit) -> Result<Vec<f32>> {
        self.decode_fitted(&path.to_string_lossy(), &files::read(path, MAX_FILE)?, fit)
    }

    /// As [`Preprocess::load`], from a file's content; `file` is its name in errors.
    pub fn decode(&self, file: &str, bytes: &[u8]) -> Result<Vec<f32>> {
        self.decode_fitted(file, bytes, self.fit())
    }

    /// As [`Preprocess::decode`], scaled as `fit` says.
    pub fn decode_fitted(&self, file: &str, bytes: &[u8], fit: Fit) -> Result<Vec<f32>> {
        self.check(file, fit)?;
        self.prepared(file, decode(file, bytes)?, fit)
    }

    /// A picture as `[channels, size, size]`, scaled and cut as `fit` says, normalised; `file` is its name in errors.
    pub(crate) fn prepared(&self, file: &str, picture: DynamicImage, fit: Fit) -> Result<Vec<f32>> {
        let cut = self.cut(file, &self.coloured(picture), fit)?;
        Ok(self.normalise(cut.as_bytes()))
    }

    /// In as many channels as are normalised, and without transparency, which would weigh the colours.
    pub(crate) fn coloured(&self, picture: DynamicImage) -> DynamicImage {
        match self.image_mean.len() {
            1 => DynamicImage::ImageLuma8(picture.into_luma8()),
            _ => DynamicImage::ImageRgb8(picture.into_rgb8()),
        }
    }

    /// Interleaved bytes of `size * size` pixels as normalised planes.
    pub fn normalise(&self, pixels: &[u8]) -> Vec<f32> {
        let channels = self.image_mean.len();
        let plane = |c: usize| {
            let (mean, std) = (self.image_mean[c], self.image_std[c]);
            pixels
                .iter()
                .skip(c)
                .step_by(channels)
                .map(move |&v| (v as f32 / 255.0 - mean) / std)
        };
        (0..channels).flat_map(plane).collect()
    }

    fn cut(&self, file: &str, picture: &DynamicImage, fit: Fit) -> Result<DynamicImage> {
        let (size, old) = (self.size as u32, (picture.width(), picture.height()));
        let (width, height) = match fit.resize {
            Resize::Sides(side) => (side as u32, side as u32),
            Resize::Shorter(side) => {
                let scaled =
                    |length: u32| (side as u64 * length as u64 / old.0.min(old.1).max(1) as u64) as u32;
                (scaled(old.0), scaled(old.1))
            }
        };
        if width.max(height) > MAX_SIDE {
            let detail = format!("{} x {} pixels are too narrow a picture", old.0, old.1);
            return Err(Error::corrupt(file, detail));
        }
        // Scaling to the same size would not change a pixel.
        let scaled = match old == (width, height) {
            true => picture.clone(),
            false => picture.resize_exact(width, height, fit.filter.into()),
        };
        Ok(scaled.crop_imm((width - size) / 2, (height - size) / 2, size, size))
    }

    pub(crate) fn check(&self, file: &str, fit: Fit) -> Result<()> {
        let (Resize::Sides(scaled) | Resize::Shorter(scaled)) = fit.resize;
        let channels = self.image_mean.len();
        let sound = matches!(channels, 1 | 3)
            && self.image_std.len() == channels
            && self.image_std.iter().all(|s| *s > 0.0)
            && (1..=scaled).contains(&self.size)
            && scaled <= MAX_SIDE as usize;
        if sound {
            Ok(())
        } else {
            Err(Error::corrupt(
                file,
                format!("cannot be prepared as {self:?}, {fit:?}"),
            ))
        }
    }
}

/// A grey picture as a PNG file's content; `pixels` are `side * side` bytes.
pub fn grey_png(pixels: &[u8], side: u32) -> Result<Vec<u8>> {
    let picture = image::GrayImage::from_raw(side, side, pixels.to_vec()).ok_or_else(|| {
        Error::corrupt(
            "PNG",
            format!("{} pixels are no square of side {side}", pixels.len()),
        )
    })?;
    encode(DynamicImage::ImageLuma8(picture))
}

/// An RGB picture as a PNG file's content; `pixels` are `width * height * 3` bytes.
pub fn rgb_png(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>> {
    let picture = RgbImage::from_raw(width, height, pixels.to_vec()).ok_or_else(|| {
        Error::corrupt(
            "PNG",
            format!("{} bytes are not {width}x{height} pixels", pixels.len()),
        )
    })?;
    encode(DynamicImage::ImageRgb8(picture))
}

fn encode(picture: DynamicImage) -> Result<Vec<u8>> {
    let mut out = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut out, image::ImageFormat::Png)
        .map_err(|e| Error::corrupt("PNG", e))?;
    Ok(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(size: usize) -> Preprocess {
        Preprocess {
            size,
            centre_crop: false,
            image_mean: vec![0.5],
            image_std: vec![0.5],
        }
    }

    #[test]
    fn pixels_survive_at_the_same_size() {
        let png = grey_png(&[0, 255, 51, 102], 2).unwrap();
        let x = grey(2).decode("p", &png).unwrap();
        for (x, want) in x.iter().zip([-1.0, 1.0, -0.6, -0.2]) {
            assert!((x - want).abs() < 1e-6);
        }
    }

    #[test]
    fn colours_become_planes_and_other_sizes_are_scaled() {
        let row = [255, 0, 0, 0, 0, 255];
        let png = rgb_png(&row.repeat(2), 2, 2).unwrap();
        let rgb = Preprocess {
            image_mean: vec![0.0; 3],
            image_std: vec![1.0; 3],
            ..grey(2)
        };
        assert_eq!(
            rgb.decode("p", &png).unwrap(),
            [1., 0., 1., 0., 0., 0., 0., 0., 0., 1., 0., 1.]
        );
        let wide = rgb_png(&[10; 3 * 40 * 20], 40, 20).unwrap();
        for centre_crop in [false, true] {
            let p = Preprocess {
                centre_crop,
                size: 7,
                ..rgb.clone()
            };
            let x = p.decode("p", &wide).unwrap();
            assert_eq!(x.len(), 3 * 49);
            assert!(x.iter().all(|v| (v - 10.0 / 255.0).abs() < 1e-6));
        }
    }

    #[test]
    fn the_centre_is_cut_out_of_the_scaled_picture() {
        // 8 x 4 pixels whose value is ten times their column.
        let png = {
            let row: Vec<u8> = (0..8).flat_map(|x| [10 * x; 3]).collect();
            rgb_png(&row.repeat(4), 8, 4).unwrap()
        };
        let p = Preprocess {
            image_mean: vec![0.0; 3],
            image_std: vec![1.0 / 255.0; 3],
            ..grey(2)
        };
        let columns = |resize| {
            let filter = Filter::Bicubic;
            let x = p.decode_fitted("p", &png, Fit { resize, filter }).unwrap();
            x[..2].iter().map(|v| v.round() as i32).collect::<Vec<_>>()
        };
        assert_eq!(columns(Resize::Shorter(4)), [30, 40]);
        assert_eq!(columns(Resize::Sides(4)), [25, 45], "pairs of columns");

        let narrow = rgb_png(&[1; 3 * 8000], 8000, 1).unwrap();
        for (png, resize) in [(&narrow, Resize::Shorter(2)), (&png, Resize::Shorter(1))] {
            let fit = Fit {
                resize,
                filter: Filter::Bilinear,
            };
            assert!(p.decode_fitted("p", png, fit).is_err());
        }
    }

    #[test]
    fn bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shoe.png");
        let mut png = grey_png(&[7; 64], 8).unwrap();
        // A header that promises more than any decoder should allocate.
        let mut huge = png.clone();
        huge[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        png.truncate(png.len() / 2);
        for bytes in [&b"no image at all"[..], &[], &png, &huge] {
            files::write_atomic(&path, bytes).unwrap();
            assert!(grey(8).load(&path).unwrap_err().to_string().contains("shoe.png"));
        }
        assert!(
            Preprocess {
                image_std: vec![],
                ..grey(8)
            }
            .decode("p", b"")
            .is_err()
        );
    }
}
