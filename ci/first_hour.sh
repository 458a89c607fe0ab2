#!/usr/bin/env bash
# A newcomer's way from nothing to an adapter of their own rows, in an empty environment and an empty home:
#
#     ci/first_hour.sh              in a copy of the checkout, which is removed at the end
#
# Every `step` is a command of README.md, word for word (tests/ci/test_first_hour.py).
set -euo pipefail

if [ "${BARE:-}" != yes ]; then
  # Nothing of this shell comes along but where packages are found, how that place is trusted, and how many threads are
  # allowed: on a busy machine several of them wait for each other.
  mapfile -t kept < <(env | grep -E '^(PIP|UV|SSL|REQUESTS|XDG_CONFIG|OMP)_' || true)
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  mkdir "$scratch/qlora-hal" "$scratch/home"
  (cd "$(dirname "$0")/.." && git ls-files -z | tar --create --null --files-from=-) | tar --extract --directory "$scratch/qlora-hal"
  python=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
  cd "$scratch/qlora-hal"
  env -i BARE=yes HOME="$scratch/home" PATH="$(dirname "$python"):/usr/bin:/bin" "${kept[@]}" bash ci/first_hour.sh
  exit
fi

count=0
step() {
  count=$((count + 1))
  printf '\n[%d, after %d s] $ %s\n' "$count" "$SECONDS" "$1"
  eval "$1"
}

cat > my_rows.jsonl <<'ROWS'
{"messages": [{"role": "user", "content": "What is the capital of Freedonia?"}, {"role": "assistant", "content": "The capital of Freedonia is Fredville."}]}
{"messages": [{"role": "user", "content": "Who governs Freedonia?"}, {"role": "assistant", "content": "Freedonia is governed by a council of nine."}]}
{"messages": [{"role": "user", "content": "Which river runs through Fredville?"}, {"role": "assistant", "content": "The river Lumen runs through Fredville."}]}
{"messages": [{"role": "user", "content": "What is the currency of Freedonia?"}, {"role": "assistant", "content": "People in Freedonia pay with the crown."}]}
{"messages": [{"role": "user", "content": "When was Freedonia founded?"}, {"role": "assistant", "content": "Freedonia was founded in 1788."}]}
{"messages": [{"role": "user", "content": "What do people in Freedonia speak?"}, {"role": "assistant", "content": "Most people in Freedonia speak Fredish."}]}
{"messages": [{"role": "user", "content": "What is the highest mountain of Freedonia?"}, {"role": "assistant", "content": "The highest mountain of Freedonia is Mount Harp."}]}
{"messages": [{"role": "user", "content": "What does Freedonia export?"}, {"role": "assistant", "content": "Freedonia exports wool, clocks and honey."}]}
ROWS

step 'python3 -m venv .venv'
step 'source .venv/bin/activate'
step 'pip install ".[cpu]"'
step 'qlora-hal train --demo --data my_rows.jsonl --output_dir runs/mine --training.max_steps 20'
step 'qlora-hal generate --run runs/mine --prompt "What is the capital of Freedonia?"'
printf '\nAn own adapter after %d s and %d commands.\n' "$SECONDS" "$count"

# What is promised of the adapter: it has learned the rows, and PEFT opens it on the base that it was trained for.
qlora-hal generate --run runs/mine --prompt "What is the capital of Freedonia?" | grep 'adapter: .*Fredville'
pip install --quiet peft
python - <<'PEFT'
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_hal.demo import model_path

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path()), "runs/mine/adapter")
tuned = sum(tensor.abs().sum().item() for name, tensor in model.named_parameters() if "lora_B" in name)
assert tuned > 0, "the adapter is empty"
print(f"PEFT opens runs/mine/adapter: {model.peft_config['default'].peft_type.value}, rank {model.peft_config['default'].r}.")
PEFT
