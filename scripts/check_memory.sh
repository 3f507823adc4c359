#!/usr/bin/env bash
# Memory checks of the CPU kernels: AddressSanitizer and UndefinedBehaviorSanitizer, and memory held after many calls.
#   scripts/check_memory.sh              3 minutes
#   scripts/check_memory.sh --valgrind   instead under memcheck, which sees what is read before it is written: 6 minutes
# PYTHON: an interpreter that has the package's dependencies, Cython and setuptools. Needs GCC on Linux.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
exercise=$root/scripts/exercise_kernels.py
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
failed=0

# build FOLDER OPTIMIZATION FLAG...: a copy of the source, with its kernels compiled in place.
build() {
    local folder=$work/$1 optimization=$2
    shift 2
    mkdir "$folder"
    tar -C "$root" -c --exclude='*.so' --exclude=__pycache__ lightning_acu configs setup.py pyproject.toml README.md LICENSE |
        tar -C "$folder" -x
    # Flags as part of CC: CFLAGS would not reach the link that finds out whether there is OpenMP.
    # Line numbers in reports are those of the .pyx files.
    sed -i "s/\"-O3\"/\"$optimization\"/; s/compiler_directives=directives/&, emit_linenums=True/" "$folder/setup.py"
    (cd "$folder" && CC="gcc $*" "$python" setup.py -q build_ext --inplace) >"$folder/log" 2>&1 || true
    local ops=$folder/lightning_acu/ops
    if [ "$(find "$ops" -name '*.so' | wc -l)" != "$(find "$ops" -name '*.pyx' | wc -l)" ]; then
        cat "$folder/log"
        echo "FAILED  build with $*"
        exit 1
    fi
}

# check NAME COMMAND...: one line that says how it went, after the output of a command that failed.
check() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "ok      $name ($((SECONDS - start)) s): $(tail -n 1 "$work/log")"
    else
        cat "$work/log"
        echo "FAILED  $name ($((SECONDS - start)) s)"
        failed=1
    fi
}

# The sanitizers' libraries go first, and libstdc++ with them: they look for its throw when they start.
# Memory that was never written holds NaN. Leaks of Python and torch are noise; the other check sees ours.
sanitized() {
    LD_PRELOAD="$(for name in asan ubsan stdc++; do gcc -print-file-name=lib$name.so; done | tr '\n' ' ')" \
        PYTHONMALLOC=malloc PYTHONPATH=$work/sanitized UBSAN_OPTIONS=print_stacktrace=1 \
        ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64:malloc_fill_byte=255:max_malloc_fill_size=1000000000 \
        "$python" "$exercise" --built-in "$work/sanitized"
}

leaks() { PYTHONPATH=$work/plain "$python" "$exercise" --built-in "$work/plain" --leaks 10000; }

# Only errors whose stack meets our modules count: Python and torch have their own. It has no AVX-512 and says so to
# programs, so that the kernels take AVX2.
memcheck() {
    PYTHONMALLOC=malloc PYTHONPATH=$work/plain valgrind --quiet --num-callers=20 --error-limit=no \
        --xml=yes --xml-file="$work/memcheck.xml" \
        "$python" "$exercise" --built-in "$work/plain" --first 4 --cases 27 || return 1
    "$python" - "$work/memcheck.xml" <<'EOF'
import sys
import xml.etree.ElementTree as ElementTree

errors = [
    error for error in ElementTree.parse(sys.argv[1]).getroot().iter("error")
    if not error.findtext("kind").startswith("Leak")  # in XML it always lists them; the other check is ours
]
ours = [
    error for error in errors if any("lightning_acu/ops/" in (frame.findtext("obj") or "") for frame in error.iter("frame"))
]
for error in ours:
    print(error.findtext("kind"), error.findtext("what") or error.findtext("xwhat/text"))
    for frame in error.iter("frame"):
        print("   ", frame.findtext("fn"), frame.findtext("file"), frame.findtext("line"))
print(f"{len(ours)} of {len(errors)} errors are in the kernels")
sys.exit(bool(ours))
EOF
}

build plain -O3 -g
if [ "${1:-}" = --valgrind ]; then
    check "valgrind memcheck" memcheck
else
    check "no leak" leaks
    build sanitized -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
        -fno-omit-frame-pointer -g
    check "AddressSanitizer and UndefinedBehaviorSanitizer" sanitized
fi
exit $failed
