#!/usr/bin/env bash
# What an AMD machine must pass: the certificate of rocm_bnb.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 ci/setup_environment.py --tests
.venv/bin/qlora-hal doctor
ci/certify.sh rocm_bnb
