#!/usr/bin/env bash
# Everything that CI checks, one line a step: format, clippy, tests, documentation, dependencies,
# the Python clients against a real server, a real model trained, merged and served, and that the
# code for GPUs compiles.
#
#   scripts/check.sh [STEP…]      steps: fmt clippy test doc deny clients gotmpl gguf peft quickstart cuda
#                                 (default: all of these), emulated
#
# The output of a step is shown when it fails. What needs a tool that is not installed is skipped
# and says so; with CI=true it fails instead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export CARGO_TERM_COLOR=never
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=()

# Runs a step: NAME COMMAND…; status 0 is success, 77 a step that cannot run here.
step() {
  local name=$1 start=$SECONDS status=0
  shift
  printf '%-10s ' "$name"
  "$@" >"$log" 2>&1 || status=$?
  if ((status == 77)) && [[ ${CI:-} != true ]]; then
    printf 'skipped         %s\n' "$(tail -n 1 "$log")"
    return
  fi
  if ((status != 0)); then
    printf 'FAILED  %5ss\n' $((SECONDS - start))
    cat "$log"
    failed+=("$name")
    return
  fi
  printf 'ok      %5ss  %s\n' $((SECONDS - start)) "$(summary "$name")"
}

# What a successful step has to say, from its output.
summary() {
  case $1 in
    test) awk '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
        END { printf "test result: ok. %d passed; %d failed; %d ignored", passed, failed, ignored }' "$log" ;;
    clients) grep -E '^[0-9]+ passed' "$log" || tail -n 1 "$log" ;;
    gotmpl | gguf | peft) tail -n 1 "$log" ;;
    quickstart) grep '^after ' "$log" ;;
    deny) grep -E '^(advisories|note):? ' "$log" | tail -n 1 ;;
  esac
}

fmt() { cargo fmt --check; }
clippy() { cargo clippy --all-targets --locked --quiet -- -D warnings; }
tests() { cargo test --locked --no-fail-fast; }
doc() { RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --locked --quiet; }

deny() {
  if ! command -v cargo-deny >/dev/null; then
    echo 'cargo-deny is not installed (cargo install cargo-deny --locked)'
    return 77
  fi
  cargo deny --locked check --hide-inclusion-graph licenses bans sources || return
  # The advisory database is a git repository elsewhere: not everywhere can it be fetched.
  if timeout 60 cargo deny --locked fetch db; then
    cargo deny --locked check --hide-inclusion-graph advisories || return
    echo 'advisories checked too'
  else
    echo 'advisories not checked: their database cannot be fetched from here'
  fi
}

# Go itself renders the TEMPLATEs of our Modelfiles.
gotmpl() { scripts/check_modelfile.sh; }

# llama.cpp and others read the GGUF files of `infold merge`.
gguf() { scripts/check_gguf_consumers.sh; }

# PEFT merges random adapters to the same bytes, and its live adapters give the same logits. Its stack
# wants Debian 12; elsewhere this is no failure, the goldens of the tests are from it.
peft() {
  local stack=target/oracle python
  if ! scripts/oracle_stack.sh "$stack" merge; then
    echo 'not compared with PEFT: its stack (apt-get and python3.11 of Debian 12, pip) cannot be installed here'
    return
  fi
  cargo build --locked --quiet || return
  for python in python python-peft-0.18; do
    "$stack/$python" scripts/check_merged_logits.py target/debug/infold || return
    "$stack/$python" scripts/check_merge_with_peft.py target/debug/infold || return
  done
}

# The kernels through nvcc for every architecture, then the feature through clippy. Whoever has no
# toolkit gets one from wheels. In a folder of its own: it can run beside the other steps.
cuda() (
  use_cuda_toolkit
  CARGO_TARGET_DIR=target/cuda cargo clippy --all-targets --features cuda --locked --quiet -- -D warnings
)

# The GPU tests on GPUs that this machine's CPU emulates. By hand: half an hour on two cores.
emulated() (
  use_cuda_toolkit
  (cd tests/cuda/emulator && cargo fmt --check && CARGO_TARGET_DIR=../../../target/cuda/emulator \
    cargo clippy --all-targets --locked --quiet -- -D warnings) || return
  CARGO_TARGET_DIR=target/cuda scripts/check_cuda_emulated.sh
)

use_cuda_toolkit() {
  local exports
  if [[ -z ${CUDA_HOME:-} ]]; then
    exports=$(scripts/cuda_toolchain.sh target/cuda-toolkit) || {
      echo 'the CUDA toolkit cannot be installed from wheels'
      exit 77
    }
    eval "$exports"
  fi
}

# candle's own kernels take ten minutes on one core the first time: begun first, awaited last.
begin_cuda() {
  cuda_log=$(mktemp)
  cuda >"$cuda_log" 2>&1 &
  cuda_pid=$!
}
await_cuda() {
  local status=0
  wait "$cuda_pid" || status=$?
  cat "$cuda_log"
  rm -f "$cuda_log"
  return "$status"
}
# A real model learns who it is; with a release build, as a user has it.
quickstart() { scripts/quickstart.sh; }

clients() {
  local environment=target/clients
  if ! command -v python3 >/dev/null || ! python3 -c 'import ensurepip, venv'; then
    echo 'the clients need python3 with venv'
    return 77
  fi
  if ! [[ -x $environment/bin/pytest ]]; then
    rm -rf "$environment"
    python3 -m venv "$environment" || return
  fi
  if ! "$environment/bin/pip" install --quiet --requirement tests/clients/requirements.txt; then
    echo 'the packages in tests/clients/requirements.txt cannot be installed'
    return 77
  fi
  cargo build --locked --quiet || return
  INFOLD_BIN=target/debug/infold "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/clients
}

start=$SECONDS
for name in "${@:-all}"; do
  case $name in
    all)
      begin_cuda
      step fmt fmt
      step clippy clippy
      step test tests
      step doc doc
      step deny deny
      step clients clients
      step gotmpl gotmpl
      step gguf gguf
      step peft peft
      step quickstart quickstart
      step cuda await_cuda
      ;;
    fmt | clippy | doc | deny | clients | gotmpl | gguf | peft | quickstart | cuda | emulated) step "$name" "$name" ;;
    test) step test tests ;;
    *)
      echo "check.sh: there is no step $name" >&2
      exit 2
      ;;
  esac
done

if ((${#failed[@]})); then
  printf 'FAILED: %s (%ss)\n' "${failed[*]}" $((SECONDS - start))
  exit 1
fi
printf 'all checks passed (%ss)\n' $((SECONDS - start))
