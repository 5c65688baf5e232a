//! GGUF files: one file with a model's description, its tokenizer and its weights, often quantised.
//!
//! The format is that of llama.cpp's documentation, versions 2 and 3. Nothing is allocated on the word of a file: every length is
//! compared with the bytes that are left.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Cursor;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, gguf_file::TensorInfo};

use crate::safetensors::MAX_CHECKPOINT;
use crate::{Error, Result, files};

/// A file, with its bytes; a tensor is dequantised when it is asked for.
pub struct Gguf {
    file: String,
    bytes: Vec<u8>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
    /// Where tensors begin.
    data: u64,
}

/// A described property.
enum Value {
    Number(f64),
    Text(String),
    Numbers(Vec<f64>),
    Texts(Vec<String>),
}

struct Tensor {
    dims: Vec<usize>,
    kind: GgmlDType,
    offset: u64,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Gguf({})", self.file)
    }
}

const MAGIC: &[u8] = b"GGUF";
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Most values of a tensor.
const MAX_VALUES: usize = 1 << 33;
/// Tensors begin at a multiple of this, unless the file says otherwise.
const ALIGNMENT: u64 = 32;

impl Gguf {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path.to_string_lossy(), files::read(path, MAX_CHECKPOINT)?)
    }

    /// Takes a file's content; `file` is its name in errors.
    pub fn from_bytes(file: impl Into<String>, bytes: Vec<u8>) -> Result<Self> {
        let file = file.into();
        let (metadata, tensors, data) =
            header(&bytes).map_err(|detail| Error::corrupt(&file, format!("no GGUF file: {detail}")))?;
        Ok(Gguf {
            file,
            bytes,
            metadata,
            tensors,
            data,
        })
    }

    /// Its name, for errors.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`, dequantised; its shape, slowest dimension first, must be `dims`.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensors.get(name).ok_or_else(|| Error::Missing {
            file: self.file.clone(),
            name: name.to_owned(),
        })?;
        if tensor.dims != dims {
            return Err(Error::Shape {
                file: self.file.clone(),
                name: name.to_owned(),
                found: tensor.dims.clone(),
                expected: dims.to_vec(),
            });
        }
        let info = TensorInfo {
            ggml_dtype: tensor.kind,
            shape: tensor.dims.clone().into(),
            offset: tensor.offset,
        };
        let device = Device::Cpu;
        let values = info
            .read(&mut Cursor::new(&self.bytes), self.data, &device)
            .and_then(|t| t.dequantize(&device)?.flatten_all()?.to_vec1::<f32>())
            .map_err(|e| Error::corrupt(&self.file, format!("tensor {name}: {e}")))?;
        match values.iter().all(|v| v.is_finite()) {
            true => Ok(values),
            false => Err(Error::NotFinite {
                file: self.file.clone(),
                name: name.to_owned(),
            }),
        }
    }

    /// A property that is a text.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(self.lacks(key, "text")),
        }
    }

    /// A property that is a number or a truth value (0 or 1).
    pub fn number(&self, key: &str) -> Result<f64> {
        match self.metadata.get(key) {
            Some(Value::Number(number)) => Ok(*number),
            _ => Err(self.lacks(key, "number")),
        }
    }

    /// A property that is a size.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.number(key)? {
            n if n >= 0.0 && n <= f64::from(u32::MAX) && n.fract() == 0.0 => Ok(n as usize),
            _ => Err(self.lacks(key, "size")),
        }
    }

    /// A property that is a list of texts.
    pub fn texts(&self, key: &str) -> Result<&[String]> {
        match self.metadata.get(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            // Writers give an empty list any type.
            Some(Value::Numbers(none)) if none.is_empty() => Ok(&[]),
            _ => Err(self.lacks(key, "list of texts")),
        }
    }

    /// A property that is a list of numbers.
    pub fn numbers(&self, key: &str) -> Result<&[f64]> {
        match self.metadata.get(key) {
            Some(Value::Numbers(numbers)) => Ok(numbers),
            _ => Err(self.lacks(key, "list of numbers")),
        }
    }

    /// Whether there is such a property.
    pub fn describes(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn lacks(&self, key: &str, kind: &str) -> Error {
        Error::corrupt(
            &self.file,
            format!("the property {key} is missing, or is no {kind}"),
        )
    }
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, Tensor>, u64);
type Parsed<T> = std::result::Result<T, String>;

fn header(bytes: &[u8]) -> Parsed<Header> {
    let mut left = Reader { bytes, at: 0 };
    if left.take(4)? != MAGIC {
        return Err("it starts otherwise".into());
    }
    let version = left.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version}; 2 and 3 are supported"));
    }
    let (tensor_count, property_count) = (left.u64()?, left.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..property_count {
        let key = left.text()?;
        let kind = left.u32()?;
        let value = left.value(kind).map_err(|e| format!("property {key}: {e}"))?;
        metadata.insert(key, value);
    }
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = left.text()?;
        let tensor = left.tensor().map_err(|e| format!("tensor {name}: {e}"))?;
        tensors.insert(name, tensor);
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Number(n)) if *n >= 1.0 && *n <= 65536.0 && n.fract() == 0.0 => *n as u64,
        Some(_) => return Err("general.alignment is no alignment".into()),
    };
    Ok((metadata, tensors, (left.at as u64).next_multiple_of(alignment)))
}

/// The bytes of a header that are left.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("it ends too early")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as were taken"))
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Parsed<usize> {
        let length = self.u64()?;
        usize::try_from(length).map_err(|_| format!("a length of {length}"))
    }

    fn text(&mut self) -> Parsed<String> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn number(&mut self, kind: u32) -> Parsed<f64> {
        Ok(match kind {
            0 | 7 => f64::from(self.array::<1>()?[0]),
            1 => f64::from(i8::from_le_bytes(self.array()?)),
            2 => f64::from(u16::from_le_bytes(self.array()?)),
            3 => f64::from(i16::from_le_bytes(self.array()?)),
            4 => f64::from(self.u32()?),
            5 => f64::from(i32::from_le_bytes(self.array()?)),
            6 => f64::from(f32::from_le_bytes(self.array()?)),
            10 => self.u64()? as f64,
            11 => i64::from_le_bytes(self.array()?) as f64,
            12 => f64::from_le_bytes(self.array()?),
            other => return Err(format!("type {other} is not supported")),
        })
    }

    fn value(&mut self, kind: u32) -> Parsed<Value> {
        const TEXT: u32 = 8;
        const LIST: u32 = 9;
        Ok(match kind {
            TEXT => Value::Text(self.text()?),
            LIST => {
                let (kind, length) = (self.u32()?, self.length()?);
                // Each entry takes a byte at least, and what has been read bounds what is held.
                match kind {
                    TEXT => Value::Texts((0..length).map(|_| self.text()).collect::<Parsed<_>>()?),
                    _ => Value::Numbers((0..length).map(|_| self.number(kind)).collect::<Parsed<_>>()?),
                }
            }
            _ => Value::Number(self.number(kind)?),
        })
    }

    fn tensor(&mut self) -> Parsed<Tensor> {
        let count = self.u32()?;
        if count > MAX_DIMS {
            return Err(format!("{count} dimensions"));
        }
        let mut dims = (0..count).map(|_| self.length()).collect::<Parsed<Vec<_>>>()?;
        // The fastest comes first in the file.
        dims.reverse();
        let kind = quantisation(self.u32()?)?;
        let values = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if values.is_none_or(|n| n > MAX_VALUES)
            || !dims.last().unwrap_or(&0).is_multiple_of(kind.block_size())
        {
            return Err(format!("shape {dims:?} in blocks of {}", kind.block_size()));
        }
        Ok(Tensor {
            dims,
            kind,
            offset: self.u64()?,
        })
    }
}

fn quantisation(kind: u32) -> Parsed<GgmlDType> {
    Ok(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => return Err(format!("quantisation {other} is not supported")),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Bytes of a file in the making.
    #[derive(Default)]
    pub(crate) struct Writer(Vec<u8>);

    impl Writer {
        /// The start of a file of version 3.
        pub(crate) fn new(tensors: u64, properties: u64) -> Self {
            let mut out = Writer(MAGIC.to_vec());
            out.0.extend(3u32.to_le_bytes());
            out.0.extend(tensors.to_le_bytes());
            out.0.extend(properties.to_le_bytes());
            out
        }

        fn string(&mut self, text: &str) {
            self.0.extend((text.len() as u64).to_le_bytes());
            self.0.extend(text.bytes());
        }

        pub(crate) fn text(mut self, key: &str, value: &str) -> Self {
            self.string(key);
            self.0.extend(8u32.to_le_bytes());
            self.string(value);
            self
        }

        pub(crate) fn number(mut self, key: &str, value: u32) -> Self {
            self.string(key);
            self.0.extend(4u32.to_le_bytes());
            self.0.extend(value.to_le_bytes());
            self
        }

        pub(crate) fn texts(mut self, key: &str, values: &[&str]) -> Self {
            self.string(key);
            self.0.extend(9u32.to_le_bytes());
            self.0.extend(8u32.to_le_bytes());
            self.0.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|v| self.string(v));
            self
        }

        pub(crate) fn numbers(mut self, key: &str, values: &[i32]) -> Self {
            self.string(key);
            self.0.extend(9u32.to_le_bytes());
            self.0.extend(5u32.to_le_bytes());
            self.0.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|v| self.0.extend(v.to_le_bytes()));
            self
        }

        fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
            self.string(name);
            self.0.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| self.0.extend(d.to_le_bytes()));
            self.0.extend(kind.to_le_bytes());
            self.0.extend(offset.to_le_bytes());
            self
        }

        pub(crate) fn open(self) -> Result<Gguf> {
            Gguf::from_bytes("m.gguf", self.0)
        }

        fn aligned(mut self) -> Self {
            self.0.resize(self.0.len().next_multiple_of(32), 0);
            self
        }
    }

    /// A matrix in f32 and one in blocks of 32 bytes with a common scale.
    fn example() -> Vec<u8> {
        let mut out = Writer::new(2, 3)
            .text("general.architecture", "llama")
            .number("llama.block_count", 7)
            .numbers("none", &[])
            .tensor("a", &[2, 3], 0, 0)
            .tensor("b", &[32, 1], 8, 32)
            .aligned();
        (0..6).for_each(|i| out.0.extend((i as f32 - 2.0).to_le_bytes()));
        let mut out = out.aligned().0;
        out.extend(half::f16::from_f32(0.5).to_le_bytes());
        out.extend((0..32).map(|i| (i - 16) as i8 as u8));
        out
    }

    #[test]
    fn properties_and_tensors_are_read() {
        let gguf = Gguf::from_bytes("m.gguf", example()).unwrap();
        assert_eq!(gguf.text("general.architecture").unwrap(), "llama");
        assert_eq!(gguf.size("llama.block_count").unwrap(), 7);
        assert!(gguf.texts("none").unwrap().is_empty());
        assert_eq!(gguf.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(
            gguf.tensor("a", &[3, 2]).unwrap(),
            [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
        );
        let blocks = gguf.tensor("b", &[1, 32]).unwrap();
        assert_eq!((blocks[0], blocks[31]), (-8.0, 7.5));
        for (error, words) in [
            (gguf.tensor("a", &[2, 3]).unwrap_err(), ["m.gguf", "a", "[3, 2]"]),
            (gguf.tensor("c", &[1]).unwrap_err(), ["m.gguf", "c", "no tensor"]),
            (
                gguf.text("llama.block_count").unwrap_err(),
                ["m.gguf", "llama.block_count", "text"],
            ),
        ] {
            let error = error.to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
        }
    }

    #[test]
    fn a_cut_or_lying_file_is_refused() {
        let whole = example();
        let data = whole.len() - 34 - 32;
        for end in 0..whole.len() {
            match Gguf::from_bytes("m.gguf", whole[..end].to_vec()) {
                Ok(gguf) => assert!(end > data - 64 && gguf.tensor("b", &[1, 32]).is_err(), "{end}"),
                Err(e) => assert!(e.to_string().contains("m.gguf")),
            }
        }
        // Any length may be a lie: each eight bytes of the header as the largest number.
        for at in 4..data - 8 {
            let mut bytes = whole.clone();
            bytes[at..at + 8].fill(0xff);
            if let Ok(gguf) = Gguf::from_bytes("m.gguf", bytes) {
                let _ = gguf.tensor("a", &[3, 2]);
            }
        }
        let refusal = |w: Writer| w.open().unwrap_err().to_string();
        assert!(refusal(Writer::new(0, 1).number("general.alignment", 0)).contains("alignment"));
        assert!(refusal(Writer::new(1, 0).tensor("t", &[4], 99, 0)).contains("quantisation 99"));
        assert!(refusal(Writer::new(1, 0).tensor("t", &[33], 8, 0)).contains("blocks of 32"));
        assert!(refusal(Writer::new(1, 0).tensor("t", &[1; 5], 0, 0)).contains("5 dimensions"));
        assert!(refusal(Writer::new(1, 0).tensor("t", &[u64::MAX, 2], 0, 0)).contains("shape"));
    }
}
