# Both commands set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
export GPTQMODEL_CPU_WORKERS ?= 2
# One thread in each test process: many small products gain nothing from more, and waiting threads cost others.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" TMPDIR=$(CURDIR)/.tmp $(BIN)/python -m pytest -q

.PHONY: demo test check environment test-environment

# Fine-tune the embedded demo model on the hardware found here; results in runs/demo.
demo: environment
	env -u OMP_NUM_THREADS $(BIN)/qlora-hal train --demo --overwrite

# Everything: types, style, all tests.
test: test-environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	mkdir -p .tmp
	$(PYTEST) -n $(WORKERS) -m "not needs_triton"
	TRITON_INTERPRET=1 $(PYTEST) -m needs_triton tests/torch_family

environment:
	$(PYTHON) ci/setup_environment.py

test-environment:
	$(PYTHON) ci/setup_environment.py --tests
