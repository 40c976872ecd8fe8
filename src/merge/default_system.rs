//! `--default-system`: one system prompt for training template, chat template and Modelfile.

use serde_json::{Value, json};

use crate::text::{ChatTemplate, NamedToken, RenderInput, TextError, TrainingTemplate};

/// Stands for a question when a template is asked what it does.
const QUESTION: &str = "INFOLD QUESTION";
/// Stands for a system prompt.
const SYSTEM: &str = "INFOLD SYSTEM";

/// Errors of giving a model another default system prompt.
#[derive(Debug, thiserror::Error)]
pub enum DefaultSystemError {
    /// A chat template that neither holds its default as a text nor takes a system message.
    #[error(
        "the chat template cannot be given the default system prompt {default_system:?}: with it \
         a conversation without a system message renders {rendered:?}, wanted {wanted:?}; edit \
         chat_template.jinja by hand"
    )]
    Rewrite {
        /// The prompt asked for.
        default_system: String,
        /// What the rewritten template makes of a question.
        rendered: String,
        /// What the template makes of the question under that system prompt.
        wanted: String,
    },
    /// No prompt can not be made the default.
    #[error(
        "an empty default system prompt cannot be written into a chat template; leave \
         --default-system out to keep the template's own"
    )]
    Empty,
    /// The chat template does not compile or does not render.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// A template and a chat template that agree on the default system prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultSystem {
    /// For the Modelfile and the record in the output.
    pub template: TrainingTemplate,
    /// Source of the chat template to export.
    pub chat_template: String,
}

/// Gives a training template and a chat template the same default system prompt.
///
/// Where the chat template holds its default as a text, the text is replaced; else a line is put
/// before it that adds a system message to conversations without one. Either is accepted only if
/// conversations with and without a system message then render as they should.
///
/// # Errors
/// [`DefaultSystemError::Rewrite`] when neither way does.
pub fn set_default_system(
    template: &TrainingTemplate,
    chat_template: &str,
    special_tokens: &[NamedToken],
    default_system: &str,
) -> Result<DefaultSystem, DefaultSystemError> {
    if default_system.is_empty() {
        return Err(DefaultSystemError::Empty);
    }
    let old = ChatTemplate::compile(chat_template, special_tokens)?;
    let wanted = render(&old, Some(default_system))?;
    let replaced = literal_default(&old)?
        .map(|literal| chat_template.replace(&literal, &jinja_text(default_system)));
    let mut rendered = String::new();
    for source in replaced
        .into_iter()
        .chain([wrapped(chat_template, default_system)])
    {
        let new = ChatTemplate::compile(&source, special_tokens);
        let Ok(new) = new else { continue };
        rendered = render(&new, None).unwrap_or_default();
        let keeps_given = render(&new, Some(SYSTEM)).ok() == Some(render(&old, Some(SYSTEM))?);
        if rendered == wanted && keeps_given {
            return Ok(DefaultSystem {
                template: template.with_default_system(default_system),
                chat_template: source,
            });
        }
    }
    Err(DefaultSystemError::Rewrite {
        default_system: default_system.to_owned(),
        rendered,
        wanted,
    })
}

/// Returns the system prompt that a chat template gives a conversation without one, if any.
///
/// # Errors
/// The template does not render a question.
pub fn default_system_of(chat_template: &ChatTemplate) -> Result<Option<String>, TextError> {
    let without = render(chat_template, None)?;
    let Ok(with) = render(chat_template, Some(SYSTEM)) else {
        return Ok(None);
    };
    let Some((before, after)) = with.split_once(SYSTEM) else {
        return Ok(None);
    };
    let inner = without.strip_prefix(before);
    let inner = inner.and_then(|rest| rest.strip_suffix(after));
    Ok(inner.filter(|text| !text.is_empty()).map(str::to_owned))
}

/// Returns the default system prompt as it stands in the template's source, if it does.
fn literal_default(chat_template: &ChatTemplate) -> Result<Option<String>, TextError> {
    let default = default_system_of(chat_template)?;
    let spellings = default.map(|text| [jinja_text(&text), text]);
    let found = spellings.into_iter().flatten();
    Ok(found
        .into_iter()
        .find(|text| chat_template.source().contains(text)))
}

/// Puts a line before a chat template that adds the system message where there is none.
fn wrapped(chat_template: &str, default_system: &str) -> String {
    format!(
        "{{%- if messages[0]['role'] != 'system' -%}}{{%- set messages = [{{'role': 'system', \
         'content': '{}'}}] + messages -%}}{{%- endif %}}{chat_template}",
        jinja_text(default_system)
    )
}

/// Writes a text as it stands in a Jinja string of either kind of quotes.
fn jinja_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\'' => out.push_str("\\'"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            _ => out.push(character),
        }
    }
    out
}

fn render(template: &ChatTemplate, system: Option<&str>) -> Result<String, TextError> {
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(system.map(|text| json!({"role": "system", "content": text})));
    messages.push(json!({"role": "user", "content": QUESTION}));
    template.render(&RenderInput {
        messages: &messages,
        add_generation_prompt: true,
        ..RenderInput::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fallback_template;

    const HARD: &str = "It's \"quoted\" \\ {{ x }} {% if %}\nTwo lines. 你好";

    fn set(source: &str, text: &str) -> DefaultSystem {
        let template = TrainingTemplate::named("qwen").unwrap();
        set_default_system(template, source, &[], text).unwrap()
    }

    #[test]
    fn default_that_stands_in_the_template_is_replaced() {
        let source = fallback_template("qwen2.5").unwrap();
        let new = set(source, HARD);
        assert_eq!(new.template.default_system(), HARD);
        assert!(!new.chat_template.contains("Alibaba"));
        assert!(!new.chat_template.contains("set messages"));
        let compiled = ChatTemplate::compile(&new.chat_template, &[]).unwrap();
        assert_eq!(default_system_of(&compiled).unwrap().unwrap(), HARD);
    }

    #[test]
    fn template_without_a_default_is_given_one() {
        for name in ["chatml", "qwen3"] {
            let source = fallback_template(name).unwrap();
            let compiled = ChatTemplate::compile(source, &[]).unwrap();
            assert_eq!(default_system_of(&compiled).unwrap(), None);
            let new = set(source, HARD);
            assert!(new.chat_template.ends_with(source));
            let compiled = ChatTemplate::compile(&new.chat_template, &[]).unwrap();
            assert_eq!(
                default_system_of(&compiled).unwrap().unwrap(),
                HARD,
                "{name}"
            );
        }
    }

    #[test]
    fn default_inside_plain_text_is_replaced_or_overruled() {
        let source = "{% if messages[0]['role'] != 'system' %}<s>Be kind.</s>{% endif %}\
                      {% for m in messages %}{% if m.role == 'system' %}<s>{{ m.content }}</s>\
                      {% else %}{{ m.content }}{% endif %}{% endfor %}";
        let new = set(source, "Be brief.");
        assert_eq!(new.chat_template, source.replace("Be kind.", "Be brief."));
        let compiled = ChatTemplate::compile(&set(source, HARD).chat_template, &[]).unwrap();
        assert_eq!(default_system_of(&compiled).unwrap().unwrap(), HARD);
    }

    #[test]
    fn template_that_takes_no_system_message_is_refused() {
        let source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}\
                      {% endfor %}";
        let template = TrainingTemplate::named("qwen").unwrap();
        let new = set_default_system(template, source, &[], "Be brief.");
        // It renders the same with and without, so there is nothing that could be wrong.
        assert!(new.unwrap().chat_template.ends_with(source));
        let raising =
            "{% if messages | length > 1 %}{{ raise_exception('no system') }}{% endif %}x";
        let error = set_default_system(template, raising, &[], "Be brief.").unwrap_err();
        assert_eq!(error.to_string(), "no system");
    }
}
