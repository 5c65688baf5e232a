//! The IDX format of MNIST and its successors, plain or gzipped.
//!
//! Layout: two zero bytes, the element type (8: unsigned byte), the number of dimensions, each dimension as a
//! big-endian u32, then the elements, row-major.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

use crate::{Error, Result, files};

/// Largest array accepted, elements; a gzipped file of a few bytes must not fill the memory.
const MAX_ELEMENTS: usize = 1 << 30;

/// An array of bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Bytes {
    /// Row-major shape: items first.
    pub dims: Vec<usize>,
    /// As many as the shape says.
    pub values: Vec<u8>,
}

/// Reads an array of unsigned bytes with `rank` dimensions: 3 for images, 1 for labels.
pub fn read(path: &Path, rank: usize) -> Result<Bytes> {
    let raw = files::read(path, MAX_ELEMENTS as u64 + 64)?;
    let file = path.to_string_lossy();
    if raw.starts_with(&[0x1f, 0x8b]) {
        parse(&file, GzDecoder::new(&raw[..]), rank)
    } else {
        parse(&file, &raw[..], rank)
    }
}

fn parse(file: &str, mut from: impl Read, rank: usize) -> Result<Bytes> {
    let cut = |e: std::io::Error| Error::corrupt(file, format!("truncated or corrupt: {e}"));
    let mut magic = [0; 4];
    from.read_exact(&mut magic).map_err(cut)?;
    if magic != [0, 0, 8, rank as u8] {
        return Err(Error::corrupt(
            file,
            format!("no IDX file of unsigned bytes with {rank} dimensions"),
        ));
    }
    let mut dims = Vec::with_capacity(rank);
    for _ in 0..rank {
        let mut word = [0; 4];
        from.read_exact(&mut word).map_err(cut)?;
        dims.push(u32::from_be_bytes(word) as usize);
    }
    let count = dims
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= MAX_ELEMENTS);
    let count = count.ok_or_else(|| Error::corrupt(file, format!("{dims:?} is too large")))?;
    // One byte more than declared is enough to notice that there is more; memory grows with what is there.
    let mut values = Vec::new();
    from.take(count as u64 + 1)
        .read_to_end(&mut values)
        .map_err(cut)?;
    if values.len() != count {
        let found = if values.len() < count { "fewer" } else { "more" };
        return Err(Error::corrupt(file, format!("{found} elements than {dims:?}")));
    }
    Ok(Bytes { dims, values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const TWO_BY_THREE: [u8; 18] = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];

    #[test]
    fn plain_and_gzipped_agree() {
        let dir = tempfile::tempdir().unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&TWO_BY_THREE).unwrap();
        for (name, bytes) in [("a", TWO_BY_THREE.to_vec()), ("a.gz", gz.finish().unwrap())] {
            let path = dir.path().join(name);
            files::write_atomic(&path, &bytes).unwrap();
            assert_eq!(
                read(&path, 2).unwrap(),
                Bytes {
                    dims: vec![2, 3],
                    values: vec![1, 2, 3, 4, 5, 6]
                }
            );
            assert!(read(&path, 3).is_err());
            files::write_atomic(&path, &bytes[..bytes.len() - 1]).unwrap();
            assert!(read(&path, 2).unwrap_err().to_string().contains(name));
        }
    }

    #[test]
    fn counts_are_checked() {
        let more = [&TWO_BY_THREE[..], &[7]].concat();
        assert!(
            parse("f", &more[..], 2)
                .unwrap_err()
                .to_string()
                .contains("more elements")
        );
        let huge = [0, 0, 8, 2, 255, 255, 255, 255, 255, 255, 255, 255];
        assert!(
            parse("f", &huge[..], 2)
                .unwrap_err()
                .to_string()
                .contains("too large")
        );
    }
}
