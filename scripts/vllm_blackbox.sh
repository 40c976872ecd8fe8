#!/usr/bin/env bash
# Runs vLLM's own black-box HTTP tests against infold, through the stand-ins of tests/vllm.
#
#   scripts/vllm_blackbox.sh VLLM_CHECKOUT [pytest arguments...]
#
# Needs a build (or $INFOLD_BIN) and a Python ($PYTHON, default python3) with tests/vllm/requirements.txt. The model
# is a copy of tests/fixtures/tiny-qwen2 with room for long sequences, or $INFOLD_VLLM_MODEL. vLLM's files are copied
# to a temporary folder, with its metric prefix replaced by ours; none of them is part of this repository.
# $INFOLD_VLLM_REPORT names a file for the Markdown list that docs/vllm_blackbox.md holds.
set -euo pipefail

FILES=(
    entrypoints/openai/chat_completion/test_chat.py
    entrypoints/openai/chat_completion/test_chat_completion.py
    entrypoints/openai/chat_completion/test_chat_echo.py
    entrypoints/openai/chat_completion/test_chat_logit_bias_validation.py
    entrypoints/openai/chat_completion/test_enable_force_include_usage.py
    entrypoints/openai/chat_completion/test_non_object_body_validation.py
    entrypoints/openai/chat_completion/test_root_path.py
    entrypoints/openai/completion/test_completion.py
    entrypoints/openai/completion/test_prompt_validation.py
    entrypoints/openai/completion/test_shutdown.py
    entrypoints/openai/models/test_models.py
    entrypoints/openai/test_chunked_prompt.py
    entrypoints/openai/test_return_token_ids.py
    entrypoints/openai/test_return_tokens_as_ids.py
    entrypoints/openai/test_uds.py
    entrypoints/serve/instrumentator/test_basic.py
    entrypoints/serve/instrumentator/test_metrics.py
    entrypoints/serve/tokenize/test_tokenization.py
)

if [[ $# -lt 1 || ! -d "$1/tests/entrypoints" ]]; then
    echo "usage: $0 VLLM_CHECKOUT [pytest arguments...]" >&2
    exit 2
fi
checkout=$(cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [[ -z "${INFOLD_BIN:-}" ]]; then
    INFOLD_BIN=$(cd "$root/scripts" && "$python" -c 'import infold_server; print(infold_server.infold_binary())')
fi
INFOLD_BIN=$(readlink -f "$INFOLD_BIN")
export INFOLD_BIN
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$root/tests/vllm/." "$work/"
for file in "${FILES[@]}"; do
    if [[ ! -f "$checkout/tests/$file" ]]; then
        echo "this checkout has no tests/$file" >&2
        continue
    fi
    mkdir -p "$work/tests/$(dirname "$file")"
    sed 's/"vllm:/"infold:/g' "$checkout/tests/$file" >"$work/tests/$file"
done
find "$work/tests" -type d -exec touch {}/__init__.py \;

if [[ -z "${INFOLD_VLLM_MODEL:-}" ]]; then
    cp -r "$root/tests/fixtures/tiny-qwen2" "$work/model"
    sed -i 's/"max_position_embeddings": [0-9]*/"max_position_embeddings": 32768/' "$work/model/config.json"
    # Its sampling defaults (top_k 20, repetition penalty) are Qwen's; vLLM's tests expect a model without any.
    sed -i '/do_sample\|temperature\|top_p\|top_k\|repetition_penalty/d' "$work/model/generation_config.json"
    export INFOLD_VLLM_MODEL="$work/model"
fi
INFOLD_VERSION=$("$INFOLD_BIN" --version | awk '{ print $NF }')
export INFOLD_VERSION
export INFOLD_VLLM_MODEL PYTHONPATH="$work"
cd "$work"
"$python" -m pytest -p no:cacheprovider -o asyncio_mode=strict tests -q "$@"
