//! The OpenAI endpoints: JSON in, engine requests, token events, JSON or server-sent events out.
//!
//! One request walks through the files in this order: `types` and `unions` (wire form),
//! `validate` (every value checked once), `convert` (text to token ids to engine requests),
//! `choice` (token events to text, one a choice), `chat` and `completions` (answers), `stream`
//! (server-sent events).

mod chat;
mod choice;
mod completions;
mod convert;
mod lax;
mod logprobs;
mod responses;
mod stream;
mod template;
mod types;
mod unions;
mod usage;
mod validate;

pub(super) use chat::chat_completions;
pub(super) use completions::completions;
pub(super) use convert::{check_model, check_token_ids, encode};
pub(super) use responses::{ChatCompletion, Completion};
pub(super) use template::render_chat;
pub(super) use types::{
    ChatFields, CompletionFields, DetokenizeRequest, SamplingFields, TemplateFields,
    TokenizeRequest,
};
pub(super) use unions::RefusedFields;
pub(super) use validate::check_refused;
