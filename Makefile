# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint format bench full-size cross-product install
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/pal demo --out runs/demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=85

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pal.bench

# Llama-3.2-1B's shape with Whisper-small's on this machine: minutes, and several gigabytes.
full-size: $(STAMP)
	$(BIN)/python -m pytest -s tests/full_size.py

cross-product: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/product.py

install: $(STAMP)

# The constraints file pins torch: an open range can pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plots,av,test,dev]'
	touch $@
