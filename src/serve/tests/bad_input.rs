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
    insta::assert_snapshot!(text_error("{\"messages\": [").await, @"");
    insta::assert_snapshot!(text_error("").await, @"");
    insta::assert_snapshot!(text_error("{} {}").await, @"");
    insta::assert_snapshot!(text_error("[]").await, @"");
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
    insta::assert_snapshot!(chat_error(json!({"temperature": "hot"})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"stop": [1]})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"messages": "Hi"})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": 5}]})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"messages": [{"content": "x"}]})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": {"a": 1}})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": [1, "a"]})).await, @"");
}

#[tokio::test]
async fn long_values_are_not_repeated_in_full() {
    let message = chat_error(json!({"temperature": "x".repeat(1_000_000)})).await;
    assert!(message.len() < 1000, "{}", message.len());
    assert!(message.contains("expected f64"));
}

#[tokio::test]
async fn missing_fields() {
    insta::assert_snapshot!(text_error("{}").await, @"");
    let server = TestServer::answering("Yo");
    insta::assert_snapshot!(server.post(COMPLETIONS, json!({})).await.error(), @"");
    insta::assert_snapshot!(server.post("/tokenize", json!({})).await.error(), @"");
    insta::assert_snapshot!(server.post("/detokenize", json!({})).await.error(), @"");
}

#[tokio::test]
async fn empty_messages_and_prompts() {
    insta::assert_snapshot!(chat_error(json!({"messages": []})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": ""})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": []})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": [[]]})).await, @"");
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
            insta::assert_snapshot!(reply.error(), @"");
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
    insta::assert_snapshot!(reply.error(), @"");
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
    insta::assert_snapshot!(chat_error(json!({"model": "gpt"})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"model": "gpt"})).await, @"");
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
    insta::assert_snapshot!(server.get("/v1/nothing").await.error(), @"");
    insta::assert_snapshot!(server.get(CHAT).await.error(), @"");
}

#[tokio::test]
async fn a_prompt_that_leaves_no_room() {
    insta::assert_snapshot!(completion_error(json!({"prompt": "x".repeat(MAX_MODEL_LEN)})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"max_tokens": 1000})).await, @"");
    let content = "x".repeat(2 * MAX_MODEL_LEN);
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": content}]})).await, @"");
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
    insta::assert_snapshot!(errors.join("\n"), @"");
}

#[tokio::test]
async fn more_than_the_limits_allow() {
    let stop: Vec<String> = (0..10_000).map(|index| format!("stop {index}")).collect();
    insta::assert_snapshot!(chat_error(json!({"stop": stop})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"stop": "x".repeat(100_000)})).await, @"");
    insta::assert_snapshot!(chat_error(json!({"stop_token_ids": vec![1; 5000]})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": vec!["a"; 2000]})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": vec!["a"; 600], "n": 2})).await, @"");
}

#[tokio::test]
async fn token_ids_outside_the_vocabulary() {
    insta::assert_snapshot!(completion_error(json!({"prompt": [97, 260]})).await, @"");
    insta::assert_snapshot!(completion_error(json!({"prompt": [[-1]]})).await, @"");
    let server = TestServer::answering("Yo");
    let reply = server
        .post("/detokenize", json!({"tokens": [99999999999i64]}))
        .await;
    insta::assert_snapshot!(reply.error(), @"");
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
    insta::assert_snapshot!(completion_error(json!({"suffix": "x"})).await, @"");
    let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    insta::assert_snapshot!(chat_error(json!({"messages": [{"role": "user", "content": image}]})).await, @"");
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
    insta::assert_snapshot!(server.chat(json!({})).await.error(), @"");
    let server = TestServer::with_model("", None, json!({}), |request| answer(request, "Yo"));
    assert_eq!(
        server.chat(json!({})).await.status,
        200,
        "the vocabulary speaks ChatML"
    );
}

#[tokio::test]
async fn a_full_queue_is_refused_with_a_time_to_come_back() {
    let server = TestServer::with_flags("--max-queued-requests 1", |_| Vec::new());
    // The one place is taken by hand: the mock engine takes requests out at once.
    let info = server.state.engine.info();
    assert_eq!(info.max_num_waiting, 1);
    let reply = server.chat(json!({"n": 2, "temperature": 1})).await;
    insta::assert_snapshot!(reply.error(), @"");
}

#[tokio::test]
async fn a_dead_engine_is_an_error_with_its_reason() {
    let server = TestServer::answering("Yo");
    server.state.engine.stop();
    while server.state.engine.death().is_none() {
        tokio::task::yield_now().await;
    }
    insta::assert_snapshot!(server.chat(json!({})).await.error(), @"");
    insta::assert_snapshot!(server.get("/health").await.error(), @"");
}
