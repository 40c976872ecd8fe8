//! Odd but legal forms of requests, which vLLM takes and so must this server.

use serde_json::json;

use super::*;

#[tokio::test]
async fn numbers_and_switches_may_be_written_as_text_or_with_a_point() {
    let server = TestServer::answering("Yo");
    let fields = json!({
        "max_tokens": "3", "temperature": "0.5", "top_k": 5.0, "seed": " -3 ", "min_tokens": "2.0",
        "top_p": 1, "ignore_eos": "true", "logprobs": 1, "top_logprobs": true, "n": "1",
        "stream": "off",
    });
    let reply = server.chat(fields).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let params = server.last_request().sampling_params;
    assert_eq!((params.max_tokens, params.min_tokens), (3, 2));
    assert_eq!((params.temperature, params.top_k), (0.5, 5));
    assert_eq!(params.seed, Some((-3i64).cast_unsigned()));
    assert_eq!((params.ignore_eos, params.logprobs), (true, Some(1)));
    let logprobs = &reply.json()["choices"][0]["logprobs"]["content"];
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 1);

    let reply = server
        .complete(json!({"max_tokens": 3.0, "logprobs": true}))
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(server.last_request().sampling_params.max_tokens, 3);
}

#[tokio::test]
async fn what_is_no_number_is_still_refused() {
    let server = TestServer::answering("Yo");
    let mut errors = Vec::new();
    for fields in [
        json!({"max_tokens": 5.5}),
        json!({"max_tokens": "five"}),
        json!({"max_tokens": ""}),
        json!({"max_tokens": 9_223_372_036_854_775_808u64}),
        json!({"max_tokens": "1e30"}),
        json!({"temperature": "nan"}),
        json!({"temperature": [1]}),
        json!({"stream": 2}),
        json!({"stream": "maybe"}),
    ] {
        let error = server.chat(fields).await.error();
        errors.push(error.split("'loc': ").nth(1).unwrap().to_owned());
    }
    insta::assert_snapshot!(errors.join("\n"), @r#"
    ('body', 'max_tokens'), 'msg': 'invalid type: floating point `5.5`, expected a whole number at line 1 column 61'}
    ('body', 'max_tokens'), 'msg': 'invalid type: string "five", expected a whole number at line 1 column 64'}
    ('body', 'max_tokens'), 'msg': 'invalid type: string "", expected a whole number at line 1 column 60'}
    ('body', 'max_tokens'), 'msg': 'Input should be less than or equal to 9223372036854775807'}
    ('body', 'max_tokens'), 'msg': 'invalid type: string "1e30", expected a whole number at line 1 column 64'}
    ('body', 'temperature'), 'msg': 'invalid type: string "nan", expected a number at line 1 column 64'}
    ('body', 'temperature'), 'msg': 'invalid type: list, expected a number at line 1 column 60'}
    ('body', 'stream'), 'msg': 'invalid type: integer `2`, expected a boolean at line 1 column 55'}
    ('body', 'stream'), 'msg': 'invalid type: string "maybe", expected a boolean at line 1 column 61'}
    "#);
}

#[tokio::test]
async fn parts_that_carry_text_are_text() {
    let server = TestServer::answering("Yo");
    let parts = json!([
        {"type": "text", "text": "a"}, {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"}, {"type": "refusal", "refusal": "d"},
        {"type": "thinking", "thinking": "e"}, {"type": "text", "text": null},
        {"type": "text", "text": ""}, "f", {"text": "g"},
    ]);
    let messages = json!([{"role": "user", "content": parts}]);
    let reply = server.chat(json!({"messages": messages})).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let prompt = server.last_request().prompt_token_ids;
    let text = server
        .state
        .tokenizer
        .decode(&prompt, SkipSpecialTokens::No);
    let asked = "<|im_start|>user\na\nb\nc\nd\ne\nf\ng<|im_end|>\n";
    assert!(text.starts_with(asked), "{text}");

    let messages = json!([{"role": "user", "content": [{"type": "text", "content": "a"}]}]);
    let reply = server.chat(json!({"messages": messages})).await;
    insta::assert_snapshot!(reply.error(), @r"
    400 Bad Request body.messages.0.content.0.text: 1 validation error:
      {'type': 'missing', 'loc': ('body', 'messages', 0, 'content', 0, 'text'), 'msg': 'Field required'}
    ");
}

#[tokio::test]
async fn reasoning_of_an_earlier_turn_reaches_the_template_under_both_names() {
    let template = "{% for message in messages %}[{{ message.reasoning }}|\
                    {{ message.reasoning_content }}]{% endfor %}";
    let server = TestServer::with_model("", Some(template), json!({}), |request| {
        answer(request, "Yo")
    });
    for name in ["reasoning", "reasoning_content"] {
        let mut message = json!({"role": "assistant", "content": "a"});
        message[name] = json!("why");
        let reply = server.chat(json!({"messages": [message]})).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let prompt = server.last_request().prompt_token_ids;
        let text = server
            .state
            .tokenizer
            .decode(&prompt, SkipSpecialTokens::No);
        assert_eq!(text, "[why|why]", "{name}");
    }
}

#[tokio::test]
async fn fields_that_ask_for_nothing_are_accepted() {
    let server = TestServer::answering("Yo");
    for fields in [
        json!({"length_penalty": 1.0, "early_stopping": false}),
        json!({"bad_words": [], "logits_processors": []}),
        json!({"documents": [], "vllm_xargs": {}, "mm_processor_kwargs": {}, "media_io_kwargs": {}}),
        json!({"modalities": []}),
    ] {
        let reply = server.chat(fields.clone()).await;
        assert_eq!(reply.status, 200, "{fields}: {}", reply.text);
    }
    let reply = server.chat(json!({"allowed_token_ids": []})).await;
    assert_eq!(reply.status, 400, "an empty list would allow no token");
}

#[tokio::test]
async fn a_byte_order_mark_before_the_json_is_passed_over() {
    let server = TestServer::answering("Yo");
    let body = "\u{feff}{\"prompt\": \"ab\"}";
    let reply = server.post_text("/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_name() {
    let server = TestServer::answering("Yo");
    let mut request = post_request("/v1/completions", &b"\x1f\x8b\x08\x00"[..]);
    let headers = request.headers_mut();
    headers.insert("content-encoding", "gzip".parse().unwrap());
    insta::assert_snapshot!(server.call(request).await.error(), @"415 BadRequestError -: Content-Encoding `gzip` is not supported by this server; send the body as it is.");
    let mut request = post_request("/v1/completions", r#"{"prompt": "ab"}"#);
    let headers = request.headers_mut();
    headers.insert("content-encoding", "identity".parse().unwrap());
    assert_eq!(server.call(request).await.status, 200);
}

#[tokio::test]
async fn a_prompt_is_cut_at_the_side_that_is_asked_for() {
    let server = TestServer::answering("Yo");
    for (side, kept) in [
        (json!(null), [98, 99]),
        (json!("left"), [98, 99]),
        (json!("right"), [97, 98]),
    ] {
        let fields = json!({"prompt": "abc", "truncate_prompt_tokens": 2, "truncation_side": side});
        let reply = server.complete(fields).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        assert_eq!(server.last_request().prompt_token_ids, kept, "{side}");
    }
    let reply = server.complete(json!({"truncation_side": "middle"})).await;
    assert_eq!(reply.status, 400, "{}", reply.text);
}
