//! `--check`: is a directory what this merge would write?

use std::path::Path;

use serde_json::Value;

use super::companions::Companions;
use super::progress::Progress;
use crate::weights::{
    Checkpoint, MergedCheckpoint, ShardPlan, StoredTensor, TensorInfo, TensorSource, WeightsError,
};

/// How many differences are told.
const SHOWN: usize = 10;

/// Rows compared at a time.
const ROWS: usize = 1024;

/// Returns the differences between what `merged` would be and what lies in `dir`, the first few
/// in words and the number of all.
///
/// # Errors
/// A directory that is no checkpoint; weights that cannot be made.
pub(super) fn differences(
    merged: &MergedCheckpoint,
    companions: &Companions,
    plan: &ShardPlan,
    dir: &Path,
    progress: &Progress,
) -> Result<(usize, Vec<String>), WeightsError> {
    let found = Checkpoint::open(dir)?;
    let mut differences = Vec::new();
    let wanted = merged.tensors()?;
    let known: std::collections::HashSet<&str> =
        wanted.iter().map(|info| info.name.as_str()).collect();
    for name in found.names().filter(|name| !known.contains(name)) {
        differences.push(format!("{name}: is too much"));
    }
    for info in &wanted {
        differences.extend(difference(merged, &found, info, progress)?);
    }
    for shard in &plan.shards {
        if !dir.join(&shard.file_name).is_file() {
            differences.push(format!("{}: the file is missing", shard.file_name));
        }
    }
    for (name, content) in &companions.files {
        differences.extend(file_difference(dir, name, content));
    }
    let count = differences.len();
    differences.truncate(SHOWN);
    Ok((count, differences))
}

/// Compares one tensor.
fn difference(
    merged: &MergedCheckpoint,
    found: &Checkpoint,
    info: &TensorInfo,
    progress: &Progress,
) -> Result<Option<String>, WeightsError> {
    let name = &info.name;
    if !found.contains(name) {
        return Ok(Some(format!("{name}: is missing")));
    }
    let header = found.tensor(name)?;
    if (header.dtype, &header.shape) != (info.dtype, &info.shape) {
        return Ok(Some(format!(
            "{name}: is {:?} {:?}, expected {:?} {:?}",
            header.dtype, header.shape, info.dtype, info.shape
        )));
    }
    let num_rows = info.shape.first().copied().unwrap_or(1);
    for start in (0..num_rows).step_by(ROWS) {
        let rows = start..(start + ROWS).min(num_rows);
        let wanted = merged.rows(name, rows.clone())?;
        let found = TensorSource::rows(found, name, rows)?;
        progress.add(wanted.data.len() as u64);
        if let Some(element) = first_difference(&wanted, &found) {
            let cols = info.shape.iter().skip(1).product::<usize>().max(1);
            return Ok(Some(format!(
                "{name}: differs first in row {}, column {}",
                start + element / cols,
                element % cols
            )));
        }
    }
    Ok(None)
}

fn first_difference(a: &StoredTensor, b: &StoredTensor) -> Option<usize> {
    if a.data == b.data {
        return None;
    }
    let byte = a.data.iter().zip(&b.data).position(|(a, b)| a != b)?;
    Some(byte / a.dtype.type_size())
}

/// Compares one of the other files; JSON by its content.
fn file_difference(dir: &Path, name: &str, wanted: &[u8]) -> Option<String> {
    let Ok(found) = std::fs::read(dir.join(name)) else {
        return Some(format!("{name}: the file is missing"));
    };
    if found == wanted {
        return None;
    }
    let parse = |content: &[u8]| serde_json::from_slice::<Value>(content).ok();
    match (parse(&found), parse(wanted)) {
        (Some(Value::Object(found)), Some(Value::Object(wanted))) => {
            let differs = |key: &&String| found.get(*key) != wanted.get(*key);
            let mut keys = wanted.keys().chain(found.keys());
            keys.find(differs)
                .map(|key| format!("{name}: {key} differs"))
        }
        _ => Some(format!("{name}: the content differs")),
    }
}
