"""The load generator of scripts/bench_open_loop.py: what it sends when, and what it makes of answers."""

import socket
import threading
import types

import bench_open_loop
import http_load
import pytest
from conftest import MODEL

NUM_TOKENS = 3


def body(**fields):
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, **stream, **fields}


def test_arrivals_are_kept_whatever_is_in_flight(server):
    requests = [http_load.Request(i, body(), 0.02 * i) for i in range(20)]
    load = http_load.run_load(server.port, requests, num_processes=2)
    assert [answer.error for answer in load.answers] == [None] * 20
    for index, answer in enumerate(load.answers):
        assert answer.scheduled - load.started == pytest.approx(0.02 * index)
        assert answer.sent >= answer.scheduled and answer.first_token_secs > 0
        assert answer.num_tokens == 5 and len(answer.chunk_times) == 5
        assert list(answer.chunk_times) == sorted(answer.chunk_times)
    assert load.tokens_between(-1, 1000) == 100
    assert 0 < load.client_cpu <= 1.5


def test_a_closed_loop_repeats_requests_until_its_time_is_over(server):
    requests = [http_load.Request(i, body(max_tokens=2)) for i in range(4)]
    load = http_load.run_load(server.port, requests, num_processes=1, concurrency=3, stop_secs=1.0)
    assert len(load.answers) > 4
    assert all(answer.scheduled <= load.started + 1.0 for answer in load.answers)
    in_flight = [(answer.sent, 1) for answer in load.answers] + [(answer.chunk_times[-1], -1) for answer in load.answers]
    most = now = 0
    for _, change in sorted(in_flight):
        now += change
        most = max(most, now)
    assert most == 3


def test_a_refused_request_is_an_error_with_the_servers_words(server):
    load = http_load.run_load(server.port, [http_load.Request(0, body(model="nobody"), 0.0)], num_processes=1)
    assert "404" in load.answers[0].error and "nobody" in load.answers[0].error


def chunked(data, size):
    """Writes `data` in HTTP chunks of `size` bytes, so that they and the events do not begin together."""
    parts = [data[i:i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def answer_of(stream, piece):
    """Lets a server send `stream` in pieces of `piece` bytes; returns what the client made of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        connection.recv(65536)
        for i in range(0, len(stream), piece):
            connection.sendall(stream[i:i + piece])
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    requests = [http_load.Request(0, body(max_tokens=NUM_TOKENS), 0.0)]
    load = http_load.run_load(listener.getsockname()[1], requests, num_processes=1)
    thread.join()
    listener.close()
    return load.answers[0]


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices":[{"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("http_size, piece", [(7, 5), (1000, 1000), (1, 64)])
def test_events_are_found_wherever_they_are_cut(http_size, piece):
    # Two chunks for three tokens: a server that lags behind its engine sends several at once.
    answer = answer_of(HEAD + chunked(CHUNK * 2 + USAGE % NUM_TOKENS + DONE, http_size), piece)
    assert (answer.error, answer.num_tokens, len(answer.chunk_times)) == (None, 3, 2)


@pytest.mark.parametrize("events, error", [
    (CHUNK + USAGE % 2 + DONE, "2 tokens in 1 chunks, asked for 3"),
    (CHUNK + b'data: {"error":{"message":"out of luck"}}\n\n' + DONE, "out of luck"),
    (CHUNK, "before [DONE]"),
])
def test_an_answer_that_is_not_whole_is_an_error(events, error):
    assert error in answer_of(HEAD + chunked(events, 100), 1000).error


def test_percentiles_are_values_that_were_measured():
    assert bench_open_loop.percentile(list(range(1, 101)), 50) == 50
    assert bench_open_loop.percentile(list(range(1, 101)), 99) == 99
    assert bench_open_loop.percentile([3.0], 99) == 3.0


def test_the_check_names_what_is_above_the_other_server():
    run = {name: 1.0 for name, _ in bench_open_loop.MEASURES}
    run |= {"errors": 0, "first error": None, "lag p99": 0.1}
    options = types.SimpleNamespace(fractions=[0.5])
    results = {"infold": {"runs": {0.5: dict(run)}}, "peer": {"runs": {0.5: dict(run)}}}
    assert bench_open_loop.faults_of(options, results) == []
    results["infold"]["runs"][0.5]["TTFT p99"] = 1.5
    results["peer"]["runs"][0.5]["errors"] = 2
    faults = bench_open_loop.faults_of(options, results)
    assert len(faults) == 2 and "peer at 50%: 2 requests failed" in faults[0] and "50% TTFT p99: 1.50" in faults[1]
