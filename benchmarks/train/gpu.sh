#!/usr/bin/env bash
# Training on one GPU beside transformers.Trainer: tokens/s, MFU, peak memory. Needs torch, transformers, numpy, numba,
# pyarrow, pydantic and safetensors; no Ray. PYTHON names another interpreter.
#   benchmarks/train/gpu.sh [--quick] [--shapes 0.1b 1b] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python}" -m benchmarks.train.gpu "$@"
