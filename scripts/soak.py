#!/usr/bin/env python3
r"""Soaks a running `infold serve`: mixed requests with random aborts, then checks that nothing leaked.

    scripts/soak.py                                 start infold on tests/fixtures/tiny-qwen2, 10 minutes
    scripts/soak.py --model DIR|FILE --minutes 2    another model or length
    scripts/soak.py --model DIR --minutes 5 --concurrency 256 -- --load-format dummy --dtype half \
        --max-model-len 8192 --kv-cache-memory-bytes 8GiB                            on a GPU
The cache there is small, so that all its blocks are used in the first third: until then the index of the prefix
cache grows with every new block, in a whole GPU's memory for longer than five minutes.
Ends with 1 if a request failed, memory grew, or sequences or KV blocks stayed in use. Standard library only.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time

import infold_server

WORDS = "river stone quiet lamp garden copper window seven letter winter horse market silver door 你好 世界 🦀".split()
# What the last third may have above the middle third, in medians. The first third is warm-up: every thread's
# allocator fills its own pools (49 MiB in the first minute of a GPU server at concurrency 256).
MAX_GROWTH_KIB = 16 * 1024


class Tally:
    """Counts of outcomes and the errors, shared by the workers."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counts = {}
        self.errors = []
        self.latencies_secs = []

    def add(self, outcome, secs=None, error=None):
        with self.lock:
            self.counts[outcome] = self.counts.get(outcome, 0) + 1
            if secs is not None:
                self.latencies_secs.append(secs)
            if error is not None and len(self.errors) < 20:
                self.errors.append(error)


def request_body(rng, streamed):
    """Returns a random path and body; a third of the prompts share a beginning, so the prefix cache works too."""
    words = [rng.choice(WORDS) for _ in range(rng.choice((1, 5, 20, 60)))]
    if rng.random() < 0.33:
        words = ["a", "common", "beginning", "of", "some", "words"] * 4 + words
    body = {
        "max_tokens": rng.choice((1, 8, 32, 128)),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "ignore_eos": rng.random() < 0.5,
        "stream": streamed,
    }
    if rng.random() < 0.3:
        body["seed"] = rng.randrange(1000)
    if rng.random() < 0.2:
        body["stop"] = ["e", "\n\n"]
    if rng.random() < 0.2 and body["temperature"] > 0:
        body["n"] = 2
    if rng.random() < 0.5:
        return "/v1/completions", {**body, "prompt": " ".join(words), "logprobs": rng.choice((None, 3))}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": " ".join(words)}]}


def run_one(port, rng):
    """Sends one request; returns its outcome."""
    streamed = rng.random() < 0.6
    abort = rng.random() < 0.25
    path, body = request_body(rng, streamed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        if abort and not streamed:
            # Hang up while the server works on it.
            time.sleep(rng.random() * 0.2)
            return "aborted"
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
        if not streamed:
            answer = json.loads(response.read())
            assert len(answer["choices"]) == body.get("n", 1), answer
            return "answered"
        return read_stream(response, rng.randrange(12) if abort else None)
    finally:
        connection.close()


def read_stream(response, max_events):
    """Reads events to [DONE], or hangs up after `max_events`; returns the outcome."""
    num_events, finished = 0, False
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            assert finished, "a stream ended without a finish reason"
            return "streamed"
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"error event: {event}")
        finished |= any(choice["finish_reason"] for choice in event["choices"])
        num_events += 1
        if max_events is not None and num_events > max_events:
            return "aborted"
    raise RuntimeError("a stream ended without [DONE]")


def worker(port, seed, deadline, tally):
    rng = random.Random(seed)
    while time.monotonic() < deadline:
        started = time.perf_counter()
        try:
            outcome = run_one(port, rng)
            tally.add(outcome, None if outcome == "aborted" else time.perf_counter() - started)
        except Exception as error:  # Every failure is counted, whatever it is.
            tally.add("failed", error=f"{type(error).__name__}: {error}")
            time.sleep(0.1)


def wait_until_idle(server, timeout_secs=30):
    """Returns the metrics once nothing runs or waits, or the last ones after `timeout_secs`."""
    deadline = time.monotonic() + timeout_secs
    while True:
        metrics = server.metrics()
        busy = metrics["infold:num_requests_running"] + metrics["infold:num_requests_waiting"]
        if busy == 0 or time.monotonic() > deadline:
            return metrics
        time.sleep(0.2)


def sample_memory(server, deadline, samples):
    """Adds a sample each hundredth of the time to `deadline`, but not more often than every 0.2 s."""
    interval = max(0.2, (deadline - time.monotonic()) / 100)
    while (rest := deadline - time.monotonic()) > 0:
        time.sleep(min(interval, rest))
        samples.append(server.memory_kib())


def thirds_of(samples):
    """Returns the medians of the three thirds of the samples taken under load."""
    third = max(1, len(samples) // 3)
    return [statistics.median(part) for part in (samples[:third], samples[third:-third] or samples, samples[-third:])]


def faults_of(tally, metrics, samples):
    """Returns what is wrong, in words."""
    faults = list(tally.errors)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if metrics[f"infold:{name}"] != 0:
            faults.append(f"infold:{name} is {metrics[f'infold:{name}']} after the last request")
    _, middle, last = thirds_of(samples)
    if last > middle + MAX_GROWTH_KIB:
        faults.append(f"memory grew from {middle:.0f} KiB in the middle third to {last:.0f} KiB in the last")
    if not tally.latencies_secs:
        faults.append("no request was answered")
    return faults


def soak(server, minutes, concurrency, seed):
    """Runs the load on `server`, prints a table and returns the faults."""
    tally, samples, at_start = Tally(), [], server.memory_kib()
    started = time.monotonic()
    deadline = started + minutes * 60
    threads = [threading.Thread(target=worker, args=(server.port, seed + i, deadline, tally)) for i in range(concurrency)]
    threads.append(threading.Thread(target=sample_memory, args=(server, deadline, samples)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = wait_until_idle(server)
    faults = faults_of(tally, metrics, samples)
    print(f"{'minutes':24} {(time.monotonic() - started) / 60:.1f}")
    for outcome, count in sorted(tally.counts.items()):
        print(f"{outcome:24} {count}")
    for name in ("generation_tokens_total", "prefix_cache_hits_total", "num_preemptions_total",
                 "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        print(f"{name:24} {metrics.get('infold:' + name, float('nan')):g}")
    if tally.latencies_secs:
        print(f"{'median latency':24} {statistics.median(tally.latencies_secs):.3f} s")
    thirds = ", ".join(f"{median / 1024:.0f}" for median in thirds_of(samples))
    print(f"{'resident MiB':24} start {at_start / 1024:.0f}, medians of the thirds {thirds}, "
          f"idle {server.memory_kib() / 1024:.0f}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=infold_server.FIXTURES / "tiny-qwen2", help="model to serve")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve_args", nargs="*", help="after --: further flags of infold serve")
    options = parser.parse_args()
    with infold_server.infold_serve(options.model, "--disable-access-log", *options.serve_args) as server:
        faults = soak(server, options.minutes, options.concurrency, options.seed)
        if server.process.poll() is not None:
            faults.append(f"the server ended: {server.log()}")
    for fault in faults:
        print("FAULT:", fault)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
