//! `checkpoint-N/`: everything a run needs to go on as if it had not stopped.
//!
//! A checkpoint is written beside its place and renamed when all of it is on the disk, so one
//! that has its name is whole. Moments are stored per parameter name, not per rank, so the number
//! of ranks may change. The frozen base is never stored. With `save_only_model` a checkpoint has the
//! adapter and the trainer's state for readers, and no run can go on from it.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::{Value, json};

use super::TrainError;
use super::adapter_out::{ADAPTER_MODEL, AdapterFiles, named_tensors, read_flat, write_adapter};
use super::files::{pretty_json, write_atomically, write_tensors};
use super::lora::LoraLayout;
use super::manifest::{self, Manifest};
use super::optimizer::LossScaler;
use super::report::{RunFacts, TrainerState};

const PREFIX: &str = "checkpoint-";
const UNFINISHED: &str = "tmp-checkpoint-";
const OPTIMIZER: &str = "optimizer.safetensors";
/// Prefix of the f32 parameters, where the adapter's file has fewer bits.
const MASTER: &str = "master";
const PROGRESS: &str = "infold_state.json";
const MANIFEST: &str = "manifest.json";

/// What a run carries from update to update besides parameters and moments.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Progress {
    /// Updates of the optimizer (skipped ones not counted).
    pub(super) num_updates: u64,
    /// Sum of the losses of all updates, and of those since the last log entry.
    pub(super) loss_sum: f64,
    pub(super) window_sum: f64,
    /// Updates since the last log entry.
    pub(super) window_len: u64,
    /// Evaluations in a row without a better metric.
    pub(super) num_worse: u64,
    /// Scale, updates, last overflow and what is left of the hysteresis.
    pub(super) loss_scale: Option<(f64, u64, Option<u64>, u64)>,
}

impl Progress {
    /// Takes the state of a loss scaler.
    pub(super) fn set_scaler(&mut self, scaler: &LossScaler) {
        self.loss_scale = Some((
            scaler.scale,
            scaler.num_updates,
            scaler.last_overflow,
            scaler.hysteresis_left,
        ));
    }

    /// Gives its state to a loss scaler.
    pub(super) fn restore_scaler(&self, scaler: &mut LossScaler) {
        if let Some((scale, num_updates, last_overflow, hysteresis_left)) = self.loss_scale {
            scaler.scale = scale;
            scaler.num_updates = num_updates;
            scaler.last_overflow = last_overflow;
            scaler.hysteresis_left = hysteresis_left;
        }
    }

    /// Floats go as their bits: decimal readers may be off by the last one.
    fn to_json(&self) -> Value {
        let scale = self
            .loss_scale
            .map(|(scale, updates, last, left)| json!([scale.to_bits(), updates, last, left]));
        json!({
            "format": 1,
            "num_updates": self.num_updates,
            "loss_sum_bits": self.loss_sum.to_bits(),
            "window_sum_bits": self.window_sum.to_bits(),
            "window_len": self.window_len,
            "num_worse": self.num_worse,
            "loss_scale": scale,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let float = |value: &Value| value.as_u64().map(f64::from_bits);
        let loss_scale = match &value["loss_scale"] {
            Value::Null => None,
            scale => Some((
                float(&scale[0])?,
                scale[1].as_u64()?,
                scale[2].as_u64(),
                scale[3].as_u64()?,
            )),
        };
        Some(Self {
            num_updates: value["num_updates"].as_u64()?,
            loss_sum: float(&value["loss_sum_bits"])?,
            window_sum: float(&value["window_sum_bits"])?,
            window_len: value["window_len"].as_u64()?,
            num_worse: value["num_worse"].as_u64()?,
            loss_scale,
        })
    }
}

/// A run at one update.
pub(super) struct Snapshot {
    pub(super) params: Vec<f32>,
    /// First and second moments of all parameters; with `save_only_model` they may be empty.
    pub(super) moments: (Vec<f32>, Vec<f32>),
    pub(super) progress: Progress,
    pub(super) state: TrainerState,
}

/// What of a run is the same in all its checkpoints.
#[derive(Clone, Copy)]
pub(super) struct CheckpointContext<'a> {
    pub(super) layout: &'a LoraLayout,
    pub(super) files: &'a AdapterFiles,
    pub(super) manifest: &'a Manifest,
    pub(super) facts: &'a RunFacts,
    pub(super) save_only_model: bool,
}

/// Returns the place of a checkpoint.
pub fn checkpoint_dir(output_dir: &Path, global_step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{global_step}"))
}

/// Returns the update and place of every whole checkpoint, oldest first.
pub fn list_checkpoints(output_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(output_dir)
        .into_iter()
        .flatten()
        .flatten();
    let mut checkpoints: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let step = name.strip_prefix(PREFIX)?.parse().ok()?;
            entry.path().is_dir().then(|| (step, entry.path()))
        })
        .collect();
    checkpoints.sort();
    checkpoints
}

/// Writes a checkpoint whole and removes what a killed run left half-written.
///
/// # Errors
/// [`TrainError::Io`] naming the file; earlier checkpoints stay.
pub(super) fn save(
    output_dir: &Path,
    context: CheckpointContext<'_>,
    snapshot: &Snapshot,
) -> Result<PathBuf, TrainError> {
    let step = snapshot.state.global_step;
    let unfinished = output_dir.join(format!("{UNFINISHED}{step}"));
    remove_unfinished(output_dir)?;
    if let Err(error) = write_content(&unfinished, context, snapshot) {
        // On a full disk what was written is in the way; the error that counts is the first.
        let _ = std::fs::remove_dir_all(&unfinished);
        return Err(error);
    }
    let place = checkpoint_dir(output_dir, step);
    if place.exists() {
        std::fs::remove_dir_all(&place).map_err(TrainError::io(&place))?;
    }
    std::fs::rename(&unfinished, &place).map_err(TrainError::io(&place))?;
    Ok(place)
}

fn write_content(
    dir: &Path,
    context: CheckpointContext<'_>,
    snapshot: &Snapshot,
) -> Result<(), TrainError> {
    let CheckpointContext {
        layout,
        files,
        manifest,
        facts,
        save_only_model,
    } = context;
    write_adapter(dir, layout, &snapshot.params, files)?;
    write_atomically(
        &dir.join(MANIFEST),
        pretty_json(&json!(manifest), 2).as_bytes(),
    )?;
    snapshot.state.write(dir, facts)?;
    if save_only_model {
        return Ok(());
    }
    let (first, second) = &snapshot.moments;
    let mut kinds = vec![("exp_avg", first), ("exp_avg_sq", second)];
    if layout.options().dtype != DType::F32 {
        // The adapter's file is rounded; the optimizer goes on from what was not.
        kinds.push((MASTER, &snapshot.params));
    }
    let tensors = kinds.into_iter().flat_map(|(kind, values)| {
        let named = named_tensors(layout, values).into_iter();
        named.map(move |(name, shape, values)| (format!("{kind}.{name}"), shape, values))
    });
    write_tensors(&dir.join(OPTIMIZER), &tensors.collect(), DType::F32)?;
    write_atomically(
        &dir.join(PROGRESS),
        pretty_json(&snapshot.progress.to_json(), 2).as_bytes(),
    )
}

fn remove_unfinished(output_dir: &Path) -> Result<(), TrainError> {
    let entries = std::fs::read_dir(output_dir).map_err(TrainError::io(output_dir))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(TrainError::io(&path))?;
        }
    }
    Ok(())
}

/// Reads a checkpoint of the same configuration.
///
/// # Errors
/// [`TrainError::ManifestMismatch`] with every key that differs; [`TrainError::Io`] or
/// [`TrainError::Checkpoint`] naming the file and what to do.
pub(super) fn load(
    dir: &Path,
    layout: &LoraLayout,
    manifest: &Manifest,
) -> Result<Snapshot, TrainError> {
    if !dir.join(MANIFEST).is_file() {
        return Err(TrainError::Checkpoint {
            path: dir.to_owned(),
            what: format!(
                "{MANIFEST} is missing, so that this is no checkpoint of infold; name one of an \
                 output directory ({PREFIX}N), or set overwrite_output_dir: true without \
                 resume_from_checkpoint; adapter_name_or_path goes on from the weights of an \
                 adapter that another program trained"
            ),
        });
    }
    if !dir.join(OPTIMIZER).exists() && !dir.join(PROGRESS).exists() {
        return Err(TrainError::Checkpoint {
            path: dir.to_owned(),
            what: format!(
                "there is no {OPTIMIZER} to go on with, as after save_only_model: true; set \
                 overwrite_output_dir: true without resume_from_checkpoint to begin again, or \
                 adapter_name_or_path: {} and another output_dir to go on from its weights",
                dir.display()
            ),
        });
    }
    read_whole(dir, layout, manifest).map_err(|error| match error {
        TrainError::Checkpoint { path, what } => TrainError::Checkpoint {
            path,
            what: format!(
                "{what}. If the file is damaged, remove {}: the run goes on at the checkpoint \
                 before it",
                dir.display()
            ),
        },
        other => other,
    })
}

fn read_whole(
    dir: &Path,
    layout: &LoraLayout,
    manifest: &Manifest,
) -> Result<Snapshot, TrainError> {
    manifest::compare(dir, &read_json(&dir.join(MANIFEST))?, manifest)?;
    let optimizer = dir.join(OPTIMIZER);
    let moment = |kind: &str| read_flat(&optimizer, layout, |name| format!("{kind}.{name}"));
    let progress = read_json(&dir.join(PROGRESS))?;
    let progress = Progress::from_json(&progress).ok_or_else(|| TrainError::Checkpoint {
        path: dir.join(PROGRESS),
        what: "is not what this version writes; use an earlier checkpoint".to_owned(),
    })?;
    let params = match layout.options().dtype {
        DType::F32 => read_flat(&dir.join(ADAPTER_MODEL), layout, str::to_owned)?,
        _ => moment(MASTER)?,
    };
    Ok(Snapshot {
        params,
        moments: (moment("exp_avg")?, moment("exp_avg_sq")?),
        progress,
        state: TrainerState::read(dir)?,
    })
}

fn read_json(path: &Path) -> Result<Value, TrainError> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
    serde_json::from_str(&text).map_err(|error| TrainError::Checkpoint {
        path: path.to_owned(),
        what: error.to_string(),
    })
}

/// Removes the oldest checkpoints beyond `limit`, never the best one.
///
/// # Errors
/// [`TrainError::Io`] naming the directory.
pub(super) fn rotate(
    output_dir: &Path,
    limit: usize,
    best: Option<&str>,
) -> Result<(), TrainError> {
    let checkpoints = list_checkpoints(output_dir);
    let mut surplus = checkpoints.len().saturating_sub(limit.max(1));
    let newest = checkpoints.last().map(|(step, _)| *step);
    for (step, path) in &checkpoints {
        let is_best = best.is_some_and(|best| Path::new(best) == path);
        if surplus == 0 || is_best || Some(*step) == newest {
            continue;
        }
        std::fs::remove_dir_all(path).map_err(TrainError::io(path))?;
        surplus -= 1;
    }
    Ok(())
}
