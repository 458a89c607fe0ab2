# Both commands set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: demo test check environment test-environment

# Fine-tune the embedded demo model on the hardware found here; results in runs/demo.
demo: environment
	$(BIN)/qlora-hal train --demo --overwrite

# Everything: types, style, all tests.
test: test-environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	mkdir -p .tmp
	TMPDIR=$(CURDIR)/.tmp $(BIN)/python -m pytest

environment:
	$(PYTHON) ci/setup_environment.py

test-environment:
	$(PYTHON) ci/setup_environment.py --tests
