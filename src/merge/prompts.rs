//! How the merged model is asked: chat template, Modelfile and record follow the training.
//!
//! The template is the one named by the user, else the one that the adapter was trained with, else
//! a guess by the model's tokens. Sample conversations then go through all three, so that a model
//! that would be served with other prompts than it was trained on is noticed before it is served.

#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::{Context, bail};

use super::args::ModelfileChoice;
use super::companions::Companions;
use super::default_system::{default_system_of, set_default_system};
use super::modelfile::{ModelfileInput, ModelfileStyle, modelfile};
use super::prompt_check::{PromptCheckInput, PromptReport, check_prompts};
use crate::text::{
    ChatTemplate, NamedToken, TEMPLATE_RECORD_FILE, TemplateRecord, Tokenizer, TrainingTemplate,
    fallback_template, fallback_template_for_architecture,
};
use crate::weights::{Adapter, MergedCheckpoint, ModelSource};

/// Name of Ollama's file.
pub(super) const MODELFILE: &str = "Modelfile";
/// LLaMA-Factory's context length, which Ollama users expect to find.
const NUM_CTX: u64 = 4096;

/// What the user wishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PromptOptions {
    /// Name of the training template.
    pub(super) template: Option<String>,
    /// System prompt of conversations without one.
    pub(super) default_system: Option<String>,
    pub(super) modelfile: ModelfileChoice,
}

/// Where Ollama finds the weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct OllamaSource<'a> {
    /// What `FROM` names.
    pub(super) from: &'a str,
    /// What `ADAPTER` names.
    pub(super) adapter: Option<&'a str>,
}

/// How sure the template is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// Named by the user or recorded in training.
    Known,
    /// From the model's own tokens; its chat template is then right by definition.
    Guessed,
}

/// Puts chat template, Modelfile and record into `companions`; returns how their prompts compare,
/// `None` where the model has no tokenizer or no template fits it.
///
/// # Errors
/// An unknown template; a tokenizer or chat template that cannot be read; a system prompt that a
/// file cannot hold; wishes about prompts for a model without a tokenizer.
pub(super) fn complete(
    companions: &mut Companions,
    merged: &MergedCheckpoint,
    options: &PromptOptions,
    source: OllamaSource<'_>,
) -> anyhow::Result<Option<PromptReport>> {
    let dir = companions.tokenizer_dir.clone();
    if let Some(name) = &options.template {
        TrainingTemplate::named(name)?;
    }
    if !companions.files.contains_key("tokenizer.json") {
        if options.default_system.is_some() {
            bail!(
                "--default-system needs a tokenizer.json, {} has none",
                dir.display()
            );
        }
        tracing::warn!("no Modelfile: {} has no tokenizer.json", dir.display());
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_dir(&dir)
        .with_context(|| format!("read the tokenizer of {}", dir.display()))?;
    let Some((mut template, certainty)) = choose(merged, options, &tokenizer)? else {
        tracing::warn!(
            "no Modelfile: no template is known for this model, --template names one of {}",
            TrainingTemplate::names().collect::<Vec<_>>().join(", ")
        );
        return Ok(None);
    };
    let named_tokens = match certainty {
        Certainty::Known => replace_eos(companions, &template, &tokenizer)?,
        Certainty::Guessed => tokenizer.named_tokens().to_vec(),
    };
    let wished = wished_system(companions, options, &template, certainty)?;
    if let (Some(chat_template), Some(system)) = (companions.chat_template(), wished) {
        let changed = set_default_system(&template, chat_template, &named_tokens, &system)?;
        companions.set_chat_template(&changed.chat_template)?;
        template = changed.template;
    }
    let chat_template = companions
        .chat_template()
        .map(|source| ChatTemplate::compile(source, &named_tokens))
        .transpose()
        .context("compile the chat template")?;
    if let (Certainty::Guessed, Some(chat_template), None) =
        (certainty, &chat_template, &options.default_system)
    {
        let default = default_system_of(chat_template).context("render the chat template")?;
        template = template.with_default_system(&default.unwrap_or_default());
    }
    write_modelfile(companions, merged, options, source, (&template, &tokenizer))?;
    if certainty == Certainty::Known {
        let record = serde_json::to_string_pretty(&TemplateRecord::new(&template))?;
        let content = format!("{record}\n").into_bytes();
        companions
            .files
            .insert(TEMPLATE_RECORD_FILE.to_owned(), content);
    }
    let modelfile = companions.files.get(MODELFILE);
    let report = check_prompts(&PromptCheckInput {
        template: &template,
        tokenizer: &tokenizer,
        chat_template: chat_template.as_ref(),
        modelfile: modelfile.and_then(|content| std::str::from_utf8(content).ok()),
    })
    .context("compare the prompts")?;
    Ok(Some(report))
}

/// Returns the training template, without one that is known or guessed `None`.
fn choose(
    merged: &MergedCheckpoint,
    options: &PromptOptions,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Option<(TrainingTemplate, Certainty)>> {
    let records = merged
        .adapters()
        .iter()
        .rev()
        .map(Adapter::dir)
        .map(record_of);
    let record = records
        .collect::<anyhow::Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .next();
    let recorded = record.map(|record| record.to_template()).transpose()?;
    match (&options.template, recorded) {
        (Some(name), Some(recorded)) if recorded.name() == name => {
            Ok(Some((recorded, Certainty::Known)))
        }
        (Some(name), _) => {
            let template = TrainingTemplate::named(name)?.clone();
            Ok(Some((template, Certainty::Known)))
        }
        (None, Some(recorded)) => Ok(Some((recorded, Certainty::Known))),
        (None, None) => {
            let has_token = |token: &str| tokenizer.token_id(token).is_some();
            let architecture = merged.config()["model_type"].as_str().unwrap_or_default();
            let family = fallback_template_for_architecture(architecture, &has_token);
            let named = family.map(|family| TrainingTemplate::named(training_name(family)));
            let template = named.transpose()?.filter(|template| {
                // A base model of the family may lack the tokens.
                template.missing_stop_words(tokenizer).is_empty()
            });
            Ok(template.map(|template| (template.clone(), Certainty::Guessed)))
        }
    }
}

/// Returns the training template of a built-in chat template.
fn training_name(family: &str) -> &str {
    match family {
        "qwen2.5" => "qwen",
        other => other,
    }
}

/// Returns the built-in chat template of a training template.
fn family_of(template: &TrainingTemplate) -> &'static str {
    match template.name() {
        "qwen3" => "qwen3",
        "llama3" => "llama3",
        "chatml" => "chatml",
        _ => "qwen2.5",
    }
}

fn record_of(adapter: &Path) -> anyhow::Result<Option<TemplateRecord>> {
    let path = adapter.join(TEMPLATE_RECORD_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let content = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let record = serde_json::from_slice(&content);
    Ok(Some(
        record.with_context(|| format!("parse {}", path.display()))?,
    ))
}

/// Makes the template's word the end-of-sequence token where it replaces the tokenizer's, as
/// LLaMA-Factory's export does: engines stop at the token that the files name, and the trained
/// model ends its answers with the template's. Returns the named tokens of the exported tokenizer.
fn replace_eos(
    companions: &mut Companions,
    template: &TrainingTemplate,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Vec<NamedToken>> {
    let mut named_tokens = tokenizer.named_tokens().to_vec();
    let Some(word) = template.replaced_eos() else {
        return Ok(named_tokens);
    };
    let Some(id) = tokenizer.token_id(word) else {
        tracing::warn!(
            "the end-of-sequence token stays as it is: template {} ends answers with {word}, which \
             is no token of {}; --template names the template of the training",
            template.name(),
            companions.tokenizer_dir.display()
        );
        return Ok(named_tokens);
    };
    companions.set_eos_token(word, id)?;
    named_tokens.retain(|token| token.name != "eos_token");
    named_tokens.push(NamedToken {
        name: "eos_token".to_owned(),
        content: word.to_owned(),
        id: Some(id),
    });
    Ok(named_tokens)
}

/// Gives a model without a chat template one; returns the system prompt that the chat template is
/// to have, if it is to change.
fn wished_system(
    companions: &mut Companions,
    options: &PromptOptions,
    template: &TrainingTemplate,
    certainty: Certainty,
) -> anyhow::Result<Option<String>> {
    let mut wished = options.default_system.clone();
    if companions.chat_template().is_none()
        && certainty == Certainty::Known
        && let Some(fallback) = fallback_template(family_of(template))
    {
        companions.set_chat_template(fallback)?;
        let trained = template.default_system();
        wished = wished.or_else(|| (!trained.is_empty()).then(|| trained.to_owned()));
    }
    Ok(wished)
}

fn write_modelfile(
    companions: &mut Companions,
    merged: &MergedCheckpoint,
    options: &PromptOptions,
    source: OllamaSource<'_>,
    (template, tokenizer): (&TrainingTemplate, &Tokenizer),
) -> anyhow::Result<()> {
    let style = match options.modelfile {
        ModelfileChoice::Complete => ModelfileStyle::Complete,
        ModelfileChoice::Llamafactory => ModelfileStyle::LlamaFactory,
        ModelfileChoice::None => return Ok(()),
    };
    let generation_config = companions.generation_config()?;
    let longest = merged.config()["max_position_embeddings"].as_u64();
    let num_ctx = longest.unwrap_or(NUM_CTX).min(NUM_CTX) as usize;
    let written = modelfile(
        style,
        &ModelfileInput {
            template,
            tokenizer,
            generation_config: generation_config.as_ref(),
            num_ctx,
            from: source.from,
        },
    )
    .context("write the Modelfile")?;
    for warning in &written.warnings {
        tracing::warn!("Modelfile: {warning}");
    }
    let text = match source.adapter {
        None => written.text,
        Some(adapter) => {
            let from = format!("FROM {}\n", source.from);
            written
                .text
                .replacen(&from, &format!("{from}ADAPTER {adapter}\n"), 1)
        }
    };
    companions
        .files
        .insert(MODELFILE.to_owned(), text.into_bytes());
    Ok(())
}
