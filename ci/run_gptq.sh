#!/usr/bin/env bash
# The certificate of gptq_int4, in an environment of its own: GPTQModel pins other versions than the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[gptq,conformance]"
ci/certify.sh gptq_int4
