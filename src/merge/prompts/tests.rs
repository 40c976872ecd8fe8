//! The end-of-sequence token of models that are exported with a template.

use std::fs;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::weights::{Checkpoint, MergeOptions};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A model whose files name `eos`, whose id is `id`, as the end of a sequence.
fn model(eos: &str, id: u32) -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-qwen2");
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    let text = fs::read(from.join(TOKENIZER_CONFIG)).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["eos_token"] = json!({"__type": "AddedToken", "content": eos, "lstrip": false});
    let map = json!({"eos_token": eos, "pad_token": "<|endoftext|>"});
    let generation = json!({"eos_token_id": id, "pad_token_id": 509});
    for (name, content) in [
        (TOKENIZER_CONFIG, config),
        (SPECIAL_TOKENS_MAP, map),
        (GENERATION_CONFIG, generation),
    ] {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

/// Exports a model without adapters, with a template.
fn export(dir: &Path, template: Option<&str>) -> (Companions, PromptReport) {
    let base = Arc::new(Checkpoint::open(dir).unwrap());
    let merged = MergedCheckpoint::plan(base, Vec::new(), MergeOptions::default()).unwrap();
    let mut companions = Companions::of(&merged).unwrap();
    let options = PromptOptions {
        template: template.map(str::to_owned),
        default_system: None,
        modelfile: ModelfileChoice::Complete,
    };
    let source = OllamaSource {
        from: ".",
        adapter: None,
    };
    let report = complete(&mut companions, &merged, &options, source).unwrap();
    (companions, report.unwrap())
}

fn json_of(companions: &Companions, name: &str) -> Value {
    serde_json::from_slice(&companions.files[name]).unwrap()
}

#[test]
fn a_base_model_stops_at_the_word_that_the_template_taught() {
    let dir = model("<|endoftext|>", 509);
    let (companions, _) = export(dir.path(), Some("qwen"));
    let config = json_of(&companions, TOKENIZER_CONFIG);
    let token = json!({"__type": "AddedToken", "content": "<|im_end|>", "lstrip": false});
    assert_eq!(config["eos_token"], token);
    let map = json_of(&companions, SPECIAL_TOKENS_MAP);
    assert_eq!(
        map,
        json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    );
    let generation = json_of(&companions, GENERATION_CONFIG);
    assert_eq!(
        generation,
        json!({"eos_token_id": [511, 509], "pad_token_id": 509})
    );
    assert_eq!(companions.eos_token_id, Some(511));
    for name in [TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG] {
        let is_told = |change: &String| change.starts_with(&format!("{name}: eos_token"));
        assert!(companions.changes.iter().any(is_told), "{name}");
    }
    // Ollama stops at both, as before.
    let modelfile = std::str::from_utf8(&companions.files[MODELFILE]).unwrap();
    for stop in ["<|im_end|>", "<|endoftext|>"] {
        assert!(
            modelfile.contains(&format!("stop \"{stop}\"")),
            "{modelfile}"
        );
    }
}

#[test]
fn chat_templates_are_compared_with_the_token_that_is_exported() {
    let dir = model("<|endoftext|>", 509);
    let family = fallback_template("qwen2.5").unwrap();
    // The same template, for a tokenizer that ends texts with anything else.
    let template = format!("{{% if eos_token == '<|im_end|>' %}}{family}{{% endif %}}");
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let (_, report) = export(dir.path(), Some("qwen"));
    assert_eq!(report.differences, []);
    assert!(report.num_compared > 0);
}

#[test]
fn files_that_name_the_right_token_or_no_known_template_stay_as_they_are() {
    for (eos, id, template) in [
        ("<|im_end|>", 511, Some("qwen")),
        // It does not replace the tokenizer's token.
        ("<|endoftext|>", 509, Some("qwen@0.9.2")),
        // The tokenizer has no <|eot_id|>.
        ("<|endoftext|>", 509, Some("llama3")),
        ("<|endoftext|>", 509, None),
    ] {
        let dir = model(eos, id);
        let (companions, _) = export(dir.path(), template);
        for name in [SPECIAL_TOKENS_MAP, GENERATION_CONFIG] {
            let before = fs::read(dir.path().join(name)).unwrap();
            assert!(companions.files[name] == before, "{template:?}: {name}");
        }
        let config = json_of(&companions, TOKENIZER_CONFIG);
        assert_eq!(config["eos_token"]["content"], eos, "{template:?}");
    }
}
