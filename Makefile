# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
# The proofs of the GPU kernel need JAX 0.12, which needs Python 3.12.
GPU_PYTHON ?= python3.12
GPU_VENV ?= .venv-gpu
BENCH ?= --quick
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Each worker runs the tests of a file in a row, which share compiled programs, and takes from others when it is done.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --durations=10

OLDEST := jax==0.10.0 jaxlib==0.10.0 equinox==0.13.2 jaxtyping==0.3.0

.PHONY: demo demo-train pictures support docs test test-kernels test-slow test-oldest test-newest test-gpu-proofs gpu-proofs mutants check format bench clean

demo: $(VENV)/.examples $(VENV)/.models
	$(BIN)/python -m examples.demo

demo-train: $(VENV)/.examples
	$(BIN)/python -m examples.demo_train

pictures: $(VENV)/.examples $(VENV)/.models
	$(BIN)/python -m examples.pictures
	$(BIN)/python -m examples.masks
	$(BIN)/python -m examples.notebooks

# The GPU kernel's column needs JAX 0.11, and so Python 3.12.
support: $(VENV)/.examples
	$(BIN)/python -m examples.support

# Any warning, such as a dead link, is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

test: $(VENV)/.test
	$(PYTEST)

test-kernels: $(VENV)/.test
	$(PYTEST) -m "kernels and not slow"

test-slow: $(VENV)/.test
	PAGED_TEST_OPTIMISED=1 $(PYTEST) -m "slow or kernels or not slow"

test-gpu-proofs:
	@if $(GPU_PYTHON) --version > /dev/null 2>&1; then \
		$(MAKE) VENV=$(GPU_VENV) PYTHON=$(GPU_PYTHON) gpu-proofs; \
	else \
		echo "Skipped: the proofs of the GPU kernel need Python 3.12, for JAX 0.12, and $(GPU_PYTHON) does not run."; \
	fi

gpu-proofs: $(VENV)/.gpu-proofs
	$(PYTEST) -m "slow or kernels or not slow" tests/gpu

# The oldest dependencies that pyproject.toml allows, and the newest that PYTHON can have: an environment of its own each.
test-oldest:
	$(MAKE) VENV=.venv-oldest .venv-oldest/.test
	.venv-oldest/bin/python -m pip --disable-pip-version-check install -q $(OLDEST)
	$(MAKE) VENV=.venv-oldest test

test-newest:
	$(MAKE) VENV=.venv-newest .venv-newest/.test
	.venv-newest/bin/python -m pip --disable-pip-version-check install -q --upgrade jax jaxlib equinox jaxtyping
	$(MAKE) VENV=.venv-newest test

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants

check: $(VENV)/.dev $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_structure.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.examples
	$(BIN)/python -m benchmarks.xla_cpu $(BENCH)

# One stamp file per extra: installed when missing, or when the dependencies change.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing paged[$*] into $(VENV) ..."
	$(PIP) install -e ".[$*]"
	@touch $@

$(BIN)/python:
	@echo "Making the virtual environment $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(GPU_VENV) build *.egg-info
