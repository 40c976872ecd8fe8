//! LLaMA-Factory's export file, and `key=value` arguments, as settings of a merge.
//!
//! Every key of its export is known, so that a file written for `llamafactory-cli export` works
//! unchanged; a key that would change the result and is not built is refused, one that is not
//! known is an error that names the nearest.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_norway::Value;

use super::args::{Accumulate, Dtype, ModelfileChoice, parse_shard_size};
use super::gguf::GgufFileType;
use crate::text::nearest;

/// What the keys say; flags win over it.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    pub(super) model: Option<String>,
    pub(super) adapters: Vec<String>,
    pub(super) adapter_weights: Vec<f32>,
    pub(super) adapter_folder: Option<String>,
    pub(super) output: Option<PathBuf>,
    pub(super) max_shard_size: Option<u64>,
    pub(super) accumulate: Option<Accumulate>,
    pub(super) dtype: Option<Dtype>,
    pub(super) template: Option<String>,
    pub(super) default_system: Option<String>,
    pub(super) modelfile: Option<ModelfileChoice>,
    pub(super) gguf: Vec<GgufFileType>,
    pub(super) gguf_only: bool,
    pub(super) gguf_lora: bool,
    pub(super) overwrite: bool,
    pub(super) dry_run: bool,
    pub(super) check: bool,
    pub(super) warnings: Vec<String>,
    finetuning_type: Option<String>,
}

/// The keys of LLaMA-Factory's export.
const LLAMAFACTORY_KEYS: &[&str] = &[
    "model_name_or_path",
    "adapter_name_or_path",
    "adapter_folder",
    "template",
    "trust_remote_code",
    "finetuning_type",
    "export_dir",
    "export_size",
    "export_device",
    "export_legacy_format",
    "export_quantization_bit",
    "export_quantization_dataset",
    "export_quantization_nsamples",
    "export_quantization_maxlen",
    "export_hub_model_id",
    "hf_hub_token",
    "infer_dtype",
    "resize_vocab",
    "add_tokens",
    "add_special_tokens",
    "default_system",
    "tool_format",
    "use_kv_cache",
];

/// This program's own names for what LLaMA-Factory does not have or names otherwise.
const OWN_KEYS: &[&str] = &[
    "model",
    "adapter",
    "adapter_weight",
    "output",
    "max_shard_size",
    "accumulate",
    "dtype",
    "modelfile",
    "gguf",
    "gguf_only",
    "gguf_lora",
    "overwrite",
    "dry_run",
    "check",
];

/// Returns whether LLaMA-Factory's export has the key and no flag of that name exists here.
pub(super) fn is_llamafactory_key(key: &str) -> bool {
    !["adapter_folder", "template", "default_system"].contains(&key)
        && LLAMAFACTORY_KEYS.contains(&key)
}

impl Settings {
    /// Reads a file, if the first argument is one, and then `key=value` arguments.
    ///
    /// # Errors
    /// An unreadable file, an unknown key, a value of the wrong kind, a key that asks for
    /// something that is not built.
    pub(super) fn read(arguments: &[String]) -> anyhow::Result<Self> {
        let mut settings = Self::default();
        for (i, argument) in arguments.iter().enumerate() {
            let is_file = [".yaml", ".yml", ".json"]
                .iter()
                .any(|end| argument.ends_with(end));
            // Directories of runs are named by their settings: runs/lr=1e-4/merge.yaml.
            if i == 0 && is_file && (!argument.contains('=') || Path::new(argument).is_file()) {
                settings.read_file(argument)?;
                continue;
            }
            let Some((key, value)) = argument.split_once('=') else {
                bail!(
                    "expected a settings file (.yaml, .yml, .json) or key=value, got {argument:?}"
                );
            };
            // As in a file: true is a boolean, 5 a number.
            let value = serde_norway::from_str(value).unwrap_or(Value::String(value.to_owned()));
            settings.set(key.trim(), &value)?;
        }
        let full = settings
            .finetuning_type
            .as_deref()
            .filter(|kind| *kind != "lora");
        if let (Some(kind), false) = (full, settings.adapters.is_empty()) {
            bail!("finetuning_type is {kind}, adapters need lora: correct it or leave it out");
        }
        Ok(settings)
    }

    fn read_file(&mut self, path: &str) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("read the settings in {path}, which must be a text file in UTF-8")
        })?;
        // JSON is YAML too.
        let yaml: Value = serde_norway::from_str(&text)
            .with_context(|| format!("parse the settings in {path}"))?;
        let Value::Mapping(entries) = yaml else {
            bail!("{path} is not a mapping of keys to values");
        };
        for (key, value) in &entries {
            let key = key
                .as_str()
                .with_context(|| format!("{path}: a key is no string"))?;
            self.set(key, value).with_context(|| format!("in {path}"))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &Value) -> anyhow::Result<()> {
        if value.is_null() && is_known(key) {
            return Ok(());
        }
        match key {
            "model" | "model_name_or_path" => self.model = Some(text(key, value)?),
            "adapter" | "adapter_name_or_path" => {
                let texts = texts(key, value)?;
                self.adapters = adapter_list(texts.iter().map(String::as_str));
            }
            "adapter_weight" => self.adapter_weights = numbers(key, value)?,
            "adapter_folder" => self.adapter_folder = Some(text(key, value)?),
            "output" | "export_dir" => self.output = Some(text(key, value)?.into()),
            "max_shard_size" => self.max_shard_size = Some(size(key, &text(key, value)?)?),
            "export_size" => {
                // LLaMA-Factory's is a number of GB.
                let text = text(key, value)?;
                let text = match text.trim().parse::<f64>() {
                    Ok(number) => format!("{number}GB"),
                    Err(_) => text,
                };
                self.max_shard_size = Some(size(key, &text)?);
            }
            "accumulate" => self.accumulate = Some(choice(key, value)?),
            "dtype" | "infer_dtype" => self.dtype = Some(choice(key, value)?),
            "template" => self.template = Some(text(key, value)?),
            "default_system" => self.default_system = Some(text(key, value)?),
            "modelfile" => self.modelfile = Some(choice(key, value)?),
            "gguf" => {
                self.gguf = (adapter_list(texts(key, value)?.iter().map(String::as_str)).into_iter())
                    .map(|name| choice(key, &Value::String(name)))
                    .collect::<anyhow::Result<_>>()?;
            }
            "gguf_only" => self.gguf_only = boolean(key, value)?,
            "gguf_lora" => self.gguf_lora = boolean(key, value)?,
            "overwrite" => self.overwrite = boolean(key, value)?,
            "dry_run" => self.dry_run = boolean(key, value)?,
            "check" => self.check = boolean(key, value)?,
            "finetuning_type" => self.finetuning_type = Some(text(key, value)?),
            "export_device" => {
                let device = text(key, value)?;
                if !["cpu", "auto", "gpu", "cuda"].contains(&device.as_str()) {
                    bail!("export_device is {device:?}, expected cpu, auto, gpu or cuda");
                }
            }
            "export_legacy_format" if boolean(key, value)? => {
                bail!("export_legacy_format asks for pickled weights, infold writes safetensors only: set it to false");
            }
            "export_quantization_bit" => {
                bail!("export_quantization_bit is not built: merge first, then quantise the result");
            }
            "export_hub_model_id" => {
                bail!("export_hub_model_id is not built: merge first, then upload the directory with huggingface_hub");
            }
            "resize_vocab" | "add_tokens" | "add_special_tokens" => self.warnings.push(format!(
                "{key} has no effect: the size of the vocabulary comes from the adapter, and the tokenizer \
                 where the adapter's has more tokens than the base's"
            )),
            _ if is_known(key) => {}
            _ => return Err(unknown(key)),
        }
        Ok(())
    }
}

fn is_known(key: &str) -> bool {
    LLAMAFACTORY_KEYS.contains(&key) || OWN_KEYS.contains(&key)
}

fn unknown(key: &str) -> anyhow::Error {
    let known = LLAMAFACTORY_KEYS.iter().chain(OWN_KEYS).copied();
    match nearest(key, known) {
        Some(nearest) => anyhow::anyhow!("unknown key {key:?}: did you mean {nearest:?}?"),
        None => anyhow::anyhow!("unknown key {key:?}"),
    }
}

/// Splits lists by commas, as LLaMA-Factory does; spaces around names do not count.
pub(super) fn adapter_list<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<String> {
    texts
        .flat_map(|text| text.split(','))
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

fn wrong(key: &str, wanted: &str, value: &Value) -> anyhow::Error {
    let found = serde_norway::to_string(value).unwrap_or_default();
    anyhow::anyhow!("{key} must be {wanted}, found {}", found.trim())
}

fn text(key: &str, value: &Value) -> anyhow::Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(value) => Ok(value.to_string()),
        _ => Err(wrong(key, "a text", value)),
    }
}

fn texts(key: &str, value: &Value) -> anyhow::Result<Vec<String>> {
    match value {
        Value::Sequence(values) => values.iter().map(|value| text(key, value)).collect(),
        _ => Ok(vec![text(key, value)?]),
    }
}

fn numbers(key: &str, value: &Value) -> anyhow::Result<Vec<f32>> {
    let texts = texts(key, value)?;
    adapter_list(texts.iter().map(String::as_str))
        .iter()
        .map(|number| number.parse().map_err(|_| wrong(key, "numbers", value)))
        .collect()
}

fn boolean(key: &str, value: &Value) -> anyhow::Result<bool> {
    match text(key, value)?.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(wrong(key, "true or false", value)),
    }
}

fn size(key: &str, text: &str) -> anyhow::Result<u64> {
    parse_shard_size(text).map_err(|error| anyhow::anyhow!("{key}: {error}"))
}

fn choice<T: ValueEnum>(key: &str, value: &Value) -> anyhow::Result<T> {
    let found = text(key, value)?;
    T::from_str(&found, true).map_err(|_| {
        let names: Vec<String> = (T::value_variants().iter())
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect();
        anyhow::anyhow!("{key} is {found:?}, expected one of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> anyhow::Result<Settings> {
        Settings::read(
            &arguments
                .iter()
                .map(|a| (*a).to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn the_file_of_the_issue_is_read_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("merge.yaml");
        let yaml = "### model\r\nmodel_name_or_path: /models/Qwen2.5-7B\r\nadapter_name_or_path: saves/a, saves/b\r\n\
                    template: qwen\r\ntrust_remote_code: true\r\n\r\n### export\r\nexport_dir: out\r\nexport_size: 5\r\n\
                    export_device: gpu\r\nexport_legacy_format: false\r\n";
        std::fs::write(&path, yaml).unwrap();
        let settings =
            read(&[path.to_str().unwrap(), "export_size=2", "export_dir=other"]).unwrap();
        assert_eq!(settings.model.as_deref(), Some("/models/Qwen2.5-7B"));
        assert_eq!(settings.adapters, ["saves/a", "saves/b"]);
        assert_eq!(settings.max_shard_size, Some(2_000_000_000));
        assert_eq!(settings.output, Some("other".into()));
    }

    #[test]
    fn a_file_whose_path_has_an_equals_sign_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("lr=1e-4");
        std::fs::create_dir(&run).unwrap();
        let path = run.join("merge.yaml");
        std::fs::write(&path, "model: m").unwrap();
        let settings = read(&[path.to_str().unwrap(), "output=merge.yaml"]).unwrap();
        assert_eq!(settings.model.as_deref(), Some("m"));
        assert_eq!(settings.output, Some("merge.yaml".into()));
        // Without such a file it stays a key with a value.
        let settings = read(&["output=no/such/file.yaml"]).unwrap();
        assert_eq!(settings.output, Some("no/such/file.yaml".into()));
    }

    #[test]
    fn json_works_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("merge.json");
        std::fs::write(&path, r#"{"model": "m", "adapter_weight": [1, 0.5], "export_size": "500MB", "export_quantization_bit": null}"#).unwrap();
        let settings = read(&[path.to_str().unwrap(), "dtype=BFLOAT16"]).unwrap();
        assert_eq!(settings.adapter_weights, [1.0, 0.5]);
        assert_eq!(settings.max_shard_size, Some(500_000_000));
        assert_eq!(settings.dtype, Some(Dtype::Bfloat16));
    }

    #[test]
    fn what_is_wrong_is_named_with_a_way_out() {
        for (arguments, wanted) in [
            (&["export_dri=x"][..], "did you mean \"export_dir\"?"),
            (&["export_device=tpu"], "expected cpu, auto, gpu or cuda"),
            (&["export_quantization_bit=4"], "merge first"),
            (&["export_legacy_format=true"], "safetensors only"),
            (&["overwrite=perhaps"], "must be true or false"),
            (&["dtype=int8"], "expected one of auto, float32"),
            (&["export_size=0"], "expected a size"),
            (&["notes.txt"], "expected a settings file"),
            (&["adapter=a", "finetuning_type=full"], "adapters need lora"),
            (
                &["/no/such/file.yaml"],
                "read the settings in /no/such/file.yaml",
            ),
        ] {
            let error = read(arguments).unwrap_err();
            assert!(error.to_string().contains(wanted), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn keys_without_effect_are_accepted() {
        let settings = read(&[
            "use_kv_cache=false",
            "export_device=cuda",
            "resize_vocab=true",
        ])
        .unwrap();
        assert_eq!(settings.warnings.len(), 1);
    }
}
