//! Exact bytes, grammar cases and what can not be written.

use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(format!("{MODELS}/tiny-qwen2").as_ref()).unwrap()
}

/// The tokenizer of a base model: it ends a text with `<|endoftext|>`.
fn base_tokenizer() -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let from = std::path::Path::new(MODELS).join("tiny-qwen2");
    std::fs::copy(
        from.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let config = std::fs::read_to_string(from.join("tokenizer_config.json")).unwrap();
    let config = config.replace(
        "\"eos_token\": \"<|im_end|>\"",
        "\"eos_token\": \"<|endoftext|>\"",
    );
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn input<'a>(template: &'a TrainingTemplate, tokenizer: &'a Tokenizer) -> ModelfileInput<'a> {
    ModelfileInput {
        template,
        tokenizer,
        generation_config: None,
        num_ctx: 8192,
        from: ".",
    }
}

fn written(style: ModelfileStyle, template: &TrainingTemplate) -> String {
    let tokenizer = tokenizer();
    modelfile(style, &input(template, &tokenizer)).unwrap().text
}

fn named(name: &str) -> &'static TrainingTemplate {
    TrainingTemplate::named(name).unwrap()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn llama_factory_style_is_its_file_byte_for_byte() {
    let cases = [
        (
            "qwen@0.9.2",
            424,
            "95d2a815e542d15e9f7a4feeab46402d7f8cef3b63ba3c26a5c4d9f6e70f8e9f",
        ),
        (
            "qwen",
            464,
            "5e3d4048240729db5b474431102461272678d60e5793d4a3452b2cfaf3acb2f7",
        ),
        (
            "qwen3_nothink",
            381,
            "6ff2ee517c72f16c560b06f414bcc4bf583715abdd263723242baaea23393377",
        ),
    ];
    for (name, len, hash) in cases {
        let text = written(ModelfileStyle::LlamaFactory, named(name));
        assert_eq!(
            (text.len(), sha256(&text).as_str()),
            (len, hash),
            "{name}:\n{text}"
        );
    }
}

#[test]
fn llama_factory_style_stops_a_base_model_as_the_version_does() {
    let tokenizer = base_tokenizer();
    let stops = |name| {
        let input = input(named(name), &tokenizer);
        let text = modelfile(ModelfileStyle::LlamaFactory, &input)
            .unwrap()
            .text;
        let lines = text
            .lines()
            .filter(|line| line.starts_with("PARAMETER stop"));
        (
            lines.map(str::to_owned).collect::<Vec<_>>(),
            text.len(),
            sha256(&text),
        )
    };
    let (old, len, hash) = stops("qwen@0.9.2");
    assert_eq!(
        old,
        [
            "PARAMETER stop \"<|endoftext|>\"",
            "PARAMETER stop \"<|im_end|>\""
        ]
    );
    assert_eq!((len, &hash[..8]), (455, "9cb15c15"));
    assert_eq!(stops("qwen").0, ["PARAMETER stop \"<|im_end|>\""]);
}

#[test]
fn complete_style_has_tools_stops_and_sampling() {
    let tokenizer = tokenizer();
    let config = json!({
        "do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
        "repetition_penalty": 1.05, "eos_token_id": [511, 509], "pad_token_id": 509
    });
    let input = ModelfileInput {
        generation_config: Some(&config),
        ..input(named("qwen"), &tokenizer)
    };
    let file = modelfile(ModelfileStyle::Complete, &input).unwrap();
    assert!(file.warnings.is_empty());
    let instructions = parse_modelfile(&file.text).unwrap();
    let parameters: Vec<_> = instructions
        .iter()
        .filter_map(|instruction| match instruction {
            Instruction::Parameter { name, value } => Some((name.as_str(), value.as_str())),
            _ => None,
        })
        .collect();
    let want = [
        ("stop", "<|im_end|>"),
        ("stop", "<|endoftext|>"),
        ("temperature", "0.7"),
        ("top_p", "0.8"),
        ("top_k", "20"),
        ("repeat_penalty", "1.05"),
        ("num_ctx", "8192"),
    ];
    assert_eq!(parameters, want);
    assert!(instructions.contains(&Instruction::Other {
        name: "SYSTEM",
        value: named("qwen").default_system().to_owned(),
    }));
    assert!(instructions.contains(&Instruction::Other {
        name: "TEMPLATE",
        value: ollama_template(named("qwen"), &tokenizer),
    }));
}

#[test]
fn greedy_model_is_served_greedily() {
    let config = json!({ "do_sample": false, "temperature": 0.7 });
    assert_eq!(
        sampling_parameters(Some(&config)),
        [("temperature", "0".to_owned())]
    );
}

#[test]
fn every_template_is_read_back_as_written() {
    let tokenizer = tokenizer();
    for name in TrainingTemplate::names() {
        for style in [ModelfileStyle::Complete, ModelfileStyle::LlamaFactory] {
            let file = modelfile(style, &input(named(name), &tokenizer)).unwrap();
            assert!(file.warnings.is_empty(), "{name}");
        }
    }
}

#[test]
fn system_prompt_with_quotes_before_a_line_end_is_refused() {
    let refused = ["a\"\"\"\nb", "a\"\"\" \nb", "\"\"\"\nb"];
    let tokenizer = tokenizer();
    for system in refused {
        let template = named("qwen").with_default_system(system);
        let error = modelfile(ModelfileStyle::Complete, &input(&template, &tokenizer));
        assert!(
            matches!(
                error,
                Err(ModelfileError::Unquotable {
                    instruction: "SYSTEM",
                    ..
                })
            ),
            "{system:?}: {error:?}"
        );
    }
}

#[test]
fn system_prompt_with_other_quotes_survives() {
    let tokenizer = tokenizer();
    for system in [
        "say \"\"\"hi\"\"\" twice",
        "\"quoted\"",
        "\"",
        "a\nb\r\nc",
        "  x  ",
        "你好 é",
    ] {
        let template = named("qwen").with_default_system(system);
        let file = modelfile(ModelfileStyle::Complete, &input(&template, &tokenizer)).unwrap();
        let instructions = parse_modelfile(&file.text).unwrap();
        let value = system.to_owned();
        assert!(
            instructions.contains(&Instruction::Other {
                name: "SYSTEM",
                value
            }),
            "{system:?}: {}",
            file.text
        );
    }
}

#[test]
fn characters_that_ollama_drops_are_named() {
    let tokenizer = tokenizer();
    let template = named("qwen").with_default_system("你好\u{3000}世界\u{a0}\u{200d}.");
    let file = modelfile(ModelfileStyle::Complete, &input(&template, &tokenizer)).unwrap();
    assert!(
        file.warnings[0].contains("U+3000, U+00A0, U+200D"),
        "{:?}",
        file.warnings
    );
    assert!(
        parse_modelfile(&file.text)
            .unwrap()
            .contains(&Instruction::Other {
                name: "SYSTEM",
                value: "你好世界.".to_owned(),
            })
    );
}

fn other(name: &'static str, value: &str) -> Instruction {
    let value = value.to_owned();
    Instruction::Other { name, value }
}

fn from(value: &str) -> Instruction {
    Instruction::From(value.to_owned())
}

#[test]
fn values_are_read_as_ollama_reads_them() {
    let cases = [
        ("FROM x\nSYSTEM one line", "one line"),
        ("FROM x\nSYSTEM \"quoted\"  ", "quoted"),
        ("FROM x\nsystem \"\"\"two\nlines\n\"\"\"\n", "two\nlines\n"),
        ("# note\n  FROM x\nSYSTEM \"one\ntwo\"", "one\ntwo"),
        ("\u{feff}FROM x\nSYSTEM \"\"\"\"a\"\"\"\"", "\"a\""),
        (
            "FROM x\r\nSYSTEM a # not a comment\r\n",
            "a # not a comment",
        ),
        (
            "FROM x\nSYSTEM \"\"\"it's \\n \"\"quoted\"\" here\"\"\"",
            "it's \\n \"\"quoted\"\" here",
        ),
    ];
    for (text, system) in cases {
        let want = vec![from("x"), other("SYSTEM", system)];
        assert_eq!(parse_modelfile(text).unwrap(), want, "{text:?}");
    }
}

#[test]
fn messages_parameters_and_order_are_free() {
    let text = "PARAMETER stop a\nMESSAGE user What\nMESSAGE assistant \"\"\"Th\nat\"\"\"\n\
                PARAMETER num_ctx 1\nFROM a\nfrom b\nPARAMETER mirostat 1\n";
    let parameter = |name: &str, value: &str| Instruction::Parameter {
        name: name.to_owned(),
        value: value.to_owned(),
    };
    let message = |role: &str, content: &str| Instruction::Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let want = vec![
        parameter("stop", "a"),
        message("user", "What"),
        message("assistant", "Th\nat"),
        parameter("num_ctx", "1"),
        from("a"),
        from("b"),
        parameter("mirostat", "1"),
    ];
    assert_eq!(parse_modelfile(text).unwrap(), want);
}

#[test]
fn faults_are_named_with_their_line() {
    let cases = [
        ("PARAMETER stop x\n", "no FROM line"),
        ("FROM x\n\nBAD y\n", "line 3: \"BAD\" is no instruction"),
        (
            "FROM x\nMESSAGE nobody hi\n",
            "line 2: MESSAGE by \"nobody\"",
        ),
        (
            "FROM x\nPARAMETER num_ctz 1\n",
            "no parameter \"num_ctz\"; the nearest is num_ctx",
        ),
        ("FROM x\nPARAMETER num_ctx many\n", "wanted a whole number"),
        ("FROM x\nPARAMETER use_mmap 2\n", "wanted true or false"),
        (
            "FROM x\nPARAMETER stop",
            "line 2: the file ends inside PARAMETER: a value",
        ),
        (
            "FROM x\nSYSTEM \"\"\"open\n",
            "ends inside SYSTEM: a closing quote",
        ),
        ("FROM", "ends inside FROM: a value"),
    ];
    for (text, want) in cases {
        let error = parse_modelfile(text).unwrap_err().to_string();
        assert!(error.contains(want), "{text:?}: {error}");
    }
}
