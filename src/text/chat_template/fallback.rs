//! Chat templates of this program, for models that come without one.

use std::path::Path;

use crate::text::TextError;

/// Built-in templates: (name, source). They render what the official ones of the models render.
const FALLBACKS: [(&str, &str); 4] = [
    (
        "qwen2.5",
        include_str!("../../../chat_templates/qwen2.5.jinja"),
    ),
    ("qwen3", include_str!("../../../chat_templates/qwen3.jinja")),
    (
        "chatml",
        include_str!("../../../chat_templates/chatml.jinja"),
    ),
    (
        "llama3",
        include_str!("../../../chat_templates/llama3.jinja"),
    ),
];

/// Returns the source of a built-in template.
pub fn fallback_template(name: &str) -> Option<&'static str> {
    let found = FALLBACKS.iter().find(|(known, _)| *known == name)?;
    Some(found.1)
}

/// Returns the names of the built-in templates.
pub fn fallback_template_names() -> impl Iterator<Item = &'static str> {
    FALLBACKS.iter().map(|&(name, _)| name)
}

/// Returns the name of the template for a model without one, by `model_type` (`qwen2`) or
/// architecture (`Qwen2ForCausalLM`).
///
/// A Llama model may be of any family, so its vocabulary decides: see `has_token`.
pub fn fallback_template_for_architecture(
    architecture: &str,
    has_token: &dyn Fn(&str) -> bool,
) -> Option<&'static str> {
    match architecture {
        "qwen2" | "Qwen2ForCausalLM" => Some("qwen2.5"),
        "qwen3" | "Qwen3ForCausalLM" => Some("qwen3"),
        _ if has_token("<|start_header_id|>") => Some("llama3"),
        _ if has_token("<|im_start|>") => Some("chatml"),
        _ => None,
    }
}

/// Returns the source that `--chat-template` names: a built-in name, a file, or the template itself.
///
/// # Errors
/// None of the three, or a file that can not be read.
pub fn resolve_chat_template(argument: &str) -> Result<String, TextError> {
    if let Some(source) = fallback_template(argument) {
        return Ok(source.to_owned());
    }
    let path = Path::new(argument);
    match std::fs::read_to_string(path) {
        Ok(source) => Ok(source),
        // As in vLLM, only what looks like Jinja is taken for a template written out.
        Err(_) if argument.contains(['{', '}', '\n']) => Ok(argument.to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(TextError::UnknownTemplate {
                name: argument.to_owned(),
                known: fallback_template_names().collect::<Vec<_>>().join(", "),
            })
        }
        Err(source) => Err(TextError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_is_a_name_a_file_or_a_template() {
        assert_eq!(
            resolve_chat_template("chatml").unwrap(),
            fallback_template("chatml").unwrap()
        );
        assert_eq!(resolve_chat_template("{{ x }}").unwrap(), "{{ x }}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.jinja");
        std::fs::write(&path, "mine").unwrap();
        assert_eq!(
            resolve_chat_template(path.to_str().unwrap()).unwrap(),
            "mine"
        );
        let error = resolve_chat_template("quen3").unwrap_err();
        assert_eq!(
            error.to_string(),
            "no chat template \"quen3\": not a file, and the built-in ones are \
             qwen2.5, qwen3, chatml, llama3"
        );
        assert!(matches!(
            resolve_chat_template(dir.path().to_str().unwrap()),
            Err(TextError::Read { .. })
        ));
    }

    #[test]
    fn architecture_or_vocabulary_decides() {
        let choose = fallback_template_for_architecture;
        assert_eq!(choose("Qwen2ForCausalLM", &|_| false), Some("qwen2.5"));
        assert_eq!(choose("qwen3", &|_| false), Some("qwen3"));
        assert_eq!(
            choose("llama", &|token| token == "<|im_start|>"),
            Some("chatml")
        );
        assert_eq!(
            choose("llama", &|token| token == "<|start_header_id|>"),
            Some("llama3")
        );
        assert_eq!(choose("llama", &|_| false), None);
    }
}
