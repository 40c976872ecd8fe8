//! Templates that agree and templates that do not.

use serde_json::json;

use super::*;
use crate::merge::default_system::set_default_system;
use crate::merge::modelfile::{ModelfileInput, ModelfileStyle, modelfile};
use crate::text::{Thinking, ThoughtHistory, fallback_template};

fn tokenizer() -> Tokenizer {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen2");
    Tokenizer::from_dir(dir.as_ref()).unwrap()
}

fn check(template: &TrainingTemplate, chat_template: &str, style: ModelfileStyle) -> PromptReport {
    let tokenizer = tokenizer();
    let chat_template = ChatTemplate::compile(chat_template, tokenizer.named_tokens()).unwrap();
    let file = modelfile(
        style,
        &ModelfileInput {
            template,
            tokenizer: &tokenizer,
            generation_config: None,
            num_ctx: 4096,
            from: ".",
        },
    );
    check_prompts(&PromptCheckInput {
        template,
        tokenizer: &tokenizer,
        chat_template: Some(&chat_template),
        modelfile: Some(&file.unwrap().text),
    })
    .unwrap()
}

fn named(name: &str) -> &'static TrainingTemplate {
    TrainingTemplate::named(name).unwrap()
}

fn differing(report: &PromptReport) -> Vec<(PromptSource, &'static str)> {
    let differences = report.differences.iter();
    differences
        .map(|difference| (difference.source, difference.sample))
        .collect()
}

#[test]
fn templates_of_one_model_agree_on_every_sample() {
    let report = check(
        named("qwen"),
        fallback_template("qwen2.5").unwrap(),
        ModelfileStyle::Complete,
    );
    assert_eq!(report.differences, []);
    assert_eq!((report.num_compared, report.advice), (16, None));
}

#[test]
fn old_system_prompt_is_found_and_the_advice_repairs_it() {
    let source = fallback_template("qwen2.5").unwrap();
    let old = named("qwen@0.9.2");
    // The first version wrapped tools that are wrapped already once more.
    let report = check(old, source, ModelfileStyle::LlamaFactory);
    let no_system = report
        .differences
        .iter()
        .find(|d| d.sample == "a question")
        .unwrap();
    assert_eq!(no_system.source, PromptSource::ChatTemplate);
    assert_eq!(
        no_system.to_string(),
        "a question: the chat template differs from token 7 on: trained with \
         \"art|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\nWho are you?\", \
         served with \"art|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\""
    );
    let advice = report.advice.unwrap();
    assert!(
        advice.starts_with("--default-system \"You are a helpful assistant.\""),
        "{advice}"
    );

    let new = set_default_system(named("qwen"), source, &[], old.default_system()).unwrap();
    let repaired = check(&new.template, &new.chat_template, ModelfileStyle::Complete);
    assert_eq!(repaired.differences, []);
}

#[test]
fn modelfile_without_tools_is_found() {
    let source = fallback_template("qwen2.5").unwrap();
    let report = check(named("qwen"), source, ModelfileStyle::LlamaFactory);
    let samples: Vec<_> = differing(&report);
    assert_eq!(
        samples,
        [
            "tools",
            "tools under a system prompt",
            "a call of a tool",
            "two calls at once"
        ]
        .map(|sample| (PromptSource::Modelfile, sample))
    );
    assert_eq!(report.advice, None);
}

#[test]
fn simple_templates_agree() {
    let report = check(
        named("chatml"),
        fallback_template("chatml").unwrap(),
        ModelfileStyle::Complete,
    );
    assert_eq!(report.differences, []);
    assert_eq!(report.num_compared, 8);
}

/// LLaMA-Factory learns an empty thought in every answer, and the chat template drops the thoughts
/// of all but the last.
#[test]
fn thoughts_of_earlier_answers_are_what_qwen3_differs_in() {
    let template = named("qwen3").with_thinking(Thinking::Disabled, ThoughtHistory::Dropped);
    let report = check(
        &template,
        fallback_template("qwen3").unwrap(),
        ModelfileStyle::Complete,
    );
    for difference in &report.differences {
        let several = [
            "several turns",
            "several turns under a system prompt",
            "a call of a tool",
            "two calls at once",
            "tools",
        ];
        assert!(several.contains(&difference.sample), "{difference}");
    }
    let chat: Vec<_> = differing(&report);
    assert!(chat.contains(&(PromptSource::ChatTemplate, "several turns")));
    assert!(!chat.iter().any(|(_, sample)| *sample == "a question"));
}

#[test]
fn template_that_raises_is_a_difference_with_its_words() {
    let tokenizer = tokenizer();
    let chat_template = ChatTemplate::compile("{{ raise_exception('never') }}", &[]).unwrap();
    let report = check_prompts(&PromptCheckInput {
        template: named("chatml"),
        tokenizer: &tokenizer,
        chat_template: Some(&chat_template),
        modelfile: None,
    });
    assert!(report.is_err() || report.unwrap().differences[0].to_string().contains("never"));
}

/// The text of every sample by every complete Modelfile, for `scripts/check_modelfile.sh`, which
/// lets Go render the same and compares.
#[test]
fn samples_for_go_are_as_committed() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/modelfile/go_cases.json"
    );
    let tokenizer = tokenizer();
    let mut cases = Vec::new();
    for (name, chat_template) in [
        ("qwen", Some("qwen2.5")),
        ("qwen3_nothink", Some("qwen3")),
        ("llama3", None),
        ("chatml", Some("chatml")),
        ("smollm2", None),
        ("default", None),
    ] {
        let template = named(name);
        let source = crate::merge::ollama_template(template, &tokenizer);
        let go_template = GoTemplate::parse(&source).unwrap();
        for sample in samples(template.has_native_tools()) {
            let data = sample.ollama_data(template.default_system());
            let rendered = go_template.render(&data).unwrap();
            if let Some(chat_template) = chat_template {
                let source = fallback_template(chat_template).unwrap();
                let chat_template = ChatTemplate::compile(source, &[]).unwrap();
                let chat = render_chat(&chat_template, template, &sample).unwrap();
                assert_eq!(rendered, chat, "{name}: {}", sample.name);
            }
            cases.push(json!({
                "name": format!("{name}: {}", sample.name),
                "template": source, "data": data, "rendered": rendered,
            }));
        }
    }
    let cases = serde_json::to_string_pretty(&cases).unwrap() + "\n";
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    if cases != committed {
        let fresh = std::env::temp_dir().join("go_cases.json");
        std::fs::write(&fresh, &cases).unwrap();
        panic!("{path} is not what the samples render now; the new one is {fresh:?}");
    }
}
