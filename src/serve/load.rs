//! From flags to a running engine.

use anyhow::Context;
use serde_json::Value;

use crate::engine::EngineHandle;
use crate::text::{
    ChatTemplate, TextError, Tokenizer, fallback_template, fallback_template_for_architecture,
    resolve_chat_template,
};
use crate::weights::{self, Checkpoint, TokenizerSource};

use super::args::ServeArgs;
use super::defaults;

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
        let has_token = |token: &str| self.tokenizer.token_id(token).is_some();
        let model_type = self
            .config
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let source = match (asked_for, self.tokenizer.chat_templates().select(None)) {
            (Some(asked_for), _) => Some(resolve_chat_template(asked_for)?),
            (None, Some(own)) => Some(own.to_owned()),
            (None, None) => fallback_template_for_architecture(model_type, &has_token)
                .and_then(fallback_template)
                .map(str::to_owned),
        };
        let compile =
            |source: String| ChatTemplate::compile(&source, self.tokenizer.named_tokens());
        Ok(source.map(compile).transpose()?)
    }
}

/// Finds and opens the model that `args` names, then starts its engine.
///
/// # Errors
/// A model that can not be found, read or run.
pub(super) fn start_engine(args: &ServeArgs) -> anyhow::Result<LoadedModel> {
    let checkpoint = args.engine.open(args.model())?;
    // The tokenizer first: a wrong one is found in moments, an engine takes longer to start.
    let tokenizer = match &args.tokenizer {
        Some(directory) => Tokenizer::from_dir(directory),
        None => tokenizer_of(&checkpoint),
    }
    .context("loading the tokenizer")?;
    let generation_config = checkpoint.generation_config().cloned();
    let root = checkpoint.path().display().to_string();
    let hub = args.engine.hub_options();
    let model = weights::open_with_adapters(checkpoint, &args.merge_adapter, &hub)
        .context("folding the adapters into the model")?;
    let config = model.config().clone();
    let engine = args.engine.start(model)?;
    Ok(LoadedModel {
        engine,
        tokenizer,
        config,
        generation_config,
        root,
    })
}

fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Tokenizer, TextError> {
    match checkpoint.tokenizer() {
        TokenizerSource::Directory(directory) => Tokenizer::from_dir(&directory),
        TokenizerSource::Gguf(vocabulary) => Tokenizer::from_vocabulary(*vocabulary),
    }
}
