#!/usr/bin/env bash
# What an NVIDIA machine must pass: the tests with the GPU, and the certificate of cuda_bnb.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 ci/setup_environment.py --tests
.venv/bin/qlora-hal doctor
.venv/bin/python -m pytest
ci/certify.sh cuda_bnb
