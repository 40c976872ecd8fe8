"""Skips what is out of scope and writes the list of results; takes the place of vLLM's tests/conftest.py."""

import fnmatch
import os
import pathlib

import pytest

RESULTS = {}
HERE = pathlib.Path(__file__).resolve().parent


class LocalAssetServer:
    """Named in signatures of tests about images, which are out of scope."""


def out_of_scope():
    """Returns `(pattern, reason)` pairs of out_of_scope.txt."""
    rules = []
    for line in (HERE.parent / "out_of_scope.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, reason = line.split(" | ", 1)
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


def pytest_terminal_summary(terminalreporter):
    lines = ["| test | result | reason |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {result} | {reason.replace('|', chr(92) + '|')} |" for name, (result, reason) in RESULTS.items()]
    counts = {kind: sum(result == kind for result, _ in RESULTS.values()) for kind in ("passed", "failed", "out of scope")}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    terminalreporter.write_line("\n".join(lines) + f"\n\n{text}")
    if "INFOLD_VLLM_REPORT" in os.environ:
        pathlib.Path(os.environ["INFOLD_VLLM_REPORT"]).write_text("\n".join(lines) + f"\n\n{text}\n")
