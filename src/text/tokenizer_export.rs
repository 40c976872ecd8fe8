//! A GGUF file's vocabulary as the tokenizer files of a model directory.
//!
//! What is written is what transformers 4 and 5, vLLM and [`Tokenizer::from_dir`] read:
//! `tokenizer.json` with begin and end tokens in its post-processor, so that no tokenizer class
//! has to know about them, and `tokenizer_config.json` with names and the chat template.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer as HfTokenizer;
use tokenizers::processors::template::{Template, TemplateProcessing};

use super::vocabulary::{CONTROL, USER_DEFINED};
use super::{GgufVocabulary, TextError, Tokenizer};

const ORIGIN: &str = "the GGUF vocabulary";

impl GgufVocabulary {
    /// Returns the files of this tokenizer: name, which may have one directory in front, and
    /// content.
    ///
    /// # Errors
    /// As [`Tokenizer::from_vocabulary`], and a named chat template whose name no file can have.
    pub fn to_files(&self) -> Result<Vec<(String, String)>, TextError> {
        let tokenizer = Tokenizer::from_vocabulary(self.clone())?;
        let invalid = |source| TextError::InvalidTokenizer {
            origin: ORIGIN.to_owned(),
            source,
        };
        let mut inner = tokenizer.inner().clone();
        add_post_processor(&mut inner, &tokenizer).map_err(invalid)?;
        let text = inner.to_string(true).map_err(invalid)?;
        let config = format!("{:#}\n", self.tokenizer_config(&tokenizer));
        let mut files = vec![
            ("tokenizer.json".to_owned(), text),
            ("tokenizer_config.json".to_owned(), config),
        ];
        if let Some(template) = &self.chat_template {
            files.push(("chat_template.jinja".to_owned(), template.clone()));
        }
        for (name, template) in &self.named_chat_templates {
            // It comes from a file of anyone's.
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if name.is_empty() || !name.chars().all(is_plain) {
                let reason = format!("the name of chat template {name:?} cannot be one of a file");
                return Err(invalid(reason.into()));
            }
            let name = format!("additional_chat_templates/{name}.jinja");
            files.push((name, template.clone()));
        }
        Ok(files)
    }

    fn tokenizer_config(&self, tokenizer: &Tokenizer) -> Value {
        let mut added = Map::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.token_types).enumerate() {
            if matches!(*kind, CONTROL | USER_DEFINED) && !token.is_empty() {
                let entry = json!({
                    "content": token, "lstrip": false, "normalized": false, "rstrip": false,
                    "single_word": false, "special": *kind == CONTROL,
                });
                added.insert(id.to_string(), entry);
            }
        }
        let mut config = Map::new();
        config.insert("added_tokens_decoder".to_owned(), added.into());
        // The end of a turn has no name in transformers; it is among the tokens that end a
        // generation.
        let named = tokenizer.named_tokens().iter();
        for token in named.filter(|token| token.name != "eot_token") {
            config.insert(token.name.clone(), json!(token.content));
        }
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), json!(template));
        }
        config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
        config.insert(
            "tokenizer_class".to_owned(),
            "PreTrainedTokenizerFast".into(),
        );
        config.into()
    }
}

/// Has the tokens around a text added by `tokenizer.json` itself.
fn add_post_processor(inner: &mut HfTokenizer, tokenizer: &Tokenizer) -> tokenizers::Result<()> {
    let (prefix, suffix) = tokenizer.around();
    let names = [prefix, suffix].map(|id| id.and_then(|id| tokenizer.token_string(id)));
    let [before, after] = &names;
    if before.is_none() && after.is_none() {
        return Ok(());
    }
    let pieces = |sequence: &str| {
        let pieces = before.iter().cloned();
        let pieces = pieces.chain([sequence.to_owned()]);
        pieces.chain(after.iter().cloned()).collect::<Vec<_>>()
    };
    let single: Template = pieces("$A").try_into()?;
    let pair: Template = [pieces("$A:0"), pieces("$B:1")].concat().try_into()?;
    let tokens = [prefix, suffix].into_iter().zip(&names);
    let tokens: Vec<(String, u32)> = tokens
        .filter_map(|(id, name)| Some((name.clone()?, id?)))
        .collect();
    let processor = TemplateProcessing::builder()
        .try_single(single)?
        .try_pair(pair)?
        .special_tokens(tokens)
        .build()?;
    inner.with_post_processor(Some(processor));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::text::AddSpecialTokens;

    fn written(vocabulary: &GgufVocabulary) -> (tempfile::TempDir, Tokenizer) {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in vocabulary.to_files().unwrap() {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        (dir, tokenizer)
    }

    fn assert_same_ids(vocabulary: &GgufVocabulary) {
        let (_dir, after) = written(vocabulary);
        let before = Tokenizer::from_vocabulary(vocabulary.clone()).unwrap();
        for text in ["", "the then 123", "a<|im_end|>\n\nhé 北京", "<x> b"] {
            for add in [AddSpecialTokens::Yes, AddSpecialTokens::No] {
                assert_eq!(
                    after.encode(text, add).unwrap(),
                    before.encode(text, add).unwrap(),
                    "{text:?} {add:?}"
                );
            }
        }
        for id in 0..vocabulary.tokens.len() as u32 {
            assert_eq!(after.is_special(id), before.is_special(id), "{id}");
        }
    }

    #[test]
    fn a_vocabulary_survives_the_way_through_a_directory() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let config = json!({"vocab_size": 514});
        let mut vocabulary =
            GgufVocabulary::from_dir(&fixtures.join("tiny-llama"), &config).unwrap();
        assert_same_ids(&vocabulary);
        (vocabulary.bos, vocabulary.add_bos) = (Some(509), Some(true));
        (vocabulary.eos, vocabulary.add_eos) = (Some(511), Some(true));
        assert_same_ids(&vocabulary);
        vocabulary.add_bos = Some(false);
        assert_same_ids(&vocabulary);
    }

    #[test]
    fn a_sentencepiece_vocabulary_survives_too() {
        let tokens = [
            "<unk>",
            "<s>",
            "</s>",
            "\u{2581}",
            "a",
            "b",
            "ab",
            "\u{2581}a",
        ];
        let vocabulary = GgufVocabulary {
            model: "llama".to_owned(),
            tokens: tokens.map(str::to_owned).to_vec(),
            token_types: vec![2, 3, 3, 1, 1, 1, 1, 1],
            scores: vec![0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0],
            bos: Some(1),
            eos: Some(2),
            unknown: Some(0),
            ..GgufVocabulary::default()
        };
        assert_same_ids(&vocabulary);
    }

    #[test]
    fn a_template_whose_name_leaves_the_directory_is_refused() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let config = json!({"vocab_size": 514});
        let mut vocabulary =
            GgufVocabulary::from_dir(&fixtures.join("tiny-qwen2"), &config).unwrap();
        for name in ["../../x", "a/b", ""] {
            vocabulary.named_chat_templates = vec![(name.to_owned(), "t".to_owned())];
            let error = vocabulary.to_files().unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn names_and_templates_are_kept() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let config = json!({"vocab_size": 514, "pad_token_id": 509});
        let mut vocabulary =
            GgufVocabulary::from_dir(&fixtures.join("tiny-qwen2"), &config).unwrap();
        vocabulary.chat_template = Some("{{ 'ü' }}".to_owned());
        vocabulary.named_chat_templates = vec![("tool_use".to_owned(), "t".to_owned())];
        let (dir, after) = written(&vocabulary);
        assert_eq!(after.chat_templates().get("default"), Some("{{ 'ü' }}"));
        assert_eq!(after.chat_templates().get("tool_use"), Some("t"));
        let before = Tokenizer::from_vocabulary(vocabulary).unwrap();
        assert_eq!(after.eos_token(), before.eos_token());
        let config = std::fs::read_to_string(dir.path().join("tokenizer_config.json")).unwrap();
        assert!(config.contains("PreTrainedTokenizerFast"), "{config}");
    }
}
