#!/usr/bin/env bash
# Runs the GPU tests without a GPU: the kernels' PTX on the CPU, under the engine's own driver calls,
# through the emulated driver of tests/cuda/emulator.
#
#   scripts/check_cuda_emulated.sh [8.0|9.0]…     compute capabilities (default: both)
#
# 8.0 takes Ampere's forms of the kernels, 9.0 Hopper's (TMA, wgmma, clusters) and FP8. TESTS names
# tests instead (parts of names, blanks between); CARGO_FLAGS is for cargo test (--release: faster to
# run, longer to build). Needs nvcc: eval "$(scripts/cuda_toolchain.sh FOLDER)" sets one up. Builds
# in $CARGO_TARGET_DIR, target/cuda unless set, as the step cuda of check.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${CUDA_HOME:-} ]]; then
  echo 'CUDA_HOME is not set; run: eval "$(scripts/cuda_toolchain.sh FOLDER)"' >&2
  exit 2
fi
capabilities=("$@")
(($#)) || capabilities=(8.0 9.0)
target=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target/cuda}")
read -ra flags <<<"${CARGO_FLAGS:-}"

cargo build --release --locked --quiet --manifest-path tests/cuda/emulator/Cargo.toml --target-dir "$target/emulator"
# One library under the names of all that it stands in for: the loader takes them for one.
links=$target/emulator/links
mkdir -p "$links"
for name in libcuda.so.1 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnccl.so.2; do
  ln -sf ../release/libemulator.so "$links/$name"
done

# PTX that is not packed, and Hopper's own, which no other GPU could run.
export CARGO_TARGET_DIR=$target INFOLD_CUDA_ARCHS=80
export INFOLD_NVCC_FLAGS='--no-compress -gencode=arch=compute_90a,code=compute_90a'
build=(cargo test --features cuda --locked "${flags[@]}" --test it)
"${build[@]}" --no-run

# Runs tests on so many GPUs: CAPABILITY GPUS ARGUMENTS… The runtime library is the toolkit's; it
# finds the emulated driver when it is used.
run() {
  local capability=$1 num_gpus=$2
  shift 2
  echo "compute capability $capability, $num_gpus GPUs: $*"
  EMULATED_CAPABILITY=$capability EMULATED_GPUS=$num_gpus \
    LD_LIBRARY_PATH=$links:$CUDA_HOME/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
    "${build[@]}" -- "$@"
}

for capability in "${capabilities[@]}"; do
  if [[ -n ${TESTS:-} ]]; then
    read -ra tests <<<"$TESTS"
    run "$capability" 4 "${tests[@]}" --test-threads=1
    continue
  fi
  tests=(cuda:: cuda_draws:: cuda_kv_cache_fp8::)
  [[ $capability != 9.0 ]] || tests+=(cuda_fp8::)
  # What needs several GPUs says so and ends; engines on them may not come and go at once.
  run "$capability" 1 "${tests[@]}"
  tests=(cuda_ranks:: cuda::two_gpus)
  [[ $capability != 9.0 ]] || tests+=(fp8_on_two_gpus)
  run "$capability" 4 "${tests[@]}" --test-threads=1
done
