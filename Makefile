# Everything starts from a bare Python 3.11 or newer:
#   make test
#   make test PYTHON=python3.13 VENV=.venv-ceiling
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2

# The interpreter's version, as in 3.11; empty when there is none.
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# Python 3.11 tests the oldest supported JAX, newer ones the newest.
CONSTRAINTS ?= constraints/$(if $(filter 3.11,$(PYVER)),floor,ceiling).txt

BIN       := $(VENV)/bin
CREATED   := $(VENV)/.created-$(PYVER)
INSTALLED := $(VENV)/.installed-$(PYVER)-$(basename $(notdir $(CONSTRAINTS)))

.PHONY: help demo test compile ptxas lint types clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1:\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS=: read -r name text; do printf 'make %-7s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) CONSTRAINTS=$(CONSTRAINTS) WORKERS=$(WORKERS)"

demo: $(INSTALLED) ## run the demo
	$(BIN)/python -m train.demo

# worksteal: tests beside each other, which share what they compile, mostly get the same worker.
# In two halves: XLA maps memory for every program, and a process may have only so many maps.
# Workers fill the cores: BLAS, by which the oracle multiplies, gets one thread in each.
test: export OPENBLAS_NUM_THREADS = 1
test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q tests/test_[a-d]*.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q tests/test_[!a-d]*.py

# worksteal here too: where short and long calls share a kernel, one worker compiles it once.
compile: $(INSTALLED) ## compile the kernels with the official Triton; no GPU needed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m compile

# JAX's CUDA plugin stays in a folder of its own: JAX would ask an installed one for a GPU.
PLUGIN := $(VENV)/cuda-plugin

ptxas: $(PLUGIN)/.unpacked ## compile Mosaic's kernels with CUDA's ptxas; no GPU needed
	S2_CUDA_PLUGIN=$(PLUGIN) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m ptxas tests/test_ptxas.py

$(PLUGIN)/.unpacked: $(INSTALLED)
	rm -rf $(PLUGIN) && mkdir $(PLUGIN)
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(PLUGIN) \
	    jax-cuda13-pjrt==$$version jax-cuda13-plugin==$$version
	set -e; for wheel in $(PLUGIN)/*.whl; do $(BIN)/python -m zipfile -e $$wheel $(PLUGIN); rm $$wheel; done
	@touch $@

lint: $(INSTALLED) ## ruff check and ruff format --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

clean: ## remove the virtual environments, caches and build outputs
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv* of another Python version is emptied first; a virtual environment
# anywhere else is only added to.
$(CREATED):
	@if [ -z "$(PYVER)" ]; then \
	  echo "error: '$(PYTHON)' was not found or does not run; name a Python >= 3.11: make PYTHON=..." >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is Python $(PYVER), but 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(filter .venv%,$(VENV)),--clear) $(VENV)
	@touch $@

# --no-compile: most of pip's time would go into bytecode of modules that nothing imports.
$(INSTALLED): $(CREATED) pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[train,plot,dev]' -c $(CONSTRAINTS)
	@touch $@
