//! The endpoints around generation, keys, ids, CORS, draining and metrics.

use serde_json::json;

use super::*;

#[tokio::test]
async fn models_are_listed_under_every_name() {
    let server = TestServer::with_flags("--served-model-name org/other", |_| Vec::new());
    let mut list = server.get("/v1/models").await.json();
    assert_eq!(list["data"][1]["id"], "org/other");
    let permission = list["data"][0]["permission"][0].as_object_mut().unwrap();
    permission.insert("id".to_owned(), json!("modelperm-x"));
    permission.insert("created".to_owned(), json!(0));
    list["data"][0]["created"] = json!(0);
    insta::assert_snapshot!(list["data"][0], @r#"{"id":"tiny","object":"model","created":0,"owned_by":"infold","root":"models/tiny","parent":null,"max_model_len":512,"permission":[{"id":"modelperm-x","object":"model_permission","created":0,"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}]}"#);
    let one = server.get("/v1/models/org/other").await;
    assert_eq!((one.status, &one.json()["id"]), (200, &json!("org/other")));
}

#[tokio::test]
async fn small_endpoints_answer() {
    let server = TestServer::answering("Yo");
    for path in ["/health", "/ping"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, reply.text.as_str()), (200, ""));
    }
    assert_eq!(server.post("/ping", json!({})).await.status, 200);
    assert_eq!(
        server.get("/version").await.json(),
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
    assert_eq!(server.get("/load").await.json(), json!({"server_load": 0}));
    assert_eq!(server.get("/openapi.json").await.json()["openapi"], "3.1.0");
}

#[tokio::test]
async fn texts_and_chats_are_tokenized_and_back() {
    let server = TestServer::answering("Yo");
    let reply = server
        .post(
            "/tokenize",
            json!({"prompt": "a €", "return_token_strs": true}),
        )
        .await;
    insta::assert_snapshot!(reply.text, @r#"{"count":5,"max_model_len":512,"tokens":[97,32,226,130,172],"token_strs":["a","Ġ","â","Ĥ","¬"]}"#);
    let chat =
        json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false});
    let reply = server.post("/tokenize", chat).await.json();
    assert_eq!(
        reply["tokens"],
        json!([256, 117, 115, 101, 114, 10, 120, 257, 10])
    );
    let back = server
        .post("/detokenize", json!({"tokens": reply["tokens"]}))
        .await;
    assert_eq!(
        back.json(),
        json!({"prompt": "<|im_start|>user\nx<|im_end|>\n"})
    );
}

#[tokio::test]
async fn tokenize_refuses_what_a_chat_refuses() {
    let server = TestServer::answering("Yo");
    let tools = json!([{"type": "function", "function": {"name": "now"}}]);
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools});
    let reply = server.post("/tokenize", chat).await.json();
    assert_eq!(reply["error"]["param"], "tools");
}

#[tokio::test]
async fn keys_guard_v1_only() {
    let server = TestServer::with_flags("--api-key one two", |request| answer(request, "Yo"));
    let with_key = |key: &str| {
        Request::get("/v1/models")
            .header("authorization", key)
            .body(Body::empty())
            .unwrap()
    };
    for key in ["Bearer one", "Bearer two", "bearer one"] {
        assert_eq!(server.call(with_key(key)).await.status, 200, "{key}");
    }
    for key in [
        "Bearer three",
        "Bearer ",
        "one",
        "Basic one",
        "Bearer onetwo",
    ] {
        let reply = server.call(with_key(key)).await;
        assert_eq!(
            (reply.status, reply.text.as_str()),
            (401, r#"{"error":"Unauthorized"}"#),
            "{key}"
        );
    }
    assert_eq!(server.get("/v1/models").await.status, 401);
    assert_eq!(server.get("/v1/made-up").await.status, 401);
    for open in ["/health", "/metrics", "/version"] {
        assert_eq!(server.get(open).await.status, 200);
    }
    let preflight = Request::options("/v1/models")
        .header("origin", "http://x")
        .header("access-control-request-method", "GET")
        .body(Body::empty())
        .unwrap();
    assert_eq!(server.call(preflight).await.status, 200);
}

#[tokio::test]
async fn request_ids_come_back_when_asked_for() {
    let server = TestServer::answering("Yo");
    assert!(
        !server
            .chat(json!({}))
            .await
            .headers
            .contains_key("x-request-id")
    );
    let server = TestServer::with_flags("--enable-request-id-headers", |request| {
        answer(request, "Yo")
    });
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.headers["x-request-id"], "test");
    assert_eq!(reply.json()["id"], "chatcmpl-test");
    assert_eq!(
        server.get("/version").await.headers["x-request-id"].len(),
        32
    );
}

#[tokio::test]
async fn a_request_id_in_the_body_counts_without_a_header() {
    let server = TestServer::answering("Yo");
    let request = Request::post("/v1/completions")
        .header("content-type", "application/json")
        .body(Body::from(r#"{"prompt": "a", "request_id": "mine"}"#))
        .unwrap();
    assert_eq!(server.call(request).await.json()["id"], "cmpl-mine");
}

#[tokio::test]
async fn browsers_of_allowed_origins_may_call() {
    let origin_of = async |flags: &str, origin: &str| {
        let server = TestServer::with_flags(flags, |_| Vec::new());
        let request = Request::get("/version")
            .header("origin", origin)
            .body(Body::empty())
            .unwrap();
        let reply = server.call(request).await;
        reply
            .headers
            .get("access-control-allow-origin")
            .map(|value| value.to_str().unwrap().to_owned())
    };
    assert_eq!(origin_of("", "http://a").await.as_deref(), Some("*"));
    assert_eq!(
        origin_of("--allow-credentials", "http://a")
            .await
            .as_deref(),
        Some("http://a")
    );
    let only_a = r#"--allowed-origins ["http://a"]"#;
    assert_eq!(
        origin_of(only_a, "http://a").await.as_deref(),
        Some("http://a")
    );
    assert_eq!(origin_of(only_a, "http://b").await, None);
}

#[tokio::test]
async fn a_browser_may_send_its_key_and_other_headers() {
    // `*` does not cover Authorization (Fetch standard, "CORS-preflight fetch"), so that browsers
    // would keep back what the OpenAI SDK for JavaScript sends.
    let preflight = async |flags: &str| {
        let server = TestServer::with_flags(flags, |_| Vec::new());
        let request = Request::options("/v1/chat/completions")
            .header("origin", "http://a")
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type,x-stainless-lang",
            )
            .body(Body::empty())
            .unwrap();
        let headers = server.call(request).await.headers;
        let text = |name: &str| {
            headers
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        ["origin", "methods", "headers"].map(|of| text(&format!("access-control-allow-{of}")))
    };
    let some = |text: &str| Some(text.to_owned());
    let asked = some("authorization,content-type,x-stainless-lang");
    assert_eq!(preflight("").await, [some("*"), some("POST"), asked]);
    let only = r#"--allowed-headers ["authorization"] --allowed-methods ["GET"]"#;
    assert_eq!(
        preflight(only).await,
        [some("*"), some("GET"), some("authorization")]
    );
}

#[tokio::test]
async fn a_draining_server_takes_no_new_work() {
    let server = TestServer::answering("Yo");
    server.state.lifecycle.start_draining();
    let reply = server.chat(json!({})).await;
    assert_eq!(
        reply.error(),
        "503 ServiceUnavailableError -: the server is shutting down"
    );
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequences() {
    let server = TestServer::with_flags("", |_| {
        vec![TokenEvent::Token {
            token_id: 65,
            logprobs: None,
            finish: None,
        }]
    });
    let body = json!({"prompt": "ab", "stream": true, "n": 2, "temperature": 1}).to_string();
    let response = server
        .start(post_request("/v1/completions", body.clone()))
        .await;
    assert_eq!(server.state.lifecycle.num_in_flight(), 1);
    drop(response);
    assert_eq!(server.state.lifecycle.num_in_flight(), 0);
    let metrics = server.get("/metrics").await.text;
    assert!(
        metrics.contains("finished_reason=\"abort\",model_name=\"tiny\"} 2"),
        "{metrics}"
    );

    // The same without a stream, where the handler itself is dropped.
    let body = body.replace("\"stream\":true,", "");
    let request = server.start(post_request("/v1/completions", body));
    tokio::select! {
        biased;
        _ = request => panic!("the engine never finishes"),
        () = async { while server.requests.lock().unwrap().len() < 4 { tokio::task::yield_now().await; } } => {}
    }
    assert_eq!(server.state.lifecycle.num_in_flight(), 0);
    let metrics = server.get("/metrics").await.text;
    assert!(
        metrics.contains("finished_reason=\"abort\",model_name=\"tiny\"} 4"),
        "{metrics}"
    );
}

#[tokio::test]
async fn requests_are_measured() {
    let server = TestServer::answering("Yo");
    server.chat(json!({"max_tokens": 2})).await;
    server.get("/made/up").await;
    let metrics = server.get("/metrics").await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4");
    for line in [
        "infold:http_requests_total{handler=\"/v1/chat/completions\",method=\"POST\",model_name=\"tiny\",status=\"200\"} 1",
        "infold:http_requests_total{handler=\"none\",method=\"GET\",model_name=\"tiny\",status=\"404\"} 1",
        "infold:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"} 1",
        "infold:request_generation_tokens_sum{engine=\"0\",model_name=\"tiny\"} 2",
        "infold:request_params_max_tokens_sum{engine=\"0\",model_name=\"tiny\"} 2",
        "infold:num_requests_waiting{engine=\"0\",model_name=\"tiny\"} 0",
    ] {
        assert!(
            metrics.text.contains(line),
            "{line}\nis not in\n{}",
            metrics.text
        );
    }
}

#[tokio::test]
async fn requests_are_shared_among_replicas_and_measured_at_each() {
    let flags = "--data-parallel-size 2 --max-queued-requests 3";
    let server = TestServer::with_flags(flags, |request| answer(request, "Yo"));
    server.chat(json!({"max_tokens": 2})).await;
    server
        .chat(json!({"max_tokens": 2, "n": 3, "temperature": 1}))
        .await;
    let two_prompts = json!({"prompt": ["a", "b"], "max_tokens": 1});
    server.post("/v1/completions", two_prompts).await;
    let metrics = server.get("/metrics").await.text;
    for line in [
        "infold:request_generation_tokens_count{engine=\"0\",model_name=\"tiny\"} 2",
        "infold:request_generation_tokens_count{engine=\"1\",model_name=\"tiny\"} 4",
        "infold:request_params_n_sum{engine=\"1\",model_name=\"tiny\"} 4",
        "infold:request_params_n_count{engine=\"1\",model_name=\"tiny\"} 2",
    ] {
        assert!(metrics.contains(line), "{line}\nis not in\n{metrics}");
    }
    // The queue's limit is that of the whole server.
    let reply = server.chat(json!({"n": 4, "temperature": 1})).await;
    assert_eq!(reply.status, 400);
}
