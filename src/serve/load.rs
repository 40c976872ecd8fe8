//! From flags to a running engine.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::engine::{EngineHandle, LoadFormat};
use crate::text::{
    ChatTemplate, TextError, Tokenizer, fallback_template, fallback_template_for_architecture,
    resolve_chat_template,
};
use crate::weights::{self, Checkpoint, DummyCheckpoint, ModelSource, TokenizerSource};

use super::args::ServeArgs;
use super::defaults::{self, SamplingDefaults};

/// A model that answers, with all that the HTTP side needs to know about it.
pub struct LoadedModel {
    /// The running engine.
    pub engine: EngineHandle,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// `config.json`, or what stands for it in a GGUF file.
    pub config: Value,
    /// `generation_config.json`, if the model has one.
    pub generation_config: Option<Value>,
    /// Where the model was read from, shown by `/v1/models`.
    pub root: String,
}

impl LoadedModel {
    /// Returns the end-of-sequence ids that config, generation config and tokenizer name.
    pub(super) fn eos_token_ids(&self) -> Vec<u32> {
        let mut ids = defaults::eos_token_ids(&self.config);
        if let Some(generation_config) = &self.generation_config {
            ids.extend(defaults::eos_token_ids(generation_config));
        }
        ids.extend(self.tokenizer.eos_token().and_then(|token| token.id));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Returns the template for chats: the one asked for, the model's own, or its family's.
    ///
    /// # Errors
    /// A template that can not be read or compiled.
    pub(super) fn chat_template(
        &self,
        asked_for: Option<&str>,
    ) -> anyhow::Result<Option<ChatTemplate>> {
        chat_template(&self.tokenizer, &self.config, asked_for)
    }
}

fn chat_template(
    tokenizer: &Tokenizer,
    config: &Value,
    asked_for: Option<&str>,
) -> anyhow::Result<Option<ChatTemplate>> {
    let has_token = |token: &str| tokenizer.token_id(token).is_some();
    let model_type = config.get("model_type").and_then(Value::as_str);
    let source = match (asked_for, tokenizer.chat_templates().select(None)) {
        (Some(asked_for), _) => Some(resolve_chat_template(asked_for)?),
        (None, Some(own)) => Some(own.to_owned()),
        (None, None) => {
            fallback_template_for_architecture(model_type.unwrap_or_default(), &has_token)
                .and_then(fallback_template)
                .map(str::to_owned)
        }
    };
    let compile = |source: String| ChatTemplate::compile(&source, tokenizer.named_tokens());
    Ok(source.map(compile).transpose()?)
}

/// Finds and opens the model that `args` names, then starts its engine.
///
/// # Errors
/// A model that can not be found, read or run.
pub(super) fn start_engine(args: &ServeArgs) -> anyhow::Result<LoadedModel> {
    let OpenedModel {
        source,
        tokenizer,
        generation_config,
    } = match args.engine.load_format {
        LoadFormat::Auto => open_model(args)?,
        LoadFormat::Dummy => open_dummy_model(args)?,
    };
    let root = source.path().display().to_string();
    let config = source.config().clone();
    // The server makes both again; a mistake in the flags must not cost the minutes of a load.
    SamplingDefaults::load(&args.api, generation_config.as_ref())?;
    chat_template(&tokenizer, &config, args.api.chat_template.as_deref())?;
    let engine = args.engine.start(source)?;
    Ok(LoadedModel {
        engine,
        tokenizer,
        config,
        generation_config,
        root,
    })
}

/// A model that was found, before its engine starts.
struct OpenedModel {
    source: Arc<dyn ModelSource>,
    /// Read before the engine starts: a wrong one is found in moments, an engine takes longer.
    tokenizer: Tokenizer,
    generation_config: Option<Value>,
}

fn open_model(args: &ServeArgs) -> anyhow::Result<OpenedModel> {
    let checkpoint = args.engine.open(args.model())?;
    let tokenizer = match &args.tokenizer {
        Some(directory) => Tokenizer::from_dir(directory),
        None => tokenizer_of(&checkpoint),
    }
    .context("loading the tokenizer")?;
    let generation_config = checkpoint.generation_config().cloned();
    let hub = args.engine.hub_options();
    let source = weights::open_with_adapters(checkpoint, &args.merge_adapter, &hub)
        .context("folding the adapters into the model")?;
    Ok(OpenedModel {
        source,
        tokenizer,
        generation_config,
    })
}

/// Opens a directory that has all but the weights.
fn open_dummy_model(args: &ServeArgs) -> anyhow::Result<OpenedModel> {
    if !args.merge_adapter.is_empty() {
        bail!("--merge-adapter needs real weights: leave out --load-format dummy");
    }
    let directory = Path::new(args.model());
    let source = args
        .engine
        .open_dummy(args.model())
        .context("--load-format dummy needs a directory with config.json and a tokenizer")?;
    let tokenizer = Tokenizer::from_dir(args.tokenizer.as_deref().unwrap_or(directory));
    Ok(OpenedModel {
        tokenizer: tokenizer.context("loading the tokenizer")?,
        generation_config: DummyCheckpoint::read_generation_config(directory)?,
        source,
    })
}

fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Tokenizer, TextError> {
    match checkpoint.tokenizer() {
        TokenizerSource::Directory(directory) => Tokenizer::from_dir(&directory),
        TokenizerSource::Gguf(vocabulary) => Tokenizer::from_vocabulary(*vocabulary),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        serve: ServeArgs,
    }

    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen2");

    /// Starts what `infold serve DIRECTORY --load-format dummy FLAGS` would.
    fn start_dummy(directory: &Path, flags: &[&str]) -> anyhow::Result<LoadedModel> {
        let directory = directory.to_str().unwrap();
        let start = ["infold", directory, "--load-format", "dummy"];
        let start = start.into_iter().chain(flags.iter().copied());
        start_engine(&Command::parse_from(start).serve)
    }

    fn without_weights(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::copy(Path::new(FIXTURE).join(name), folder.path().join(name)).unwrap();
        }
        folder
    }

    fn message(result: anyhow::Result<LoadedModel>) -> String {
        format!("{:#}", result.err().unwrap())
    }

    #[test]
    fn dummy_weights_need_no_weight_files() {
        let files = ["config.json", "tokenizer.json", "generation_config.json"];
        let folder = without_weights(&files);
        let flags = ["--device", "cpu", "--threads", "1"];
        let size = ["--kv-cache-memory-bytes", "1MiB", "--max-model-len", "64"];
        let loaded = start_dummy(folder.path(), &[&flags[..], &size[..]].concat()).unwrap();
        assert!(loaded.generation_config.is_some());
        assert_eq!(loaded.engine.info().max_model_len, 64);
        loaded.engine.stop();
    }

    #[test]
    fn settings_are_checked_before_the_engine_starts() {
        // An engine with this flag would not start either.
        let too_small = ["--device", "cpu", "--kv-cache-memory-bytes", "1"];
        let error = |flags: [&str; 2]| {
            message(start_dummy(
                Path::new(FIXTURE),
                &[&too_small[..], &flags].concat(),
            ))
        };
        let template = error(["--chat-template", "{{ messages"]);
        assert!(template.contains("chat template, line 1"), "{template}");
        let hot = error(["--override-generation-config", r#"{"temperature": 9}"#]);
        assert!(hot.contains("temperature must be in [0, 2]"), "{hot}");
        let directory = error(["--generation-config", "/nonexistent"]);
        assert!(directory.contains("/nonexistent"), "{directory}");
    }

    #[test]
    fn a_length_beyond_the_models_is_refused() {
        let flags = ["--device", "cpu", "--max-model-len", "1025"];
        let error = message(start_dummy(Path::new(FIXTURE), &flags));
        assert!(error.contains("--max-model-len 1025"), "{error}");
        assert!(error.contains("1024 tokens"), "{error}");
    }

    #[test]
    fn what_dummy_weights_lack_is_named() {
        let no_tokenizer = without_weights(&["config.json"]);
        let error = message(start_dummy(no_tokenizer.path(), &[]));
        assert!(error.contains("tokenizer.json"), "{error}");
        let error = message(start_dummy(without_weights(&[]).path(), &[]));
        assert!(error.contains("config.json"), "{error}");
        let error = message(start_dummy(Path::new(FIXTURE), &["--merge-adapter", "a"]));
        assert!(error.contains("--merge-adapter"), "{error}");
    }
}
