#!/usr/bin/env bash
# The core and the suite on a machine without any tensor library: they must work, and catch every wrong backend.
set -euo pipefail
cd "$(dirname "$0")/.."
core=${CORE_ENVIRONMENT:-.venv-core}
[ -d "$core" ] || python3 -m venv "$core"
"$core/bin/pip" install --quiet --constraint constraints.txt --editable ".[conformance]"
"$core/bin/python" - <<'CHECK'
import importlib.util
found = [name for name in ("torch", "mlx", "transformers") if importlib.util.find_spec(name)]
assert not found, f"this job is about a machine without {found}"
CHECK
"$core/bin/qlora-hal" --help > /dev/null
"$core/bin/qlora-hal" backends
reference=qlora_hal_conformance.reference_backend
"$core/bin/python" -m qlora_hal_conformance --spec "$reference:SPEC" --out runs/conformance/reference
"$core/bin/python" -m qlora_hal_conformance.mutants --jobs 2
