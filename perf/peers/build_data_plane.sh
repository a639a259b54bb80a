#!/bin/sh
# Builds the bare data plane: target/peers/data_plane, which `a2a-perf --device cuda --peers` runs.
#
# Takes nvcc from A2A_NVCC, CUDA_HOME, PATH or /usr/local/cuda. A2A_PERF_GENCODE names other GPUs than Hopper and newer.
# Needs no GPU and no cargo. Exit code 3: there is no nvcc.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
mkdir -p "$target/peers"
peers=$(cd "$target/peers" && pwd)

for nvcc in "${A2A_NVCC:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [ -n "$nvcc" ] && [ -x "$nvcc" ]; then
        break
    fi
    nvcc=
done
if [ -z "$nvcc" ]; then
    echo "build_data_plane.sh: no nvcc in A2A_NVCC, CUDA_HOME, PATH or /usr/local/cuda" >&2
    exit 3
fi

gencode=${A2A_PERF_GENCODE:-"-gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90"}
# The wheel's nvcc has its libraries where it does not look for them.
lib=$(dirname "$nvcc")/../lib
"$nvcc" -O3 -std=c++17 $gencode -L"$lib" "$here/data_plane.cu" -o "$peers/data_plane"
echo "built $peers/data_plane with $("$nvcc" --version | grep release)"
