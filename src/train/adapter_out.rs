//! Writes adapters in PEFT's format, and reads them back to go on training.
//!
//! Keys, order and names are PEFT 0.12's, which refuses configurations with keys it does not
//! know; newer versions, vLLM and `infold merge` read the same files.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::TrainError;
use super::files::{
    NamedValues, Tensors, pretty_json, read_tensors, write_atomically, write_tensors,
};
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
    collect_flat(&read_tensors(path)?, path, layout, name_of)
}

fn collect_flat(
    tensors: &NamedValues,
    path: &Path,
    layout: &LoraLayout,
    name_of: impl Fn(&str) -> String,
) -> Result<Vec<f32>, TrainError> {
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

/// Reads the weights of an adapter that this layout describes, and nothing beside it.
///
/// # Errors
/// [`TrainError::Checkpoint`] naming the file and the tensor that is missing, of another shape or
/// no part of the layout.
pub fn read_adapter(dir: &Path, layout: &LoraLayout) -> Result<Vec<f32>, TrainError> {
    let path = dir.join(ADAPTER_MODEL);
    let tensors = read_tensors(&path)?;
    let flat = collect_flat(&tensors, &path, layout, str::to_owned)?;
    let tensors_used = layout.tensors().into_iter().map(|tensor| tensor.name);
    // PEFT saves an adapted lm_head's own weight too, as the base has it.
    let below = layout.entries().iter().map(|entry| {
        let path = entry.module.path();
        format!("base_model.model.{path}.base_layer.weight")
    });
    let used: BTreeSet<String> = tensors_used.chain(below).collect();
    let unused: Vec<&String> = tensors
        .keys()
        .filter(|name| !used.contains(*name))
        .collect();
    if unused.is_empty() {
        return Ok(flat);
    }
    Err(TrainError::Checkpoint {
        path,
        what: format!(
            "{} tensors would be left out: {unused:?}; {ADAPTER_CONFIG} beside it does not ask \
             for them in target_modules, modules_to_save or use_dora: correct it, or save the \
             adapter again",
            unused.len()
        ),
    })
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

#[cfg(test)]
mod tests {
    use super::super::forward_backward::tests::lora_options;
    use super::super::{LoraOptions, LoraTarget};
    use super::*;
    use crate::models::ModelConfig;

    #[test]
    fn tensors_that_the_layout_does_not_use_are_refused_by_name() {
        let fixture = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/tiny-qwen2/config.json"
        );
        let model = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
        let model = ModelConfig::from_json(&model).unwrap();
        let layout = |targets: &[&str]| {
            let targets = targets.iter().map(|&target| target.to_owned()).collect();
            let options = LoraOptions {
                target: LoraTarget::Modules(targets),
                ..lora_options()
            };
            LoraLayout::new(&model, options).unwrap()
        };
        let both = layout(&["q_proj", "v_proj"]);
        let dir = tempfile::tempdir().unwrap();
        let params = both.init(1);
        write_adapter(dir.path(), &both, &params, &AdapterFiles::default()).unwrap();
        assert_eq!(read_adapter(dir.path(), &both).unwrap(), params);
        let error = read_adapter(dir.path(), &layout(&["q_proj"])).unwrap_err();
        let text = error.to_string();
        for part in [
            "adapter_model.safetensors",
            "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("q_proj"), "{text}");
    }
}
