//! Writes adapters in PEFT's format, and reads them back to go on training.
//!
//! Keys, order and names are PEFT 0.12's, which refuses configurations with keys it does not
//! know; newer versions, vLLM and `infold merge` read the same files.

use std::path::Path;

use serde_json::json;

use super::TrainError;
use super::files::{Tensors, pretty_json, read_tensors, write_atomically, write_tensors};
use super::lora::LoraLayout;

/// Name of the file with the weights.
pub(super) const ADAPTER_MODEL: &str = "adapter_model.safetensors";
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// What goes beside the weights of every adapter of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterFiles {
    /// `base_model_name_or_path` as the user gave it.
    pub base_model_name_or_path: String,
    /// More files by name: the tokenizer's, and what the template was.
    pub companions: Vec<(String, Vec<u8>)>,
}

/// Returns every trained tensor by its name in PEFT's state dict, in the order of the buffer.
pub(super) fn named_tensors<'a>(layout: &LoraLayout, mut flat: &'a [f32]) -> Tensors<'a> {
    let tensors = layout.tensors().into_iter().map(|tensor| {
        let (values, rest) = flat.split_at(tensor.len());
        flat = rest;
        (tensor.name, tensor.shape, values)
    });
    tensors.collect()
}

/// Collects a flat buffer from named tensors, all of which must be there in their shapes.
///
/// # Errors
/// [`TrainError::Checkpoint`] naming the file and the tensor.
pub(super) fn read_flat(
    path: &Path,
    layout: &LoraLayout,
    name_of: impl Fn(&str) -> String,
) -> Result<Vec<f32>, TrainError> {
    let tensors = read_tensors(path)?;
    let zeros = vec![0f32; layout.num_params()];
    let mut flat = Vec::with_capacity(layout.num_params());
    // The layout's order is that of the flat buffer, without gaps.
    for (name, shape, _) in named_tensors(layout, &zeros) {
        let name = name_of(&name);
        let what = match tensors.get(&name) {
            Some((found, values)) if *found == shape => {
                flat.extend_from_slice(values);
                continue;
            }
            Some((found, _)) => format!("tensor \"{name}\" is {found:?}, expected {shape:?}"),
            None => format!("tensor \"{name}\" of shape {shape:?} is missing"),
        };
        return Err(TrainError::Checkpoint {
            path: path.to_owned(),
            what: format!(
                "{what}; the adapter was made with another lora_rank, lora_target, \
                 additional_target or use_dora"
            ),
        });
    }
    Ok(flat)
}

/// Reads the weights of an adapter that this layout describes.
///
/// # Errors
/// [`TrainError::Checkpoint`] naming the file and the tensor.
pub fn read_adapter(dir: &Path, layout: &LoraLayout) -> Result<Vec<f32>, TrainError> {
    read_flat(&dir.join(ADAPTER_MODEL), layout, str::to_owned)
}

/// Writes the adapter's configuration, weights, card and companions into a directory.
///
/// # Errors
/// [`TrainError::Io`] naming the file.
pub fn write_adapter(
    dir: &Path,
    layout: &LoraLayout,
    params: &[f32],
    files: &AdapterFiles,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
    let tensors = named_tensors(layout, params);
    write_tensors(&dir.join(ADAPTER_MODEL), &tensors, layout.options().dtype)?;
    let config = pretty_json(&adapter_config(layout, files), 2);
    write_atomically(&dir.join(ADAPTER_CONFIG), config.trim_end().as_bytes())?;
    let card = model_card(&files.base_model_name_or_path);
    write_atomically(&dir.join("README.md"), card.as_bytes())?;
    for (name, content) in &files.companions {
        write_atomically(&dir.join(name), content)?;
    }
    Ok(())
}

fn adapter_config(layout: &LoraLayout, files: &AdapterFiles) -> serde_json::Value {
    let options = layout.options();
    // PEFT writes whole numbers without a fraction, and vLLM wants them so.
    let alpha = match options.alpha.fract() {
        0.0 => json!(options.alpha as i64),
        _ => json!(options.alpha),
    };
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": files.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        // As an f64 that is written with the digits of the f32.
        "lora_dropout": options.dropout.to_string().parse::<f64>().unwrap_or(0.0),
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": match &options.modules_to_save[..] {
            [] => json!(null),
            names => json!(names),
        },
        "peft_type": "LORA",
        "r": options.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": layout.target_modules(),
        "task_type": "CAUSAL_LM",
        "use_dora": options.use_dora,
        "use_rslora": options.use_rslora,
    })
}

fn model_card(base_model: &str) -> String {
    format!(
        "---\nbase_model: {base_model}\nlibrary_name: peft\nlicense: other\ntags:\n- lora\n\
         - infold\n- generated_from_trainer\n---\n\n# LoRA adapter of {base_model}\n\n\
         Made by `infold train`. `infold merge` folds it into its base model; PEFT and vLLM load \
         it as it is. `trainer_state.json` holds the losses of the run.\n"
    )
}
