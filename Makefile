# make demo   the main job, end to end, on data it makes itself      make test   the tests (with lint: make check)
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo demo-data demo-model test test-all lint check clean

$(VENV)/installed: pyproject.toml constraints.txt setup.py photon_data/_kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: demo-data demo-model

demo-data: $(VENV)/installed
	$(BIN)/photon-data phantom $(DEMO)/phantoms --n 12 --seed 0
	$(BIN)/photon-data prepare $(DEMO)/phantoms/scans $(DEMO)/prepared --questions $(DEMO)/phantoms/questions.jsonl
	$(BIN)/photon-data verify $(DEMO)/prepared
	$(BIN)/photon-data show "$$(ls -d $(DEMO)/prepared/volumes/*.ome.zarr | head -n 1)" --output $(DEMO)/volume.png
	@echo "Open $(DEMO)/prepared/report.html and $(DEMO)/volume.png"

# A tiny model learns to say whether whole organs are affected, on a grid of an eighth of the voxels, and where they are (from the
# masks of the training phantoms); then it learns to drop tokens.
MANIFESTS := $(DEMO)/easy/prepared/manifests
demo-model: $(VENV)/installed
	$(BIN)/photon-data phantom $(DEMO)/easy/phantoms --n 120 --easy --size 160
	$(BIN)/photon-data prepare $(DEMO)/easy/phantoms/scans $(DEMO)/easy/prepared \
		--questions $(DEMO)/easy/phantoms/questions.jsonl --set model_shape_zyx=70,140,140
	test -e $(DEMO)/tiny || $(BIN)/photon init --tiny $(DEMO)/tiny --model-shape 70,140,140
	$(BIN)/photon train tiny-s1 --model $(DEMO)/tiny --data $(MANIFESTS)/train.jsonl --eval $(MANIFESTS)/val.jsonl \
		--set grounding=$(DEMO)/easy/phantoms/masks --output $(DEMO)/s1 --resume auto
	$(BIN)/photon train tiny-s2 --model "$$(ls -d $(DEMO)/s1/checkpoint-* | tail -n 1)" --data $(MANIFESTS)/train.jsonl \
		--eval $(MANIFESTS)/val.jsonl --output $(DEMO)/s2 --resume auto
	$(BIN)/photon eval vqa --model "$$(ls -d $(DEMO)/s2/checkpoint-* | tail -n 1)" --data $(MANIFESTS)/test.jsonl \
		--train $(MANIFESTS)/train.jsonl --masks $(DEMO)/easy/phantoms/masks --max-new-tokens 8 \
		--schedulers its,none,random,uniform,foreground --output $(DEMO)/scores
	$(BIN)/photon predict --model "$$(ls -d $(DEMO)/s2/checkpoint-* | tail -n 1)" --overlay $(DEMO)/overlay --max-new-tokens 8 \
		--at=-52,52,356 \
		"$$(ls $(DEMO)/easy/phantoms/scans/*-0002.*)" \
		"Any lung consolidation?" "Any liver calcification?"
	@echo "Open $(DEMO)/scores/report.html, $(DEMO)/s2/curves.png and $(DEMO)/overlay"

# Two workers of one thread each; with more they wait for each other.
test test-all: export OMP_NUM_THREADS = 1

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
