#!/usr/bin/env bash
# Check and measure this project on a GPU, and write baco-gpu.json to attach to an issue.
#
#     bash benchmarks/gpu.sh [options of python -m benchmarks.gpu, see --help]
#
# PYTHON names an interpreter whose torch sees the GPU (default: python3). The rest is installed into
# .venv-gpu, which uses that torch. Pairs are fetched from the Hugging Face hub; set HF_TOKEN for
# gated ones, or name others: --small qwen2.5-1.5b --large qwen2.5-7b.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "gpu.sh: torch of $python finds no CUDA device; install a build of torch for your GPU," \
    "or name another interpreter: PYTHON=... bash benchmarks/gpu.sh" >&2
  exit 2
}
[ -x .venv-gpu/bin/python ] || "$python" -m venv --system-site-packages .venv-gpu
.venv-gpu/bin/python -m pip install --quiet --editable '.[quantization]'
exec .venv-gpu/bin/python -m benchmarks.gpu "$@"
