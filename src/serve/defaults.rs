//! Sampling values that a request leaves open, from the model's `generation_config.json`.
//!
//! Names and precedence are vLLM's: request field, then `--override-generation-config`, then
//! the file, then the neutral value.

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use super::args::ApiArgs;

/// Values used where a request sets none.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SamplingDefaults {
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) top_k: i64,
    pub(super) min_p: f64,
    pub(super) repetition_penalty: f64,
    /// Used when a request names no number of tokens.
    pub(super) max_tokens: Option<usize>,
    /// Set by the operator: bounds what a request may ask for.
    pub(super) max_tokens_cap: Option<usize>,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: None,
            max_tokens_cap: None,
        }
    }
}

impl SamplingDefaults {
    /// Reads the defaults for a model whose own `generation_config.json` is `of_model`.
    ///
    /// # Errors
    /// A named directory without a readable file, or a value of the wrong type or out of range.
    pub(super) fn load(args: &ApiArgs, of_model: Option<&Value>) -> anyhow::Result<Self> {
        let from_file = match args.generation_config.as_str() {
            "vllm" => None,
            "auto" => of_model.cloned(),
            directory => Some(read_directory(directory)?),
        };
        let mut defaults = Self::default();
        if let Some(Value::Object(values)) = &from_file {
            defaults
                .apply(values)
                .context("read generation_config.json (--generation-config vllm leaves it out)")?;
        }
        if let Some(values) = &args.override_generation_config {
            defaults
                .apply(values)
                .context("apply --override-generation-config")?;
            defaults.max_tokens_cap = count(values, "max_new_tokens")?;
        }
        Ok(defaults)
    }

    fn apply(&mut self, values: &Map<String, Value>) -> anyhow::Result<()> {
        set(&mut self.temperature, number(values, "temperature")?);
        set(&mut self.top_p, number(values, "top_p")?);
        set(
            &mut self.top_k,
            number(values, "top_k")?.map(|top_k| top_k as i64),
        );
        set(&mut self.min_p, number(values, "min_p")?);
        set(
            &mut self.repetition_penalty,
            number(values, "repetition_penalty")?,
        );
        if let Some(max_tokens) = count(values, "max_new_tokens")? {
            self.max_tokens = Some(max_tokens);
        }
        self.check_ranges()
    }

    /// Refuses defaults that every request would be refused for.
    fn check_ranges(&self) -> anyhow::Result<()> {
        let Self {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            max_tokens: _,
            max_tokens_cap: _,
        } = *self;
        let faults = [
            (
                !(0.0..=2.0).contains(&temperature),
                "temperature",
                "in [0, 2]",
                temperature,
            ),
            (!(top_p > 0.0 && top_p <= 1.0), "top_p", "in (0, 1]", top_p),
            (top_k < -1, "top_k", "-1, 0 or more", top_k as f64),
            (!(0.0..=1.0).contains(&min_p), "min_p", "in [0, 1]", min_p),
            (
                repetition_penalty <= 0.0,
                "repetition_penalty",
                "greater than zero",
                repetition_penalty,
            ),
        ];
        match faults.into_iter().find(|(is_fault, ..)| *is_fault) {
            Some((_, key, wanted, found)) => bail!("{key} must be {wanted}, got {found}"),
            None => Ok(()),
        }
    }
}

/// Returns the end-of-sequence ids of a config: absent, one number or a list.
pub(super) fn eos_token_ids(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

fn read_directory(directory: &str) -> anyhow::Result<Value> {
    let path = std::path::Path::new(directory).join("generation_config.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("read {} (--generation-config)", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn number(values: &Map<String, Value>, key: &str) -> anyhow::Result<Option<f64>> {
    match values.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => Ok(number.as_f64()),
        Some(other) => bail!("{key} must be a number, got {other}"),
    }
}

fn count(values: &Map<String, Value>, key: &str) -> anyhow::Result<Option<usize>> {
    match number(values, key)? {
        Some(number) if number < 1.0 => bail!("{key} must be at least 1, got {number}"),
        number => Ok(number.map(|number| number as usize)),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        api: ApiArgs,
    }

    fn load(arguments: &[&str], of_model: Value) -> anyhow::Result<SamplingDefaults> {
        let program = std::iter::once("infold").chain(arguments.iter().copied());
        SamplingDefaults::load(&Command::parse_from(program).api, Some(&of_model))
    }

    fn qwen() -> Value {
        json!({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
               "max_new_tokens": 512, "eos_token_id": [151645, 151643], "do_sample": true})
    }

    #[test]
    fn the_models_file_gives_the_defaults() {
        let defaults = load(&[], qwen()).unwrap();
        assert_eq!(
            (defaults.temperature, defaults.top_p, defaults.top_k),
            (0.7, 0.8, 20)
        );
        assert_eq!(
            (defaults.max_tokens, defaults.max_tokens_cap),
            (Some(512), None)
        );
    }

    #[test]
    fn the_file_can_be_ignored_and_overridden() {
        let ignored = load(&["--generation-config", "vllm"], qwen()).unwrap();
        assert_eq!(ignored, SamplingDefaults::default());
        let json = r#"{"temperature": 0.1, "max_new_tokens": 9}"#;
        let overridden = load(&["--override-generation-config", json], qwen()).unwrap();
        assert_eq!((overridden.temperature, overridden.top_k), (0.1, 20));
        assert_eq!(overridden.max_tokens_cap, Some(9));
    }

    #[test]
    fn wrong_values_are_named() {
        let error = load(&[], json!({"top_p": "high"})).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "read generation_config.json (--generation-config vllm leaves it out): top_p must be a number, got \"high\""
        );
        for (values, text) in [
            (
                json!({"temperature": 3}),
                "temperature must be in [0, 2], got 3",
            ),
            (json!({"top_p": 0}), "top_p must be in (0, 1], got 0"),
            (json!({"top_k": -2}), "top_k must be -1, 0 or more, got -2"),
            (json!({"min_p": 1.5}), "min_p must be in [0, 1], got 1.5"),
            (
                json!({"repetition_penalty": 0}),
                "repetition_penalty must be greater than zero, got 0",
            ),
        ] {
            let error = format!("{:#}", load(&[], values).unwrap_err());
            assert!(error.ends_with(text), "{error}");
        }
    }

    #[test]
    fn eos_ids_may_be_one_number_or_a_list() {
        assert_eq!(eos_token_ids(&qwen()), [151_645, 151_643]);
        assert_eq!(eos_token_ids(&json!({"eos_token_id": 2})), [2]);
        assert!(eos_token_ids(&json!({"eos_token_id": null})).is_empty());
    }
}
