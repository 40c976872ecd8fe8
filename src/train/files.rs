//! Files that are there whole or not at all, tensors in them, and what the system's files say.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use candle_core::DType;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

use super::TrainError;

/// Named f32 tensors with their shapes.
pub(super) type Tensors<'a> = Vec<(String, Vec<usize>, &'a [f32])>;

/// Shape and values of tensors by name.
pub(super) type NamedValues = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Writes a file beside its place and moves it there when it is safe on the disk.
///
/// # Errors
/// [`TrainError::Io`] naming the file; what was there before stays.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), TrainError> {
    let write = || {
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        make_readable(file.path())?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(TrainError::io(path))
}

/// Temporary files are private; results are for everybody whom the system lets.
#[cfg(unix)]
fn make_readable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_path: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Returns a value as JSON, indented by `indent` spaces.
pub(super) fn pretty_json(value: &serde_json::Value, indent: usize) -> String {
    let (mut text, indent) = (Vec::new(), " ".repeat(indent));
    let formatter = PrettyFormatter::with_indent(indent.as_bytes());
    let written = value.serialize(&mut Serializer::with_formatter(&mut text, formatter));
    written.expect("a JSON value goes into memory without an error");
    String::from_utf8(text).expect("JSON is UTF-8") + "\n"
}

/// Writes tensors as safetensors, as PEFT does (`{"format": "pt"}`), in f32, bf16 or f16.
///
/// # Errors
/// [`TrainError::Io`] naming the file.
pub(super) fn write_tensors(
    path: &Path,
    tensors: &Tensors<'_>,
    dtype: DType,
) -> Result<(), TrainError> {
    let bytes = tensors.iter().map(|(_, _, values)| to_bytes(values, dtype));
    let bytes: Vec<Vec<u8>> = bytes.collect();
    let dtype = match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    };
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(dtype, shape.clone(), bytes);
        view.map(|view| (name.clone(), view))
    });
    let invalid = |source| TrainError::Io {
        path: path.to_owned(),
        source: std::io::Error::other(source),
    };
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(invalid)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let content = safetensors::serialize(views, Some(metadata)).map_err(invalid)?;
    write_atomically(path, &content)
}

fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        DType::BF16 => values
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect(),
        DType::F16 => values
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect(),
        _ => values.flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Reads tensors of f32, bf16 or f16 as f32.
///
/// # Errors
/// [`TrainError::Io`] or [`TrainError::Checkpoint`] naming the file.
pub(super) fn read_tensors(path: &Path) -> Result<NamedValues, TrainError> {
    let content = std::fs::read(path).map_err(TrainError::io(path))?;
    let invalid = |what: String| TrainError::Checkpoint {
        path: path.to_owned(),
        what,
    };
    let file = SafeTensors::deserialize(&content).map_err(|error| invalid(error.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let data = view.data();
        let pairs = data.as_chunks().0.iter();
        let values = match view.dtype() {
            Dtype::F32 => (data.as_chunks().0.iter())
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
            Dtype::BF16 => pairs.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F16 => pairs.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            other => {
                return Err(invalid(format!(
                    "tensor \"{name}\" is {other:?}, expected F32, BF16 or F16"
                )));
            }
        };
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    Ok(tensors)
}

/// Returns the bytes of memory that the machine can still give, where the system says so.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}
