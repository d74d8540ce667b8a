# make demo    what flows buy in a VAE, on the digits: print the README's table, save figure and netCDF
# make demo-mnist DATA=PATH    the same on MNIST or Fashion-MNIST: an npz file, an idx file or a folder of them
# make test    run the test suite
# make check   ruff, codespell, mypy
# make docs    build the site into docs/_build/html; needs no network once it is set up
# make snippets    run the programs in the pages and write below each what it prints
# make notebooks    execute the tutorials and write the notebooks beside them
# make clean   remove environments, caches and build outputs
#
# Each does all its own set-up in $(VENV); nothing is installed outside of it. Variables:
#   PYTHON=python3.12     the interpreter of a fresh environment (3.11 or newer)
#   VENV=.venv            where the environment goes
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    PyTorch's CPU wheels: a small download, no GPU
#   CONSTRAINTS=          empty: the newest PyTorch instead of the pinned one
#   JOBS=2                processes of the test suite, one thread each; by default one per core
#   PYTEST_ARGS="-k spline -x"

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
PYTEST_ARGS ?=
JOBS        ?= auto
DEMO_ARGS   ?=
DATA        ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DELETE_ON_ERROR:
.PHONY: demo demo-mnist test check docs snippets notebooks setup setup-dev setup-docs clean

# Said first, since a fresh environment is a download and a minute or two of silence.
SET_UP = @echo "What do flows buy in a VAE? First the set-up in $(VENV) (once: PyTorch is downloaded, one to two minutes)," && \
    echo "then four VAEs are trained several times and compared: about 12 minutes of one core, 6 where two are free." && \
    $(MAKE) --no-print-directory setup

demo:
	$(SET_UP)
	$(BIN)/python -m models.compare $(DEMO_ARGS)

demo-mnist:
	@test -n "$(DATA)" || { echo "Expected DATA=PATH (an npz file, an idx file or a folder of them), got none"; exit 2; }
	$(SET_UP)
	$(BIN)/python -m models.compare --data "$(DATA)" $(DEMO_ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: setup-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m mypy

notebooks: setup
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m jupytext --to ipynb --set-kernel python3 --execute tutorials/[0-9]*.py

docs: setup-docs
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

snippets: setup
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python docs/snippets.py

setup: $(VENV)/.stamp-test
setup-dev: $(VENV)/.stamp-dev
setup-docs: $(VENV)/.stamp-docs

# PyTorch comes first and alone, so that nothing else chooses its version or its index.
$(VENV)/.stamp-torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	    f"expected Python 3.11 or newer, got {v}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml setup.py $(wildcard pyro_flowkit/ops/_kernel/*)
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-test
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-test
	$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv .venv-next docs/_build docs/reference/generated docs/tutorials docs/benchmark_results build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
