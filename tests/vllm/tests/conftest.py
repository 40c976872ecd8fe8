"""Skips what is out of scope and writes the list of results; takes the place of vLLM's tests/conftest.py."""

import fnmatch
import os
import pathlib

import pytest

RESULTS = {}
HERE = pathlib.Path(__file__).resolve().parent


class LocalAssetServer:
    """Named in signatures of tests about images, which are out of scope."""


@pytest.fixture(scope="session")
def qwen3_lora_files():
    """Stands for adapter files: the flags that name them are taken out."""
    return "no-adapter"


@pytest.fixture(scope="session")
def local_asset_server():
    """Serves pictures to tests about images, which are out of scope."""
    return None


@pytest.fixture(autouse=True, scope="session")
def tokenizer_of_the_model_under_test():
    """Tests that load a tokenizer by the name of a hub model get the one of the model under test."""
    import transformers
    import vllm.tokenizers

    transformers.AutoTokenizer.from_pretrained, original = (
        vllm.tokenizers.get_tokenizer, transformers.AutoTokenizer.from_pretrained
    )
    yield
    transformers.AutoTokenizer.from_pretrained = original


def out_of_scope():
    """Returns `(pattern, reason)` pairs of out_of_scope.txt."""
    rules = []
    for line in (HERE.parent / "out_of_scope.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, reason = line.split(" | ", 1)
            # Those of the tiny model do not hold where another one was chosen.
            if "INFOLD_VLLM_TOKENIZER" in os.environ and reason.startswith("tiny model:"):
                continue
            rules.append((pattern.strip(), reason.strip()))
    return rules


def name_of(nodeid):
    return nodeid.removeprefix("tests/").removeprefix("entrypoints/")


def pytest_collection_modifyitems(items):
    rules = out_of_scope()
    for item in items:
        # Brackets of a parametrised id are characters here, not a pattern.
        name = name_of(item.nodeid).replace("[", "(").replace("]", ")")
        reason = next((reason for pattern, reason in rules if fnmatch.fnmatchcase(name, pattern)), None)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report):
    name = name_of(report.nodeid)
    if report.skipped:
        RESULTS[name] = ("out of scope", report.longrepr[2].removeprefix("Skipped: "))
    elif report.failed:
        RESULTS[name] = ("failed", str(report.longrepr).strip().splitlines()[-1][:200])
    elif report.when == "call":
        RESULTS.setdefault(name, ("passed", ""))


def pytest_collectreport(report):
    if report.failed:
        RESULTS[name_of(report.nodeid)] = ("failed", "collection: " + str(report.longrepr).splitlines()[-1][:200])


def table():
    """Returns the Markdown table: one line a test, or one a case where its cases differ."""
    tests = {}
    for name, result in RESULTS.items():
        tests.setdefault(name.split("[")[0], {})[name] = result
    lines = ["| test | result | reason |", "| --- | --- | --- |"]
    for test, cases in tests.items():
        if len(set(cases.values())) == 1:
            cases = {test + (f" ({len(cases)} cases)" if len(cases) > 1 else ""): next(iter(cases.values()))}
        for name, (result, reason) in cases.items():
            lines.append(f"| `{name}` | {result} | {reason.replace('|', '/')} |")
    return lines


def pytest_terminal_summary(terminalreporter):
    kinds = ("passed", "failed", "out of scope")
    counts = {kind: sum(result == kind for result, _ in RESULTS.values()) for kind in kinds}
    text = "\n".join(table()) + "\n\n" + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    terminalreporter.write_line(text)
    if "INFOLD_VLLM_REPORT" in os.environ:
        pathlib.Path(os.environ["INFOLD_VLLM_REPORT"]).write_text(text + "\n")
