#!/usr/bin/env bash
# A disk that fills up during training: the run must say so and lose nothing but the updates since
# the last checkpoint; with room again it goes on and ends as if nothing had happened.
#
#   scripts/check_full_disk.sh [PROGRAM]      default: target/debug/infold
#
# Needs root, for a small tmpfs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

program=${1:-target/debug/infold}
dir=$(mktemp -d)
clean_up() {
  mountpoint -q "$dir/small" && umount "$dir/small"
  rm -rf "$dir"
}
trap clean_up EXIT
fail() {
  echo "check_full_disk: $*" >&2
  exit 1
}

train() {
  "$program" train --model_name_or_path tests/fixtures/tiny-qwen2 --dataset persona --template qwen \
    --output_dir "$1" --max_samples 24 --cutoff_len 64 --per_device_train_batch_size 4 --num_train_epochs 4 \
    --learning_rate 1e-3 --logging_steps 1 --save_steps 1 --lora_rank 64 >"$dir/stdout" 2>"$dir/stderr"
}

train "$dir/whole" || fail "$(cat "$dir/stderr")"
checkpoint=$(du -sk "$dir/whole/checkpoint-2" | cut -f1)
mkdir "$dir/small"
# Room for some checkpoints and a half.
mount -t tmpfs -o "size=$((checkpoint * 9 / 2))k" tmpfs "$dir/small"
if train "$dir/small/out"; then
  fail 'the run fitted on a disk that is too small for it'
fi
grep -qi 'no space left' "$dir/stderr" || fail "the error does not name the full disk: $(cat "$dir/stderr")"
echo "error    $(tail -n 3 "$dir/stderr" | tr '\n' ' ')"
saved=$(find "$dir/small/out" -maxdepth 1 -name 'checkpoint-*' | wc -l)
((saved >= 2)) || fail "$saved checkpoints are left"
mount -o remount,size=1g "$dir/small"
train "$dir/small/out" || fail "$(cat "$dir/stderr")"
grep -o 'resuming at step [0-9]*' "$dir/stderr" || fail 'the run began anew'
cmp "$dir/whole/adapter_model.safetensors" "$dir/small/out/adapter_model.safetensors" ||
  fail 'the adapter is not that of a run without a full disk'
echo "a full disk after $saved checkpoints lost nothing but the updates since the last one"
