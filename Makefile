# make demo   the main job, end to end, on data it makes itself      make test   the tests (with lint: make check)
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-all lint check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/photon-data phantom $(DEMO)/phantoms --n 12 --seed 0
	$(BIN)/photon-data prepare $(DEMO)/phantoms/scans $(DEMO)/prepared --questions $(DEMO)/phantoms/questions.jsonl
	$(BIN)/photon-data verify $(DEMO)/prepared
	$(BIN)/photon-data show "$$(ls -d $(DEMO)/prepared/volumes/*.ome.zarr | head -n 1)" --output $(DEMO)/volume.png
	@echo "Open $(DEMO)/prepared/report.html and $(DEMO)/volume.png"

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --slow

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
