"""Sends streamed completions from several processes and times every chunk; used by bench_open_loop.py.

Each process is one epoll loop over raw sockets, one connection a request, so that it spends a few microseconds on a
chunk: `Load.client_cpu` (the busiest process) and the lags say whether the client kept up. Knows HTTP's chunked
encoding and server-sent events, nothing of either server. Standard library only, Linux.
"""

import array
import gc
import itertools
import json
import multiprocessing
import selectors
import socket
import time

RECV_BYTES = 1 << 18
# A request without a byte for so long is counted as failed.
SILENCE_SECS = 60.0


class Request:
    """One request to send: its body, when (seconds from the start; None: as soon as one of its process is done)."""

    def __init__(self, index, body, arrival_secs=None):
        self.index = index
        self.payload = http_request(body)
        self.max_tokens = body["max_tokens"]
        self.arrival_secs = arrival_secs


class Answer:
    """What came of a request. Times are of time.monotonic()."""

    def __init__(self, request, scheduled, sent):
        self.index, self.max_tokens = request.index, request.max_tokens
        self.scheduled, self.sent = scheduled, sent
        self.chunk_times = array.array("d")
        self.num_tokens = None
        self.error = None

    @property
    def first_token_secs(self):
        return self.chunk_times[0] - self.scheduled

    @property
    def token_secs(self):
        """Mean time of a token after the first, None for a single one."""
        if self.num_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.num_tokens - 1)


class Load:
    """The answers of one run, by request, and how busy the busiest client process was."""

    def __init__(self, answers, started, client_cpu):
        self.answers = sorted(answers, key=lambda answer: answer.index)
        self.started = started
        self.client_cpu = client_cpu

    def tokens_between(self, begin_secs, end_secs):
        """Returns the tokens that came in a window, seconds from the start; a chunk may hold several."""
        begin, end, tokens = self.started + begin_secs, self.started + end_secs, 0.0
        for answer in self.answers:
            if answer.error is None:
                inside = sum(begin <= at < end for at in answer.chunk_times)
                tokens += answer.num_tokens * inside / len(answer.chunk_times)
        return tokens


def http_request(body):
    payload = json.dumps(body).encode()
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: text/event-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n")
    return head.encode() + payload


class Connection:
    """One request in flight: takes bytes, fills in its answer."""

    def __init__(self, port, request, scheduled):
        self.answer = Answer(request, scheduled, time.monotonic())
        self.head_is_read = False
        self.raw = b""
        self.events = b""
        self.heard = self.answer.sent
        # Connecting and a few kilobytes never wait on loopback.
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.sendall(request.payload)
        self.socket.setblocking(False)

    def receive(self):
        """Takes what is there; returns whether the answer is over."""
        try:
            data = self.socket.recv(RECV_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            return self.fail(f"{type(error).__name__}: {error}")
        self.heard = time.monotonic()
        if not data:
            return self.fail(f"the connection ended before [DONE]: {(self.raw + self.events)[:300]!r}")
        self.raw += data
        if not self.head_is_read and not self.read_head():
            return self.answer.error is not None
        try:
            self.read_chunks()
        except ValueError:
            return self.fail(f"no chunk of HTTP: {self.raw[:300]!r}")
        return self.read_events()

    def fail(self, error):
        self.answer.error = self.answer.error or error
        return True

    def read_head(self):
        head, end, rest = self.raw.partition(b"\r\n\r\n")
        if not end:
            return False
        if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in head.lower():
            self.fail(f"not a stream: {self.raw[:600]!r}")
            return False
        self.raw, self.head_is_read = rest, True
        return True

    def read_chunks(self):
        """Moves the whole chunks of HTTP's encoding from `raw` to `events`."""
        while True:
            size, end, rest = self.raw.partition(b"\r\n")
            if not end:
                return
            length = int(size.partition(b";")[0], 16)
            if len(rest) < length + 2:
                return
            self.events += rest[:length]
            self.raw = rest[length + 2:]
            if length == 0:
                return

    def read_events(self):
        while True:
            event, end, rest = self.events.partition(b"\n\n")
            if not end:
                return False
            self.events = rest
            if event == b"data: [DONE]":
                return self.close_answer()
            if event.startswith(b'data: {"error"'):
                return self.fail(event.decode(errors="replace")[:300])
            if b'"choices":[]' in event:
                self.answer.num_tokens = json.loads(event[6:])["usage"]["completion_tokens"]
            elif event.startswith(b"data: "):
                self.answer.chunk_times.append(self.heard)

    def close_answer(self):
        answer = self.answer
        if answer.num_tokens != answer.max_tokens or not answer.chunk_times:
            self.fail(f"{answer.num_tokens} tokens in {len(answer.chunk_times)} chunks, asked for {answer.max_tokens}")
        return True


class Client:
    """The loop of one process."""

    def __init__(self, port, requests, started, concurrency, stop_secs):
        self.port, self.started, self.answers = port, started, []
        timed = [request for request in requests if request.arrival_secs is not None]
        # The next one is the last.
        self.timed = sorted(timed, key=lambda request: -request.arrival_secs)
        self.untimed = itertools.cycle([request for request in requests if request.arrival_secs is None])
        self.concurrency, self.stop_at = concurrency, started + stop_secs
        self.selector = selectors.EpollSelector()
        self.num_open = 0

    def run(self):
        time.sleep(max(0.0, self.started - time.monotonic()))
        cpu = time.process_time()
        for _ in range(self.concurrency):
            self.send_untimed()
        while self.timed or self.num_open:
            self.send_due()
            wait = self.started + self.timed[-1].arrival_secs - time.monotonic() if self.timed else 1.0
            if not self.num_open:
                time.sleep(max(0.0, wait))
                continue
            # epoll waits whole milliseconds, rounded up: the last one is spent asking again.
            events = self.selector.select(wait - 0.001 if wait > 0.001 else 0)
            for key, _ in events:
                self.receive(key.data)
            if not events:
                self.drop_silent()
        return self.answers, (time.process_time() - cpu) / (time.monotonic() - self.started)

    def send_due(self):
        while self.timed and self.started + self.timed[-1].arrival_secs <= time.monotonic():
            request = self.timed.pop()
            self.send(request, self.started + request.arrival_secs)

    def send_untimed(self):
        now = time.monotonic()
        if now < self.stop_at:
            self.send(next(self.untimed), now)

    def send(self, request, scheduled):
        try:
            connection = Connection(self.port, request, scheduled)
        except OSError as error:
            failed = Answer(request, scheduled, scheduled)
            failed.error = f"{type(error).__name__}: {error}"
            self.answers.append(failed)
            return
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.num_open += 1

    def receive(self, connection):
        if connection.receive():
            self.close(connection)
            self.send_untimed()

    def close(self, connection):
        self.selector.unregister(connection.socket)
        connection.socket.close()
        self.num_open -= 1
        self.answers.append(connection.answer)

    def drop_silent(self):
        deadline = time.monotonic() - SILENCE_SECS
        for key in list(self.selector.get_map().values()):
            if key.data.heard < deadline:
                key.data.fail(f"nothing came for {SILENCE_SECS:.0f} s")
                self.close(key.data)


def client_process(pipe, *arguments):
    # Nothing here makes cycles, and a collection would stop the clock's reader.
    gc.disable()
    try:
        pipe.send(Client(*arguments).run())
    except BaseException as error:  # The parent reports it.
        pipe.send(error)
    pipe.close()


def run_load(port, requests, num_processes, concurrency=0, stop_secs=0.0):
    """Sends `requests` and waits for all answers.

    Requests with an arrival time are sent then, whatever is in flight (open loop). The others, again from the first
    after the last, keep `concurrency` in flight until `stop_secs`, after which none is sent any more (closed loop).
    """
    started = time.monotonic() + 0.5
    context, pipes = multiprocessing.get_context("fork"), []
    for index in range(num_processes):
        share = requests[index::num_processes]
        mine = concurrency // num_processes + (index < concurrency % num_processes)
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=client_process, args=(child, port, share, started, mine, stop_secs))
        process.start()
        child.close()
        pipes.append((parent, process))
    answers, client_cpu, errors = [], 0.0, []
    for pipe, process in pipes:
        result = pipe.recv()
        process.join()
        if isinstance(result, BaseException):
            errors.append(result)
            continue
        answers.extend(result[0])
        client_cpu = max(client_cpu, result[1])
    if errors:
        raise errors[0]
    return Load(answers, started, client_cpu)
