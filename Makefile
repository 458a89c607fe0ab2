# Each command sets up what it needs by itself.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
export GPTQMODEL_CPU_WORKERS ?= 2
# One thread in each test process: many small products gain nothing from more, and waiting threads cost others.
export OMP_NUM_THREADS ?= 1
# Tests start hundreds of processes: without kept bytecode each would compile this project anew.
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= 2
# What the tests of a file share is made once: they run in one process.
SPREAD := -n $(WORKERS) --dist loadfile
# Which environments of the matrix: nothing for all, --corners for two of them.
MATRIX ?=
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" TMPDIR=$(CURDIR)/.tmp $(BIN)/python -m pytest -q

.PHONY: demo docs notebooks test test-cuda test-slow test-long test-matrix types kernels environment test-environment

# Fine-tune the embedded demo model on the hardware found here; results in runs/demo.
demo: environment
	env -u OMP_NUM_THREADS $(BIN)/qlora-hal train --demo --overwrite

# Types, style, all tests but the slow and the long ones, and the core on the newest versions of its dependencies.
test: test-environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .tmp
	$(MAKE) --no-print-directory --jobs 2 types kernels  # one process each
	$(PYTEST) $(SPREAD) -m "not slow and not long and not needs_triton and not needs_cuda"
	$(PYTHON) ci/version_matrix.py --corners --part core --versions newest

types:
	$(BIN)/mypy

kernels:
	TRITON_INTERPRET=1 $(PYTEST) -m "needs_triton and not slow and not long" tests/torch_family

# Where an NVIDIA GPU is found; the kernels run compiled there.
test-cuda: test-environment
	$(PYTEST) -m "needs_cuda or (needs_triton and not long)" tests/torch_family

# What takes several seconds and seldom fails; .ci/run runs it behind `make test`.
test-slow: test-environment
	mkdir -p .tmp
	TRITON_INTERPRET=1 $(PYTEST) -m "needs_triton and slow and not long" tests/torch_family || [ $$? -eq 5 ]
	$(PYTEST) $(SPREAD) -m "slow and not long and not needs_triton and not needs_cuda"

# What takes minutes and seldom fails: every mutant, whole runs of the suite.
test-long: test-environment
	mkdir -p .tmp
	TRITON_INTERPRET=1 $(PYTEST) -m "needs_triton and long" tests/torch_family
	$(PYTEST) $(SPREAD) -m "long and not needs_triton and not needs_cuda"

# The newest and the oldest versions that pyproject.toml allows, on every Python found here.
test-matrix:
	$(PYTHON) ci/version_matrix.py $(MATRIX)

# docs/notebooks from their sources, executed on this machine in an environment of their own.
notebooks:
	$(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/pip install -q -c constraints.txt -e ".[cpu,conformance,notebooks]"
	.venv-notebooks/bin/python ci/make_notebooks.py

# The documentation as a site, in site/; a link that leads nowhere fails.
docs: .venv-docs/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/bin/mkdocs: ci/site_requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --requirement ci/site_requirements.txt
	touch $@

environment:
	$(PYTHON) ci/setup_environment.py

test-environment:
	$(PYTHON) ci/setup_environment.py --tests
