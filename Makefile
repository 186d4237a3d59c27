# Two commands do everything on a fresh machine with Python >= 3.10:
#   make demo   sets up .venv, installs the package, runs the whole road and prints where the report is
#   make test   the same set-up, then the checks and the tests
# and make docs builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread each: models this small gain from a second process, not from a second thread.
WORKERS ?= 2

.PHONY: demo test lint figures docs notebooks clean

demo: $(VENV)/.installed
	$(BIN)/mansu-tl demo --out runs/demo

test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check mansu_tl tests
	$(BIN)/ruff check mansu_tl tests
	$(BIN)/mypy

# Draws figures/ again from the result files in it; needs a Chromium for the images.
figures: $(VENV)/.installed
	$(BIN)/mansu-tl figures

# Offline, and any warning fails it; the variable only silences an advertisement of mkdocs-material.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs every notebook from a clean kernel and stores what it shows; needs a Chromium for the images.
notebooks: $(VENV)/.installed-test
	$(BIN)/python -m tests.store_notebooks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: a CPU build that is at hand satisfies it, and nothing after replaces it.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed torch==2.13.0
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs site
