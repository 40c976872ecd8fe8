//! The `TEMPLATE` of a Modelfile: Go's `text/template` over Ollama's variables.
//!
//! The templates with tools render what the models' own chat templates render, parallel calls and
//! consecutive results of tools included; an answer that ends the conversation is left open, for
//! Ollama lets the model go on with it. The others are put together from the training template's
//! slots, in LLaMA-Factory's layout.

use crate::text::{Slot, TemplatePart, Tokenizer, TrainingTemplate};

/// Whether results of tools are rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolTurns {
    /// As any other turn.
    Rendered,
    /// They are left out, as LLaMA-Factory leaves them out.
    Left,
}

/// Returns the best template for a model trained with this one.
pub fn ollama_template(template: &TrainingTemplate, tokenizer: &Tokenizer) -> String {
    let known = match template.name() {
        "qwen" | "qwen@0.9.2" => include_str!("qwen.gotmpl"),
        "qwen3" | "qwen3_nothink" => include_str!("qwen3.gotmpl"),
        "llama3" => include_str!("llama3.gotmpl"),
        _ => return slot_template(template, tokenizer, ToolTurns::Rendered),
    };
    // The end of the file's last line is the file's, not the template's.
    known.strip_suffix('\n').unwrap_or(known).to_owned()
}

/// Puts a template together from the slots of a training template.
pub(super) fn slot_template(
    template: &TrainingTemplate,
    tokenizer: &Tokenizer,
    tool_turns: ToolTurns,
) -> String {
    let slots = |part, variable: &str| go_text(template, tokenizer, part, variable);
    let tool = match tool_turns {
        ToolTurns::Rendered => format!(
            "{{{{ else if eq .Role \"tool\" }}}}{}",
            slots(TemplatePart::Observation, ".Content")
        ),
        ToolTurns::Left => String::new(),
    };
    format!(
        "{}{{{{ if .System }}}}{}{{{{ end }}}}{{{{ range .Messages }}}}\
         {{{{ if eq .Role \"user\" }}}}{}{{{{ else if eq .Role \"assistant\" }}}}{}{tool}\
         {{{{ end }}}}{{{{ end }}}}",
        slots(TemplatePart::Prefix, ""),
        slots(TemplatePart::System, ".System"),
        slots(TemplatePart::User, ".Content"),
        slots(TemplatePart::Assistant, ".Content"),
    )
}

/// Writes slots with a variable in the place of the content.
fn go_text(
    template: &TrainingTemplate,
    tokenizer: &Tokenizer,
    part: TemplatePart,
    variable: &str,
) -> String {
    let mut text = String::new();
    for slot in template.slots(part) {
        match slot {
            Slot::Text(slot) => {
                let variable = format!("{{{{ {variable} }}}}");
                text.push_str(&slot.replacen("{{content}}", &variable, 1));
            }
            Slot::Bos => {
                if let Some(token) = tokenizer.bos_token() {
                    text.push_str(&token.content);
                }
            }
            Slot::Eos => text.push_str(&template.eos_token(tokenizer)),
        }
    }
    text
}
