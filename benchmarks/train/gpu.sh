#!/usr/bin/env bash
# Training on one GPU beside transformers.Trainer: tokens/s, MFU, peak memory. Needs no Ray, but for --ray.
#   benchmarks/train/gpu.sh [--quick] [--shapes 0.1b 1b] [--ray] [--dry-run]
# Runs in .venv where `make setup` made it. On a bare machine the few packages that it needs go into .peers/gpu, in the
# versions of requirements/gpu.txt. PYTHON names another interpreter, which is used as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
needs=(torch transformers accelerate peft numpy numba pyarrow pydantic pyyaml psutil safetensors tokenizers)
[[ " $* " != *" --ray "* ]] || needs+=("ray[default,train]" tensorboardx)
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.peers/gpu/bin/python
    wanted=$(echo "${needs[*]}" | cat - requirements/gpu.txt | sha256sum)
    if [ "$(cat .peers/gpu/.installed 2>/dev/null)" != "$wanted" ]; then
        python3 -m venv .peers/gpu
        sed -n 's/^\([A-Za-z0-9._-]*==[^ ]*\).*/\1/p' requirements/gpu.txt > .peers/gpu/versions.txt
        "$PYTHON" -m pip install -q --disable-pip-version-check -c .peers/gpu/versions.txt "${needs[@]}"
        echo "$wanted" > .peers/gpu/.installed
    fi
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "$PYTHON" -m benchmarks.train.gpu "$@"
