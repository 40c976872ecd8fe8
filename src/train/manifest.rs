//! What makes a run the same run: a checkpoint goes on only where all of it is equal.
//!
//! Stands beside every checkpoint as `manifest.json`. When a run logs, evaluates and saves may
//! change from one start to the next, and its ranks too; what changes the updates may not.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::text::SupervisedExample;

use super::{Duration, LrCurve, Prepared, TrainConfig, TrainError};

/// The configuration that a checkpoint belongs to: key to value, compared on resuming.
pub type Manifest = BTreeMap<String, Value>;

/// The key of the examples' hash: where other keys differ too, they say why.
const TRAINING_DATA: &str = "training_data";
const NUM_RANKS: &str = "num_ranks";
const ACCUMULATION: &str = "gradient_accumulation_steps";

/// Returns the manifest of a run.
pub(super) fn manifest_of(config: &TrainConfig, prepared: &Prepared) -> Manifest {
    let TrainConfig {
        model,
        data,
        lora,
        batch,
        optimizer,
        schedule,
        ..
    } = config;
    let template = prepared.encoder.template();
    let always = json!({
        "model_name_or_path": model.model_name_or_path,
        "adapter_name_or_path": model.adapter_name_or_path,
        "num_examples": prepared.train.len(),
        TRAINING_DATA: hash(&prepared.train),
        "template": template.name(),
        "default_system": template.default_system(),
        "cutoff_len": data.cutoff_len,
        "train_on_prompt": data.train_on_prompt,
        "mask_history": data.mask_history,
        "disable_shuffling": data.disable_shuffling,
        "data_seed": data.data_seed,
        "lora_rank": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_target": lora.lora_target,
        "use_rslora": lora.use_rslora,
        "loraplus_lr_ratio": lora.loraplus_lr_ratio,
        "per_device_train_batch_size": batch.per_device_train_batch_size,
        ACCUMULATION: batch.gradient_accumulation_steps,
        NUM_RANKS: batch.num_ranks,
        "learning_rate": schedule.learning_rate,
        "adam": [optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_epsilon],
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "neftune_noise_alpha": optimizer.neftune_noise_alpha,
        "seed": config.seed,
    });
    // Keys that are left out when they ask for nothing.
    let wishes = json!({
        "use_dora": lora.use_dora,
        "additional_target": lora.additional_target,
        "dataloader_drop_last": batch.dataloader_drop_last,
        "dtype": config.lora_options().dtype.as_str(),
        "loss_scale": config.loss_scale().is_some(),
    });
    let is_off = |value: &Value| {
        [json!(false), json!([]), json!("f32"), json!(0), json!(0.0)].contains(value)
            || value.is_null()
            || value.as_object().is_some_and(Map::is_empty)
    };
    let wishes = [wishes, of_schedule(config, prepared)];
    let wishes = wishes.iter().filter_map(Value::as_object).flatten();
    let wishes = wishes.filter(|(_, value)| !is_off(value));
    let entries = always.as_object().into_iter().flatten().chain(wishes);
    entries
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Returns what decides the learning rate of every update, the length of the run included where
/// the curve ends with it.
fn of_schedule(config: &TrainConfig, prepared: &Prepared) -> Value {
    let schedule = &config.schedule;
    let curve = config.lr_schedule(&prepared.plan.counts).curve;
    let has_ratio = schedule.warmup_steps == 0 && schedule.warmup_ratio > 0.0;
    let ends_with_run = match curve {
        LrCurve::Constant => false,
        LrCurve::ConstantWithWarmup | LrCurve::InverseSqrt | LrCurve::WarmupLr(_) => has_ratio,
        LrCurve::Linear
        | LrCurve::Cosine { .. }
        | LrCurve::CosineWithRestarts { .. }
        | LrCurve::CosineWithMinLr { .. }
        | LrCurve::Polynomial { .. }
        | LrCurve::WarmupStableDecay { .. }
        | LrCurve::WarmupDecayLr(_)
        | LrCurve::WarmupCosineLr { .. } => true,
    };
    let (num_train_epochs, max_steps) = match config.batch.duration {
        _ if !ends_with_run => (None, None),
        Duration::Epochs(epochs) => (Some(epochs), None),
        Duration::Updates(updates) => (None, Some(updates)),
    };
    let deepspeed = config.deepspeed_schedule();
    json!({
        "lr_scheduler_type": match deepspeed {
            Some(schedule) => schedule.name(),
            None => schedule.lr_scheduler_type.name(),
        },
        "lr_scheduler_kwargs": schedule.lr_scheduler_kwargs,
        "deepspeed.scheduler": deepspeed.map(|schedule| format!("{schedule:?}")),
        "warmup_steps": schedule.warmup_steps,
        "warmup_ratio": schedule.warmup_ratio,
        "num_train_epochs": num_train_epochs,
        "max_steps": max_steps,
    })
}

/// Returns the first half of the SHA-256 of all ids and labels, in hexadecimal digits.
fn hash(examples: &[SupervisedExample]) -> String {
    let mut hash = Sha256::new();
    for example in examples {
        hash.update((example.input_ids.len() as u64).to_le_bytes());
        for id in &example.input_ids {
            hash.update(id.to_le_bytes());
        }
        for label in &example.labels {
            hash.update(label.to_le_bytes());
        }
    }
    let digest = hash.finalize();
    digest[..16].iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares the manifest of the checkpoint in `dir` with that of the run that shall go on there.
///
/// # Errors
/// [`TrainError::ManifestMismatch`] with every key that differs.
pub(super) fn compare(dir: &Path, there: &Value, manifest: &Manifest) -> Result<(), TrainError> {
    // Through JSON too, so that both sides have numbers in one form.
    let here = serde_json::from_str(&json!(manifest).to_string()).unwrap_or(Value::Null);
    let keys = [there, &here].into_iter().filter_map(Value::as_object);
    let mut keys: Vec<&String> = keys.flat_map(Map::keys).collect();
    keys.sort();
    keys.dedup();
    // The same micro-batches make an update where fewer ranks make more of them.
    let per_update = |manifest: &Value| {
        let number = |key: &str| manifest[key].as_u64();
        Some(number(NUM_RANKS)? * number(ACCUMULATION)?)
    };
    let (before, now) = (per_update(there), per_update(&here));
    let is_same_update = before.is_some() && before == now;
    keys.retain(|key| *key != NUM_RANKS && !(is_same_update && *key == ACCUMULATION));
    keys.retain(|key| there[key.as_str()] != here[key.as_str()]);
    if keys.len() > 1 {
        keys.retain(|key| *key != TRAINING_DATA);
    }
    if keys.is_empty() {
        return Ok(());
    }
    let difference = |key: &&String| {
        let (before, now) = (&there[key.as_str()], &here[key.as_str()]);
        match key.as_str() {
            TRAINING_DATA => "the training examples are others than they were".to_owned(),
            _ => format!("{key} was {before}, is {now}"),
        }
    };
    let differences: Vec<String> = keys.iter().map(difference).collect();
    Err(TrainError::ManifestMismatch {
        path: dir.to_owned(),
        differences: differences.join("; "),
    })
}
