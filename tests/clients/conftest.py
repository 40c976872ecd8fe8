"""Starts one infold server on a tiny checkpoint for all client tests.

Run: `pip install -r tests/clients/requirements.txt && pytest tests/clients` after a build ($INFOLD_BIN names
another binary).
"""

import pathlib
import sys

import openai
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))

import infold_server  # noqa: E402

MODEL = "Qwen2.5-tiny-sft"
ALIAS = "second-name"


@pytest.fixture(scope="session")
def server():
    model = infold_server.FIXTURES / "tiny-qwen2"
    args = ["--served-model-name", MODEL, ALIAS, "--dtype", "float32", "--max-model-len", "512"]
    args += ["--kv-cache-memory-bytes", "64MiB"]
    with infold_server.infold_serve(model, *args) as running:
        yield running
        assert running.process.poll() is None, f"the server died during the tests:\n{running.log()}"


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as running:
        yield running


@pytest.fixture(scope="session")
def model():
    return MODEL
