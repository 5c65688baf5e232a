//! Safetensors checkpoints, read tensor by tensor against stated shapes.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView};

use crate::{Error, Result, files};

/// Largest checkpoint read, bytes.
pub(crate) const MAX_CHECKPOINT: u64 = 16 << 30;

/// A named, row-major array.
#[derive(Clone, PartialEq)]
pub struct Array {
    /// Row-major shape.
    pub dims: Vec<usize>,
    /// As many as the shape says.
    pub values: Vec<f32>,
}

/// Weights may be secret: the shape alone is shown.
impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Array{:?}", self.dims)
    }
}

/// Arrays by dotted name.
pub type Tensors = BTreeMap<String, Array>;

/// How arrays are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single.
    F32,
    /// IEEE half; refused where a value overflows it.
    F16,
}

/// A safetensors file, or several that make one checkpoint. Holds the files' bytes; a tensor is converted when it is
/// asked for.
pub struct Checkpoint {
    /// What was opened, for errors.
    file: String,
    parts: Vec<Part>,
}

/// One file.
struct Part {
    file: String,
    bytes: Cow<'static, [u8]>,
    data: usize,
    index: Metadata,
}

/// `*.safetensors.index.json`: which file has which tensor.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Ends the name of a list of parts.
const INDEX: &str = ".index.json";
/// Most parts of a checkpoint.
const MAX_PARTS: usize = 1024;

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Checkpoint({})", self.file)
    }
}

impl Checkpoint {
    /// Reads a file, or the files beside it that a `*.safetensors.index.json` lists.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.to_string_lossy();
        if !file.ends_with(INDEX) {
            return Self::from_bytes(file, files::read(path, MAX_CHECKPOINT)?);
        }
        let names = parts(path)?;
        let mut parts = Vec::with_capacity(names.len());
        let mut left = MAX_CHECKPOINT;
        for name in names {
            let path = path.with_file_name(name);
            let part = Part::new(path.to_string_lossy().into(), files::read(&path, left)?.into())?;
            left -= part.bytes.len() as u64;
            parts.push(part);
        }
        let file = file.into_owned();
        Ok(Checkpoint { file, parts })
    }

    /// Takes a file's content, embedded for instance; `file` is its name in errors.
    pub fn from_bytes(file: impl Into<String>, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let file = file.into();
        let parts = vec![Part::new(file.clone(), bytes.into())?];
        Ok(Checkpoint { file, parts })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let names = self.parts.iter().flat_map(|p| p.index.offset_keys());
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// The tensor `name` in f32, from f32, f16 or bf16.
    ///
    /// Its shape must be `dims`; a convolution's `[out, c, h, w]` is also taken as the matrix `[out, c * h * w]`.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let (part, info) = self.find(name)?;
        if info.shape != dims && matrix(&info.shape).as_deref() != Some(dims) {
            return Err(Error::Shape {
                file: part.file.clone(),
                name: name.to_owned(),
                found: info.shape.clone(),
                expected: dims.to_vec(),
            });
        }
        part.values(name, info)
    }

    /// The tensor `name` in whatever shape it has.
    pub fn array(&self, name: &str) -> Result<Array> {
        let (part, info) = self.find(name)?;
        Ok(Array {
            dims: info.shape.clone(),
            values: part.values(name, info)?,
        })
    }

    /// All tensors.
    pub fn arrays(&self) -> Result<Tensors> {
        self.names()
            .into_iter()
            .map(|name| Ok((name.clone(), self.array(&name)?)))
            .collect()
    }

    fn find(&self, name: &str) -> Result<(&Part, &TensorInfo)> {
        let found = self.parts.iter().find_map(|p| Some((p, p.index.info(name)?)));
        found.ok_or_else(|| Error::Missing {
            file: self.file.clone(),
            name: name.to_owned(),
        })
    }
}

/// The files that a `*.safetensors.index.json` lists, sorted; they are beside it.
pub(crate) fn parts(index: &Path) -> Result<BTreeSet<String>> {
    let file = index.to_string_lossy();
    let list: Index = files::read_json(index)?;
    let names: BTreeSet<String> = list.weight_map.into_values().collect();
    if names.len() > MAX_PARTS {
        return Err(Error::corrupt(file, format!("more than {MAX_PARTS} parts")));
    }
    // A list must not lead out of its folder.
    match names
        .iter()
        .find(|n| !n.ends_with(".safetensors") || n.contains(['/', '\\']))
    {
        Some(name) => Err(Error::corrupt(file, format!("{name:?} is no file beside it"))),
        None => Ok(names),
    }
}

impl Part {
    fn new(file: String, bytes: Cow<'static, [u8]>) -> Result<Self> {
        let (header, index) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| Error::corrupt(&file, format!("no safetensors file: {e}")))?;
        Ok(Part {
            file,
            bytes,
            data: header + 8,
            index,
        })
    }

    fn values(&self, name: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let (start, end) = info.data_offsets;
        let raw = self
            .bytes
            .get(self.data + start..self.data + end)
            .ok_or_else(|| Error::corrupt(&self.file, format!("tensor {name} lies outside the file")))?;
        let values: Vec<f32> = match info.dtype {
            Dtype::F32 => raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => raw
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            Dtype::BF16 => raw
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
            other => {
                return Err(Error::corrupt(
                    &self.file,
                    format!("tensor {name} is {other:?}, not f32, f16 or bf16"),
                ));
            }
        };
        if values.iter().all(|v| v.is_finite()) {
            Ok(values)
        } else {
            Err(Error::NotFinite {
                file: self.file.clone(),
                name: name.to_owned(),
            })
        }
    }
}

fn matrix(shape: &[usize]) -> Option<Vec<usize>> {
    let (&[first, ..], true) = (shape, shape.len() > 2) else {
        return None;
    };
    let rest = shape[1..].iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    Some(vec![first, rest])
}

/// Writes arrays as one safetensors file, atomically; what was trained may say what it was trained on, so only its user may read it.
pub fn write(path: &Path, tensors: &Tensors, precision: Precision) -> Result<()> {
    let file = path.to_string_lossy();
    let mut encoded = Vec::with_capacity(tensors.len());
    for (name, array) in tensors {
        if !array.values.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite {
                file: file.into_owned(),
                name: name.clone(),
            });
        }
        let (dtype, raw): (_, Vec<u8>) = match precision {
            Precision::F32 => (
                Dtype::F32,
                array.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
            Precision::F16 => {
                let halves: Vec<f16> = array.values.iter().map(|v| f16::from_f32(*v)).collect();
                if !halves.iter().all(|v| v.is_finite()) {
                    return Err(Error::corrupt(
                        file,
                        format!("tensor {name} overflows half precision"),
                    ));
                }
                (Dtype::F16, halves.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
        };
        encoded.push((name, dtype, &array.dims, raw));
    }
    let views = encoded
        .iter()
        .map(|(name, dtype, dims, raw)| Ok((*name, TensorView::new(*dtype, dims.to_vec(), raw)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
    let bytes = views
        .and_then(|v| safetensors::serialize(v, None))
        .map_err(|e| Error::corrupt(file, e))?;
    files::write_private(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tensors {
        let array = |dims: &[usize], values: &[f32]| Array {
            dims: dims.to_vec(),
            values: values.to_vec(),
        };
        Tensors::from([
            (
                "a.weight".to_owned(),
                array(&[2, 3], &[1.0, -2.0, 0.5, 0.25, 3.0, -0.125]),
            ),
            ("conv".to_owned(), array(&[2, 1, 2, 1], &[1.0, 2.0, 3.0, 4.0])),
        ])
    }

    fn written(precision: Precision) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        write(&path, &sample(), precision).unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn both_precisions_read_back() {
        for precision in [Precision::F32, Precision::F16] {
            let file = Checkpoint::from_bytes("m", written(precision)).unwrap();
            assert_eq!(file.arrays().unwrap(), sample());
            assert_eq!(file.tensor("conv", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        }
    }

    #[test]
    fn errors_name_file_tensor_and_shapes() {
        let file = Checkpoint::from_bytes("m.safetensors", written(Precision::F32)).unwrap();
        let text = |e: Error| e.to_string();
        assert_eq!(
            text(file.tensor("b", &[1]).unwrap_err()),
            "m.safetensors: no tensor b"
        );
        let shape = text(file.tensor("a.weight", &[3, 2]).unwrap_err());
        assert!(
            shape.contains("a.weight") && shape.contains("[2, 3]") && shape.contains("[3, 2]"),
            "{shape}"
        );
    }

    #[test]
    fn what_is_not_finite_is_refused_both_ways() {
        let nan = Tensors::from([(
            "x".to_owned(),
            Array {
                dims: vec![1],
                values: vec![f32::NAN],
            },
        )]);
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            write(&dir.path().join("m"), &nan, Precision::F32),
            Err(Error::NotFinite { .. })
        ));
        let big = Tensors::from([(
            "x".to_owned(),
            Array {
                dims: vec![1],
                values: vec![1e6],
            },
        )]);
        assert!(
            write(&dir.path().join("m"), &big, Precision::F16)
                .unwrap_err()
                .to_string()
                .contains("overflows")
        );

        let encoded = |v: f32| {
            [
                (Dtype::F32, v.to_le_bytes().to_vec()),
                (Dtype::F16, f16::from_f32(v).to_le_bytes().to_vec()),
                (Dtype::BF16, bf16::from_f32(v).to_le_bytes().to_vec()),
            ]
        };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for ((dtype, good), (_, bad)) in encoded(1.5).into_iter().zip(encoded(bad)) {
                let values = [&good[..], &bad, &good].concat();
                let sound = ("layer.0", TensorView::new(dtype, vec![1], &good).unwrap());
                let spoilt = ("layer.1", TensorView::new(dtype, vec![3], &values).unwrap());
                let bytes = safetensors::serialize([sound, spoilt], None).unwrap();
                let file = Checkpoint::from_bytes("m.safetensors", bytes).unwrap();
                assert_eq!(file.tensor("layer.0", &[1]).unwrap(), [1.5]);
                for result in [file.tensor("layer.1", &[3]).map(drop), file.arrays().map(drop)] {
                    let text = result.unwrap_err().to_string();
                    assert_eq!(
                        text,
                        "m.safetensors: tensor layer.1 holds a value that is not finite"
                    );
                }
            }
        }
    }

    #[test]
    fn truncated_and_corrupt_files_are_errors() {
        let bytes = written(Precision::F16);
        for end in 0..bytes.len() {
            assert!(
                Checkpoint::from_bytes("m", bytes[..end].to_vec()).is_err(),
                "cut at {end}"
            );
        }
        // A header length far beyond the file must not be believed.
        let mut lie = bytes.clone();
        lie[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Checkpoint::from_bytes("m", lie).is_err());
        for i in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[i] ^= 0x20;
            // Whatever it now says, reading it neither panics nor yields a value that is not finite.
            if let Ok(arrays) = Checkpoint::from_bytes("m", flipped).and_then(|f| f.arrays()) {
                assert!(arrays.values().all(|a| a.values.iter().all(|v| v.is_finite())));
            }
        }
    }
}
