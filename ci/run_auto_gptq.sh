#!/usr/bin/env bash
# auto-gptq 0.7.1 itself, on a CPU and in an environment of its own: its engine's tests, a model quantized and trained
# with it, and the certificate of gptq_int4 on this engine in runs/conformance/gptq_int4_auto_gptq. --keep puts the
# certificate into docs/certificates and the support table. Needs Linux on x86-64 and Python 3.11 (PYTHON names it).
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${AUTO_GPTQ_ENVIRONMENT:-.venv-auto-gptq}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
[ -d "$environment" ] || "$python" -m venv "$environment"
bin=$environment/bin
index=$("$python" -c 'import sys; sys.path.insert(0, "ci"); import setup_environment as s; print(*s.torch_index("cpu"))')
# shellcheck disable=SC2086  # two words or none
"$bin/pip" install --quiet --constraint ci/auto_gptq_constraints.txt --editable '.[auto-gptq,conformance]' pytest-timeout $index
"$bin/pip" check

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE=1
"$bin/python" -m pytest -q -p no:cacheprovider tests/gptq_auto/with_auto_gptq.py

work=runs/auto_gptq
rm -rf "$work"
mkdir -p "$work"
demo=$("$bin/python" -c 'from qlora_hal.demo import model_path; print(model_path())')
rows=$("$bin/python" -c 'from qlora_hal.demo import data_path; print(data_path("train"))')
held_out=$("$bin/python" -c 'from qlora_hal.demo import data_path; print(data_path("validation"))')
"$bin/qlora-hal" quantize "$demo" "$work/model" --data "$rows" --rows 64 --group-size 64 --engine auto_gptq
"$bin/qlora-hal" train --model "$work/model" --data "$rows" --data.validation_path "$held_out" \
  --output_dir "$work/run" --backend gptq_int4 --training.max_steps 30 --training.learning_rate 2e-3 \
  --training.per_device_train_batch_size 4 --training.seed 7
"$bin/python" - "$work/run/run.json" <<'CHECK'
import json, sys
run = json.load(open(sys.argv[1], encoding="utf-8"))
kernel = run["resolved"]["kernel_path"]
assert kernel.startswith("auto-gptq 0.7.1 cuda_old"), kernel
before, after = run["eval_loss_before"], run["eval_loss_after"]
assert after < 0.7 * before, f"30 steps took the held-out loss from {before} to {after} only"
CHECK

out=runs/conformance/gptq_int4_auto_gptq
"$bin/python" -m qlora_hal_conformance --backend gptq_int4 --out "$out"
"$bin/python" -m qlora_hal_conformance --verify "$out/certificate.json"
if [ "${1:-}" = --keep ]; then
  cp "$out/certificate.json" docs/certificates/gptq_int4_auto_gptq.json
  "$bin/python" ci/matrix.py
fi
