//! `/v1/chat/completions`: answers and transcripts.

use serde_json::json;

use crate::engine::{FinishReason, TokenEvent};

use super::*;

#[tokio::test]
async fn an_answer_has_the_form_of_vllm() {
    let reply = TestServer::answering("Yo").chat(json!({})).await;
    insta::assert_snapshot!(reply.redacted(), @r#"{"id":"chatcmpl-test","object":"chat.completion","created":0,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"Yo","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":21,"total_tokens":24,"completion_tokens":3,"prompt_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null}"#);
}

#[tokio::test]
async fn the_prompt_is_the_rendered_chat_and_takes_the_rest_of_the_context() {
    let server = TestServer::answering("Yo");
    server.chat(json!({"seed": 7})).await;
    let request = server.last_request();
    let prompt = server.state.tokenizer.decode(
        &request.prompt_token_ids,
        crate::text::SkipSpecialTokens::No,
    );
    assert_eq!(
        prompt,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let params = &request.sampling_params;
    assert_eq!(
        params.max_tokens,
        MAX_MODEL_LEN - request.prompt_token_ids.len()
    );
    assert_eq!(
        (params.seed, &params.eos_token_ids),
        (Some(7), &vec![IM_END])
    );
    assert_eq!(request.request_id, "chatcmpl-test");
}

#[tokio::test]
async fn a_stream_has_the_order_of_vllm() {
    let fields = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = TestServer::answering("Yo").chat(fields).await;
    assert_eq!(
        reply.headers["content-type"],
        "text/event-stream; charset=utf-8"
    );
    insta::assert_snapshot!(reply.redacted(), @r#"
    data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}

    data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":"Y"},"logprobs":null,"finish_reason":null}]}

    data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":"o"},"logprobs":null,"finish_reason":null}]}

    data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}

    data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[],"usage":{"prompt_tokens":21,"total_tokens":24,"completion_tokens":3,"prompt_tokens_details":null}}

    data: [DONE]
    "#);
}

#[tokio::test]
async fn every_chunk_carries_usage_when_asked_for() {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let reply = TestServer::answering("Y")
        .chat(json!({"stream": true, "stream_options": options}))
        .await;
    let usages = reply.text.matches("\"usage\":{").count();
    assert_eq!(usages, reply.text.matches("data: {").count());
}

#[tokio::test]
async fn choices_interleave_and_keep_their_order() {
    let fields = json!({"stream": true, "n": 2, "temperature": 1, "max_tokens": 2});
    let reply = TestServer::answering("Yo").chat(fields).await;
    let mut texts = [String::new(), String::new()];
    for event in reply
        .text
        .split("\n\n")
        .filter(|event| event.starts_with("data: {"))
    {
        let chunk: Value = serde_json::from_str(&event[6..]).unwrap();
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index].push_str(choice["delta"]["content"].as_str().unwrap());
    }
    assert_eq!(texts, ["Yo", "Yo"]);
}

#[tokio::test]
async fn each_choice_has_its_own_seed() {
    let server = TestServer::answering("Yo");
    let reply = server.chat(json!({"n": 3, "seed": 5})).await;
    let seeds: Vec<_> = server
        .requests
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.sampling_params.seed)
        .collect();
    assert_eq!(seeds, [Some(5), Some(6), Some(7)]);
    let reply = reply.json();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 3);
    assert_eq!(reply["usage"]["completion_tokens"], 9);
    assert_eq!(
        reply["usage"]["prompt_tokens"],
        server.last_request().prompt_token_ids.len()
    );
}

#[tokio::test]
async fn broken_characters_never_leave() {
    let server = TestServer::with_flags("", |request| answer(request, "ä€"));
    let reply = server.chat(json!({"stream": true, "max_tokens": 4})).await;
    // Two bytes of `ä`, two of three bytes of `€`, cut by the limit.
    let contents: Vec<&str> = reply
        .text
        .split("\"content\":\"")
        .skip(2)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(contents, ["", "ä", "", "\u{fffd}"]);
}

#[tokio::test]
async fn stop_strings_end_an_answer_and_do_not_leak() {
    let server = TestServer::answering("one STOP two");
    let reply = server.chat(json!({"stop": ["nope", "STOP"]})).await.json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "one ");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!("STOP"))
    );
    assert_eq!(reply["usage"]["completion_tokens"], 8);
    let kept = server
        .chat(json!({"stop": "STOP", "include_stop_str_in_output": true}))
        .await
        .json();
    assert_eq!(kept["choices"][0]["message"]["content"], "one STOP");
    let streamed = server.chat(json!({"stop": "STOP", "stream": true})).await;
    assert!(!streamed.text.contains("\"S\""), "{}", streamed.text);
    assert!(
        streamed
            .text
            .contains("\"finish_reason\":\"stop\",\"stop_reason\":\"STOP\"")
    );
}

#[tokio::test]
async fn text_held_back_for_a_stop_string_is_sent_at_the_end() {
    let reply = TestServer::answering("one STO")
        .chat(json!({"stop": "STOP"}))
        .await
        .json();
    assert_eq!(reply["choices"][0]["message"]["content"], "one STO");
}

#[tokio::test]
async fn stop_strings_do_not_count_in_the_first_min_tokens() {
    let server = TestServer::answering("xaxa");
    let reply = server
        .chat(json!({"stop": "a", "min_tokens": 2, "max_tokens": 9}))
        .await
        .json();
    assert_eq!(reply["choices"][0]["message"]["content"], "xax");
}

#[tokio::test]
async fn a_stop_token_is_named_and_left_out() {
    let reply = TestServer::answering("abc")
        .chat(json!({"stop_token_ids": [98]}))
        .await
        .json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "a");
    assert_eq!(choice["stop_reason"], 98);
    let kept = json!({"stop_token_ids": [98], "include_stop_str_in_output": true});
    let reply = TestServer::answering("abc").chat(kept).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "ab");
}

#[tokio::test]
async fn logprobs_name_tokens_bytes_and_alternatives() {
    let fields = json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 1});
    let reply = TestServer::answering("Yo").chat(fields).await.json();
    insta::assert_snapshot!(reply["choices"][0]["logprobs"], @r#"{"content":[{"token":"Y","logprob":-0.25,"bytes":[89],"top_logprobs":[{"token":"Y","logprob":-0.25,"bytes":[89]},{"token":"b","logprob":-1.5,"bytes":[98]},{"token":"a","logprob":-9999.0,"bytes":[97]}]}]}"#);
    let fields = json!({"logprobs": true, "max_tokens": 1, "return_tokens_as_token_ids": true});
    let reply = TestServer::answering("Yo").chat(fields).await.json();
    insta::assert_snapshot!(reply["choices"][0]["logprobs"], @r#"{"content":[{"token":"token_id:89","logprob":-0.25,"bytes":[89],"top_logprobs":[]}]}"#);
}

#[tokio::test]
async fn token_ids_are_returned_on_request() {
    let fields = json!({"return_token_ids": true, "max_tokens": 2});
    let reply = TestServer::answering("Yo").chat(fields).await.json();
    assert_eq!(reply["choices"][0]["token_ids"], json!([89, 111]));
    assert_eq!(reply["prompt_token_ids"][0], IM_START);
}

#[tokio::test]
async fn prompt_logprobs_go_by_token_id() {
    let reply = TestServer::answering("Yo")
        .chat(json!({"prompt_logprobs": 1, "max_tokens": 1}))
        .await;
    let prompt = &reply.json()["prompt_logprobs"];
    assert_eq!(prompt[0], Value::Null);
    assert_eq!(
        prompt[1],
        json!({"117": {"logprob": -0.25, "rank": 1, "decoded_token": "u"}})
    );
}

#[tokio::test]
async fn a_failure_in_mid_stream_becomes_an_event() {
    let server = TestServer::with_flags("", |request| {
        let mut events = answer(request, "Y");
        events.pop();
        events.push(TokenEvent::Failed {
            message: "out of memory".to_owned(),
        });
        events
    });
    let reply = server.chat(json!({"stream": true})).await;
    assert_eq!(reply.status, 200);
    let end = reply.text.split_once("\"content\":\"Y\"").unwrap().1;
    insta::assert_snapshot!(end.split_once("\n\n").unwrap().1, @r#"
    data: {"error":{"message":"out of memory","type":"InternalServerError","param":null,"code":500}}

    data: [DONE]
    "#);
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.error(), "500 InternalServerError -: out of memory");
}

#[tokio::test]
async fn an_engine_that_falls_silent_is_an_error_not_an_end() {
    let server = TestServer::with_flags("", |request| {
        vec![
            TokenEvent::Token {
                token_id: 65,
                logprobs: None,
                finish: None
            };
            request.sampling_params.max_tokens.min(1)
        ]
    });
    let stop_when_asked = async {
        while server.requests.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        server.state.engine.stop();
    };
    let (reply, ()) = tokio::join!(server.chat(json!({"stream": true})), stop_when_asked);
    assert!(reply.text.contains("the engine"), "{}", reply.text);
    assert!(reply.text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn an_aborted_answer_says_so() {
    let server = TestServer::with_flags("", |_| {
        let finish = Some(FinishReason::Aborted);
        vec![TokenEvent::Token {
            token_id: 65,
            logprobs: None,
            finish,
        }]
    });
    let reply = server.chat(json!({})).await.json();
    assert_eq!(reply["choices"][0]["finish_reason"], "abort");
}

#[tokio::test]
async fn several_tokens_may_share_a_chunk() {
    let server =
        TestServer::with_flags("--stream-interval 3", |request| answer(request, "abcdefg"));
    let reply = server.chat(json!({"stream": true})).await;
    let contents: Vec<&str> = reply
        .text
        .split("\"content\":\"")
        .skip(2)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(contents, ["a", "bcd", "efg", ""]);
}

#[tokio::test]
async fn content_parts_are_joined_and_a_last_message_can_be_continued() {
    let server = TestServer::answering("!");
    let body = json!({
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "Yes"},
        ],
        "add_generation_prompt": false, "continue_final_message": true, "echo": true,
    });
    let reply = server.post("/v1/chat/completions", body).await.json();
    assert_eq!(
        reply["choices"][0]["message"],
        json!({
            "role": "assistant", "content": "Yes!", "refusal": null, "annotations": null,
            "audio": null, "function_call": null, "reasoning": null,
        })
    );
    let prompt = server.last_request().prompt_token_ids;
    let prompt = server
        .state
        .tokenizer
        .decode(&prompt, crate::text::SkipSpecialTokens::No);
    assert_eq!(
        prompt,
        "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nYes"
    );
}

#[tokio::test]
async fn defaults_come_from_the_model_and_give_way_to_the_request() {
    let config =
        json!({"temperature": 0.5, "top_k": 20, "max_new_tokens": 3, "eos_token_id": [1, IM_END]});
    let server =
        TestServer::with_model("", Some(TEMPLATE), config, |request| answer(request, "Yo"));
    server.chat(json!({"top_k": -1})).await;
    let params = server.last_request().sampling_params;
    assert_eq!(
        (params.temperature, params.top_k, params.max_tokens),
        (0.5, 0, 3)
    );
    assert_eq!(params.eos_token_ids, [1, IM_END]);
}

#[tokio::test]
async fn a_template_of_the_request_needs_permission() {
    let template = json!({"chat_template": "{{ messages[0].content }}{{ x }}", "chat_template_kwargs": {"x": 1}});
    let refused = TestServer::answering("Yo").chat(template.clone()).await;
    assert_eq!(refused.status, 400);
    let server = TestServer::with_flags("--trust-request-chat-template", |request| {
        answer(request, "Yo")
    });
    assert_eq!(server.chat(template).await.status, 200);
    assert_eq!(server.last_request().prompt_token_ids, [72, 105, 49]);
}
