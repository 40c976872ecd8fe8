//! A tokenizer from the files of a model directory.
//!
//! `tokenizer.json` is the tokenizer; `tokenizer_config.json` and `special_tokens_map.json` name the
//! special tokens, `chat_template.jinja` and `additional_chat_templates/` win over the template in
//! the config, all as in transformers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use super::tokenizer::{Tokenizer, TokenizerParts};
use super::{ChatTemplateSources, TextError, tokenizer_json};

/// Keys under which a special token is named, in the order of transformers.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Token classes of transformers that put their own tokens around a text, whatever
/// `tokenizer.json` says.
const CLASSES_WITH_BOS: [&str; 4] = ["Llama", "CodeLlama", "Gemma", "Cohere"];

/// The parts of `tokenizer_config.json` that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    added_tokens_decoder: BTreeMap<u32, AddedToken>,
    chat_template: Option<ChatTemplateField>,
    tokenizer_class: Option<String>,
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

/// One template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ChatTemplateField {
    One(String),
    Several(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory.
    ///
    /// # Errors
    /// No `tokenizer.json`, a file that can not be read or parsed, a merge or token that does not
    /// fit the vocabulary; each names the file.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(TextError::MissingTokenizer { path });
            }
            Err(source) => return Err(TextError::Read { path, source }),
        };
        let origin = path.display().to_string();
        let mut inner = tokenizer_json::parse(&bytes, &origin)?;
        let config_path = dir.join("tokenizer_config.json");
        let config: TokenizerConfig = read_json(&config_path)?.unwrap_or_default();
        add_configured_tokens(&mut inner, &config, &config_path)?;
        let mut named = named_tokens(&config.other);
        let map_path = dir.join("special_tokens_map.json");
        let map: BTreeMap<String, Value> = read_json(&map_path)?.unwrap_or_default();
        for (name, content) in named_tokens(&map) {
            if named.iter().all(|(known, _)| *known != name) {
                named.push((name, content));
            }
        }
        let honours_config = honours_add_bos(config.tokenizer_class.as_deref());
        if honours_config && config.add_bos_token == Some(false) {
            inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        }
        let parts = TokenizerParts {
            named,
            add_bos: honours_config && config.add_bos_token == Some(true),
            add_eos: honours_config && config.add_eos_token == Some(true),
            chat_templates: chat_templates(dir, config.chat_template)?,
        };
        Self::assemble(inner, parts, None, &origin)
    }
}

/// Returns whether transformers applies `add_bos_token` for this class; others follow the
/// post-processor of `tokenizer.json` alone.
fn honours_add_bos(class: Option<&str>) -> bool {
    let Some(class) = class else {
        return false;
    };
    CLASSES_WITH_BOS.iter().any(|prefix| {
        class
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with("Tokenizer"))
    })
}

/// Adds the tokens that only `tokenizer_config.json` lists, at the ids it gives them.
fn add_configured_tokens(
    inner: &mut HfTokenizer,
    config: &TokenizerConfig,
    path: &Path,
) -> Result<(), TextError> {
    let invalid = |source| TextError::InvalidTokenizer {
        origin: path.display().to_string(),
        source,
    };
    for (&id, token) in &config.added_tokens_decoder {
        if inner.id_to_token(id).is_some() || inner.token_to_id(&token.content).is_some() {
            continue;
        }
        inner.add_tokens([token.clone()]).map_err(invalid)?;
        let got = inner.token_to_id(&token.content);
        if got != Some(id) {
            let content = &token.content;
            return Err(invalid(
                format!("added token {content:?} should have id {id} but would get {got:?}").into(),
            ));
        }
    }
    Ok(())
}

/// Collects the named tokens of a config: a string, or an object with `content`.
fn named_tokens(fields: &BTreeMap<String, Value>) -> Vec<(String, String)> {
    let content = |value: &Value| match value {
        Value::String(content) => Some(content.clone()),
        Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    };
    NAMED_TOKENS
        .iter()
        .filter_map(|&name| Some((name.to_owned(), content(fields.get(name)?)?)))
        .collect()
}

fn chat_templates(
    dir: &Path,
    field: Option<ChatTemplateField>,
) -> Result<ChatTemplateSources, TextError> {
    let mut sources = ChatTemplateSources::default();
    match field {
        Some(ChatTemplateField::One(template)) => sources.insert("default", template),
        Some(ChatTemplateField::Several(list)) => {
            for NamedTemplate { name, template } in list {
                sources.insert(&name, template);
            }
        }
        None => {}
    }
    if let Some(template) = read_text(&dir.join("chat_template.jinja"))? {
        // The files replace the whole field, named templates included.
        sources = ChatTemplateSources::default();
        sources.insert("default", template);
    }
    let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) else {
        return Ok(sources);
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_stem().and_then(|stem| stem.to_str());
        if path
            .extension()
            .is_some_and(|extension| extension == "jinja")
            && let Some(name) = name
            && let Some(template) = read_text(&path)?
        {
            sources.insert(name, template);
        }
    }
    Ok(sources)
}

/// Reads a text file that may be absent.
fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Reads a JSON file that may be absent.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> Result<Option<T>, TextError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|source| TextError::Json {
            path: path.to_owned(),
            source,
        })
}
