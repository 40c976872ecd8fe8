//! The whole HTTP side against a scripted engine: no socket, model or file.
//!
//! The tokenizer has one token a byte, so transcripts can be read letter by letter.

mod bad_input;
mod chat;
mod completions;
mod connections;
mod fuzz;
mod lenient;
mod operations;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use clap::Parser;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::engine::{
    EngineInfo, FinishReason, GenerateRequest, TokenEvent, TokenLogprobs, mock_engine,
};
use crate::text::{GgufVocabulary, SkipSpecialTokens, Tokenizer};

use super::args::ServeArgs;
use super::load::LoadedModel;
use super::router;
use super::state::AppState;

/// First id after the 256 bytes.
const IM_START: u32 = 256;
const IM_END: u32 = 257;
const VOCAB_SIZE: usize = 260;
const MAX_MODEL_LEN: usize = 512;

const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// GPT-2's printable stand-in for a byte.
fn byte_token(byte: u8) -> String {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = match printable(byte) {
        true => u32::from(byte),
        false => 256 + (0..byte).filter(|&before| !printable(before)).count() as u32,
    };
    char::from_u32(code).unwrap().to_string()
}

/// Returns a tokenizer whose ids below 256 are bytes.
fn tokenizer(chat_template: Option<&str>) -> Tokenizer {
    let mut tokens: Vec<String> = (0..=255).map(byte_token).collect();
    let specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|unused|>"];
    tokens.extend(specials.map(str::to_owned));
    let token_types = (0..tokens.len())
        .map(|id| if id < 256 { 1 } else { 3 })
        .collect();
    Tokenizer::from_vocabulary(GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: None,
        token_types,
        merges: Vec::new(),
        scores: Vec::new(),
        bos: None,
        eos: Some(IM_END),
        unknown: None,
        padding: None,
        eot: None,
        add_bos: None,
        add_eos: None,
        add_space_prefix: None,
        chat_template: chat_template.map(str::to_owned),
        named_chat_templates: Vec::new(),
        tokens,
    })
    .unwrap()
}

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    serve: ServeArgs,
}

fn parse_args(flags: &str) -> ServeArgs {
    let line = format!("infold --served-model-name tiny --disable-access-log {flags}");
    let mut arguments: Vec<&str> = line.split_whitespace().collect();
    arguments.insert(1, "models/tiny");
    CommandLine::parse_from(arguments).serve
}

/// A server whose engine follows a script.
struct TestServer {
    router: Router,
    state: Arc<AppState>,
    /// What reached the engine.
    requests: Arc<Mutex<Vec<GenerateRequest>>>,
}

/// A response that was read to its end.
struct Reply {
    status: u16,
    headers: axum::http::HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    /// Returns the body with the time of creation taken out.
    fn redacted(&self) -> String {
        let mut parts = self.text.split("\"created\":");
        let mut text = parts.next().unwrap().to_owned();
        for part in parts {
            text.push_str("\"created\":0");
            text.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
        }
        text
    }

    /// Returns `status type param: message` of an error.
    fn error(&self) -> String {
        let error = &self.json()["error"];
        let text = |key: &str| error[key].as_str().unwrap_or("-").to_owned();
        assert_eq!(error["code"], json!(self.status));
        format!(
            "{} {} {}: {}",
            self.status,
            text("type"),
            text("param"),
            text("message")
        )
    }
}

impl TestServer {
    /// Starts a server whose engine answers every request with `text`.
    fn answering(text: &'static str) -> Self {
        Self::with_flags("", move |request| answer(request, text))
    }

    fn with_flags(
        flags: &str,
        script: impl FnMut(&GenerateRequest) -> Vec<TokenEvent> + Send + 'static,
    ) -> Self {
        Self::with_model(flags, Some(TEMPLATE), json!({}), script)
    }

    fn with_model(
        flags: &str,
        chat_template: Option<&str>,
        generation_config: Value,
        mut script: impl FnMut(&GenerateRequest) -> Vec<TokenEvent> + Send + 'static,
    ) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let args = parse_args(flags);
        let info = EngineInfo {
            max_model_len: MAX_MODEL_LEN,
            vocab_size: VOCAB_SIZE,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            block_size: 16,
            max_num_waiting: args.engine.max_queued_requests,
            num_replicas: args.engine.data_parallel_size,
        };
        let engine = mock_engine(info, move |request| {
            seen.lock().unwrap().push(request.clone());
            script(request)
        });
        let loaded = LoadedModel {
            engine,
            tokenizer: tokenizer(chat_template),
            config: json!({"model_type": "llama", "eos_token_id": IM_END}),
            generation_config: Some(generation_config),
            root: "models/tiny".to_owned(),
        };
        let api_keys = args.listen.api_key.clone();
        let cors = router::cors(&args.listen).unwrap();
        let state = Arc::new(AppState::new(&args, loaded, api_keys).unwrap());
        let router = router::router(Arc::clone(&state), cors);
        Self {
            router,
            state,
            requests,
        }
    }

    async fn call(&self, request: Request<Body>) -> Reply {
        let response = self.start(request).await;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        Reply {
            status,
            headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    /// Returns a response whose body has not been read.
    async fn start(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn get(&self, path: &str) -> Reply {
        self.call(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        self.post_text(path, body.to_string()).await
    }

    async fn post_text(&self, path: &str, body: impl Into<Body>) -> Reply {
        self.call(post_request(path, body)).await
    }

    /// Chats with one user message and these further fields.
    async fn chat(&self, fields: Value) -> Reply {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        self.post("/v1/chat/completions", body).await
    }

    /// Continues the prompt `ab` with these further fields.
    async fn complete(&self, fields: Value) -> Reply {
        let mut body = json!({"prompt": "ab"});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        self.post("/v1/completions", body).await
    }

    fn last_request(&self) -> GenerateRequest {
        self.requests.lock().unwrap().last().unwrap().clone()
    }
}

/// Builds a JSON request with a fixed id.
fn post_request(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .header("x-request-id", "test")
        .body(body.into())
        .unwrap()
}

/// Made-up logprobs: the token itself, then `b` and `a`.
fn logprobs_of(token_id: u32, num_top: usize) -> TokenLogprobs {
    let mut top = vec![(token_id, -0.25), (98, -1.5), (97, f32::NEG_INFINITY)];
    top.truncate(num_top);
    TokenLogprobs {
        token_id,
        logprob: -0.25,
        rank: 1,
        top,
    }
}

/// Scripts an answer of one token a byte that ends like a model does: by its end-of-sequence
/// token, by a stop token or at the limit.
fn answer(request: &GenerateRequest, text: &str) -> Vec<TokenEvent> {
    let params = &request.sampling_params;
    let prompt = request.prompt_token_ids.iter().enumerate();
    let of_prompt = |num_top| {
        prompt
            .map(|(index, &id)| (index > 0).then(|| logprobs_of(id, num_top)))
            .collect()
    };
    let mut events = vec![TokenEvent::Prompt {
        num_cached_tokens: 2,
        queue_time: Duration::ZERO,
        logprobs: params.prompt_logprobs.map(of_prompt),
        finish: (params.max_tokens == 0).then_some(FinishReason::Length),
    }];
    let tokens = text.bytes().map(u32::from).chain([IM_END]);
    for (index, token_id) in tokens.take(params.max_tokens).enumerate() {
        let finish = if token_id == IM_END && !params.ignore_eos {
            Some(FinishReason::EndOfSequence)
        } else if params.stop_token_ids.contains(&token_id) {
            Some(FinishReason::StopToken(token_id))
        } else {
            (index + 1 == params.max_tokens).then_some(FinishReason::Length)
        };
        let logprobs = params
            .logprobs
            .map(|num_top| logprobs_of(token_id, num_top));
        events.push(TokenEvent::Token {
            token_id,
            logprobs,
            finish,
        });
        if finish.is_some() {
            break;
        }
    }
    events
}
