//! The vocabulary of a model directory as a GGUF file holds it.
//!
//! The other direction of `vocabulary`. Rules (filler, types of tokens, special ids, names of
//! pre-tokenizers) follow `get_vocab_base` and `SpecialVocab` of llama.cpp's converter, so that
//! files are the same; a SentencePiece vocabulary gets its scores from the order of its merges.

use std::collections::BTreeMap;
use std::path::Path;

use ahash::AHashMap;
use serde::Deserialize;
use serde_json::Value;

use super::pre_tokenizer::{GPT2, PreTokenizer};
use super::tokenizer_json::{Merges, Vocab};
use super::vocabulary::{CONTROL, USER_DEFINED};
use super::{AddSpecialTokens, GgufVocabulary, TextError, Tokenizer};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: BpeModel,
}

#[derive(Deserialize)]
struct BpeModel {
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Merges,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// The part of `tokenizer_config.json` that decides which tokens are special.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    added_tokens_decoder: BTreeMap<u32, ConfiguredToken>,
}

#[derive(Deserialize)]
struct ConfiguredToken {
    content: String,
    #[serde(default)]
    special: bool,
}

impl GgufVocabulary {
    /// Reads the tokenizer of a model directory.
    ///
    /// `config` is the model's `config.json`: its `vocab_size` says how many tokens there are (the
    /// rest is filled up), its `*_token_id` name special tokens that the tokenizer does not.
    ///
    /// # Errors
    /// What [`Tokenizer::from_dir`] returns, and a tokenizer that GGUF has no words for: not a
    /// byte-level or SentencePiece BPE, words cut in a way that llama.cpp does not know, tokens
    /// beyond `vocab_size`.
    pub fn from_dir(dir: &Path, config: &Value) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_dir(dir)?;
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read {
            path: path.clone(),
            source,
        })?;
        let export_error = |reason: String| TextError::NotExportable {
            path: path.clone(),
            reason,
        };
        let file: TokenizerFile = serde_json::from_slice(&bytes)
            .map_err(|error| export_error(format!("it is not a BPE ({error})")))?;
        let added = added_tokens(dir, file.added_tokens)?;
        let vocab_size = (config.get("vocab_size").and_then(Value::as_u64))
            .ok_or_else(|| export_error("config.json has no vocab_size".to_owned()))?;

        let mut vocabulary = Self::default();
        let listed = token_list(&file.model, &added, vocab_size).map_err(export_error)?;
        (vocabulary.tokens, vocabulary.token_types) = listed;
        if file.model.byte_fallback {
            vocabulary.model = "llama".to_owned();
            vocabulary.pre = Some("default".to_owned());
            vocabulary.scores = scores(&vocabulary.tokens, &file.model.merges.0);
            let prefix = adds_space_prefix(&file.normalizer, &file.pre_tokenizer);
            vocabulary.add_space_prefix = Some(prefix);
        } else {
            vocabulary.model = "gpt2".to_owned();
            let name = pre_tokenizer_name(&file.pre_tokenizer, &file.model);
            vocabulary.pre = Some(name.map_err(export_error)?);
            vocabulary.merges = file.model.merges.0.iter().map(merge_text).collect();
        }
        vocabulary.add_special_tokens(&tokenizer, config)?;
        for name in tokenizer.chat_templates().names() {
            let template = tokenizer.chat_templates().get(name).unwrap_or_default();
            match name {
                "default" => vocabulary.chat_template = Some(template.to_owned()),
                name => vocabulary
                    .named_chat_templates
                    .push((name.to_owned(), template.to_owned())),
            }
        }
        Ok(vocabulary)
    }

    /// Names the special tokens: as the tokenizer does, else as `config.json`.
    fn add_special_tokens(
        &mut self,
        tokenizer: &Tokenizer,
        config: &Value,
    ) -> Result<(), TextError> {
        let find = |name: &str| {
            let mut named = tokenizer.named_tokens().iter();
            let own = named.find(|token| token.name == format!("{name}_token"));
            let configured = config
                .get(format!("{name}_token_id"))
                .and_then(Value::as_u64);
            own.and_then(|token| token.id).or_else(|| {
                let id = u32::try_from(configured?).ok()?;
                ((id as usize) < self.tokens.len()).then_some(id)
            })
        };
        let (bos, eos, unknown, padding) = (find("bos"), find("eos"), find("unk"), find("pad"));
        // What a text gets around it, whether a post-processor or a flag says so.
        let around = tokenizer.encode("", AddSpecialTokens::Yes)?;
        self.add_bos = Some(bos.is_some() && around.first().copied() == bos);
        // An empty text between two equal tokens could be either; the beginning wins.
        let ends = eos.is_some() && around.last().copied() == eos;
        self.add_eos = (ends && (eos != bos || around.len() > 1)).then_some(true);
        (self.bos, self.eos, self.unknown, self.padding) = (bos, eos, unknown, padding);
        Ok(())
    }
}

/// Returns the added tokens by id: content and whether it is special, where the configuration has
/// the last word.
fn added_tokens(
    dir: &Path,
    added: Vec<AddedToken>,
) -> Result<BTreeMap<u32, (String, bool)>, TextError> {
    let path = dir.join("tokenizer_config.json");
    let config: TokenizerConfig = super::tokenizer_files::read_json(&path)?.unwrap_or_default();
    let mut tokens: BTreeMap<u32, (String, bool)> = (added.into_iter())
        .map(|token| (token.id, (token.content, token.special)))
        .collect();
    for (id, token) in config.added_tokens_decoder {
        tokens.insert(id, (token.content, token.special));
    }
    Ok(tokens)
}

/// Returns all tokens and their types; ids without a token are filled up.
fn token_list(
    model: &BpeModel,
    added: &BTreeMap<u32, (String, bool)>,
    vocab_size: u64,
) -> Result<(Vec<String>, Vec<i32>), String> {
    let num_tokens = usize::try_from(vocab_size).unwrap_or(usize::MAX);
    let plain = model.vocab.0.iter().map(|(token, &id)| (id, token));
    let special = added.iter().map(|(&id, (token, _))| (id, token));
    let highest = plain.clone().chain(special).map(|(id, _)| id).max();
    if highest.is_some_and(|id| id as usize >= num_tokens) {
        return Err(format!(
            "it has a token {}, config.json says vocab_size {vocab_size}: the embedding must have a \
             row for every token (resize_token_embeddings)",
            highest.unwrap_or_default()
        ));
    }
    let mut tokens: Vec<String> = (0..num_tokens).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; num_tokens];
    for (id, token) in plain {
        tokens[id as usize].clone_from(token);
        types[id as usize] = match model {
            model if model.byte_fallback && is_byte(token) => BYTE,
            model if model.byte_fallback && model.unk_token.as_ref() == Some(token) => UNKNOWN,
            _ => NORMAL,
        };
    }
    for (&id, (token, special)) in added {
        let id = id as usize;
        if types[id] == UNKNOWN {
            continue;
        }
        let control = *special || looks_special(token);
        types[id] = if control { CONTROL } else { USER_DEFINED };
        tokens[id] = match control {
            true => token.clone(),
            // Such tokens are matched in the text itself, before spaces are replaced.
            false => token.replace(SPACE, " "),
        };
    }
    Ok((tokens, types))
}

/// Returns whether a token stands for one byte: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Returns whether llama.cpp takes an added token for a control token by its spelling, even if the
/// tokenizer does not: `<|fim_prefix|>` of Qwen2.5 is not special there.
fn looks_special(token: &str) -> bool {
    let between = |begin, end| token.starts_with(begin) && token.ends_with(end);
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
        || between("<unused", ">")
}

/// Joins a merge; a space within a half, which the file could not tell from the one between them,
/// becomes the letter that stands for it in byte-level vocabularies.
fn merge_text((left, right): &(String, String)) -> String {
    let escaped = |half: &str| half.replace(' ', "\u{120}");
    format!("{} {}", escaped(left), escaped(right))
}

/// Returns a score for each token, higher for those that are merged earlier.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks = AHashMap::with_capacity(merges.len());
    for (left, right) in merges {
        let rank = ranks.len();
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let unmerged = ranks.len();
    let rank = |token| ranks.get(token).copied().unwrap_or(unmerged);
    tokens.iter().map(|token| -(rank(token) as f32)).collect()
}

/// Returns whether a space is put before a text: by a normalizer or by `Metaspace`.
fn adds_space_prefix(normalizer: &Value, pre_tokenizer: &Value) -> bool {
    let prepends = steps(normalizer, "normalizers")
        .iter()
        .any(|step| kind_of(step) == "Prepend");
    let metaspace = steps(pre_tokenizer, "pretokenizers")
        .into_iter()
        .find(|step| kind_of(step) == "Metaspace")
        .is_some_and(|step| match step.get("prepend_scheme") {
            Some(scheme) => scheme != "never",
            None => step.get("add_prefix_space") != Some(&Value::Bool(false)),
        });
    prepends || metaspace
}

/// Returns llama.cpp's name for the way in which a text is cut into words.
fn pre_tokenizer_name(pre_tokenizer: &Value, model: &BpeModel) -> Result<String, String> {
    let mut expressions = Vec::new();
    for step in steps(pre_tokenizer, "pretokenizers") {
        let flag = |key: &str| step.get(key).and_then(Value::as_bool);
        match kind_of(step) {
            "Split" => match step.pointer("/pattern/Regex").and_then(Value::as_str) {
                Some(expression) => expressions.push(expression),
                None => return Err("it splits words at a fixed string".to_owned()),
            },
            "Digits" if flag("individual_digits") == Some(true) => expressions.push(r"\p{N}"),
            "ByteLevel" if flag("use_regex") != Some(false) => expressions.push(GPT2),
            "ByteLevel" => {}
            other => return Err(format!("llama.cpp knows no pre-tokenizer {other:?}")),
        }
    }
    let name = PreTokenizer::name_of(&expressions, model.ignore_merges.unwrap_or(false));
    name.map(str::to_owned)
        .ok_or_else(|| format!("llama.cpp has no name for the way it cuts words ({expressions:?})"))
}

/// Returns the parts of a sequence, or the one step that it is; none for `null`.
fn steps<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match value.get(list).and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None if value.is_object() => vec![value],
        None => Vec::new(),
    }
}

fn kind_of(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXTS: [&str; 4] = [
        "the then he 12345",
        "don't  stop \n\n now",
        "naïve 北京 🙂",
        "<|im_start|>user\nhe<|im_end|>",
    ];

    fn directory(tokenizer: &Value, config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", config),
        ] {
            std::fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        dir
    }

    /// Both directions together change no token id.
    fn assert_same_ids(dir: &Path, vocabulary: &GgufVocabulary, texts: &[&str]) {
        let before = Tokenizer::from_dir(dir).unwrap();
        let after = Tokenizer::from_vocabulary(vocabulary.clone()).unwrap();
        for text in texts {
            for add in [AddSpecialTokens::Yes, AddSpecialTokens::No] {
                assert_eq!(
                    after.encode(text, add).unwrap(),
                    before.encode(text, add).unwrap(),
                    "{text:?} {add:?}"
                );
            }
        }
    }

    /// A byte-level tokenizer of three letters with these added tokens.
    fn byte_level(added: Value) -> Value {
        json!({
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                 "use_regex": true},
            ]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": true},
            "model": {
                "type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": [["a", "b"]],
            },
        })
    }

    #[test]
    fn a_models_directory_survives_the_way_through_gguf() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        for model in ["tiny-qwen2", "tiny-qwen3", "tiny-llama"] {
            let dir = fixtures.join(model);
            let config = json!({"vocab_size": 514, "bos_token_id": 509, "eos_token_id": [1, 2]});
            let vocabulary = GgufVocabulary::from_dir(&dir, &config).unwrap();
            assert_eq!(vocabulary.pre.as_deref(), Some("qwen2"));
            assert_eq!(
                vocabulary.tokens[509..],
                [
                    "<|endoftext|>",
                    "<|im_start|>",
                    "<|im_end|>",
                    "[PAD512]",
                    "[PAD513]"
                ]
            );
            assert_eq!(vocabulary.token_types[508..], [1, 3, 3, 3, 5, 5]);
            // The tokenizer names the end, config.json the beginning.
            assert_eq!((vocabulary.bos, vocabulary.eos), (Some(509), Some(511)));
            assert_eq!(vocabulary.add_bos, Some(false));
            let template = Tokenizer::from_dir(&dir).unwrap();
            let template = template.chat_templates().select(None).map(str::to_owned);
            assert_eq!(vocabulary.chat_template, template);
            assert_same_ids(&dir, &vocabulary, &TEXTS);
        }
    }

    #[test]
    fn added_tokens_get_the_types_that_llama_cpp_gives_them() {
        let token = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        };
        let added = json!([
            token(4, "<end>", true),
            token(5, "<|fim_prefix|>", false),
            token(6, "<tool_call>", false),
            token(7, "<late>", false),
        ]);
        // transformers believes the configuration where the two differ.
        let config = json!({
            "eos_token": "<end>",
            "added_tokens_decoder": {"7": token(7, "<late>", true)},
        });
        let dir = directory(&byte_level(added), &config);
        let vocabulary = GgufVocabulary::from_dir(dir.path(), &json!({"vocab_size": 8})).unwrap();
        assert_eq!(vocabulary.token_types, [1, 1, 1, 1, 3, 3, 4, 3]);
        assert_eq!(vocabulary.pre.as_deref(), Some("smollm"));
        assert_eq!(vocabulary.merges, ["a b"]);
        assert_eq!((vocabulary.bos, vocabulary.add_bos), (None, Some(false)));
        assert_eq!(vocabulary.eos, Some(4));
    }

    #[test]
    fn a_space_within_half_a_merge_stays_apart_from_the_one_between() {
        let pair = |left: &str, right: &str| (left.to_owned(), right.to_owned());
        assert_eq!(merge_text(&pair("a", "b")), "a b");
        assert_eq!(merge_text(&pair("a ", "b")), "a\u{120} b");
    }

    #[test]
    fn sentencepiece_merges_become_scores() {
        let mut vocab = serde_json::Map::new();
        let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let pieces = [SPACE, "a", "b", "c", "bc", "ab", "abc", "\u{2581}abc"];
        tokens.extend(pieces.map(str::to_owned));
        for (id, token) in tokens.iter().enumerate() {
            vocab.insert(token.clone(), id.into());
        }
        let special = |id: u32| {
            json!({"id": id, "content": tokens[id as usize], "special": true,
                   "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        };
        let tokenizer = json!({
            "added_tokens": [special(0), special(1), special(2)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ]},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                         {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {
                "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                "vocab": vocab,
                "merges": [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"], [SPACE, "abc"]],
            },
        });
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
        let dir = directory(&tokenizer, &config);
        let size = json!({"vocab_size": tokens.len()});
        let vocabulary = GgufVocabulary::from_dir(dir.path(), &size).unwrap();
        assert_eq!(vocabulary.model, "llama");
        assert_eq!(vocabulary.token_types[..4], [2, 3, 3, 6]);
        // bc before ab before abc, which two merges make, before the one with a space.
        assert_eq!(vocabulary.scores[263..], [-0.0, -1.0, -2.0, -3.0]);
        assert_eq!(vocabulary.add_space_prefix, Some(true));
        assert_eq!(vocabulary.add_bos, Some(true));
        assert_eq!(vocabulary.unknown, Some(0));
        assert_same_ids(dir.path(), &vocabulary, &["abc ab", "cab\nabcabc", "a é"]);
    }

    #[test]
    fn what_gguf_cannot_hold_is_refused_with_the_reason() {
        let refused = |tokenizer: &Value, vocab_size: usize| {
            let dir = directory(tokenizer, &json!({}));
            let config = json!({"vocab_size": vocab_size});
            let error = GgufVocabulary::from_dir(dir.path(), &config).unwrap_err();
            assert!(matches!(error, TextError::NotExportable { .. }), "{error}");
            error.to_string()
        };
        let plain = byte_level(json!([]));
        let error = refused(&plain, 3);
        assert!(
            error.contains("it has a token 3, config.json says vocab_size 3"),
            "{error}"
        );

        let mut unknown = plain.clone();
        unknown["pre_tokenizer"] = json!({"type": "Whitespace"});
        assert!(refused(&unknown, 4).contains("no pre-tokenizer \"Whitespace\""));
        unknown["pre_tokenizer"] = json!({"type": "Split", "behavior": "Isolated",
            "invert": false, "pattern": {"Regex": "x+"}});
        assert!(refused(&unknown, 4).contains("no name for the way it cuts words"));

        let mut words = plain;
        words["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        assert!(refused(&words, 4).contains("it is not a BPE"));
    }
}
