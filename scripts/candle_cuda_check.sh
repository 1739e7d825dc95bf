#!/usr/bin/env bash
# Checks the types and lints of flashlla-candle's GPU path where there is neither CUDA nor a GPU.
#
# Candle's feature `cuda` compiles its own kernels with nvcc while it is built. What checks types does not need them, so a stand-in
# for nvcc writes empty files in their place. What this leaves in its target folder can't be linked or run.
set -euo pipefail
cd "$(dirname "$0")/.."

fake=$(mktemp -d)
trap 'rm -rf "$fake"' EXIT
mkdir "$fake/bin" "$fake/include"
echo '#define CUDA_VERSION 13000' >"$fake/include/cuda.h"
cat >"$fake/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;; esac
out= dir= sources=()
while test $# -gt 0; do
    case "$1" in
    -o | --output-file) out=$2; shift ;;
    -odir | --output-directory) dir=$2; shift ;;
    *.cu) sources+=("$1") ;;
    esac
    shift
done
test -z "$out" || : >"$out"
test -z "$dir" || for source in "${sources[@]}"; do : >"$dir/$(basename "$source" .cu).ptx"; done
NVCC
chmod +x "$fake/bin/nvcc"

export CUDA_HOME=$fake CUDA_PATH=$fake NVCC=$fake/bin/nvcc CUDA_COMPUTE_CAP=90 PATH=$fake/bin:$PATH
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/candle-cuda-check
cargo clippy -p flashlla-candle --features cuda -- -D warnings
