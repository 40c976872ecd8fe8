#!/bin/bash
# Sets up the Python stack that computes the goldens of tests/fixtures/adapters and tests/fixtures/training:
# the versions of the workflow that this project replaces, on the CPU and without CUDA wheels.
#
#   scripts/oracle_stack.sh DIR          -> DIR/python: transformers 4.46.2, PEFT 0.12.0, torch 1.13.1
#   scripts/oracle_stack.sh DIR newer    -> also DIR/python-newer: PEFT 0.18.1 over transformers 4.57 and torch 2.6,
#                                        which NEWER_PYTHON (an interpreter) has; else a venv gets them (gigabytes)
#   scripts/oracle_stack.sh DIR openblas -> also DIR/python-openblas: DIR/python with OpenBLAS in place of the
#                                        reference BLAS, for timings (goldens keep the reference BLAS)
#   scripts/oracle_stack.sh DIR merge    -> only what comparisons of merges need: DIR/python without data sets, and
#                                        DIR/python-peft-0.18: PEFT 0.18.1 over the same transformers and torch
#
# DIR/python and DIR/python-newer are used as `python3` is. A step whose result exists is skipped. Needs Debian 12,
# whose python3-torch is a small CPU build, and its python3 3.11; no root: packages are only unpacked, into DIR.
# About 250 MB of downloads and 1.2 GB on disk, for `merge` half of it.
set -euo pipefail

dir=${1:?usage: oracle_stack.sh DIR [newer|merge]}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
root=$dir/debian
libraries=$root/usr/lib/$(uname -m)-linux-gnu
# The archives keep the reference BLAS and LAPACK in folders of their own, and a few libraries in usr/lib itself.
library_path=$libraries:$libraries/blas:$libraries/lapack:$root/usr/lib:$root/lib/$(uname -m)-linux-gnu

unpack_debian_torch() {
  [ -f "$root/.complete" ] && return
  mkdir -p "$dir/debs" "$root"
  # A fresh image has no lists of packages; only getting them wants root.
  apt-cache show python3-torch >/dev/null 2>&1 || apt-get update -qq
  apt-get install --no-install-recommends --print-uris -qq python3-torch | awk '{print $2}' | cut -d_ -f1 | sort -u \
    >"$dir/debs/names"
  # A machine that already has some of the libraries gets the others only.
  (cd "$dir/debs" && xargs apt-get download -qq <names && for deb in ./*.deb; do dpkg -x "$deb" "$root"; done)
  rm -rf "$dir/debs"
  touch "$root/.complete"
}

# install_set NAME FOLDER PACKAGE…: for Debian's python, once.
install_set() {
  local mark=$dir/$2/.complete-$1 folder=$dir/$2
  shift 2
  [ -f "$mark" ] && return
  # --no-deps: to these packages' dependencies belongs the CUDA build of torch.
  python3 -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$folder" \
    --python-version 3.11 --only-binary=:all: "$@"
  touch "$mark"
}

install_packages() {
  install_set transformers site \
    transformers==4.46.2 peft==0.12.0 accelerate==1.1.1 tokenizers==0.20.3 safetensors==0.4.5 \
    huggingface_hub==0.26.2 regex==2024.11.6 tqdm==4.67.0 filelock==3.16.1 fsspec==2024.9.0 packaging==24.2 \
    pyyaml==6.0.2 requests==2.32.3 urllib3==2.2.3 certifi==2024.8.30 idna==3.10 charset-normalizer==3.4.0 \
    typing_extensions==4.12.2 psutil==6.1.0 jinja2==3.1.4 markupsafe==3.0.2
}

install_datasets() {
  install_set datasets site \
    datasets==3.1.0 pyarrow==18.0.0 pandas==2.2.3 dill==0.3.8 multiprocess==0.70.16 xxhash==3.5.0 \
    aiohttp==3.10.10 multidict==6.1.0 yarl==1.17.1 propcache==0.2.0 frozenlist==1.5.0 attrs==24.2.0 \
    aiosignal==1.3.1 aiohappyeyeballs==2.4.3 python-dateutil==2.9.0.post0 pytz==2024.2 tzdata==2024.2 six==1.16.0
}

# DeepSpeed itself wants a CUDA tool chain; its learning-rate schedules are one file of its source archive.
unpack_deepspeed() {
  [ -f "$dir/deepspeed/lr_schedules.py" ] && return
  mkdir -p "$dir/deepspeed"
  # pip runs the archive's setup.py for its metadata, which imports torch and wheel.
  python3 -m pip install -q --disable-pip-version-check --upgrade --target "$dir/build-tools" \
    setuptools==75.6.0 wheel==0.45.1
  PYTHONPATH=$dir/build-tools:$dir/site:$root/usr/lib/python3/dist-packages LD_LIBRARY_PATH=$library_path \
    DS_BUILD_OPS=0 python3 -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation \
    --no-binary=:all: -d "$dir/deepspeed" deepspeed==0.16.3
  tar -xzf "$dir"/deepspeed/deepspeed-*.tar.gz -C "$dir/deepspeed" --strip-components=3 \
    --wildcards '*/deepspeed/runtime/lr_schedules.py'
}

# Of LLaMA-Factory only the smoothing of its loss curve is run.
unpack_llamafactory() {
  [ -f "$dir/llamafactory/ploting.py" ] && return
  mkdir -p "$dir/llamafactory"
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$dir/llamafactory" \
    llamafactory==0.9.1
  (cd "$dir/llamafactory" && python3 -m zipfile -e llamafactory-*.whl all && mv all/llamafactory/extras/ploting.py . && rm -r all)
}

install_newer() {
  [ -f "$dir/site-newer/.complete" ] && return
  if [ -z "${NEWER_PYTHON:-}" ]; then
    python3 -m venv "$dir/venv-newer"
    "$dir/venv-newer/bin/pip" install -q --disable-pip-version-check torch==2.6.0 transformers==4.57.1 \
      safetensors==0.6.2 numpy
  fi
  python3 -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$dir/site-newer" \
    peft==0.18.1 accelerate==1.10.1
  touch "$dir/site-newer/.complete"
}

unpack_openblas() {
  [ -f "$dir/openblas/.complete" ] && return
  mkdir -p "$dir/openblas"
  (cd "$dir/openblas" && apt-get download -qq libopenblas0-pthread && dpkg -x ./*.deb . && rm ./*.deb)
  touch "$dir/openblas/.complete"
}

# write_wrapper FILE PYTHONPATH LD_LIBRARY_PATH INTERPRETER
write_wrapper() {
  cat >"$1" <<WRAPPER
#!/bin/bash
export PYTHONPATH="$2" LD_LIBRARY_PATH="$3" PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
export TRANSFORMERS_OFFLINE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
# The processor decides in which order PyTorch sums a norm; this is the order of the goldens.
export ATEN_CPU_CAPABILITY="\${ATEN_CPU_CAPABILITY:-avx2}"
# Without it MKL multiplies and adds in one rounding, other than the reference BLAS of Debian's torch.
export MKL_CBWR=COMPATIBLE ORACLE_STACK="$dir"
exec "$4" "\$@"
WRAPPER
  chmod +x "$1"
}

unpack_debian_torch
install_packages
write_wrapper "$dir/python" "$dir/site:$root/usr/lib/python3/dist-packages" \
  "$library_path" /usr/bin/python3
if [ "${2:-}" = merge ]; then
  install_set peft site-peft-0.18 peft==0.18.1
  write_wrapper "$dir/python-peft-0.18" "$dir/site-peft-0.18:$dir/site:$root/usr/lib/python3/dist-packages" \
    "$library_path" /usr/bin/python3
else
  install_datasets
  unpack_deepspeed
  unpack_llamafactory
fi
if [ "${2:-}" = newer ]; then
  install_newer
  write_wrapper "$dir/python-newer" "$dir/site-newer" "" "${NEWER_PYTHON:-$dir/venv-newer/bin/python}"
fi
if [ "${2:-}" = openblas ]; then
  unpack_openblas
  write_wrapper "$dir/python-openblas" "$dir/site:$root/usr/lib/python3/dist-packages" \
    "$dir/openblas/usr/lib/$(uname -m)-linux-gnu/openblas-pthread:$library_path" /usr/bin/python3
  sed -i '/OMP_NUM_THREADS/s/OMP_NUM_THREADS=1 //' "$dir/python-openblas"
fi
"$dir/python" -c 'import torch, transformers, peft; print("torch", torch.__version__, "transformers",
  transformers.__version__, "peft", peft.__version__)'
