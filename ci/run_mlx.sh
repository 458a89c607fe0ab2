#!/usr/bin/env bash
# The certificate of mlx_lora: on Apple silicon with Metal, on Linux with MLX's CPU build. A Mac also certifies mps_bnb.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(uname -s)" = Darwin ]; then
  python3 ci/setup_environment.py --tests
  .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[torch-family]"
  ci/certify.sh mps_bnb
else
  [ -d .venv ] || python3 -m venv .venv
  .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[mlx-cpu,conformance]"
fi
ci/certify.sh mlx_lora
