//! Takes over the options of an adapter that training goes on from.
//!
//! LLaMA-Factory loads such an adapter with PEFT's `from_pretrained`, so that its
//! `adapter_config.json` decides whatever the run asked for. Knows no weights; `run` calls it
//! before the plan is made, and so plan, layout and manifest have the adapter's values.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use super::{Linear, LoraConfig, TrainError};
use crate::weights::Adapter;

/// Gives a run the options of the adapter that it goes on from; returns a note for each key that
/// had another value.
///
/// # Errors
/// [`TrainError::Unsupported`] naming the keys of the adapter that cannot be trained.
pub(super) fn adopt_options(
    lora: &mut LoraConfig,
    adapter: &Adapter,
) -> Result<Vec<String>, TrainError> {
    let (config, path) = (adapter.config(), adapter.dir().join("adapter_config.json"));
    let beyond = config.keys_beyond_plain_lora();
    if !beyond.is_empty() {
        return Err(TrainError::Unsupported {
            what: format!("{} of {}", beyond.join(", "), path.display()),
            advice: "set create_new_adapter: true to merge this adapter and train a new one"
                .to_owned(),
        });
    }
    let LoraConfig {
        lora_rank,
        lora_alpha,
        lora_dropout,
        lora_target,
        additional_target,
        use_rslora,
        use_dora,
        // A matter of the optimizer, which no adapter records.
        loraplus_lr_ratio: _,
    } = lora;
    let mut adopted = Adopted {
        path: &path,
        notes: Vec::new(),
    };
    adopted.set("lora_rank", lora_rank, config.rank());
    adopted.set("lora_alpha", lora_alpha, config.alpha());
    adopted.set("lora_dropout", lora_dropout, config.dropout());
    adopted.set("use_rslora", use_rslora, config.use_rslora());
    adopted.set("use_dora", use_dora, config.use_dora());
    adopted.set_names("lora_target", lora_target, config.every_layer_targets());
    adopted.set_names(
        "additional_target",
        additional_target,
        config.modules_to_save(),
    );
    Ok(adopted.notes)
}

/// What was taken from an adapter's configuration.
struct Adopted<'a> {
    path: &'a Path,
    notes: Vec<String>,
}

impl Adopted<'_> {
    fn set<T: PartialEq + Debug>(&mut self, key: &str, own: &mut T, of_adapter: T) {
        if *own != of_adapter {
            let path = self.path.display();
            self.notes.push(format!(
                "`{key}`: {of_adapter:?}, not {own:?}: the adapter that training goes on from \
                 decides ({path})"
            ));
            *own = of_adapter;
        }
    }

    /// Sets names whose order means nothing: PEFT writes those of a set.
    fn set_names(&mut self, key: &str, own: &mut Vec<String>, of_adapter: &[String]) {
        if as_set(own) != as_set(of_adapter) {
            self.set(key, own, of_adapter.to_vec());
        }
    }
}

/// Returns names with those that `all` stands for.
fn as_set(names: &[String]) -> BTreeSet<&str> {
    let has_all = names.iter().any(|name| name == "all");
    let linears = Linear::ALL.map(Linear::name).into_iter();
    let others = names
        .iter()
        .map(String::as_str)
        .filter(|name| *name != "all");
    others.chain(linears.filter(|_| has_all)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::adapter_out::{AdapterFiles, write_adapter};
    use super::super::{LoraLayout, LoraOptions, LoraTarget, TrainConfig};
    use super::*;
    use crate::models::ModelConfig;

    /// What a run is asked for.
    fn asked(more: &[&str]) -> TrainConfig {
        let words = ["model_name_or_path=m", "dataset=d", "output_dir=o"];
        let words: Vec<String> = (words.iter().chain(more))
            .map(|&word| word.to_owned())
            .collect();
        TrainConfig::from_arguments(&words, 1).unwrap()
    }

    /// Writes an adapter with these options, and `change` in its configuration.
    fn adapter(dir: &Path, options: &LoraOptions, change: Value) -> Adapter {
        let fixture = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/tiny-qwen2/config.json"
        );
        let model: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
        let model = ModelConfig::from_json(&model).unwrap();
        let layout = LoraLayout::new(&model, options.clone()).unwrap();
        write_adapter(dir, &layout, &layout.init(1), &AdapterFiles::default()).unwrap();
        let path = dir.join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(&path, config.to_string()).unwrap();
        Adapter::open(dir, None).unwrap()
    }

    #[test]
    fn every_option_of_the_adapter_is_taken_and_noted() {
        let dir = tempfile::tempdir().unwrap();
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let options = LoraOptions {
            rank: 3,
            alpha: 7.5,
            dropout: 0.25,
            use_rslora: true,
            use_dora: true,
            target: LoraTarget::Modules(texts(&["q_proj", "down_proj"])),
            modules_to_save: texts(&["lm_head"]),
            ..asked(&[]).lora_options()
        };
        let adapter = adapter(dir.path(), &options, json!({}));
        let mut config = asked(&["lora_rank=4", "lora_dropout=0.1"]);
        let notes = adopt_options(&mut config.lora, &adapter).unwrap();
        assert_eq!(config.lora_options(), options);
        let notes = notes.join("\n");
        for part in [
            "`lora_rank`: 3, not 4: ",
            "`lora_alpha`: 7.5, not 8.0: ",
            "`lora_dropout`: 0.25, not 0.1: ",
            "`use_rslora`: true, not false: ",
            "`use_dora`: true, not false: ",
            "`lora_target`: [\"q_proj\", \"down_proj\"], not [\"all\"]: ",
            "`additional_target`: [\"lm_head\"], not []: ",
            "adapter_config.json",
        ] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
        assert_eq!(notes.lines().count(), 7, "{notes}");
    }

    #[test]
    fn what_is_the_same_in_another_order_is_not_noted() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = asked(&["lora_rank=2", "lora_dropout=0.1", "additional_target=norm"]);
        let before = config.lora.clone();
        let mut targets: Vec<&str> = Linear::ALL.map(Linear::name).to_vec();
        targets.reverse();
        let change = json!({"target_modules": targets});
        let adapter = adapter(dir.path(), &config.lora_options(), change);
        let notes = adopt_options(&mut config.lora, &adapter).unwrap();
        assert_eq!(notes, Vec::<String>::new());
        assert_eq!(config.lora, before);
    }

    #[test]
    fn adapters_that_are_more_than_plain_lora_are_refused_by_key() {
        let dir = tempfile::tempdir().unwrap();
        for (key, value) in [
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("bias", json!("lora_only")),
            ("trainable_token_indices", json!([1])),
            ("target_modules", json!(".*_proj")),
        ] {
            let mut config = asked(&["lora_rank=2"]);
            let adapter = adapter(dir.path(), &config.lora_options(), json!({key: value}));
            let error = adopt_options(&mut config.lora, &adapter).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(key), "{text}");
            assert!(text.contains("create_new_adapter: true"), "{text}");
        }
    }
}
