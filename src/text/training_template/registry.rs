//! The templates themselves. Slots, system prompts and stop words are LLaMA-Factory's.

use std::borrow::Cow;

use crate::text::nearest;

use super::tools::ToolFormat;
use super::{Slot, TextError, Thinking, ThoughtHistory, TrainingTemplate};

const CHATML_SYSTEM: &[Slot] = &[Slot::Text("<|im_start|>system\n{{content}}<|im_end|>\n")];
const CHATML_USER: &[Slot] = &[Slot::Text(
    "<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
)];
const CHATML_ASSISTANT: &[Slot] = &[Slot::Text("{{content}}<|im_end|>\n")];
const CHATML_TOOL: &[Slot] = &[Slot::Text(
    "<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
)];
const QWEN_OBSERVATION: &[Slot] = &[Slot::Text(
    "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
)];
const LLAMA3_SYSTEM: &[Slot] = &[Slot::Text(
    "<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",
)];
const LLAMA3_USER: &[Slot] = &[Slot::Text(
    "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>\
     <|start_header_id|>assistant<|end_header_id|>\n\n",
)];
const LLAMA3_OBSERVATION: &[Slot] = &[Slot::Text(
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>\
     <|start_header_id|>assistant<|end_header_id|>\n\n",
)];
const LLAMA3_ASSISTANT: &[Slot] = &[Slot::Text("{{content}}<|eot_id|>")];
const CONTENT: &[Slot] = &[Slot::Text("{{content}}")];
const CONTENT_EOS_LINE: &[Slot] = &[Slot::Text("{{content}}"), Slot::Eos, Slot::Text("\n")];

const QWEN: TrainingTemplate = TrainingTemplate {
    name: "qwen",
    prefix: &[],
    system: CHATML_SYSTEM,
    user: CHATML_USER,
    assistant: CHATML_ASSISTANT,
    observation: QWEN_OBSERVATION,
    function: CHATML_ASSISTANT,
    tool_format: ToolFormat::Qwen,
    default_system: Cow::Borrowed(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    stop_words: &["<|im_end|>"],
    replaces_eos: true,
    efficient_eos: false,
    thinking: None,
    thought_history: ThoughtHistory::Dropped,
};

const CHATML: TrainingTemplate = TrainingTemplate {
    name: "chatml",
    observation: CHATML_TOOL,
    tool_format: ToolFormat::React,
    default_system: Cow::Borrowed(""),
    stop_words: &["<|im_end|>", "<|im_start|>"],
    ..QWEN
};

/// LLaMA-Factory gives an observation without slots of its own those of a question.
const SMOLLM: TrainingTemplate = TrainingTemplate {
    name: "smollm",
    observation: CHATML_USER,
    stop_words: &["<|im_end|>"],
    replaces_eos: false,
    ..CHATML
};

const DEFAULT_USER: &[Slot] = &[
    Slot::Text("Human: {{content}}"),
    Slot::Eos,
    Slot::Text("\nAssistant:"),
];

const DEFAULT: TrainingTemplate = TrainingTemplate {
    name: "default",
    system: &[
        Slot::Text("System: {{content}}"),
        Slot::Eos,
        Slot::Text("\n"),
    ],
    user: DEFAULT_USER,
    assistant: CONTENT_EOS_LINE,
    observation: DEFAULT_USER,
    function: CONTENT_EOS_LINE,
    stop_words: &[],
    replaces_eos: false,
    ..CHATML
};

/// Every template that [`TrainingTemplate::named`] knows.
pub(super) static TEMPLATES: [TrainingTemplate; 10] = [
    QWEN,
    TrainingTemplate {
        name: "qwen@0.9.2",
        tool_format: ToolFormat::Qwen092,
        default_system: Cow::Borrowed("You are a helpful assistant."),
        replaces_eos: false,
        ..QWEN
    },
    TrainingTemplate {
        name: "qwen3",
        default_system: Cow::Borrowed(""),
        thinking: Some(Thinking::Enabled),
        ..QWEN
    },
    TrainingTemplate {
        name: "qwen3_nothink",
        default_system: Cow::Borrowed(""),
        ..QWEN
    },
    TrainingTemplate {
        name: "llama3",
        prefix: &[Slot::Bos],
        system: LLAMA3_SYSTEM,
        user: LLAMA3_USER,
        assistant: LLAMA3_ASSISTANT,
        observation: LLAMA3_OBSERVATION,
        function: LLAMA3_ASSISTANT,
        tool_format: ToolFormat::Llama3,
        default_system: Cow::Borrowed(""),
        stop_words: &["<|eot_id|>", "<|eom_id|>"],
        ..QWEN
    },
    CHATML,
    SMOLLM,
    TrainingTemplate {
        name: "smollm2",
        default_system: Cow::Borrowed(
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        ),
        ..SMOLLM
    },
    DEFAULT,
    TrainingTemplate {
        name: "empty",
        system: CONTENT,
        user: CONTENT,
        assistant: CONTENT,
        observation: CONTENT,
        function: CONTENT,
        ..DEFAULT
    },
];

/// Finds a template by name.
pub(super) fn find(name: &str) -> Result<&'static TrainingTemplate, TextError> {
    let found = TEMPLATES.iter().find(|template| template.name == name);
    found.ok_or_else(|| TextError::UnknownTrainingTemplate {
        name: name.to_owned(),
        nearest: nearest(name, TrainingTemplate::names()).unwrap_or_default(),
        known: TrainingTemplate::names().collect::<Vec<_>>().join(", "),
    })
}
