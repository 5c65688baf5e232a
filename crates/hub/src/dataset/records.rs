//! Raw pictures of one size in one file.

use std::path::Path;

use image::RgbImage;

use crate::{Error, Result};

/// A file's content, cut into records of equal length with a picture each, as planes of bytes.
pub(super) struct Records {
    /// The file's name without its folder.
    pub name: String,
    bytes: Vec<u8>,
    /// What precedes the pixels of a record.
    header: usize,
    width: u32,
    height: u32,
    planes: usize,
}

impl Records {
    /// `file` is for the error that the content does not hold whole records.
    pub fn new(
        file: &Path,
        bytes: Vec<u8>,
        header: usize,
        [planes, height, width]: [usize; 3],
    ) -> Result<Self> {
        let sides = (u32::try_from(width), u32::try_from(height));
        let record = [height, width]
            .iter()
            .try_fold(planes, |n, &d| n.checked_mul(d))
            .and_then(|n| n.checked_add(header));
        let length = bytes.len();
        match (sides, record) {
            ((Ok(width), Ok(height)), Some(record)) if record > header && length.is_multiple_of(record) => {
                Ok(Records {
                    name: file.file_name().unwrap_or_default().to_string_lossy().into(),
                    bytes,
                    header,
                    width,
                    height,
                    planes,
                })
            }
            _ => Err(Error::corrupt(
                file.to_string_lossy(),
                format!(
                    "{length} bytes are no pictures of {width} x {height}: cut off, or of another format"
                ),
            )),
        }
    }

    fn area(&self) -> usize {
        self.width as usize * self.height as usize
    }

    fn stride(&self) -> usize {
        self.header + self.planes * self.area()
    }

    pub fn len(&self) -> usize {
        self.bytes.len() / self.stride()
    }

    /// What precedes the pixels of record `i`.
    pub fn header(&self, i: usize) -> &[u8] {
        &self.bytes[i * self.stride()..][..self.header]
    }

    /// The planes of record `i`.
    pub fn pixels(&self, i: usize) -> &[u8] {
        &self.bytes[i * self.stride() + self.header..][..self.planes * self.area()]
    }

    pub fn picture(&self, i: usize) -> RgbImage {
        let (pixels, area) = (self.pixels(i), self.area());
        RgbImage::from_fn(self.width, self.height, |x, y| {
            let at = y as usize * self.width as usize + x as usize;
            // One plane is grey: all three colours are it.
            let plane = |c: usize| pixels[(c % self.planes) * area + at];
            image::Rgb([plane(0), plane(1), plane(2)])
        })
    }
}
