#!/usr/bin/env bash
# Makes the environments of the tools that benchmarks and parity tests compare with: .peers/NAME, from requirements/peers/NAME.txt.
# They are never part of the project: what they pull in stays there.
#
# usage: requirements/peers.sh [NAME ...]     (default: all)
#
# A line `# no-deps: PACKAGE==VERSION` in NAME.txt is installed without its dependencies, everything else with them.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/uv ] || { echo "requirements/peers.sh: run make setup first" >&2; exit 2; }

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for list in requirements/peers/*.txt; do names+=("$(basename "$list" .txt)"); done
fi

links=()
for folder in ${DANLU_WHEELS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true) ${PIP_FIND_LINKS:-}}; do
    links+=(--find-links "$folder")
done
index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
if [ -n "$index" ]; then links+=(--default-index "$index"); fi

failed=()
for name in "${names[@]}"; do
    list=requirements/peers/$name.txt
    [ -f "$list" ] || { echo "requirements/peers.sh: no such peer: $name" >&2; exit 2; }
    stamp=.peers/$name/.installed
    wanted=$(sha256sum < "$list")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then continue; fi
    echo "installing the peer $name into .peers/$name"
    [ -x ".peers/$name/bin/python" ] || .venv/bin/uv venv --quiet --python .venv/bin/python ".peers/$name"
    install=(.venv/bin/uv pip install --quiet --python ".peers/$name/bin/python" "${links[@]}")
    mapfile -t alone < <(sed -n 's/^# no-deps: *//p' "$list")
    if "${install[@]}" -r "$list" && { [ ${#alone[@]} -eq 0 ] || "${install[@]}" --no-deps "${alone[@]}"; }; then
        echo "$wanted" > "$stamp"
    else
        failed+=("$name")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then echo "requirements/peers.sh: not installed: ${failed[*]}" >&2; exit 1; fi
