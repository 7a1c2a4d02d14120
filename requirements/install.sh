#!/usr/bin/env bash
# Makes .venv and installs exactly what requirements/cpu.txt (or gpu.txt) lists, checked by hash; then the project itself.
#
# usage: requirements/install.sh [cpu|gpu]
#
# Wheels that no index carries (the CPU build of torch, on many machines) are looked for in the folders that pip is
# configured with (`find-links`), or in those of DANLU_WHEELS (separated by spaces).
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cpu}
list=requirements/$device.txt
[ -f "$list" ] || { echo "requirements/install.sh: no such device: $device (cpu or gpu)" >&2; exit 2; }

stamp=.venv/.installed
wanted="$(cat "$list" pyproject.toml requirements/install.sh | sha256sum | cut -c1-64) $(pwd)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "requirements/install.sh: needs Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check 'uv>=0.9'

links=()
for folder in ${DANLU_WHEELS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true) ${PIP_FIND_LINKS:-}}; do
    links+=(--find-links "$folder")
done
index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
if [ -n "$index" ]; then links+=(--default-index "$index"); fi

echo "installing $(grep -c '==' "$list") packages from $list"
# --no-deps: the list is complete; a dependency that it leaves out (CUDA on a CPU machine) is left out on purpose.
.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes --no-deps "${links[@]}" -r "$list" || {
    if [ "$device" = cpu ]; then
        echo "requirements/install.sh: if torch 2.13.0+cpu was not found, put its wheel in a folder and set DANLU_WHEELS to it" >&2
    fi
    exit 1; }
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
echo "$wanted" > "$stamp"
