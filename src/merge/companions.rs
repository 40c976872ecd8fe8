//! The files beside the weights: copied byte for byte, except keys that must change.
//!
//! What is written is meant for transformers 4 and 5, vLLM, Ollama and llama.cpp alike: the older
//! ones read `rope_theta` and `torch_dtype` at the top of `config.json` only, Ollama finds the
//! chat template in `tokenizer_config.json` only, newer transformers in `chat_template.jinja`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::json_edit;
use crate::text::Tokenizer;
use crate::weights::{MergedCheckpoint, ModelSource};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Files that make a tokenizer.
const TOKENIZER_FILES: &[&str] = &[
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
];

/// Files by name, and what was changed in them.
#[derive(Debug, Default)]
pub(super) struct Companions {
    /// Content by name; a name may have one directory in front.
    pub(super) files: BTreeMap<String, Vec<u8>>,
    /// One sentence for each change.
    pub(super) changes: Vec<String>,
    /// Where the tokenizer comes from.
    pub(super) tokenizer_dir: PathBuf,
    /// The end-of-sequence token, where it is not the one that `tokenizer_dir` names.
    pub(super) eos_token_id: Option<u32>,
}

impl Companions {
    /// Reads the files beside the base's weights and makes the changes of the merge in them.
    ///
    /// # Errors
    /// A file that cannot be read, or that is no JSON though it is changed.
    pub(super) fn of(merged: &MergedCheckpoint) -> anyhow::Result<Self> {
        let mut companions = Self {
            files: read_companions(merged.base().path())?,
            changes: Vec::new(),
            tokenizer_dir: merged.base().path().to_owned(),
            eos_token_id: None,
        };
        companions.take_grown_tokenizer(merged)?;
        for (key, value) in merged.config_changes() {
            companions.set(CONFIG, key, value)?;
        }
        companions.complete_config()?;
        companions.complete_chat_template()?;
        Ok(companions)
    }

    /// Returns the bytes of all files.
    pub(super) fn size_bytes(&self) -> u64 {
        self.files
            .values()
            .map(|content| content.len() as u64)
            .sum()
    }

    fn json(&self, name: &str) -> anyhow::Result<Option<Value>> {
        (self.files.get(name))
            .map(|content| serde_json::from_slice(content).with_context(|| format!("parse {name}")))
            .transpose()
    }

    /// Sets a key of a JSON file.
    fn set(&mut self, name: &str, key: &str, value: &Value) -> anyhow::Result<()> {
        let content = self
            .files
            .get_mut(name)
            .with_context(|| format!("there is no {name}"))?;
        let text = std::str::from_utf8(content).with_context(|| format!("read {name}"))?;
        *content = json_edit::set(text, key, value)
            .with_context(|| format!("change {key} in {name}"))?
            .into_bytes();
        let shown = value.to_string();
        let shown = if shown.len() > 60 { "…" } else { &shown };
        self.changes.push(format!("{name}: {key} = {shown}"));
        Ok(())
    }

    /// Returns the chat template, if there is one.
    pub(super) fn chat_template(&self) -> Option<&str> {
        std::str::from_utf8(self.files.get(CHAT_TEMPLATE)?).ok()
    }

    /// Puts a chat template into both places.
    pub(super) fn set_chat_template(&mut self, template: &str) -> anyhow::Result<()> {
        let content = template.as_bytes().to_vec();
        self.files.insert(CHAT_TEMPLATE.to_owned(), content);
        self.changes.push(CHAT_TEMPLATE.to_owned());
        if self.files.contains_key(TOKENIZER_CONFIG) {
            self.set(TOKENIZER_CONFIG, "chat_template", &json!(template))?;
        }
        Ok(())
    }

    /// Returns `generation_config.json`, if there is one.
    pub(super) fn generation_config(&self) -> anyhow::Result<Option<Value>> {
        self.json(GENERATION_CONFIG)
    }

    /// Has engines stop at a token of the vocabulary, where the files name others. No file is made;
    /// without a `generation_config.json` transformers asks `config.json`.
    pub(super) fn set_eos_token(&mut self, word: &str, id: u32) -> anyhow::Result<()> {
        self.eos_token_id = Some(id);
        for name in [TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP] {
            let Some(file) = self.json(name)? else {
                continue;
            };
            if let Some(token) = with_content(&file["eos_token"], word) {
                self.set(name, "eos_token", &token)?;
            }
        }
        let name = match self.files.contains_key(GENERATION_CONFIG) {
            true => GENERATION_CONFIG,
            false => CONFIG,
        };
        if let Some(ids) = (self.json(name)?).and_then(|file| with_id(&file["eos_token_id"], id)) {
            self.set(name, "eos_token_id", &ids)?;
        }
        Ok(())
    }

    /// Tokens that were added in training are described by the tokenizer beside the adapter,
    /// whether the vocabulary grew for them or was padded and had room.
    fn take_grown_tokenizer(&mut self, merged: &MergedCheckpoint) -> anyhow::Result<()> {
        let has_grown = merged
            .config_changes()
            .iter()
            .any(|(key, _)| key == "vocab_size");
        let dirs = merged.adapters().iter().map(|adapter| adapter.dir());
        let mut dirs = dirs.filter(|dir| dir.join(TOKENIZER).exists());
        let dir = match has_grown {
            true => dirs.next_back(),
            false => larger_tokenizer(merged, dirs)?,
        };
        let Some(dir) = dir else {
            return Ok(());
        };
        for name in TOKENIZER_FILES {
            self.files.remove(*name);
            if let Some(content) = read_if_there(&dir.join(name))? {
                self.files.insert((*name).to_owned(), content);
            }
        }
        self.changes
            .push(format!("the tokenizer is that of {}", dir.display()));
        self.tokenizer_dir = dir.to_owned();
        Ok(())
    }

    /// Adds to a configuration of transformers 5 the keys that older readers look for.
    fn complete_config(&mut self) -> anyhow::Result<()> {
        let Some(config) = self.json(CONFIG)? else {
            return Ok(());
        };
        if let (Some(dtype), None) = (config.get("dtype"), config.get("torch_dtype")) {
            self.set(CONFIG, "torch_dtype", dtype)?;
        }
        let rope = config.get("rope_parameters").and_then(Value::as_object);
        let theta = rope.and_then(|rope| rope.get("rope_theta"));
        if let (Some(theta), None) = (theta, config.get("rope_theta")) {
            self.set(CONFIG, "rope_theta", theta)?;
        }
        let scaling = config.get("rope_scaling").filter(|value| !value.is_null());
        let mut scaling = match (scaling.and_then(Value::as_object), rope) {
            (Some(scaling), _) => scaling.clone(),
            (None, Some(rope)) => rope.clone(),
            (None, None) => return Ok(()),
        };
        let is_old_form = scaling.contains_key("type") && scaling.contains_key("rope_type");
        let kind = scaling
            .get("rope_type")
            .or_else(|| scaling.get("type"))
            .cloned();
        let kind = kind.filter(|kind| kind.as_str().is_some_and(|kind| kind != "default"));
        if let (Some(kind), false) = (kind, is_old_form) {
            // Ollama reads `type`, newer transformers `rope_type`.
            scaling.remove("rope_theta");
            scaling.insert("rope_type".to_owned(), kind.clone());
            scaling.insert("type".to_owned(), kind);
            self.set(CONFIG, "rope_scaling", &Value::Object(scaling))?;
        }
        Ok(())
    }

    /// Puts the chat template into both places where programs look for it.
    fn complete_chat_template(&mut self) -> anyhow::Result<()> {
        let Some(config) = self.json(TOKENIZER_CONFIG)? else {
            return Ok(());
        };
        let inside = config.get("chat_template").filter(|value| !value.is_null());
        match (inside, self.files.get(CHAT_TEMPLATE)) {
            (None, Some(template)) => {
                let template = std::str::from_utf8(template)
                    .with_context(|| format!("read {CHAT_TEMPLATE}"))?;
                self.set(TOKENIZER_CONFIG, "chat_template", &json!(template))?;
            }
            (Some(inside), None) => {
                // A list has templates by name, of which one is for chats.
                let named = inside.as_array().and_then(|templates| {
                    let default = templates.iter().find(|entry| entry["name"] == "default");
                    default.and_then(|entry| entry["template"].as_str())
                });
                if let Some(template) = inside.as_str().or(named) {
                    self.changes
                        .push(format!("{CHAT_TEMPLATE}: from {TOKENIZER_CONFIG}"));
                    let content = template.as_bytes().to_vec();
                    self.files.insert(CHAT_TEMPLATE.to_owned(), content);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Returns the directory whose tokenizer has all tokens of the base's, with the same ids, and more;
/// of several, the one that also has what those before it added.
fn larger_tokenizer<'a>(
    merged: &MergedCheckpoint,
    dirs: impl Iterator<Item = &'a Path>,
) -> anyhow::Result<Option<&'a Path>> {
    let base = merged.base().path();
    let Some(base_content) = read_if_there(&base.join(TOKENIZER))? else {
        return Ok(None);
    };
    let has_own =
        |dir: &&Path| fs::read(dir.join(TOKENIZER)).is_ok_and(|content| content != base_content);
    let read = |dir: &'a Path| match Tokenizer::from_dir(dir) {
        Ok(tokenizer) => Some((dir, tokenizer)),
        Err(error) => {
            tracing::warn!("the tokenizer of {} is not used: {error}", dir.display());
            None
        }
    };
    let candidates: Vec<_> = dirs.filter(has_own).filter_map(read).collect();
    if candidates.is_empty() {
        return Ok(None);
    }
    let mut known = Tokenizer::from_dir(base)
        .with_context(|| format!("read the tokenizer of {}", base.display()))?;
    let num_rows = merged.config()["vocab_size"].as_u64().unwrap_or(0);
    let mut taken = None;
    for (dir, tokenizer) in candidates {
        let num_ids = tokenizer.vocab_size() as u64;
        if contains(&known, &tokenizer) {
            // It has nothing new.
        } else if !contains(&tokenizer, &known) {
            tracing::warn!(
                "the tokenizer of {} is not used: it lacks tokens of {} or has others under their \
                 ids",
                dir.display(),
                taken.unwrap_or(base).display()
            );
        } else if num_ids > num_rows {
            tracing::warn!(
                "the tokenizer of {} is not used: it has {num_ids} ids, the embedding {num_rows} \
                 rows; its new tokens need a training that resizes and saves the embedding",
                dir.display()
            );
        } else {
            (taken, known) = (Some(dir), tokenizer);
        }
    }
    Ok(taken)
}

/// Returns whether `larger` has every token of `smaller` under the same id.
fn contains(larger: &Tokenizer, smaller: &Tokenizer) -> bool {
    // Ids are 32 bits wide.
    (0..smaller.vocab_size() as u32).all(|id| {
        let token = smaller.token_string(id);
        token.is_none() || token == larger.token_string(id)
    })
}

/// Returns a special token, a text or an object, with this content; nothing where it has it.
fn with_content(token: &Value, content: &str) -> Option<Value> {
    match token {
        Value::String(found) if found == content => None,
        Value::Object(fields) if fields.get("content").is_some_and(|found| found == content) => {
            None
        }
        Value::Object(fields) => {
            let mut fields = fields.clone();
            fields.insert("content".to_owned(), content.into());
            Some(fields.into())
        }
        _ => Some(content.into()),
    }
}

/// Returns an id, or a list of them, with `id` before the others; nothing where it is among them.
fn with_id(ids: &Value, id: u32) -> Option<Value> {
    match ids {
        Value::Array(found) if found.iter().any(|found| *found == id) => None,
        Value::Array(found) => {
            let ids = std::iter::once(id.into()).chain(found.iter().cloned());
            Some(ids.collect())
        }
        Value::Number(found) if found.as_u64() == Some(id.into()) => None,
        Value::Number(_) => Some(json!([id, ids])),
        _ => Some(id.into()),
    }
}

/// Reads every file of a model directory that is neither weights nor the trace of a training.
fn read_companions(dir: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let entries = fs::read_dir(dir).with_context(|| format!("look into {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("look into {}", dir.display()))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = entry.path();
        if path.is_dir() && name == "additional_chat_templates" {
            for (inner, content) in read_companions(&path)? {
                files.insert(format!("{name}/{inner}"), content);
            }
        } else if path.is_file() && is_companion(&name) {
            // The content even of a link: the output must stand alone.
            let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            files.insert(name, content);
        }
    }
    Ok(files)
}

fn is_companion(name: &str) -> bool {
    const LEFT_OUT: &[&str] = &[
        "adapter_config.json",
        "merge_report.json",
        "trainer_state.json",
        "requirements.txt",
    ];
    let is_wanted = [".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"]
        .iter()
        .any(|end| name.ends_with(end));
    let is_licence = ["LICENSE", "LICENCE", "NOTICE"]
        .iter()
        .any(|start| name.starts_with(start));
    (is_wanted || is_licence)
        && !name.starts_with('.')
        && !name.ends_with(".index.json")
        && !name.ends_with("_results.json")
        && !LEFT_OUT.contains(&name)
}

fn read_if_there(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::weights::{Adapter, Checkpoint, MergeOptions};

    fn companions(files: &[(&str, &str)]) -> Companions {
        Companions {
            files: (files.iter())
                .map(|(name, content)| ((*name).to_owned(), content.as_bytes().to_vec()))
                .collect(),
            changes: Vec::new(),
            tokenizer_dir: PathBuf::new(),
            eos_token_id: None,
        }
    }

    #[test]
    fn a_version_5_configuration_gets_the_older_keys() {
        let config = r#"{"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}"#;
        let mut companions = companions(&[(CONFIG, config)]);
        companions.complete_config().unwrap();
        let found = companions.json(CONFIG).unwrap().unwrap();
        assert_eq!(found["torch_dtype"], "bfloat16");
        assert_eq!(found["rope_theta"], 1_000_000.0);
        assert!(found.get("rope_scaling").is_none());
    }

    #[test]
    fn yarn_is_spelled_both_ways() {
        for config in [
            r#"{"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}"#,
            r#"{"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}"#,
            r#"{"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}"#,
        ] {
            let mut companions = companions(&[(CONFIG, config)]);
            companions.complete_config().unwrap();
            let found = companions.json(CONFIG).unwrap().unwrap();
            let scaling = &found["rope_scaling"];
            assert_eq!(
                scaling,
                &json!({"type": "yarn", "rope_type": "yarn", "factor": 4.0})
            );
            assert_eq!(found["rope_theta"], 1e6);
        }
    }

    #[test]
    fn a_complete_configuration_keeps_every_byte() {
        let config = "{\n \"rms_norm_eps\": 1e-06,\"rope_scaling\": null, \"rope_theta\": 1e6, \"torch_dtype\": \"bfloat16\"}";
        let mut companions = companions(&[(CONFIG, config)]);
        companions.complete_config().unwrap();
        assert_eq!(companions.files[CONFIG], config.as_bytes());
        assert!(companions.changes.is_empty());
    }

    #[test]
    fn the_chat_template_is_in_both_places() {
        let mut inside = companions(&[(TOKENIZER_CONFIG, r#"{"chat_template": "{{ ü }}"}"#)]);
        inside.complete_chat_template().unwrap();
        assert_eq!(inside.files[CHAT_TEMPLATE], "{{ ü }}".as_bytes());
        let mut beside = companions(&[(TOKENIZER_CONFIG, "{}"), (CHAT_TEMPLATE, "a\n\"b\"")]);
        beside.complete_chat_template().unwrap();
        let found = beside.json(TOKENIZER_CONFIG).unwrap().unwrap();
        assert_eq!(found["chat_template"], "a\n\"b\"");
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        let mut named = companions(&[(TOKENIZER_CONFIG, list)]);
        named.complete_chat_template().unwrap();
        assert_eq!(named.files[CHAT_TEMPLATE], b"d");
    }

    /// Writes the tokenizer of the fixture with `tokens` under the last ids, 510 and what follows.
    fn write_tokenizer(dir: &Path, tokens: &[&str]) {
        let from = fixture("tiny-qwen2");
        for name in [TOKENIZER, TOKENIZER_CONFIG] {
            let content = fs::read(from.join(name)).unwrap();
            let mut json: Value = serde_json::from_slice(&content).unwrap();
            if let Some(added) = json["added_tokens"].as_array_mut() {
                added.truncate(1);
                for (id, token) in (510..).zip(tokens) {
                    let mut entry = added[0].clone();
                    (entry["id"], entry["content"]) = (json!(id), json!(token));
                    added.push(entry);
                }
            }
            if let Some(fields) = json.as_object_mut().filter(|_| name == TOKENIZER_CONFIG) {
                fields.remove("added_tokens_decoder");
                fields.insert("eos_token".to_owned(), json!("<|endoftext|>"));
            }
            fs::write(dir.join(name), json.to_string()).unwrap();
        }
    }

    fn fixture(name: &str) -> PathBuf {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        fixtures.join(name)
    }

    /// Returns which adapter's tokenizer a merge takes; the base has 512 rows and these tokens.
    fn taken_tokenizer(base_tokens: &[&str], adapters: &[&[&str]]) -> Option<usize> {
        let base = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture("tiny-qwen2").join(name), base.path().join(name)).unwrap();
        }
        write_tokenizer(base.path(), base_tokens);
        let from = fixture("adapters/adapter_bf16_on_f32/adapter");
        let dirs: Vec<_> = (adapters.iter())
            .map(|tokens| {
                let dir = tempfile::tempdir().unwrap();
                for name in ["adapter_config.json", "adapter_model.safetensors"] {
                    fs::copy(from.join(name), dir.path().join(name)).unwrap();
                }
                write_tokenizer(dir.path(), tokens);
                dir
            })
            .collect();
        let opened = dirs.iter().map(|dir| {
            let adapter = Adapter::open(dir.path(), None).unwrap();
            (adapter, 1.0)
        });
        let checkpoint = Arc::new(Checkpoint::open(base.path()).unwrap());
        let options = MergeOptions::default();
        let merged = MergedCheckpoint::plan(checkpoint, opened.collect(), options).unwrap();
        let companions = Companions::of(&merged).unwrap();
        let content = fs::read(companions.tokenizer_dir.join(TOKENIZER)).unwrap();
        assert!(companions.files[TOKENIZER] == content);
        dirs.iter()
            .position(|dir| dir.path() == companions.tokenizer_dir)
    }

    #[test]
    fn tokens_added_inside_a_padded_vocabulary_are_kept() {
        let base = &["<|im_start|>"];
        assert_eq!(
            taken_tokenizer(base, &[&["<|im_start|>", "<new>"]]),
            Some(0)
        );
        // The later adapter has the base's tokenizer.
        let adapters: [&[&str]; 2] = [&["<|im_start|>", "<new>"], base];
        assert_eq!(taken_tokenizer(base, &adapters), Some(0));
        let adapters: [&[&str]; 2] = [&["<a>"], &["<a>", "<b>"]];
        assert_eq!(taken_tokenizer(&[], &adapters), Some(1));
    }

    #[test]
    fn tokenizers_that_do_not_hold_the_base_s_or_too_much_are_not_taken() {
        let base = &["<|im_start|>"];
        for tokens in [
            &["<|im_start|>"][..],
            &[],
            // Another token under the base's id.
            &["<other>", "<new>"],
            // Id 512 has no row.
            &["<|im_start|>", "<new>", "<newer>"],
        ] {
            assert_eq!(taken_tokenizer(base, &[tokens]), None, "{tokens:?}");
        }
        // Two adapters that disagree on a token.
        assert_eq!(taken_tokenizer(&[], &[&["<a>"], &["<b>"]]), Some(0));
    }

    #[test]
    fn an_end_of_sequence_token_comes_first_and_only_once() {
        for (found, wanted) in [
            (json!(5), Some(json!([7, 5]))),
            (json!([5, 6]), Some(json!([7, 5, 6]))),
            (json!([]), Some(json!([7]))),
            (Value::Null, Some(json!(7))),
            (json!(7), None),
            (json!([5, 7]), None),
        ] {
            assert_eq!(with_id(&found, 7), wanted, "{found}");
        }
    }

    #[test]
    fn without_generation_settings_the_configuration_names_the_end_of_sequence_token() {
        let mut companions = companions(&[(CONFIG, r#"{"eos_token_id": 5}"#)]);
        companions.set_eos_token("<end>", 7).unwrap();
        assert_eq!(companions.files.len(), 1);
        let found = companions.json(CONFIG).unwrap().unwrap();
        assert_eq!(found["eos_token_id"], json!([7, 5]));
    }

    #[test]
    fn weights_and_traces_of_training_are_no_companions() {
        for name in [
            "config.json",
            "merges.txt",
            "tokenizer.model",
            "LICENSE",
            "modeling_x.py",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in [
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "trainer_state.json",
            "train_results.json",
            "README.md",
            "Modelfile",
            ".gitattributes",
        ] {
            assert!(!is_companion(name), "{name}");
        }
    }
}
