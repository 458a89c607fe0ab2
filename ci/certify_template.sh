#!/usr/bin/env bash
# Certify the plugin template as a distribution of its own, by running the `sh` blocks of docs/write_a_backend.md in an
# empty folder. PYTHON names the interpreter that has qlora-hal[conformance], torch, transformers and hatchling.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
awk '/^```sh$/ {inside = 1; next} /^```$/ {inside = 0} inside' "$root/docs/write_a_backend.md" > "$folder/commands.sh"
test -s "$folder/commands.sh"
mkdir "$folder/empty"
cd "$folder/empty"
PATH="$(dirname "$python"):$PATH"
export PATH TEMPLATE="$root/examples/plugin_template" PIP_DISABLE_PIP_VERSION_CHECK=1
bash -euxo pipefail "$folder/commands.sh"
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp certificate/* "$OUT"
fi
