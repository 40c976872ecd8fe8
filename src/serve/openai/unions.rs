//! Fields that take more than one JSON type, and the search for fields that are refused.
//!
//! Written as visitors because serde's untagged enums lose the place of an error and hold the
//! whole value in memory before they look at it.

use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};

use super::validate::MAX_PROMPTS;

/// A string or a list of strings.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::serve) enum StringOrList {
    /// One string.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl StringOrList {
    /// Returns the strings in order.
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl<'de> Deserialize<'de> for StringOrList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringOrListVisitor;
        impl<'de> Visitor<'de> for StringOrListVisitor {
            type Value = StringOrList;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<StringOrList, E> {
                Ok(StringOrList::One(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<StringOrList, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = list.next_element()? {
                    texts.push(text);
                }
                Ok(StringOrList::Many(texts))
            }
        }
        deserializer.deserialize_any(StringOrListVisitor)
    }
}

/// The content of a message.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::serve) enum MessageContent {
    /// Plain text.
    Text(String),
    /// Parts; only those that carry text are served.
    Parts(Vec<ContentPart>),
}

impl MessageContent {
    /// Returns the text; parts are joined by line feeds and empty ones left out, as vLLM does.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => {
                let texts = parts.iter().filter_map(|part| part.text.as_deref());
                let texts: Vec<&str> = texts.filter(|text| !text.is_empty()).collect();
                texts.join("\n")
            }
        }
    }

    /// Returns the content as a list of parts, for templates that want one.
    pub(super) fn parts(&self) -> Value {
        let part = |text: &str| json!({"type": "text", "text": text});
        match self {
            Self::Text(text) => Value::Array(vec![part(text)]),
            Self::Parts(parts) => {
                let texts = parts.iter().filter_map(|entry| entry.text.as_deref());
                texts.map(part).collect()
            }
        }
    }
}

impl<'de> Deserialize<'de> for MessageContent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = MessageContent;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<MessageContent, E> {
                Ok(MessageContent::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MessageContent, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = list.next_element()? {
                    parts.push(part);
                }
                Ok(MessageContent::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// One part of a message's content.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
pub(in crate::serve) struct ContentPart {
    #[schemars(rename = "type")]
    pub(super) kind: String,
    /// What it says, under the key that its type has for it; parts with a null say nothing.
    pub(super) text: Option<String>,
}

impl ContentPart {
    /// Returns whether the part carries text: as a question, an answer, a refusal or a thought of
    /// an earlier turn.
    pub(super) fn is_text(&self) -> bool {
        text_key(&self.kind).is_some()
    }
}

/// Returns the key under which a part of type `kind` carries its text, as in vLLM.
fn text_key(kind: &str) -> Option<&'static str> {
    match kind {
        "text" | "input_text" | "output_text" => Some("text"),
        "refusal" => Some("refusal"),
        "thinking" => Some("thinking"),
        _ => None,
    }
}

impl<'de> Deserialize<'de> for ContentPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PartVisitor;
        impl<'de> Visitor<'de> for PartVisitor {
            type Value = ContentPart;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an object with a type")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ContentPart, E> {
                Ok(ContentPart {
                    kind: "text".to_owned(),
                    text: Some(text.to_owned()),
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ContentPart, A::Error> {
                let (mut kind, mut text) = (None, None::<Option<String>>);
                let (mut refusal, mut thinking) = (None, None);
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "type" => kind = Some(map.next_value::<String>()?),
                        "text" => text = Some(map.next_value()?),
                        "refusal" => refusal = Some(map.next_value()?),
                        "thinking" => thinking = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                // vLLM takes a part without a type for text, if it has one.
                let kind = match (kind, &text) {
                    (Some(kind), _) => kind,
                    (None, Some(Some(_))) => "text".to_owned(),
                    (None, _) => return Err(de::Error::missing_field("type")),
                };
                let Some(key) = text_key(&kind) else {
                    return Ok(ContentPart { kind, text: None });
                };
                let text = match key {
                    "refusal" => refusal,
                    "thinking" => thinking,
                    _ => text,
                };
                let text = text.ok_or_else(|| de::Error::missing_field(key))?;
                Ok(ContentPart { kind, text })
            }
        }
        deserializer.deserialize_any(PartVisitor)
    }
}

/// The prompts of a completion request.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::serve) enum Prompt {
    /// One text.
    Text(String),
    /// One prompt of token ids.
    TokenIds(Vec<i64>),
    /// Several prompts, each a text or token ids.
    Several(Vec<OnePrompt>),
}

/// A text or token ids.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::serve) enum OnePrompt {
    /// Text to encode.
    Text(String),
    /// Ids, taken as they are.
    TokenIds(Vec<i64>),
}

impl Prompt {
    /// Returns the prompts in order.
    pub(super) fn into_prompts(self) -> Vec<OnePrompt> {
        match self {
            Self::Text(text) => vec![OnePrompt::Text(text)],
            Self::TokenIds(ids) => vec![OnePrompt::TokenIds(ids)],
            Self::Several(prompts) => prompts,
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        let (mut token_ids, mut prompts) = (Vec::new(), Vec::new());
        while let Some(element) = list.next_element()? {
            match element {
                PromptElement::TokenId(id) => token_ids.push(id),
                PromptElement::Prompt(prompt) => prompts.push(prompt),
            }
            if !token_ids.is_empty() && !prompts.is_empty() {
                return Err(de::Error::custom(
                    "a list of prompts may not contain bare token ids",
                ));
            }
            if prompts.len() > MAX_PROMPTS {
                let message = format!("a request may have at most {MAX_PROMPTS} prompts");
                return Err(de::Error::custom(message));
            }
        }
        Ok(match token_ids.is_empty() {
            true => Prompt::Several(prompts),
            false => Prompt::TokenIds(token_ids),
        })
    }
}

enum PromptElement {
    TokenId(i64),
    Prompt(OnePrompt),
}

impl<'de> Deserialize<'de> for PromptElement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = PromptElement;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<PromptElement, E> {
                Ok(PromptElement::TokenId(
                    i64::try_from(id).unwrap_or(i64::MAX),
                ))
            }
            fn visit_i64<E: de::Error>(self, id: i64) -> Result<PromptElement, E> {
                Ok(PromptElement::TokenId(id))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptElement, E> {
                Ok(PromptElement::Prompt(OnePrompt::Text(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptElement, A::Error> {
                let mut token_ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    token_ids.push(id);
                }
                Ok(PromptElement::Prompt(OnePrompt::TokenIds(token_ids)))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// Names of the fields of a body that this server does not serve yet.
///
/// They are refused and not skipped: an answer that silently ignores `tools` or
/// `response_format` looks like a failure of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::serve) struct RefusedFields(pub(super) Vec<String>);

/// Fields that are refused whatever they hold, unless it is null.
const REFUSED: [&str; 36] = [
    "tools",
    "functions",
    "audio",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
    "grammar",
    "json_schema",
    "regex",
    "ebnf",
    "lora_request",
    "lora_path",
    "lora",
    "adapter",
    "logits_processors",
    "prompt_embeds",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "documents",
    "images",
    "bad_words",
    "allowed_token_ids",
    "logprob_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
    "thinking_token_budget",
    "repetition_detection",
    "web_search_options",
    "suffix",
];

/// Refused fields that ask for nothing when they are `[]` or `{}`, as some clients send them.
const HARMLESS_IF_EMPTY: [&str; 7] = [
    "bad_words",
    "documents",
    "images",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "vllm_xargs",
];

/// Fields of which some values mean what this server does anyway.
///
/// `length_penalty` and `early_stopping` only count for beam search, which is refused itself.
fn is_harmless(field: &str, value: &Peek) -> Option<bool> {
    let text = |accepted: &str| matches!(value, Peek::Text(text) if text == accepted);
    Some(match field {
        "tool_choice" | "function_call" => text("none"),
        "response_format" => matches!(value, Peek::Object { kind } if kind == "text"),
        "modalities" => matches!(value, Peek::TextList | Peek::Empty),
        "use_beam_search" => matches!(value, Peek::False),
        _ if HARMLESS_IF_EMPTY.contains(&field) => matches!(value, Peek::Empty),
        _ if REFUSED.contains(&field) => false,
        _ => return None,
    })
}

impl<'de> Deserialize<'de> for RefusedFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BodyVisitor;
        impl<'de> Visitor<'de> for BodyVisitor {
            type Value = RefusedFields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RefusedFields, A::Error> {
                let mut refused = Vec::new();
                while let Some(field) = map.next_key::<String>()? {
                    if is_harmless(&field, &Peek::Null).is_none() {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let value = map.next_value()?;
                    if value != Peek::Null && is_harmless(&field, &value) == Some(false) {
                        refused.push(field);
                    }
                }
                Ok(RefusedFields(refused))
            }
        }
        deserializer.deserialize_map(BodyVisitor)
    }
}

/// Just enough of a value to know whether it is harmless.
#[derive(Debug, PartialEq, Eq)]
enum Peek {
    Null,
    False,
    Text(String),
    /// A list or an object without entries.
    Empty,
    /// A list of nothing but `"text"`.
    TextList,
    Object {
        kind: String,
    },
    Other,
}

impl<'de> Deserialize<'de> for Peek {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PeekVisitor;
        impl<'de> Visitor<'de> for PeekVisitor {
            type Value = Peek;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Peek, E> {
                Ok(Peek::Null)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Peek, E> {
                Ok(if value { Peek::Other } else { Peek::False })
            }
            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Peek, E> {
                Ok(Peek::Other)
            }
            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Peek, E> {
                Ok(Peek::Other)
            }
            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Peek, E> {
                Ok(Peek::Other)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Peek, E> {
                Ok(Peek::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Peek, A::Error> {
                let (mut is_empty, mut only_text) = (true, true);
                while let Some(entry) = list.next_element::<Peek>()? {
                    is_empty = false;
                    only_text &= matches!(entry, Peek::Text(text) if text == "text");
                }
                Ok(match (is_empty, only_text) {
                    (true, _) => Peek::Empty,
                    (false, true) => Peek::TextList,
                    (false, false) => Peek::Other,
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Peek, A::Error> {
                let (mut is_empty, mut kind) = (true, String::new());
                while let Some(key) = map.next_key::<String>()? {
                    is_empty = false;
                    match key.as_str() {
                        "type" => kind = map.next_value()?,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(match is_empty {
                    true => Peek::Empty,
                    false => Peek::Object { kind },
                })
            }
        }
        deserializer.deserialize_any(PeekVisitor)
    }
}
