//! No body, however strange, is the server's fault.

use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;

/// Values of every JSON type, small and extreme.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        (-3.0..3.0).prop_map(|number: f64| json!(number)),
        "\\PC{0,12}".prop_map(Value::from),
        prop_oneof![Just("user"), Just("text"), Just("none"), Just("tiny")].prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("(role|content|type|text|[0-9]{1,3})", inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Objects with the fields of requests, some of them with sensible values.
fn any_body() -> impl Strategy<Value = Value> {
    let names = vec![
        "model",
        "messages",
        "prompt",
        "n",
        "best_of",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "echo",
        "stream",
        "stream_options",
        "tools",
        "response_format",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "tokens",
        "continue_final_message",
        "truncate_prompt_tokens",
        "priority",
        "request_id",
        "modalities",
    ];
    let field = (prop::sample::select(names), any_value());
    let sensible = prop_oneof![
        Just(json!({"messages": [{"role": "user", "content": "x"}], "prompt": "x"})),
        Just(
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "prompt": [[1], [2]]})
        ),
        Just(json!({})),
    ];
    (sensible, prop::collection::vec(field, 0..5)).prop_map(|(sensible, fields)| {
        let mut body: Map<String, Value> = sensible.as_object().unwrap().clone();
        body.extend(
            fields
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value)),
        );
        Value::Object(body)
    })
}

fn never_fails(path: &'static str, body: String) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let reply = runtime.block_on(TestServer::answering("Yo").post_text(path, body));
    prop_assert!(
        matches!(reply.status, 200 | 400 | 404),
        "{} {}",
        reply.status,
        reply.text
    );
    if reply.status != 200 {
        prop_assert!(reply.json()["error"]["message"].is_string());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn bodies_of_any_json_are_answered(body in any_body(), which in 0usize..4) {
        let path = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"][which];
        never_fails(path, body.to_string())?;
    }

    #[test]
    fn bodies_of_any_text_are_answered(body in "\\PC{0,60}|[\\[\\]{}\",:0-9a-z]{0,60}") {
        never_fails("/v1/chat/completions", body)?;
    }
}
