"""RemoteOpenAIServer for vLLM's black-box tests, running `infold serve` in place of `vllm serve`.

Whatever model a test names, the one of $INFOLD_VLLM_MODEL is served under that name.
"""

import os
import socket
import subprocess
import time

import httpx
import openai


def serve_command(model, flags):
    """Returns the command line that serves the model under test as `model`."""
    names = [] if "--served-model-name" in flags else ["--served-model-name", model]
    # A tiny model's KV cache would be sized by the free memory otherwise.
    memory = ["--kv-cache-memory-bytes", "128MiB"]
    flags = without_unbuilt(flags)
    return [os.environ["INFOLD_BIN"], "serve", "--model", os.environ["INFOLD_VLLM_MODEL"], *names, *memory, *flags]


def without_unbuilt(flags):
    """Returns the flags less those about LoRA and tools: the other tests of such files still count.

    A flag given twice keeps its last value, as Python's argparse does.
    """
    options = {}
    for flag in flags:
        if flag.startswith("--"):
            name = flag
            options[name] = []
        else:
            options[name].append(flag)
    unbuilt = ("lora", "auto-tool-choice", "tool-call-parser")
    kept = [(name, values) for name, values in options.items() if not any(word in name for word in unbuilt)]
    return [part for name, values in kept for part in (name, *values)]


class RemoteOpenAIServer:
    """A server process with the face of vLLM's class of the same name."""

    DUMMY_API_KEY = "token-abc123"
    show_hidden_metrics = False

    def __init__(self, model, vllm_serve_args, *, env_dict=None, seed=0, auto_port=True, max_wait_seconds=60.0,
                 override_hf_configs=None):
        flags = [str(flag) for flag in vllm_serve_args]
        self.uds = flags[flags.index("--uds") + 1] if "--uds" in flags else None
        self.host, self.port = "localhost", None
        if self.uds is None:
            if "--port" not in flags:
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", 0))
                    flags += ["--port", str(listener.getsockname()[1])]
            self.port = int(flags[flags.index("--port") + 1])
        if seed is not None and "--seed" not in flags:
            flags += ["--seed", str(seed)]
        self.proc = subprocess.Popen(serve_command(model, flags), env={**os.environ, **(env_dict or {})})
        try:
            self._wait_until_healthy(max_wait_seconds or 60.0)
        except BaseException:
            self.proc.kill()
            self.proc.wait()
            raise

    def _wait_until_healthy(self, max_wait_secs):
        transport = httpx.HTTPTransport(uds=self.uds) if self.uds else None
        deadline = time.monotonic() + max_wait_secs
        with httpx.Client(transport=transport, timeout=10) as client:
            while True:
                if self.proc.poll() is not None:
                    raise RuntimeError(f"infold serve ended with {self.proc.returncode}")
                try:
                    if client.get(self.url_for("health")).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise RuntimeError("infold serve was not healthy in time")
                time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.proc.terminate()
        try:
            self.proc.wait(15)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()

    @property
    def url_root(self):
        return "http://localhost" if self.uds else f"http://{self.host}:{self.port}"

    def url_for(self, *parts):
        return "/".join([self.url_root, *parts])

    def get_client(self, **options):
        options = {"timeout": 600, **options}
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **options)

    def get_async_client(self, **options):
        options = {"timeout": 600, **options}
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **options)
