#!/bin/sh
# Checks and times everything that runs on a GPU, on this machine's, and prints a short table last.
#
# usage: scripts/gpu_check.sh [FOLDER]
#
# Without a folder: compiles the kernels (`cargo xtask kernels`) if there are none, builds the checks and runs them; then, if the Python that is found has
# PyTorch and CuPy, the kernels against float64 PyTorch with their tables. With one, runs what it holds, so that it can be prepared elsewhere:
#
#   gpu-check                the program that `cargo test --release -p flashlla --features cuda --test gpu --no-run` builds
#   flashlla-kernels.bundle  the compiled kernels
#   flashlla                 if wanted: the command line, built with `--features cuda`
#   k                        if wanted: the cubins of target/kernels/sm_90, for gpu_check.py and gpu_decode.py
#   site                     if wanted: the wheel of crates/flashlla-python, unpacked, and pytest with what it needs, for the Python package's tests on a GPU
set -eu
cd "$(dirname "$0")/.."
export FLASHLLA_REQUIRE_GPU=1 CARGO_MANIFEST_DIR="$PWD/crates/flashlla"

status=0
table=
# A line of the table for a command: its name, and whether it went well.
step() {
    name=$1
    shift
    began=$(date +%s)
    if "$@"; then result=ok; else result=FAILED status=1; fi
    table="$table$(printf '%-40s %-6s %5s s' "$name" "$result" $(($(date +%s) - began)))
"
}

scripts() {
    step "kernels against float64 PyTorch" python3 scripts/gpu_check.py "$1"
    step "decoding against float64 PyTorch" python3 scripts/gpu_decode.py "$1"
}

if [ $# -eq 0 ]; then
    target=${CARGO_TARGET_DIR:-target}
    export FLASHLLA_KERNELS="${FLASHLLA_KERNELS:-$target/kernels/flashlla-kernels.bundle}"
    [ -e "$FLASHLLA_KERNELS" ] || cargo xtask kernels
    step "the engine against the CPU's" cargo test --release -p flashlla --features cuda --test gpu
    if python3 -c "import torch, cupy" 2>/dev/null; then
        scripts "$target/kernels/sm_90"
    else
        echo "skipped: gpu_check.py and gpu_decode.py need PyTorch and CuPy"
    fi
else
    folder=$(cd "$1" && pwd)
    export FLASHLLA_KERNELS="$folder/flashlla-kernels.bundle"
    step "the engine against the CPU's" "$folder/gpu-check"
    if [ -x "$folder/flashlla" ]; then
        # One golden case in every type through the command line, and the speed with the copies to and from the GPU.
        for dtype in f32 f16 bf16; do
            step "flashlla attend, $dtype" "$folder/flashlla" attend crates/flashlla/tests/golden/causal_small.safetensors \
                --dtype $dtype --device cuda --output "${TMPDIR:-/tmp}/gpu_check.safetensors"
        done
        step "flashlla bench" "$folder/flashlla" bench --device cuda --dtype bf16 --shape 1,16,4096,64 --shape 1,8,4096,128 \
            --repeats 3
    fi
    [ ! -d "$folder/k" ] || scripts "$folder/k"
    if [ -d "$folder/site" ]; then
        tests=crates/flashlla-python/tests
        step "the Python package" env PYTHONPATH="$folder/site" python3 -m pytest -q -p no:cacheprovider "$tests/test_cuda.py" \
            "$tests/test_cuda_calls.py" "$tests/test_cuda_decode.py"
    fi
fi
printf '\n%s' "$table"
exit $status
