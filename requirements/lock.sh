#!/usr/bin/env bash
# Resolves pyproject.toml into requirements/cpu.txt and gpu.txt: every version and hash, no host name.
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--extra dev --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate -q)
links=()
for folder in ${DANLU_WHEELS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}; do
    links+=(--find-links "$folder")
done
.venv/bin/uv pip compile pyproject.toml --extra cpu "${options[@]}" "${links[@]}" \
    --overrides requirements/overrides.txt --overrides requirements/overrides-cpu.txt -o requirements/cpu.txt
# The GPU list must not pick up a CPU build from a wheel folder.
env -u UV_FIND_LINKS .venv/bin/uv pip compile pyproject.toml --extra gpu "${options[@]}" \
    --overrides requirements/overrides.txt -o requirements/gpu.txt
