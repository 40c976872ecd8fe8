//! Tokenizer and detokenizer over small vocabularies, and faulty tokenizer files.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The byte alphabet of GPT-2: the character that stands for each byte.
fn byte_characters() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

/// 256 bytes, a few merges, two control tokens (one with a space) and a user-defined one.
fn byte_level_vocabulary(pre: &str) -> GgufVocabulary {
    let mut tokens = byte_characters();
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "å ¥"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    tokens.extend(["<|end|>", "<|a b|>", "<think>"].map(str::to_owned));
    token_types.extend([3, 3, 4]);
    let eos = tokens.len() as u32 - 3;
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        token_types,
        merges: merges.map(str::to_owned).to_vec(),
        bos: Some(eos + 1),
        eos: Some(eos),
        chat_template: Some("{{ messages }}".to_owned()),
        ..GgufVocabulary::default()
    }
}

fn sentencepiece_vocabulary() -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    token_types.extend([6; 256]);
    let pieces = [
        "\u{2581}",
        "a",
        "b",
        ".",
        "\u{2581}a",
        "ab",
        "\u{2581}ab",
        "好",
    ];
    tokens.extend(pieces.map(str::to_owned));
    token_types.extend([1; 8]);
    let mut scores = vec![0.0; 259];
    scores.extend([-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -9.0]);
    GgufVocabulary {
        model: "llama".to_owned(),
        tokens,
        token_types,
        scores,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        ..GgufVocabulary::default()
    }
}

fn byte_level() -> Tokenizer {
    Tokenizer::from_vocabulary(byte_level_vocabulary("qwen2")).unwrap()
}

fn spell(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, AddSpecialTokens::No).unwrap();
    ids.iter()
        .map(|&id| tokenizer.token_string(id).unwrap())
        .collect()
}

/// Pushes every id and checks that the pieces are what `decode` gives.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: SkipSpecialTokens) -> String {
    let mut detokenizer = Detokenizer::new(skip);
    let mut text: String = ids
        .iter()
        .map(|&id| detokenizer.push(tokenizer, id))
        .collect();
    text.push_str(&detokenizer.finish(tokenizer));
    text
}

#[test]
fn merges_and_special_tokens_are_applied() {
    let tokenizer = byte_level();
    assert_eq!(
        spell(&tokenizer, "hello hello<|end|>he"),
        ["hello", "Ġhello", "<|end|>", "he"]
    );
    assert_eq!(spell(&tokenizer, "<|a b|><think>"), ["<|a b|>", "<think>"]);
    let end = tokenizer.token_id("<|end|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert!(!tokenizer.is_special(tokenizer.token_id("<think>").unwrap()));
    assert_eq!(tokenizer.eos_token().unwrap().id, Some(end));
    assert_eq!(tokenizer.vocab_size(), 266);
    assert_eq!(tokenizer.token_bytes(end - 2).as_deref(), Some(&b"12"[..]));
    let ids = tokenizer
        .encode("hello<|end|><think>", AddSpecialTokens::No)
        .unwrap();
    assert_eq!(
        tokenizer.decode(&ids, SkipSpecialTokens::Yes),
        "hello<think>"
    );
    assert_eq!(
        tokenizer.decode(&ids, SkipSpecialTokens::No),
        "hello<|end|><think>"
    );
    assert_eq!(
        tokenizer.chat_templates().get("default"),
        Some("{{ messages }}")
    );
    assert!(tokenizer.check_ids(&[0, 265]).is_ok());
    let error = tokenizer.check_ids(&[266]).unwrap_err();
    assert!(error.is_user_error());
}

#[test]
fn pre_tokenizer_decides_how_digits_are_cut() {
    let digits = |pre: &str| {
        let tokenizer = Tokenizer::from_vocabulary(byte_level_vocabulary(pre)).unwrap();
        spell(&tokenizer, "a12")
    };
    assert_eq!(digits("smollm"), ["a", "1", "2"]);
    assert_eq!(digits("qwen2"), ["a", "1", "2"]);
    assert_eq!(digits("llama-bpe"), ["a", "12"]);
    assert_eq!(digits("gpt-2"), ["a", "12"]);
    let unknown = Tokenizer::from_vocabulary(byte_level_vocabulary("new-model"));
    assert!(
        matches!(unknown, Err(TextError::UnsupportedPreTokenizer { pre }) if pre == "new-model")
    );
}

#[test]
fn begin_token_is_added_when_the_vocabulary_says_so() {
    let ids = |vocabulary: GgufVocabulary| {
        let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
        tokenizer.encode("he", AddSpecialTokens::Yes).unwrap().len()
    };
    assert_eq!(ids(byte_level_vocabulary("qwen2")), 1);
    assert_eq!(ids(byte_level_vocabulary("llama-bpe")), 2);
    let mut vocabulary = byte_level_vocabulary("llama-bpe");
    vocabulary.add_bos = Some(false);
    assert_eq!(ids(vocabulary.clone()), 1);
    vocabulary.add_bos = Some(true);
    vocabulary.add_eos = Some(true);
    assert_eq!(ids(vocabulary), 3);
}

#[test]
fn sentencepiece_scores_decide_the_merges() {
    let tokenizer = Tokenizer::from_vocabulary(sentencepiece_vocabulary()).unwrap();
    let ids = tokenizer.encode("ab 好é", AddSpecialTokens::Yes).unwrap();
    let spelled: Vec<_> = ids
        .iter()
        .map(|&id| tokenizer.token_string(id).unwrap())
        .collect();
    assert_eq!(
        spelled,
        ["<s>", "\u{2581}ab", "\u{2581}", "好", "<0xC3>", "<0xA9>"]
    );
    assert_eq!(tokenizer.decode(&ids, SkipSpecialTokens::Yes), "ab 好é");
    assert_eq!(stream(&tokenizer, &ids, SkipSpecialTokens::Yes), "ab 好é");
}

#[test]
fn token_after_a_prompt_keeps_its_leading_space() {
    let tokenizer = Tokenizer::from_vocabulary(sentencepiece_vocabulary()).unwrap();
    let a = tokenizer.token_id("\u{2581}a").unwrap();
    let skip = SkipSpecialTokens::Yes;
    assert_eq!(Detokenizer::new(skip).push(&tokenizer, a), "a");
    assert_eq!(
        Detokenizer::after_prompt(&tokenizer, &[1, a], skip).push(&tokenizer, a),
        " a"
    );
}

#[test]
fn character_that_the_prompt_cut_is_completed() {
    let tokenizer = byte_level();
    let ids: Vec<u32> = "😀!".bytes().map(u32::from).collect();
    let mut detokenizer = Detokenizer::after_prompt(&tokenizer, &ids[..2], SkipSpecialTokens::Yes);
    let text: String = ids[2..]
        .iter()
        .map(|&id| detokenizer.push(&tokenizer, id))
        .collect();
    assert_eq!(text, "😀!");
}

#[test]
fn broken_character_is_held_back_and_then_replaced() {
    let tokenizer = byte_level();
    let mut detokenizer = Detokenizer::new(SkipSpecialTokens::Yes);
    assert_eq!(detokenizer.push(&tokenizer, 0xE5), "");
    assert_eq!(detokenizer.push(&tokenizer, u32::from(b'a')), "\u{fffd}a");
    assert_eq!(detokenizer.push(&tokenizer, 0xF0), "");
    assert_eq!(detokenizer.finish(&tokenizer), "\u{fffd}");
    assert_eq!(detokenizer.finish(&tokenizer), "");
}

proptest! {
    #[test]
    fn joined_pieces_equal_the_whole_text(
        ids in prop::collection::vec(
            prop_oneof![0u32..270, 0xE4u32..0xE6, 0x80u32..0x90, Just(0xF0)], 0..40),
        keep in any::<bool>(),
    ) {
        let tokenizer = byte_level();
        let skip = if keep { SkipSpecialTokens::No } else { SkipSpecialTokens::Yes };
        prop_assert_eq!(stream(&tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
    }

    #[test]
    fn text_survives_both_ways(text in "[a-z 0-9好é😀\\n]{0,30}", keep in any::<bool>()) {
        let skip = if keep { SkipSpecialTokens::No } else { SkipSpecialTokens::Yes };
        for tokenizer in [
            byte_level(),
            Tokenizer::from_vocabulary(sentencepiece_vocabulary()).unwrap(),
        ] {
            let ids = tokenizer.encode(&text, AddSpecialTokens::No).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids, skip), &text);
            prop_assert_eq!(&stream(&tokenizer, &ids, skip), &text);
        }
    }

    #[test]
    fn sentencepiece_pieces_equal_the_whole_text(
        ids in prop::collection::vec(prop_oneof![1u32..3, 259u32..267], 0..20),
    ) {
        let tokenizer = Tokenizer::from_vocabulary(sentencepiece_vocabulary()).unwrap();
        for skip in [SkipSpecialTokens::Yes, SkipSpecialTokens::No] {
            prop_assert_eq!(stream(&tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
        }
    }
}

#[test]
fn vocabularies_that_do_not_fit_together_are_refused() {
    type Fault = fn(&mut GgufVocabulary);
    let faults: [(Fault, &str); 7] = [
        (|v| v.model = "bert".to_owned(), "tokenizer model \"bert\""),
        (|v| v.token_types.truncate(5), "but 5 token types"),
        (|v| v.scores = vec![0.0], "but 1 scores"),
        (|v| v.merges.push("hello".to_owned()), "merge 7"),
        (|v| v.merges.push("hello hello".to_owned()), "merge 7"),
        (|v| v.eos = Some(9999), "token id 9999"),
        (
            |v| {
                v.tokens.clear();
                v.token_types.clear();
                v.merges.clear();
                (v.bos, v.eos) = (None, None);
            },
            "vocabulary is empty",
        ),
    ];
    for (fault, want) in faults {
        let mut vocabulary = byte_level_vocabulary("qwen2");
        fault(&mut vocabulary);
        let error = Tokenizer::from_vocabulary(vocabulary)
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{error}");
    }
}

fn tokenizer_json() -> Value {
    let vocabulary = byte_level_vocabulary("gpt-2");
    let vocab: serde_json::Map<String, Value> = vocabulary.tokens[..263]
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": special})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [added(263, "<|end|>", true), added(264, "<think>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": vocabulary.merges},
    })
}

fn write(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}

#[test]
fn directory_gives_tokens_templates_and_names() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", &tokenizer_json());
    let config = json!({
        "add_bos_token": true,
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"content": "<think>", "lstrip": false},
        "eos_token": "<|end|>",
        "pad_token": null,
        "added_tokens_decoder": {"265": {"content": "<|new|>", "special": true, "lstrip": false,
            "rstrip": false, "normalized": false, "single_word": false}},
        "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
    });
    write(dir.path(), "tokenizer_config.json", &config);
    write(
        dir.path(),
        "special_tokens_map.json",
        &json!({"unk_token": "!", "eos_token": "no"}),
    );
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    // Neither cut to 2 tokens nor filled up to 8.
    let ids = tokenizer
        .encode("hello 12 12<|new|>", AddSpecialTokens::Yes)
        .unwrap();
    assert_eq!(ids[0], 264);
    assert_eq!(*ids.last().unwrap(), 265);
    assert_eq!(ids.len(), 7);
    assert_eq!(tokenizer.bos_token().unwrap().content, "<think>");
    assert_eq!(tokenizer.eos_token().unwrap().id, Some(263));
    assert!(tokenizer.is_special(264) && tokenizer.is_special(265));
    assert_eq!(tokenizer.chat_templates().select(Some(&[])), Some("t"));
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.chat_templates().select(Some(&[])), Some("file"));
}

#[test]
fn faulty_tokenizer_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |dir: &Path| Tokenizer::from_dir(dir).unwrap_err().to_string();
    assert!(error(dir.path()).contains("needs a tokenizer.json"));
    let good = tokenizer_json();
    let path = dir.path().join("tokenizer.json");
    let text = good.to_string();
    for cut in [0, 1, text.len() / 2, text.len() - 1] {
        std::fs::write(&path, &text[..cut]).unwrap();
        assert!(error(dir.path()).contains("tokenizer.json"), "cut at {cut}");
    }
    std::fs::write(&path, [0xFF, 0xFE, 0x00]).unwrap();
    assert!(error(dir.path()).contains("tokenizer.json"));
    let faults = [
        ("/model", Value::Null),
        ("/model/vocab", json!([1, 2])),
        ("/model/vocab", json!({})),
        ("/model/merges", json!(["nope nope"])),
        ("/model/merges", json!([["hello", "hello"]])),
        ("/model/merges", json!(["single"])),
        ("/model/merges", json!([["a"]])),
        ("/model/type", json!("Unknown")),
        ("/model/continuing_subword_prefix", json!("##")),
        ("/added_tokens/0/id", json!(700)),
        ("/pre_tokenizer/type", json!("Nope")),
    ];
    for (pointer, value) in faults {
        let mut file = good.clone();
        match file.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => file["model"]["continuing_subword_prefix"] = value,
        }
        std::fs::write(&path, file.to_string()).unwrap();
        assert!(error(dir.path()).contains("tokenizer.json"), "{pointer}");
    }
    write(dir.path(), "tokenizer.json", &good);
    std::fs::write(dir.path().join("tokenizer_config.json"), "{\"bos_token\": ").unwrap();
    assert!(error(dir.path()).contains("tokenizer_config.json"));
}
