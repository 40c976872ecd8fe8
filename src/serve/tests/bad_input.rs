//! Input that is refused: each case with its status, type, param and text.

use serde_json::json;

use super::*;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn chat_error(fields: Value) -> String {
    TestServer::answering("Yo").chat(fields).await.error()
}

async fn completion_error(fields: Value) -> String {
    TestServer::answering("Yo").complete(fields).await.error()
}

async fn text_error(body: impl Into<Body>) -> String {
    TestServer::answering("Yo")
        .post_text(CHAT, body)
        .await
        .error()
}

#[tokio::test]
async fn malformed_json() {
    insta::assert_snapshot!(text_error("{\"messages\": [").await, @r"
    400 Bad Request body: 1 validation error:
      {'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: EOF while parsing a list at line 1 column 14'}
    ");
    insta::assert_snapshot!(text_error("").await, @r"
    400 Bad Request body: 1 validation error:
      {'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: EOF while parsing a value at line 1 column 0'}
    ");
    insta::assert_snapshot!(text_error("{} {}").await, @r"
    400 Bad Request body: 1 validation error:
      {'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: trailing characters at line 1 column 4'}
    ");
    insta::assert_snapshot!(text_error("[]").await, @r"
    400 Bad Request body: 1 validation error:
      {'type': 'type_error', 'loc': ('body',), 'msg': 'expected a JSON object'}
    ");
}

#[tokio::test]
async fn numbers_that_json_does_not_have() {
    for number in ["NaN", "Infinity", "1e999"] {
        let body = format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"temperature\":{number}}}"
        );
        assert!(
            text_error(body).await.starts_with("400 Bad Request"),
            "{number}"
        );
    }
    let message = chat_error(json!({"repetition_penalty": 1e300})).await;
    assert!(message.contains("repetition_penalty"), "{message}");
}

#[tokio::test]
async fn text_that_is_not_utf8() {
    let body: &[u8] = b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\"}]}";
    assert!(text_error(body).await.starts_with("400 Bad Request body"));
}

#[tokio::test]
async fn deep_nesting() {
    let deep = "[".repeat(100_000);
    for body in [
        deep.clone(),
        format!("{{\"chat_template_kwargs\": {deep}"),
        format!("{{\"unknown\": {deep}"),
    ] {
        assert!(text_error(body).await.starts_with("400 Bad Request"));
    }
    let kwargs = format!(
        "{{\"messages\": [{{\"role\":\"user\"}}], \"chat_template_kwargs\": {{\"x\": {deep}{}}}}}",
        "]".repeat(100_000)
    );
    assert!(
        text_error(kwargs)
            .await
            .contains("recursion limit exceeded")
    );
}

#[tokio::test]
async fn wrong_types_name_the_field_and_both_types() {
    insta::assert_snapshot!(chat_error(json!({"temperature": "hot"})).await, @r#"
    400 Bad Request body.temperature: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'temperature'), 'msg': 'invalid type: string "hot", expected a number at line 1 column 64'}
    "#);
    insta::assert_snapshot!(chat_error(json!({"stop": [1]})).await, @r"
    400 Bad Request body.stop.0: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'stop', 0), 'msg': 'invalid type: integer `1`, expected a string at line 1 column 54'}
    ");
    insta::assert_snapshot!(chat_error(json!({"messages": "Hi"})).await, @r#"
    400 Bad Request body.messages: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'messages'), 'msg': 'invalid type: string "Hi", expected a list at line 1 column 16'}
    "#);
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": 5}]})).await, @r"
    400 Bad Request body.messages.0.content: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'messages', 0, 'content'), 'msg': 'invalid type: integer `5`, expected a string or a list of content parts at line 1 column 39'}
    ");
    insta::assert_snapshot!(chat_error(json!({"messages": [{"content": "x"}]})).await, @r"
    400 Bad Request body.messages.0.role: 1 validation error:
      {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), 'msg': 'Field required'}
    ");
    insta::assert_snapshot!(chat_error(json!({"seed": u64::MAX})).await, @"
    400 Bad Request body.seed: 1 validation error:
      {'type': 'less_than_equal', 'loc': ('body', 'seed'), 'msg': 'Input should be less than or equal to 9223372036854775807'}
    ");
    insta::assert_snapshot!(chat_error(json!({"seed": -1e19})).await, @"
    400 Bad Request body.seed: 1 validation error:
      {'type': 'greater_than_equal', 'loc': ('body', 'seed'), 'msg': 'Input should be greater than or equal to -9223372036854775808'}
    ");
    insta::assert_snapshot!(completion_error(json!({"prompt": {"a": 1}})).await, @r"
    400 Bad Request body.prompt: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'prompt'), 'msg': 'invalid type: object, expected a string, a list of strings, a list of token ids or a list of such lists at line 1 column 11'}
    ");
    insta::assert_snapshot!(completion_error(json!({"prompt": [1, "a"]})).await, @r"
    400 Bad Request body.prompt: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'prompt'), 'msg': 'a list of prompts may not contain bare token ids at line 1 column 17'}
    ");
}

#[tokio::test]
async fn long_values_are_not_repeated_in_full() {
    let message = chat_error(json!({"temperature": "x".repeat(1_000_000)})).await;
    assert!(message.len() < 1000, "{}", message.len());
    assert!(message.contains("expected a number"));
}

#[tokio::test]
async fn missing_fields() {
    insta::assert_snapshot!(text_error("{}").await, @r"
    400 Bad Request body.messages: 1 validation error:
      {'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'}
    ");
    let server = TestServer::answering("Yo");
    insta::assert_snapshot!(server.post(COMPLETIONS, json!({})).await.error(), @"400 BadRequestError prompt: Either prompt or prompt_embeds must be provided and non-empty.");
    insta::assert_snapshot!(server.post("/tokenize", json!({})).await.error(), @r"
    400 Bad Request body.prompt: 1 validation error:
      {'type': 'missing', 'loc': ('body', 'prompt'), 'msg': 'Field required'}
    ");
    insta::assert_snapshot!(server.post("/detokenize", json!({})).await.error(), @r"
    400 Bad Request body.tokens: 1 validation error:
      {'type': 'missing', 'loc': ('body', 'tokens'), 'msg': 'Field required'}
    ");
}

#[tokio::test]
async fn empty_messages_and_prompts() {
    insta::assert_snapshot!(chat_error(json!({"messages": []})).await, @"400 BadRequestError messages: messages must not be empty.");
    insta::assert_snapshot!(completion_error(json!({"prompt": ""})).await, @"400 BadRequestError prompt: The decoder prompt cannot be empty");
    insta::assert_snapshot!(completion_error(json!({"prompt": []})).await, @"400 BadRequestError prompt: Either prompt or prompt_embeds must be provided and non-empty.");
    insta::assert_snapshot!(completion_error(json!({"prompt": [[]]})).await, @"400 BadRequestError prompt: The decoder prompt cannot be empty");
}

#[tokio::test]
async fn another_content_type() {
    let server = TestServer::answering("Yo");
    for content_type in [None, Some("text/plain"), Some("application/jsonl")] {
        let mut request = Request::post(CHAT);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let reply = server.call(request.body(Body::from("{}")).unwrap()).await;
        insta::allow_duplicates! {
            insta::assert_snapshot!(reply.error(), @"400 Bad Request -: Unsupported Media Type: Only 'application/json' is allowed");
        }
    }
    let request = Request::post(CHAT).header("content-type", "Application/JSON; charset=utf-8");
    let reply = server.call(request.body(Body::from("{}")).unwrap()).await;
    assert!(reply.text.contains("messages"));
}

#[tokio::test]
async fn a_body_above_the_limit() {
    let server = TestServer::with_flags("--max-body-size 1KiB", |request| answer(request, "Yo"));
    let reply = server.post_text(CHAT, "x".repeat(100_000_000)).await;
    insta::assert_snapshot!(reply.error(), @"413 BadRequestError -: The request body is larger than 1024 bytes, the limit of this server.");
    let mut request = post_request(CHAT, Body::empty());
    request
        .headers_mut()
        .insert("expect", "100-continue".parse().unwrap());
    request
        .headers_mut()
        .insert("content-length", "100000000".parse().unwrap());
    assert_eq!(server.call(request).await.status, 413);
}

#[tokio::test]
async fn an_unknown_model() {
    insta::assert_snapshot!(chat_error(json!({"model": "gpt"})).await, @"404 NotFoundError model: The model `gpt` does not exist.");
    insta::assert_snapshot!(completion_error(json!({"model": "gpt"})).await, @"404 NotFoundError model: The model `gpt` does not exist.");
    let server = TestServer::answering("Yo");
    assert_eq!(
        server.get("/v1/models/a/b").await.error(),
        "404 NotFoundError model: The model `a/b` does not exist."
    );
    for model in ["", "tiny"] {
        assert_eq!(server.chat(json!({"model": model})).await.status, 200);
    }
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods() {
    let server = TestServer::answering("Yo");
    insta::assert_snapshot!(server.get("/v1/nothing").await.error(), @"404 Not Found -: Not Found");
    insta::assert_snapshot!(server.get(CHAT).await.error(), @"405 Method Not Allowed -: Method Not Allowed");
}

#[tokio::test]
async fn a_prompt_that_leaves_no_room() {
    insta::assert_snapshot!(completion_error(json!({"prompt": "x".repeat(MAX_MODEL_LEN)})).await, @"400 BadRequestError input_tokens: This model's maximum context length is 512 tokens. However, you requested 16 output tokens and your prompt contains 512 input tokens, for a total of 528 tokens. Please reduce the length of the input prompt or the number of requested output tokens.");
    insta::assert_snapshot!(completion_error(json!({"max_tokens": 1000})).await, @"400 BadRequestError input_tokens: This model's maximum context length is 512 tokens. However, you requested 1000 output tokens and your prompt contains 2 input tokens, for a total of 1002 tokens. Please reduce the length of the input prompt or the number of requested output tokens.");
    let content = "x".repeat(2 * MAX_MODEL_LEN);
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": content}]})).await, @"400 BadRequestError input_tokens: This model's maximum context length is 512 tokens. However, you requested 1 output tokens and your prompt contains 1043 input tokens, for a total of 1044 tokens. Please reduce the length of the input prompt or the number of requested output tokens.");
}

#[tokio::test]
async fn sampling_values_out_of_range() {
    let mut errors = Vec::new();
    for fields in [
        json!({"temperature": 3}),
        json!({"temperature": -0.1}),
        json!({"top_p": 0}),
        json!({"top_p": 1e-60}),
        json!({"top_k": -2}),
        json!({"min_p": 1.5}),
        json!({"typical_p": 0}),
        json!({"presence_penalty": 2.5}),
        json!({"frequency_penalty": -3}),
        json!({"repetition_penalty": 0}),
        json!({"max_tokens": 0}),
        json!({"max_tokens": -1}),
        json!({"max_completion_tokens": 0}),
        json!({"min_tokens": -1}),
        json!({"min_tokens": 5, "max_tokens": 4}),
        json!({"n": 0}),
        json!({"n": 20000}),
        json!({"n": 2, "temperature": 0}),
        json!({"n": 2, "best_of": 1}),
        json!({"n": 1, "best_of": 2, "stream": true}),
        json!({"truncate_prompt_tokens": 0}),
        json!({"logprobs": true, "top_logprobs": 21}),
        json!({"logprobs": true, "top_logprobs": -2}),
        json!({"top_logprobs": 2}),
        json!({"prompt_logprobs": -2}),
        json!({"prompt_logprobs": 1, "stream": true}),
        json!({"stream_options": {}}),
        json!({"logit_bias": {"x": 1}}),
        json!({"logit_bias": {"260": 1}}),
        json!({"stop_token_ids": [-1]}),
        json!({"stop": [""]}),
        json!({"chat_template": "x"}),
        json!({"continue_final_message": true}),
    ] {
        errors.push(chat_error(fields).await);
    }
    insta::assert_snapshot!(errors.join("\n"), @r"
    400 BadRequestError temperature: temperature must be in [0, 2], got 3.0.
    400 BadRequestError temperature: temperature must be in [0, 2], got -0.1.
    400 BadRequestError top_p: top_p must be in (0, 1], got 0.0.
    400 BadRequestError top_p: top_p must be in (0, 1], got 1.0000000000000001e-60.
    400 BadRequestError top_k: top_k must be 0 (disable), or at least 1, got -2.
    400 BadRequestError min_p: min_p must be in [0, 1], got 1.5.
    400 BadRequestError typical_p: typical_p must be in (0, 1], got 0.0.
    400 BadRequestError presence_penalty: presence_penalty must be in [-2, 2], got 2.5.
    400 BadRequestError frequency_penalty: frequency_penalty must be in [-2, 2], got -3.0.
    400 BadRequestError repetition_penalty: repetition_penalty must be greater than zero, got 0.0.
    400 BadRequestError max_tokens: max_tokens must be at least 1, got 0.
    400 BadRequestError max_tokens: max_tokens must be at least 1, got -1.
    400 BadRequestError max_completion_tokens: max_completion_tokens must be at least 1, got 0.
    400 BadRequestError min_tokens: min_tokens must be greater than or equal to 0, got -1.
    400 BadRequestError min_tokens: min_tokens must be less than or equal to max_tokens=4, got 5.
    400 BadRequestError n: n must be at least 1, got 0.
    400 BadRequestError n: n must be at most 16384, got 20000.
    400 BadRequestError n: n must be 1 when using greedy sampling, got 2.
    400 BadRequestError best_of: best_of must be in [n, 16384] with n=2, got 1.
    400 BadRequestError best_of: best_of above n is not available when `stream=True`.
    400 BadRequestError truncate_prompt_tokens: truncate_prompt_tokens must be -1 or in [1, 512], got 0.
    400 BadRequestError logprobs: Requested sample logprobs of 21, which is greater than max allowed: 20
    400 BadRequestError top_logprobs: top_logprobs must be a positive value or -1, got -2.
    400 BadRequestError top_logprobs: when using `top_logprobs`, `logprobs` must be set to true.
    400 BadRequestError prompt_logprobs: prompt_logprobs must be non-negative or -1, got -2.
    400 BadRequestError prompt_logprobs: `prompt_logprobs` are not available when `stream=True`.
    400 BadRequestError stream_options: Stream options can only be defined when `stream=True`.
    400 BadRequestError logit_bias: logit_bias keys must be token ids, got `x`.
    400 BadRequestError logit_bias: token_id(s) [260] in logit_bias contain out-of-vocab token ids. Vocabulary size: 260
    400 BadRequestError stop_token_ids: token_id -1 in stop_token_ids is out of vocabulary. Vocabulary size: 260
    400 BadRequestError stop: stop cannot contain an empty string.
    400 BadRequestError chat_template: Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with untrusted chat template.
    400 BadRequestError continue_final_message: Cannot set both `continue_final_message` and `add_generation_prompt` to True.
    ");
}

#[tokio::test]
async fn what_cannot_fit_is_refused_before_it_costs_anything() {
    let long = "x".repeat(512 * 13 + 1);
    insta::assert_snapshot!(completion_error(json!({"prompt": long})).await, @"400 BadRequestError input_text: This model's maximum context length is 512 tokens. However, your prompt has 6657 bytes, and so many tokens have at most 6656. Please reduce the length of the input prompt.");
    let id = "x".repeat(257);
    insta::assert_snapshot!(chat_error(json!({"request_id": id})).await, @"400 BadRequestError request_id: request_id must have at most 256 bytes, got 257.");
    insta::assert_snapshot!(completion_error(json!({"min_tokens": 17})).await, @"400 BadRequestError min_tokens: min_tokens must be less than or equal to max_tokens=16, got 17.");
    let error = chat_error(json!({"min_tokens": 512})).await;
    assert!(
        error.contains("min_tokens must be less than or equal to max_tokens="),
        "{error}"
    );
}

#[tokio::test]
async fn more_than_the_limits_allow() {
    let stop: Vec<String> = (0..10_000).map(|index| format!("stop {index}")).collect();
    insta::assert_snapshot!(chat_error(json!({"stop": stop})).await, @"400 BadRequestError stop: stop must have at most 256 strings, got 10000.");
    insta::assert_snapshot!(chat_error(json!({"stop": "x".repeat(100_000)})).await, @"400 BadRequestError stop: stop must have at most 65536 bytes, got 100000.");
    insta::assert_snapshot!(chat_error(json!({"stop_token_ids": vec![1; 5000]})).await, @"400 BadRequestError stop_token_ids: stop_token_ids must have at most 4096 entries, got 5000.");
    insta::assert_snapshot!(completion_error(json!({"prompt": vec!["a"; 2000]})).await, @r"
    400 Bad Request body.prompt: 1 validation error:
      {'type': 'type_error', 'loc': ('body', 'prompt'), 'msg': 'a request may have at most 1024 prompts at line 1 column 4111'}
    ");
    insta::assert_snapshot!(completion_error(json!({"prompt": vec!["a"; 600], "n": 2})).await, @"400 BadRequestError n: The request asks for 1200 sequences, but this server takes at most 1024 at a time (--max-queued-requests).");
}

#[tokio::test]
async fn token_ids_outside_the_vocabulary() {
    insta::assert_snapshot!(completion_error(json!({"prompt": [97, 260]})).await, @"400 BadRequestError prompt: Token id 260 is out of vocabulary. Vocabulary size: 260");
    insta::assert_snapshot!(completion_error(json!({"prompt": [[-1]]})).await, @"400 BadRequestError prompt: Token id -1 is out of vocabulary. Vocabulary size: 260");
    let server = TestServer::answering("Yo");
    let reply = server
        .post("/detokenize", json!({"tokens": [99999999999i64]}))
        .await;
    insta::assert_snapshot!(reply.error(), @"400 BadRequestError tokens: Token id 99999999999 is out of vocabulary. Vocabulary size: 260");
}

#[tokio::test]
async fn fields_that_are_not_served_are_named() {
    for (fields, name) in [
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tools": []}), "tools"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"a": [1]}}}),
            "response_format",
        ),
        (json!({"guided_json": {}}), "guided_json"),
        (
            json!({"structured_outputs": {"regex": "a"}}),
            "structured_outputs",
        ),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"logits_processors": ["x"]}), "logits_processors"),
        (json!({"bad_words": ["x"]}), "bad_words"),
        (json!({"lora_request": 1}), "lora_request"),
    ] {
        let expected = format!(
            "400 BadRequestError {name}: `{name}` is not supported by this server; leave the field out."
        );
        assert_eq!(chat_error(fields).await, expected);
    }
    insta::assert_snapshot!(completion_error(json!({"suffix": "x"})).await, @"400 BadRequestError suffix: suffix is not currently supported");
    let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": image}]})).await, @"400 BadRequestError messages.0.content: content parts of type `image_url` are not supported by this server, only `text`.");
}

#[tokio::test]
async fn harmless_and_unknown_fields_are_accepted() {
    let fields = json!({
        "tools": null, "tool_choice": "none", "response_format": {"type": "text"},
        "modalities": ["text"], "use_beam_search": false, "parallel_tool_calls": true,
        "user": "me", "metadata": {"a": "b"}, "store": false, "made_up": [1, {"x": 2}],
        "service_tier": "auto", "temperature": null, "stream": null,
    });
    let reply = TestServer::answering("Yo").chat(fields).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
}

#[tokio::test]
async fn a_template_that_raises() {
    let template = "{{ raise_exception('Roles must alternate') }}";
    let server = TestServer::with_model("", Some(template), json!({}), |request| {
        answer(request, "Yo")
    });
    insta::assert_snapshot!(server.chat(json!({})).await.error(), @"400 BadRequestError messages: Roles must alternate");
    let server = TestServer::with_model("", None, json!({}), |request| answer(request, "Yo"));
    assert_eq!(
        server.chat(json!({})).await.status,
        200,
        "the vocabulary speaks ChatML"
    );
}

#[tokio::test]
async fn more_sequences_than_the_queue_holds() {
    let server = TestServer::with_flags("--max-queued-requests 1", |_| Vec::new());
    let reply = server.chat(json!({"n": 2, "temperature": 1})).await;
    insta::assert_snapshot!(reply.error(), @"400 BadRequestError n: The request asks for 2 sequences, but this server takes at most 1 at a time (--max-queued-requests).");
}

#[tokio::test]
async fn a_full_queue_is_refused_with_a_time_to_come_back() {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let server = TestServer::with_flags("--max-queued-requests 1", move |request| {
        let _ = held.recv();
        answer(request, "Yo")
    });
    let request = || GenerateRequest {
        request_id: "held".to_owned(),
        prompt_token_ids: vec![97],
        sampling_params: crate::engine::SamplingParams::default(),
        priority: 0,
    };
    // The engine is busy with the first, the second waits, so the queue is full.
    let _running = server.state.engine.submit(request()).unwrap();
    while server.requests.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let _waiting = server.state.engine.submit(request()).unwrap();
    let reply = server.chat(json!({})).await;
    insta::assert_snapshot!(reply.error(), @"429 TooManyRequestsError -: The server is busy: the waiting queue is full: 1 requests wait, 1 may. Try again later.");
    assert_eq!(reply.headers["retry-after"], "1");
    drop(release);
}

#[tokio::test]
async fn a_dead_engine_is_an_error_with_its_reason() {
    let server = TestServer::answering("Yo");
    server.state.engine.stop();
    while server.state.engine.death().is_none() {
        tokio::task::yield_now().await;
    }
    insta::assert_snapshot!(server.chat(json!({})).await.error(), @"500 EngineDeadError -: the engine has stopped: the mock engine was stopped");
    insta::assert_snapshot!(server.get("/health").await.error(), @"503 ServiceUnavailableError -: the engine has stopped: the mock engine was stopped");
}
