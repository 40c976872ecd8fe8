"""Starts and stops a program that serves HTTP on loopback; shared by the client tests, the soak and the benchmarks.

Standard library only.
"""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


def infold_binary():
    """Returns $INFOLD_BIN, or the newest of the release and debug builds."""
    if "INFOLD_BIN" in os.environ:
        return pathlib.Path(os.environ["INFOLD_BIN"]).resolve()
    builds = [ROOT / "target" / profile / "infold" for profile in ("release", "debug")]
    builds = [path for path in builds if path.exists()]
    if not builds:
        raise FileNotFoundError("no target/release/infold or target/debug/infold: build first, or set INFOLD_BIN")
    return max(builds, key=lambda path: path.stat().st_mtime)


def free_port():
    """Returns a TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server process; use as a context manager. `command` is called with the port it shall listen on, a free one
    where none is given."""

    def __init__(self, command, env=None, ready_timeout_secs=120.0, port=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = tempfile.NamedTemporaryFile(prefix="server-", suffix=".log", delete=False)
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [str(part) for part in command(self.port)],
            stdout=self.log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            # A group of its own, so that `stop` reaches what the server starts (vLLM's engine process).
            start_new_session=True,
        )
        try:
            self._wait_until_ready(ready_timeout_secs)
        except BaseException:
            self.stop()
            raise
        self.secs_to_ready = time.perf_counter() - started

    def _wait_until_ready(self, timeout_secs):
        deadline = time.monotonic() + timeout_secs
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready after {timeout_secs} s:\n{self.log()}")
            time.sleep(0.01)

    def get(self, path, timeout_secs=30.0):
        """Returns `(status, body text)` of a GET."""
        return self.request("GET", path, None, timeout_secs)

    def post(self, path, body, timeout_secs=600.0):
        """Returns `(status, parsed body)` of a POST of JSON."""
        status, text = self.request("POST", path, body, timeout_secs)
        return status, json.loads(text)

    def request(self, method, path, body, timeout_secs):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_secs)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self):
        """Returns the Prometheus samples, summed over labels: name → value."""
        totals = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def memory_kib(self, field="VmRSS"):
        """Returns a line of /proc/PID/status in KiB: VmRSS is the present, VmHWM the largest resident size."""
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def log(self, max_chars=4000):
        """Returns the end of what the process printed."""
        return pathlib.Path(self.log_file.name).read_text(errors="replace")[-max_chars:]

    def stop(self):
        """Ends the process with SIGTERM, after 20 s with SIGKILL; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._end_group()
        self.log_file.close()
        pathlib.Path(self.log_file.name).unlink(missing_ok=True)
        return self.process.returncode

    def _end_group(self):
        """Ends what the server left behind and waits for it: a GPU's memory is free only then."""
        deadline = time.monotonic() + 5
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()


def infold_serve(model, *args, env=None):
    """Starts `infold serve MODEL --host 127.0.0.1 --port FREE ARGS...`."""
    return Server(
        lambda port: [infold_binary(), "serve", model, "--host", "127.0.0.1", "--port", port, *args], env=env
    )
