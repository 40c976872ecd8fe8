"""Plain `requests` calls, as a script without an SDK makes them, and the routes that no SDK knows."""

import requests

from conftest import MODEL

HEADERS = {"Content-Type": "application/json"}


def post(server, path, body):
    return requests.post(server.url + path, headers=HEADERS, json=body, timeout=60)


def test_chat_as_the_reference_workflow_calls_it(server):
    response = requests.post(
        f"{server.url}/v1/chat/completions",
        headers={"Content-Type": "application/json"},
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": "你是谁?"}],
            "max_tokens": 64,
            "temperature": 0.7,
        },
        timeout=60,
    )
    assert response.status_code == 200, (response.status_code, response.text)
    assert isinstance(response.json()["choices"][0]["message"]["content"], str)


def test_event_stream_ends_with_done(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    response = post(server, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line for line in response.text.split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"


def test_model_may_be_left_out(server):
    response = post(server, "/v1/completions", {"prompt": "The river", "max_tokens": 2})
    assert response.status_code == 200 and response.json()["model"] == MODEL


def test_tokenize_and_detokenize_are_inverse(server):
    text = "Hello, world! 你是谁? <|im_start|>"
    tokens = post(server, "/tokenize", {"model": MODEL, "prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 512
    assert post(server, "/detokenize", {"model": MODEL, "tokens": tokens["tokens"]}).json()["prompt"] == text


def test_tokenize_renders_chats(server):
    messages = [{"role": "user", "content": "Hi"}]
    tokens = post(server, "/tokenize", {"messages": messages}).json()["tokens"]
    text = post(server, "/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_small_routes_answer(server):
    assert requests.get(server.url + "/health", timeout=10).status_code == 200
    assert requests.get(server.url + "/ping", timeout=10).status_code == 200
    assert "version" in requests.get(server.url + "/version", timeout=10).json()
    assert requests.get(server.url + "/openapi.json", timeout=10).json()["openapi"].startswith("3.")


def test_metrics_are_prometheus_text(server):
    text = requests.get(server.url + "/metrics", timeout=10).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
                 "generation_tokens_total", "time_to_first_token_seconds_bucket", "request_success_total"):
        assert f"\ninfold:{name}" in text, name


def test_malformed_bodies_are_400(server):
    for body in (b"{", b'{"model": 7}', b"[]", b'"text"', b'{"messages": [}', b"\xff\xfe", b"[" * 5000):
        response = requests.post(server.url + "/v1/chat/completions", headers=HEADERS, data=body, timeout=10)
        assert response.status_code == 400, (body[:20], response.status_code)
        assert response.json()["error"]["message"] and response.json()["error"]["code"] == 400


def test_other_content_types_are_400(server):
    response = requests.post(server.url + "/v1/chat/completions", data={"model": MODEL}, timeout=10)
    assert response.status_code == 400


def test_unknown_route_and_method(server):
    assert requests.get(server.url + "/v1/nothing", timeout=10).status_code == 404
    assert requests.get(server.url + "/v1/chat/completions", timeout=10).status_code == 405


def test_ten_thousand_stop_strings_do_not_end_the_server(server):
    body = {"prompt": "The river", "max_tokens": 2, "stop": [f"stop {i}" for i in range(10_000)]}
    assert post(server, "/v1/completions", body).status_code in (200, 400)
    assert requests.get(server.url + "/health", timeout=10).status_code == 200


def test_huge_body_is_refused_and_the_server_lives(server):
    body = b'{"prompt": "' + b"a" * 100_000_000 + b'"}'
    try:
        response = requests.post(server.url + "/v1/completions", headers=HEADERS, data=body, timeout=60)
        assert response.status_code in (400, 413)
    except requests.exceptions.ConnectionError:
        pass  # Refused by the declared length: the server may hang up before all of it is sent.
    assert requests.get(server.url + "/health", timeout=10).status_code == 200
