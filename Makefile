# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
AUDIT  := .venv-audit
STAMP  := $(VENV)/.galray-installed
export RAY_AUTH_MODE ?= disabled
export PYTHONUNBUFFERED = 1

.PHONY: setup demo test test-cluster check fuzz audit bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## the mock Milky Way in Gaia form, the whole chain, a report
	$(BIN)/galray demo

test: setup  ## everything that one shared Ray cluster can serve
	$(BIN)/python -m pytest -m "not cluster" tests

test-cluster: setup  ## what needs Ray nodes, servers or kills of its own
	$(BIN)/python -m pytest -m cluster tests

check: setup  ## style and types
	$(BIN)/ruff check galray tests benchmarks
	$(BIN)/ruff format --check galray tests benchmarks
	$(BIN)/mypy

fuzz: setup  ## ten thousand broken files
	$(BIN)/python -m benchmarks.fuzz

audit: setup  ## known weaknesses of the code and of the image's pins; asks an advisory service
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet bandit pip-audit; }
	PATH="$(abspath $(AUDIT))/bin:$$PATH" $(BIN)/python -m pytest -q tests/test_deploy.py -k every_kind_of_finding
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r deploy/docker/constraints.txt

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(AUDIT) build *.egg-info
