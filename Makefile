# Every target sets up what it needs: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:  ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,dev]'
	@touch $@

demo: $(READY)  ## a pretrained sentence encoder -> a proved int8 ONNX file in build/minilm
	$(BIN)/qatgraph run examples/jobs/minilm.toml

# one process a core, of one thread each: the tiny models of the tests gain nothing from more
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test: $(READY)  ## the quick tests, under 10 minutes on two cores
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## everything: real models, emulated instruction sets, training
	$(PYTEST)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

GOLDEN := tests/test_golden.py tests/test_readme.py tests/test_pass_docs.py tests/test_audit.py tests/test_new.py tests/test_scale_outliers.py

golden: $(READY)  ## write golden texts, docs/passes.md, docs/lint.md, README tables and skeletons anew (not golden-zoo); review the diff
	$(BIN)/python -m pytest -q $(GOLDEN) --golden-write

golden-zoo: $(READY)  ## write docs/zoo.md anew: walks the whole zoo, some 15 minutes
	$(BIN)/python -m pytest -q tests/test_zoo.py -k test_the_page_is_current --golden-write

bench: $(READY)  ## measure; JSON in build/bench
	$(BIN)/python benchmarks/bench_latency.py && $(BIN)/python benchmarks/bench_engine.py && $(BIN)/python benchmarks/bench_stages.py && $(BIN)/python benchmarks/bench_passes.py && $(BIN)/python benchmarks/bench_costs.py

peers: $(READY)  ## audit the files of other quantizers, each in a venv of its own (some 10 GB, an hour); writes docs/peers.md
	$(BIN)/python benchmarks/bench_peers.py

clean:  ## remove what was built, and the virtual environment
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: help demo test test-all lint golden golden-zoo bench peers clean
