#!/usr/bin/env bash
# Builds dist/: the source distribution, and from it the wheel for this platform; checks both. `make wheel` calls it.
# On Linux the wheel gets the manylinux tag that the symbols it uses allow (the oldest glibc that has them; release wheels
# come from cibuildwheel in a manylinux_2_28 container).
# PYTHON: an interpreter with the dependency group "release" and the package's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
PATH=$(dirname "$python"):$PATH
export PATH
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

rm -rf dist
python -m build --outdir "$built" .
mkdir dist
mv "$built"/*.tar.gz dist
if [ "$(uname)" = Linux ]; then # OpenMP is torch's own copy: with another, two pools of threads would compete
    auditwheel repair --strip --exclude libgomp.so.1 --wheel-dir dist "$built"/*.whl
    auditwheel show --ldpaths "$built" dist/*.whl # (what torch's libgomp itself needs does not count)
else
    mv "$built"/*.whl dist
fi
twine check --strict dist/*
check-wheel-contents dist/*.whl
abi3audit --strict --summary dist/*.whl
PYTHON=$python scripts/check_wheel.sh dist/*.whl
ls -l dist
