//! Writes one GGUF file, version 3, tensor by tensor.
//!
//! The header holds the place of every tensor, so all sizes are known before the first byte:
//! [`GgufLayout`] computes them (a dry run needs nothing else), [`GgufWriter`] then takes the data
//! in that order and keeps nothing. Format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use tempfile::NamedTempFile;

use super::{
    WeightsError, encoded_bytes,
    gguf::{DEFAULT_ALIGNMENT, GGML_TYPES},
};

const VERSION: u32 = 3;

// The numbers of the value types.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// A metadata value, in the widths that llama.cpp's converter uses.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// A count, size or id.
    U32(u32),
    /// A number.
    F32(f32),
    /// A flag.
    Bool(bool),
    /// A text.
    String(String),
    /// Texts, such as the tokens of a vocabulary.
    Strings(Vec<String>),
    /// Numbers, such as the types of tokens.
    I32s(Vec<i32>),
    /// Numbers, such as the scores of tokens.
    F32s(Vec<f32>),
}

/// What the header says of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Type of its elements.
    pub dtype: GgmlDType,
    /// Row-major, as in the Hugging Face checkpoint; the file has it reversed.
    pub shape: Vec<usize>,
}

/// The header of a file to be written and the sizes of all its tensors.
#[derive(Debug)]
pub struct GgufLayout {
    header: Vec<u8>,
    tensors: Vec<(GgufTensor, u64)>,
}

impl GgufLayout {
    /// Lays a file out: metadata in the order given, then the tensors.
    ///
    /// # Errors
    /// [`WeightsError::UnevenBlocks`] for rows that do not divide into blocks,
    /// [`WeightsError::UnsupportedDtype`] for a type that is not written.
    pub fn new(
        metadata: &[(String, GgufValue)],
        tensors: Vec<GgufTensor>,
    ) -> Result<Self, WeightsError> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut offset = 0;
        let mut sized = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let GgufTensor { name, dtype, shape } = &tensor;
            let size_bytes = encoded_bytes(name, *dtype, shape)?;
            put_string(&mut header, name);
            header.extend((shape.len() as u32).to_le_bytes());
            for &size in shape.iter().rev() {
                header.extend((size as u64).to_le_bytes());
            }
            header.extend(type_number(name, *dtype)?.to_le_bytes());
            header.extend(u64::to_le_bytes(offset));
            offset += padded(size_bytes);
            sized.push((tensor, size_bytes));
        }
        header.resize(padded(header.len() as u64) as usize, 0);
        Ok(Self {
            header,
            tensors: sized,
        })
    }

    /// Returns the tensors with the bytes of their data, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = (&GgufTensor, u64)> {
        self.tensors.iter().map(|(tensor, bytes)| (tensor, *bytes))
    }

    /// Returns the bytes of all tensors, padding not counted.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Returns the size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|(_, bytes)| padded(*bytes)).sum();
        self.header.len() as u64 + data
    }
}

/// A file that is being written: aside until it is complete, then under its name.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: NamedTempFile,
    layout: GgufLayout,
    /// The tensor whose data comes next.
    current: usize,
    /// Bytes of it that have come.
    written: u64,
}

impl GgufWriter {
    /// Creates the file beside `path` and writes its header.
    ///
    /// # Errors
    /// [`WeightsError::Write`].
    pub fn create(path: &Path, layout: GgufLayout) -> Result<Self, WeightsError> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".infold-").suffix(".gguf.part");
        #[cfg(unix)]
        {
            // Temporary files are private by default, a model is for whom the umask allows.
            let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
            builder.permissions(mode);
        }
        let write_error = |source| WeightsError::Write {
            path: path.to_owned(),
            source,
        };
        let mut file = builder.tempfile_in(directory).map_err(write_error)?;
        file.write_all(&layout.header).map_err(write_error)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            layout,
            current: 0,
            written: 0,
        })
    }

    /// Appends data of the current tensor, and goes on to the next when it is complete.
    ///
    /// # Errors
    /// [`WeightsError::GgufData`] for more than the tensor has, [`WeightsError::Write`].
    pub fn write(&mut self, data: &[u8]) -> Result<(), WeightsError> {
        let Some((tensor, size_bytes)) = self.layout.tensors.get(self.current) else {
            return Err(self.data_error("data after the last tensor".to_owned()));
        };
        let size_bytes = *size_bytes;
        let written = self.written + data.len() as u64;
        if written > size_bytes {
            let name = &tensor.name;
            return Err(self.data_error(format!(
                "tensor {name} has {size_bytes} bytes by its shape, {written} came"
            )));
        }
        let padding = [0; DEFAULT_ALIGNMENT as usize];
        let padding = match written == size_bytes {
            true => &padding[..(padded(size_bytes) - size_bytes) as usize],
            false => &[],
        };
        self.written = written;
        if written == size_bytes {
            (self.current, self.written) = (self.current + 1, 0);
        }
        (self.file.write_all(data))
            .and_then(|()| self.file.write_all(padding))
            .map_err(|source| self.write_error(source))
    }

    /// Puts the complete file in its place, over one that is there.
    ///
    /// # Errors
    /// [`WeightsError::GgufData`] when data is missing, [`WeightsError::Write`].
    pub fn finish(self) -> Result<(), WeightsError> {
        if let Some((tensor, size_bytes)) = self.layout.tensors.get(self.current) {
            let (name, written) = (&tensor.name, self.written);
            return Err(self.data_error(format!(
                "tensor {name} has {size_bytes} bytes by its shape, only {written} came"
            )));
        }
        let path = self.path;
        let write_error = |source| WeightsError::Write {
            path: path.clone(),
            source,
        };
        self.file.as_file().sync_all().map_err(write_error)?;
        (self.file.persist(&path)).map_err(|error| write_error(error.error))?;
        Ok(())
    }

    fn data_error(&self, reason: String) -> WeightsError {
        WeightsError::GgufData {
            path: self.path.clone(),
            reason,
        }
    }

    fn write_error(&self, source: std::io::Error) -> WeightsError {
        WeightsError::Write {
            path: self.path.clone(),
            source,
        }
    }
}

fn padded(size_bytes: u64) -> u64 {
    size_bytes.next_multiple_of(DEFAULT_ALIGNMENT)
}

fn type_number(name: &str, dtype: GgmlDType) -> Result<u32, WeightsError> {
    match GGML_TYPES.iter().find(|(_, known)| *known == dtype) {
        Some((number, _)) => Ok(*number),
        None => Err(WeightsError::UnsupportedDtype {
            path: PathBuf::from("GGUF"),
            tensor: name.to_owned(),
            dtype: format!("{dtype:?}"),
            supported: super::gguf::SUPPORTED_DTYPES,
        }),
    }
}

fn put_string(header: &mut Vec<u8>, text: &str) {
    header.extend((text.len() as u64).to_le_bytes());
    header.extend(text.as_bytes());
}

fn put_value(header: &mut Vec<u8>, value: &GgufValue) {
    let array = |header: &mut Vec<u8>, kind: u32, count: usize| {
        header.extend(ARRAY.to_le_bytes());
        header.extend(kind.to_le_bytes());
        header.extend((count as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(value) => {
            header.extend(U32.to_le_bytes());
            header.extend(value.to_le_bytes());
        }
        GgufValue::F32(value) => {
            header.extend(F32.to_le_bytes());
            header.extend(value.to_le_bytes());
        }
        GgufValue::Bool(value) => {
            header.extend(BOOL.to_le_bytes());
            header.push(u8::from(*value));
        }
        GgufValue::String(value) => {
            header.extend(STRING.to_le_bytes());
            put_string(header, value);
        }
        GgufValue::Strings(values) => {
            array(header, STRING, values.len());
            for value in values {
                put_string(header, value);
            }
        }
        GgufValue::I32s(values) => {
            array(header, I32, values.len());
            header.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        GgufValue::F32s(values) => {
            array(header, F32, values.len());
            header.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gguf::{Value, read_header};
    use super::super::index::StoredDtype;
    use super::*;

    fn layout() -> GgufLayout {
        let metadata = [
            ("a.u32", GgufValue::U32(7)),
            ("a.f32", GgufValue::F32(0.5)),
            ("a.bool", GgufValue::Bool(true)),
            ("a.string", GgufValue::String("ä".to_owned())),
            (
                "a.strings",
                GgufValue::Strings(vec!["x".into(), String::new()]),
            ),
            ("a.i32s", GgufValue::I32s(vec![-1, 3])),
            ("a.f32s", GgufValue::F32s(vec![-0.5])),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        let tensor = |name: &str, dtype, shape: &[usize]| GgufTensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        let tensors = vec![
            tensor("norm.weight", GgmlDType::F32, &[3]),
            tensor("w.weight", GgmlDType::Q8_0, &[2, 32]),
        ];
        GgufLayout::new(&metadata, tensors).unwrap()
    }

    #[test]
    fn a_written_file_reads_back_and_has_the_size_that_was_predicted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let layout = layout();
        let (file_bytes, tensor_bytes) = (layout.file_bytes(), layout.tensor_bytes());
        assert_eq!(tensor_bytes, 12 + 68);
        let mut writer = GgufWriter::create(&path, layout).unwrap();
        writer.write(&[1; 12]).unwrap();
        writer.write(&[2; 34]).unwrap();
        assert!(!path.exists(), "the name appears with the complete file");
        writer.write(&[3; 34]).unwrap();
        writer.finish().unwrap();

        let data = fs::read(&path).unwrap();
        assert_eq!(data.len() as u64, file_bytes);
        assert_eq!(data[4], 3);
        let header = read_header(&path, &data).unwrap();
        let expected = [
            ("a.bool", Value::Bool(true)),
            ("a.f32", Value::Float(0.5)),
            ("a.f32s", Value::Array(vec![Value::Float(-0.5)])),
            (
                "a.i32s",
                Value::Array(vec![Value::Signed(-1), Value::Signed(3)]),
            ),
            ("a.string", Value::String("ä".to_owned())),
            (
                "a.strings",
                Value::Array(vec![
                    Value::String("x".into()),
                    Value::String(String::new()),
                ]),
            ),
            ("a.u32", Value::Unsigned(7)),
        ];
        let found: Vec<_> = header.metadata.into_iter().collect();
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value)));
        let [(norm, first), (weight, second)] = &header.tensors[..] else {
            panic!("{:?}", header.tensors);
        };
        assert_eq!(
            (norm.as_str(), weight.as_str()),
            ("norm.weight", "w.weight")
        );
        assert_eq!(data[first.range.clone()], [1; 12]);
        assert_eq!(second.shape, [2, 32]);
        assert_eq!(second.dtype, StoredDtype::Known(GgmlDType::Q8_0));
        assert_eq!(data[second.range.clone()], [[2; 34], [3; 34]].concat());
        assert_eq!(second.range.start % 32, 0);
        // Nothing stays beside it.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn data_that_was_not_announced_is_refused_and_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(&path, "before").unwrap();
        let mut writer = GgufWriter::create(&path, layout()).unwrap();
        assert!(matches!(
            writer.write(&[0; 13]),
            Err(WeightsError::GgufData { .. })
        ));
        writer.write(&[0; 12]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(
            error.contains("w.weight has 68 bytes by its shape, only 0 came"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        let mut writer = GgufWriter::create(&path, layout()).unwrap();
        writer.write(&[0; 12]).unwrap();
        writer.write(&[0; 68]).unwrap();
        assert!(matches!(
            writer.write(&[0]),
            Err(WeightsError::GgufData { .. })
        ));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let path = Path::new("/nonexistent/m.gguf");
        let error = GgufWriter::create(path, layout()).unwrap_err();
        assert_eq!(error.to_string(), "cannot write /nonexistent/m.gguf");
    }
}
