#!/usr/bin/env bash
# Fetches CUDA's compiler from the Python package index into build/nvcc (80 MB, no GPU needed) and prints where nvcc is:
#
#   NVCC=$(patches/nvcc.sh) cargo build --release --features cuda
#
# An nvcc that is already there (NVCC, CUDA_PATH, PATH) is taken instead. Status 3: the index cannot be reached.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

for nvcc in "${NVCC:-}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [ -x "$nvcc" ]; then
        echo "$nvcc"
        exit
    fi
done

# The five belong together: another version of one of them does not compile.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)
folder=$root/build/nvcc
find_nvcc() { find "$folder" -path '*/nvidia/cu13/bin/nvcc' 2>/dev/null | head -n 1; }
if [ -z "$(find_nvcc)" ]; then
    python3 -m venv "$folder" >&2
    if ! "$folder/bin/pip" install --quiet "${packages[@]}" >&2; then
        rm -rf "$folder"
        say "nvcc cannot be fetched: no package index"
        exit 3
    fi
fi
find_nvcc
