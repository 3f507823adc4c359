#!/usr/bin/env bash
# Installs a wheel into a clean environment outside the checkout and uses it there: scripts/check_wheel.py.
#   scripts/check_wheel.sh WHEEL [OPTION OF check_wheel.py...]
# The wheel's dependencies (torch is gigabytes) are not downloaded: they are those of PYTHON, through a .pth file. An
# editable installation of lightning_acu there stays invisible. FULL=1 downloads them instead.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
wheel=$(realpath "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

if [ -n "${FULL:-}" ]; then
    "$python" -m venv clean
    clean/bin/python -m pip install --quiet "${wheel}[onnx]"
else
    "$python" -m venv --without-pip clean
    "$python" -m pip --python clean/bin/python install --quiet --no-deps "$wheel"
    site=$(clean/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"
fi
clean/bin/python "$root/scripts/check_wheel.py" "$@"
