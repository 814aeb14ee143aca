# Every command a person needs. `make help` lists them.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Two files at a time: tests of several processes wait more than they compute, and what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup quickstart test test-all test-fast check format docs gradcheck gradcheck-all fuzz kills bench bench-gpu distill clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv with everything

$(STAMP): pyproject.toml .ci/constraints.txt
	test -x $(PY) || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch torchvision
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev,deepspeed,tools,audio,released]'
	touch $(STAMP)

quickstart: $(STAMP) ## train on real pairs, evaluate on held-out ones, write runs/quickstart/report.html (about 5 minutes on 2 cores)
	$(PY) -m dualenc train recipes/quickstart/quickstart.yaml
	$(PY) -m dualenc eval runs/quickstart --tasks quickstart_val_style,quickstart_val_clipart,quickstart_groups --out runs/quickstart/results.json
	$(PY) -m dualenc report runs/quickstart

test: check ## everything: check, then all tests, the multi-process ones too
	$(PYTEST) -m "(dist or slow) and not extra"

test-all: check ## test, and the variants it leaves out (every launcher with every engine, every way to lose a rank)
	$(PYTEST) -m "dist or slow"

test-fast: $(STAMP) ## unit tests only (one process, no slow ones)
	$(PYTEST) -m "not dist and not slow"

check: $(STAMP) ## format, lint, types, layering, unit tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -m "not dist and not slow"

format: $(STAMP) ## rewrite the code in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(STAMP) ## build the documentation site into build/site, every link and anchor checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f docs/site/mkdocs.yml

gradcheck: $(STAMP) ## the gradient of every engine, world size, loss, real small towers against one process: tables
	PYTHONPATH=tests $(PY) tests/distributed/gradcheck.py

gradcheck-all: $(STAMP) ## gradcheck with every combination of tower, loss, engine, micro-batch and world size (hours)
	PYTHONPATH=tests $(PY) tests/distributed/gradcheck.py --all

fuzz: $(STAMP) ## damaged bytes in front of every reader for SECONDS (3600): cases, escapes, hangs
	PYTHONPATH=.:evals:data_tools:tests $(PY) tests/fuzz/test_fuzz.py $(or $(SECONDS),3600)

kills: $(STAMP) ## KILLS (220) kill -9 of train, save, build, embed, eval at random moments: differences from an unbroken run
	PYTHONPATH=.:evals:data_tools:tests $(PY) tests/faults/kill_matrix.py --kills $(or $(KILLS),220)

bench: $(STAMP) ## every part against open_clip, taking turns: docs/benchmarks.md, its plot and numbers (about 40 minutes)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks --write

bench-gpu: $(STAMP) ## on a machine with CUDA, unattended, 8 minutes: towers in bf16 and compiled, losses at 8k … 128k
	$(PY) -m benchmarks.gpu

distill: $(STAMP) ## teacher, then scratch/feature/affinity/KD/DCD students, 3 seeds, on DUALENC_DATA's flickr8k and fashion: tables
	PYTHON=$(PY) recipes/distill/series.sh flickr8k
	PYTHON=$(PY) recipes/distill/series.sh fashion

clean: ## remove runs and caches, not the environment
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
