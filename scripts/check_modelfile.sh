#!/usr/bin/env bash
# Lets Go's own text/template render the TEMPLATEs of our Modelfiles and compares the text with what
# the Rust side renders, which its tests compare with the chat templates.
# Needs Go 1.19 or later (Debian: golang-go); without it there is nothing to check, which is said.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v go >/dev/null; then
    echo "check_modelfile: no go; install golang-go to compare the TEMPLATEs with Go" >&2
    exit 0
fi
GO111MODULE=off go run tests/go/render.go tests/fixtures/modelfile/go_cases.json
