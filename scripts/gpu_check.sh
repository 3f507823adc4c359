#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 9 minutes: tests, memory errors, layers, training steps.
#   scripts/gpu_check.sh OUT        logs and CSV files go to the folder OUT; a short table comes last
# PYTHON: an interpreter that has the package with its extras dev and bench. A step that fails or runs out of time is
# reported, and the next one runs all the same. Not yet run on a GPU.
set -uo pipefail
out=$(mkdir -p "${1:?usage: scripts/gpu_check.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch finds no GPU here; without one, tests/ops/test_triton.py runs in the interpreter and scripts/compile_kernels.py compiles" >&2
    exit 2
fi
"$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' |
    tee "$out/device.txt"
failed=0
table=()

# step NAME SECONDS COMMAND...: a line of the table; the output goes to OUT/NAME.log.
step() {
    local name=$1 limit=$2 start=$SECONDS status=ok
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)" && failed=1; }
    table+=("$(printf '%-12s %-13s %4d s  %s' "$name" "$status" $((SECONDS - start)) \
        "$(grep -v '^\s*$' "$out/$name.log" | tail -n 1 | cut -c1-100)")")
}

layers() { # NAME SECONDS DTYPE KIND...
    local name=$1 limit=$2 dtype=$3
    shift 3
    step "$name" "$limit" "$python" benchmarks/bench_acu_conv2d.py --device cuda --backend triton --batch 32 --dtype "$dtype" \
        --methods plain ours dense deform --kind "$@" --budget 0.1 --out "$out"
}

step tests 150 "$python" -m pytest tests/ops/test_triton.py -q -x
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/ops/test_triton.py -q -k "lost or larger"
else
    table+=("sanitizer    skipped: no compute-sanitizer on this machine")
fi
layers bfloat16 130 bfloat16 dense3x3 dense5x5 depthwise
layers float16 60 float16 dense3x3 depthwise
layers float32 60 float32 dense3x3 depthwise
step train 70 "$python" benchmarks/train_step.py --device cuda --backend triton --batch 64 \
    --autocast bfloat16 --samples 5 --out "$out"

printf '%s\n' "${table[@]}" | tee "$out/table.txt"
exit $failed
