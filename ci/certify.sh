#!/usr/bin/env bash
# Certify one backend on this machine: ci/certify.sh NAME. Leaves certificate and reports in runs/conformance/NAME.
# Keep the certificate with: cp runs/conformance/NAME/certificate.json docs/certificates/NAME.json; python ci/matrix.py
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
out=runs/conformance/$name
.venv/bin/python -m qlora_hal_conformance --backend "$name" --out "$out"
.venv/bin/python -m qlora_hal_conformance --verify "$out/certificate.json"
