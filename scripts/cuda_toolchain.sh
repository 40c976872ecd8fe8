#!/usr/bin/env bash
# Sets up nvcc 13.0, CUDA's headers and link names in a folder, for machines without a CUDA toolkit.
#
#   eval "$(scripts/cuda_toolchain.sh FOLDER)"
#
# Everything comes from Python wheels of fixed versions (pip downloads them from whatever index it
# is configured with), so neither root nor a GPU is needed: enough to compile our own kernels, to
# build candle's, and to link a binary that loads the driver when it runs. libcuda.so is a stub
# whose functions do nothing: a binary must find the driver's own one when it runs, so never put
# FOLDER/lib/stubs on LD_LIBRARY_PATH. A second call with the same folder only prints the exports.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: eval \"\$(${0##*/} FOLDER)\"" >&2
    exit 2
fi
mkdir -p "$1"
root=$(cd "$1" && pwd)

# name==version, and the wheel's sha256.
packages=(
    "nvidia-cuda-nvcc==13.0.88 56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03"
    "nvidia-nvvm==13.0.88 c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0"
    "nvidia-cuda-crt==13.0.88 2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4"
    "nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"
    "nvidia-cuda-cccl==13.0.85 e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649"
    "nvidia-cuda-nvrtc==13.0.88 ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575"
    "nvidia-cublas==13.1.0.3 ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171"
    "nvidia-curand==10.4.0.35 1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc"
    "nvidia-nccl-cu13==2.28.9 e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42"
)

# Installs the wheels with their hashes checked. They share one tree, nvidia/cu13, except NCCL.
install_wheels() {
    local requirements=$root/requirements.txt
    : >"$requirements"
    for package in "${packages[@]}"; do
        echo "${package% *} --hash=sha256:${package#* }" >>"$requirements"
    done
    python3 -m pip install --quiet --no-deps --only-binary=:all: --require-hashes \
        --no-compile --upgrade --target "$root/site" --requirement "$requirements" >&2
}

# Gives every library its link name, libX.so: wheels have libX.so.N only.
link_names() {
    local library name
    mkdir -p "$root/lib"
    for library in "$cuda"/lib/*.so.* "$root"/site/nvidia/nccl/lib/*.so.*; do
        name=$(basename "$library")
        ln -sf "$library" "$root/lib/$name"
        ln -sf "$library" "$root/lib/${name%%.so.*}.so"
    done
    ln -sf "$cuda"/lib/*.a "$root/lib/"
    # Build scripts look for lib64 below CUDA_HOME.
    ln -sfn "$root/lib" "$cuda/lib64"
    ln -sf "$root"/site/nvidia/nccl/include/*.h "$cuda/include/"
}

# Builds a libcuda.so with every function that the driver's header names, old versions included.
make_driver_stub() {
    local source=$root/driver_stub.c
    mkdir -p "$root/lib/stubs"
    cat "$cuda"/include/cuda.h "$cuda"/include/cudaProfiler*.h |
        grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' | sort -u | sed 's/.*/void &(void) {}/' >"$source"
    ${CC:-cc} -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$root/lib/stubs/libcuda.so" "$source"
    ln -sf libcuda.so "$root/lib/stubs/libcuda.so.1"
}

cuda=$root/site/nvidia/cu13
stamp=$root/.installed
wanted=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$root/site" "$root/lib"
    install_wheels
    link_names
    make_driver_stub
    echo "$wanted" >"$stamp"
fi

cat <<EXPORTS
export CUDA_HOME='$cuda'
export CUDA_PATH='$cuda'
export CUDA_TOOLKIT_ROOT_DIR='$cuda'
export CUDA_COMPUTE_CAP=90
export PATH='$cuda/bin':"\$PATH"
export LIBRARY_PATH='$root/lib:$root/lib/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
EXPORTS
