"""A stand-in for the `vllm` package: enough for vLLM's black-box test files to import.

Modules of vLLM, and heavy packages that are not installed, become mocks; the few things that the tests use for
real are set here. Whatever needs vLLM's inside (request classes, the engine) is out of scope and listed so.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import socket
import sys
from unittest import mock

# Imported by the test files for parts that are out of scope anyway.
OPTIONAL = ("fastapi", "lm_eval", "pybase64", "torch")


class _MockFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import vllm.x.y`, and a missing optional package, with a mock module."""

    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top == "vllm" or top in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__spec__, module.__path__ = spec, []
        return module

    def exec_module(self, module):
        pass


# After the regular finders: a package that is installed is used.
_FINDER = _MockFinder()
sys.meta_path.append(_FINDER)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _get_tokenizer(*args, **kwargs):
    # A class of its own, since AutoTokenizer is replaced by this function.
    from transformers import PreTrainedTokenizerFast

    folder = os.environ.get("INFOLD_VLLM_TOKENIZER", os.environ["INFOLD_VLLM_MODEL"])
    return PreTrainedTokenizerFast.from_pretrained(folder)


import vllm.config  # noqa: E402
import vllm.exceptions  # noqa: E402
import vllm.tokenizers  # noqa: E402
import vllm.utils.network_utils  # noqa: E402
import vllm.v1.engine.exceptions  # noqa: E402
import vllm.version  # noqa: E402

version = vllm.version
if importlib.util.find_spec("torch").loader is _FINDER:
    import torch

    torch.iinfo = lambda kind: mock.Mock(min=-(2**63), max=2**63 - 1)
vllm.tokenizers.get_tokenizer = _get_tokenizer
vllm.utils.network_utils.get_open_port = _free_port
vllm.version.__version__ = os.environ.get("INFOLD_VERSION", "0")
vllm.version._prev_minor_version = lambda: "0.0"
vllm.config.ModelConfig = lambda *args, **kwargs: mock.Mock(get_vocab_size=lambda: len(_get_tokenizer()))
vllm.exceptions.VLLMValidationError = ValueError
