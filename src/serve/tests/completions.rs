//! `/v1/completions`: answers and transcripts.

use serde_json::json;

use super::*;

#[tokio::test]
async fn an_answer_has_the_form_of_vllm() {
    let reply = TestServer::answering("cd").complete(json!({})).await;
    insta::assert_snapshot!(reply.redacted(), @r#"{"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"cd","logprobs":null,"finish_reason":"stop","stop_reason":null,"prompt_logprobs":null,"token_ids":null,"prompt_token_ids":null}],"usage":{"prompt_tokens":2,"total_tokens":5,"completion_tokens":3,"prompt_tokens_details":null}}"#);
}

#[tokio::test]
async fn a_stream_has_the_order_of_vllm() {
    let fields = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = TestServer::answering("cd").complete(fields).await;
    insta::assert_snapshot!(reply.redacted(), @r#"
    data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"c","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_logprobs":null,"token_ids":null,"prompt_token_ids":null}]}

    data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"d","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_logprobs":null,"token_ids":null,"prompt_token_ids":null}]}

    data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null,"prompt_logprobs":null,"token_ids":null,"prompt_token_ids":null}]}

    data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":2,"total_tokens":5,"completion_tokens":3,"prompt_tokens_details":null}}

    data: [DONE]
    "#);
}

#[tokio::test]
async fn sixteen_tokens_are_generated_unless_asked_otherwise() {
    let server = TestServer::answering("cd");
    server.complete(json!({})).await;
    assert_eq!(server.last_request().sampling_params.max_tokens, 16);
}

#[tokio::test]
async fn prompts_may_be_lists_and_token_ids() {
    let server = TestServer::answering("!");
    for (prompt, expected) in [
        (json!("ab"), vec![vec![97, 98]]),
        (json!(["a", "b"]), vec![vec![97], vec![98]]),
        (json!([97, 256]), vec![vec![97, 256]]),
        (json!([[97], [98, 99]]), vec![vec![97], vec![98, 99]]),
    ] {
        server.requests.lock().unwrap().clear();
        let reply = server
            .post("/v1/completions", json!({"prompt": prompt}))
            .await
            .json();
        let indices: Vec<_> = reply["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["index"].clone())
            .collect();
        assert_eq!(indices.len(), expected.len());
        let prompts: Vec<_> = server
            .requests
            .lock()
            .unwrap()
            .iter()
            .map(|r| r.prompt_token_ids.clone())
            .collect();
        assert_eq!(prompts, expected);
    }
}

#[tokio::test]
async fn the_prompt_is_echoed_with_its_logprobs() {
    let fields = json!({"echo": true, "logprobs": 1, "max_tokens": 1});
    let reply = TestServer::answering("cd").complete(fields).await.json();
    insta::assert_snapshot!(reply["choices"][0], @r#"{"index":0,"text":"abc","logprobs":{"text_offset":[0,1,2],"token_logprobs":[null,-0.25,-0.25],"tokens":["a","b","c"],"top_logprobs":[null,{"b":-0.25},{"c":-0.25}]},"finish_reason":"length","stop_reason":null,"prompt_logprobs":null,"token_ids":null,"prompt_token_ids":null}"#);
}

#[tokio::test]
async fn the_prompt_alone_can_be_scored() {
    let server = TestServer::answering("cd");
    let reply = server
        .complete(json!({"echo": true, "logprobs": 1, "max_tokens": 0}))
        .await
        .json();
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("ab"), &json!("length"))
    );
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.25]));
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    assert_eq!(server.last_request().sampling_params.max_tokens, 0);
}

#[tokio::test]
async fn a_stream_echoes_the_prompt_once_and_counts_offsets_on() {
    let fields = json!({"echo": true, "logprobs": 0, "max_tokens": 2, "stream": true});
    let reply = TestServer::answering("cd").complete(fields).await;
    let chunks: Vec<Value> = reply
        .text
        .split("\n\n")
        .filter(|event| event.starts_with("data: {"))
        .map(|event| serde_json::from_str(&event[6..]).unwrap())
        .collect();
    let texts: Vec<&str> = chunks
        .iter()
        .map(|c| c["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["abc", "d"]);
    assert_eq!(
        chunks[0]["choices"][0]["logprobs"]["text_offset"],
        json!([0, 1, 2])
    );
    assert_eq!(
        chunks[1]["choices"][0]["logprobs"]["text_offset"],
        json!([3])
    );
}

#[tokio::test]
async fn the_most_likely_of_several_answers_are_kept() {
    let mut nth = 0;
    let server = TestServer::with_flags("", move |request| {
        nth += 1;
        let mut events = answer(request, ["x", "y", "z"][(nth - 1) % 3]);
        for event in &mut events {
            if let TokenEvent::Token {
                logprobs: Some(logprobs),
                ..
            } = event
            {
                logprobs.logprob = -[3.0, 1.0, 2.0][(nth - 1) % 3];
            }
        }
        events
    });
    let reply = server
        .complete(json!({"n": 2, "best_of": 3, "prompt": ["a", "b"]}))
        .await
        .json();
    let texts: Vec<_> = reply["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            (
                c["index"].as_u64().unwrap(),
                c["text"].as_str().unwrap().to_owned(),
                c["logprobs"].is_null(),
            )
        })
        .collect();
    let expected = ["y", "z", "y", "z"].iter().enumerate();
    assert_eq!(
        texts,
        expected
            .map(|(i, t)| (i as u64, (*t).to_owned(), true))
            .collect::<Vec<_>>()
    );
    assert_eq!(reply["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn a_prompt_can_be_cut_to_its_end() {
    let server = TestServer::answering("!");
    let reply = server
        .complete(json!({"prompt": "abcd", "truncate_prompt_tokens": 2, "echo": true}))
        .await;
    assert_eq!(server.last_request().prompt_token_ids, [99, 100]);
    assert_eq!(reply.json()["choices"][0]["text"], "cd!");
    let long = "x".repeat(MAX_MODEL_LEN * 2);
    server
        .complete(json!({"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 12}))
        .await;
    assert_eq!(
        server.last_request().prompt_token_ids.len(),
        MAX_MODEL_LEN - 12
    );
}

#[tokio::test]
async fn cached_prompt_tokens_are_reported_when_the_server_is_asked_to() {
    let server = TestServer::with_flags("--enable-prompt-tokens-details", |request| {
        answer(request, "!")
    });
    let reply = server.complete(json!({})).await.json();
    assert_eq!(
        reply["usage"]["prompt_tokens_details"],
        json!({"cached_tokens": 2})
    );
}

#[tokio::test]
async fn special_tokens_are_shown_on_request() {
    let server = TestServer::with_flags("", |request| {
        let mut events = answer(request, "a");
        events.insert(
            1,
            TokenEvent::Token {
                token_id: IM_START,
                logprobs: None,
                finish: None,
            },
        );
        events
    });
    assert_eq!(
        server.complete(json!({})).await.json()["choices"][0]["text"],
        "a"
    );
    let shown = server
        .complete(json!({"skip_special_tokens": false}))
        .await
        .json();
    assert_eq!(shown["choices"][0]["text"], "<|im_start|>a");
}
