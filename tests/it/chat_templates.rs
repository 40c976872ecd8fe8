//! Chat templates render what transformers renders: goldens of
//! `scripts/make_chat_template_goldens.py`, compared byte for byte.

use std::path::Path;

use infold::text::{ChatTemplate, NamedToken, RenderInput, TextError, fallback_template};
use serde_json::{Map, Value};

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    template: Option<String>,
    template_name: Option<String>,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    kwargs: Map<String, Value>,
    output: Option<String>,
    raises: Option<String>,
}

fn fixtures() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/chat_templates"
    ))
}

impl Case {
    fn source(&self) -> String {
        if let Some(source) = &self.template {
            return source.clone();
        }
        let name = self
            .template_name
            .as_deref()
            .expect("a case names a template");
        match fallback_template(name) {
            Some(source) => source.to_owned(),
            None => std::fs::read_to_string(fixtures().join(format!("{name}.jinja")))
                .expect("the official template is a fixture"),
        }
    }

    fn render(&self) -> Result<String, TextError> {
        let tokens = [
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("pad_token", "<pad>"),
        ];
        let tokens = tokens.map(|(name, content)| NamedToken {
            name: name.to_owned(),
            content: content.to_owned(),
            id: None,
        });
        ChatTemplate::compile(&self.source(), &tokens)?.render(&RenderInput {
            messages: &self.messages,
            tools: self.tools.as_deref(),
            documents: self.documents.as_deref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: Some(&self.kwargs),
        })
    }
}

#[test]
fn templates_render_what_transformers_renders() {
    let text = std::fs::read_to_string(fixtures().join("goldens.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 40);
    let mut failures = Vec::new();
    for case in &cases {
        let failure = match (case.render(), &case.output) {
            (Ok(got), Some(want)) if got == *want => continue,
            (Ok(got), Some(want)) => format!("got  {got:?}\nwant {want:?}"),
            (Ok(got), None) => format!("got {got:?}\nbut transformers raises {:?}", case.raises),
            (Err(error), Some(want)) => format!("got error {error:?}\nwant {want:?}"),
            (Err(TextError::TemplateRaised { message }), None)
                if case.raises.as_ref() != Some(&message) =>
            {
                format!("raised {message:?}\nwant {:?}", case.raises)
            }
            (Err(error), None) if error.is_user_error() => continue,
            (Err(error), None) => format!("{error:?} is not blamed on the request"),
        };
        failures.push(format!("{}\n{failure}", case.name));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
