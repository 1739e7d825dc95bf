#!/bin/sh
# Checks the GPU engine on this machine's GPU and prints a short table last.
#
# usage: scripts/gpu_check.sh [FOLDER]
#
# Without a folder: compiles the kernels (`cargo xtask kernels`) if there are none, builds the checks and runs them. With one, runs
# what it holds, so that it can be prepared elsewhere: `gpu-check` (the program that `cargo test --release --features cuda --test
# gpu --no-run` builds), `flashlla-kernels.bundle`, and, if wanted, `flashlla` (built with `--features cuda`).
set -eu
cd "$(dirname "$0")/.."
export FLASHLLA_REQUIRE_GPU=1 CARGO_MANIFEST_DIR="$PWD/crates/flashlla"

if [ $# -eq 0 ]; then
    target=${CARGO_TARGET_DIR:-target}
    export FLASHLLA_KERNELS="${FLASHLLA_KERNELS:-$target/kernels/flashlla-kernels.bundle}"
    [ -e "$FLASHLLA_KERNELS" ] || cargo xtask kernels
    exec cargo test --release -p flashlla --features cuda --test gpu
fi

folder=$(cd "$1" && pwd)
export FLASHLLA_KERNELS="$folder/flashlla-kernels.bundle"
status=0
if [ -x "$folder/flashlla" ]; then
    # One golden case in every type through the command line, and the speed with the copies to and from the GPU.
    for dtype in f32 f16 bf16; do
        "$folder/flashlla" attend crates/flashlla/tests/golden/causal_small.safetensors --dtype $dtype --device cuda \
            --output "${TMPDIR:-/tmp}/gpu_check.safetensors" || status=1
    done
    "$folder/flashlla" bench --device cuda --dtype bf16 --shape 1,16,4096,64 --shape 1,8,4096,128 --repeats 3 || status=1
fi
"$folder/gpu-check" || status=1
exit $status
