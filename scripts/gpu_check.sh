#!/usr/bin/env bash
# Everything that needs a GPU: tests, memory errors, tiles, then layers and training steps with these tiles.
#   scripts/gpu_check.sh OUT        in at most 9 minutes; logs and CSV files go to the folder OUT, a short table comes last
#   scripts/gpu_check.sh OUT 1      tests, memory errors, races, tiles and a profile, in at most 4 minutes
#   scripts/gpu_check.sh OUT 2      layers and training steps, in at most 4 minutes more
# PYTHON: an interpreter with torch, Triton, timm and pytest (faster with pytest-xdist); the package need not be
# installed. DEADLINE (510; 220 for a part): seconds after which no step begins. A step that fails or runs out of time
# is reported, the next one runs all the same, and the exit status is 1; 2 without a GPU. Not yet run on a GPU.
set -uo pipefail
out=$(mkdir -p "${1:?usage: scripts/gpu_check.sh OUT}" && cd "$1" && pwd) || exit
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
part=${2:-both}
case $part in
    both) deadline=${DEADLINE:-510} ;;
    1 | 2) deadline=${DEADLINE:-220} ;;
    *) echo "the part is 1 or 2, not $part" >&2 && exit 2 ;;
esac
export LIGHTNING_ACU_CACHE=$out # the tiles of part 1 are those of part 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch finds no GPU here; without one, tests/ops/test_triton.py runs in the interpreter and" \
        "scripts/compile_kernels.py compiles" >&2
    exit 2
fi
"$python" -c 'import torch, triton
versions = "torch", torch.__version__, "triton", triton.__version__, "cuDNN", torch.backends.cudnn.version()
print(torch.cuda.get_device_name(), *versions)' 2>&1 | tail -n 1 | tee "$out/device.txt"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
table=()

row() { table+=("$(printf '%-10s %-12s %4d s  %s' "$@")"); } # NAME STATUS SECONDS TEXT

# step NAME LIMIT COMMAND...: a row of the table; the output goes to OUT/NAME.log.
step() {
    local name=$1 limit=$2 left=$((deadline + 20 - SECONDS)) start=$SECONDS status=ok code
    shift 2
    if ((SECONDS >= deadline)); then
        row "$name" SKIPPED 0 "$deadline seconds were gone"
        failed=1
        return
    fi
    timeout --signal=INT --kill-after=5 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1 # pytest then reports
    code=$?
    case $code in
        0) ;;
        124 | 137) status="OUT OF TIME" failed=1 ;;
        *) status="FAILED ($code)" failed=1 ;;
    esac
    row "$name" "$status" $((SECONDS - start)) "$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-90)"
}

# layers NAME LIMIT ARGUMENT...: times of layers. It ends by itself before the limit, with what it has.
layers() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" benchmarks/bench_acu_conv2d.py --limit $((limit - 15)) --out "$out" "${bench[@]}" "$@"
}

bench=(--device cuda --backend triton --batch 64 --budget 0.04 --samples 10)
train=(--device cuda --backend triton --batch 128 --autocast bfloat16 --compile --samples 7)
models=(resnet50 resnet18 efficientnet_b0)
some=(--only '(ResNet (64|512)|ResNet-50 256|EfficientNet (144|480))[@-]' --kind dense3x3 depthwise)

# Compilers take minutes, on one core each. While the tests run, others fill the caches for what is timed after that.
few_threads=(env OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4)
warming=()
warm() { # NAME COMMAND...
    timeout --kill-after=5 115 "${few_threads[@]}" "${@:2}" --samples 1 --out "$scratch/$1" >"$out/warm-up-$1.log" 2>&1 &
    warming+=($!)
}
if [[ $part != 1 ]] && ((SECONDS < deadline)); then
    for kind in dense3x3 dense5x5 depthwise; do
        warm "bfloat16-$kind" "$python" benchmarks/bench_acu_conv2d.py "${bench[@]}" --methods ours --launch eager \
            --dtype bfloat16 --kind "$kind"
    done
    for how in "--dtype float16" "--dtype float32" "--dtype float32 --no-tf32"; do # shellcheck disable=SC2086
        warm "${how//[- ]/}" "$python" benchmarks/bench_acu_conv2d.py "${bench[@]}" --methods ours --launch eager \
            "${some[@]}" $how
    done
    for model in "${models[@]}"; do
        warm "$model" "$python" benchmarks/train_step.py "${train[@]}" --models "$model" --warm-up 1
    done
fi
if [[ $part != 2 ]]; then
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
step tests 110 "${few_threads[@]}" "$python" -m pytest tests/ops/test_triton*.py -q "${workers[@]}" \
    -k 'not compile_without_spills' # that needs no GPU
fi
start=$SECONDS ready=0
for pid in "${warming[@]}"; do wait "$pid" && ((ready += 1)); done
row warm-ups - $((SECONDS - start)) \
    "$ready of ${#warming[@]} filled the compilers' caches; a failure shows again in its step"

if [[ $part != 2 ]]; then
# Random layers of the tests against the closed form. Without torch's memory pool, no memory beyond a tensor is allocated.
cases='import sys, torch
from helpers.fast_oracle import each, run
torch.backends.cudnn.allow_tf32 = False
each(range(5_000_000, 5_000_000 + int(sys.argv[1])), lambda seed, one: one.check(run(one, "triton", "cuda")), dtype=torch.float32)'
layers='import torch
from lightning_acu import acu_conv2d
for channels, size, groups in ((128, 28, 1), (144, 28, 144)):
    image = torch.randn(32, channels, size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(channels, channels // groups, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offsets = (torch.rand(1, 9, 2, device="cuda") * 2 - 1).requires_grad_()
    acu_conv2d(image, weight, offsets, padding=1, groups=groups, backend="triton").sum().backward()'
if command -v compute-sanitizer >/dev/null; then
    checked=(env PYTHONPATH="$PYTHONPATH:tests" PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer)
    step sanitizer 35 "${checked[@]}" --error-exitcode 1 --report-api-errors no "$python" -c "$cases" 4
    step racecheck 20 "${checked[@]}" --tool racecheck --error-exitcode 1 "$python" -c "$cases" 2
else
    row sanitizer skipped 0 "no compute-sanitizer on this machine"
    row racecheck skipped 0 "no compute-sanitizer on this machine"
fi

step tiles 55 "$python" -m lightning_acu tune --only tiles --dtype bfloat16 --tile_seconds 40

# The kernels of a dense and a depthwise layer, with the tiles just found.
if command -v ncu >/dev/null; then
    step ncu 25 ncu --clock-control none --target-processes all --kernel-name 'regex:_(product|input|forward|weight)_kernel' \
        --launch-count 12 --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats "$python" -c "$layers"
else
    row ncu skipped 0 "no ncu on this machine"
fi
fi

if [[ $part != 1 ]]; then
layers bfloat16 80 --dtype bfloat16 --kind dense3x3 depthwise dense5x5
step train 105 "$python" benchmarks/train_step.py "${train[@]}" --models "${models[@]}" --limit 70 --out "$out"
layers float16 28 --dtype float16 --launch graph "${some[@]}"
layers tf32 28 --dtype float32 --launch graph "${some[@]}"
layers float32 28 --dtype float32 --no-tf32 --launch graph "${some[@]}"
layers memory 22 --dtype bfloat16 --memory "${some[@]}"
fi
{
    cat "$out/device.txt"
    printf '%s\n' "${table[@]}"
    "$python" benchmarks/tables.py "$out"
} 2>&1 | tee "$out/table.txt"
exit $failed
