# Everything works from a fresh clone; nothing needs activating.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes share the tests, file by file: what a file has trained for its tests is there once.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-finetune claim all test quick faults slurm lint format types bench gpu gpu-giant site docs clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(STAMP): requirements.lock setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"fdscale needs Python 3.11, 3.12 or 3.13, and {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python")'
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || { echo 'fdscale needs a C++ compiler (DeepSpeed builds one small op at first use): install g++, for example apt-get install g++' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## distil a real teacher on real photographs, on this machine
	$(BIN)/python -m fdscale.demo

demo-finetune: $(STAMP) ## after it: the student as a classifier of digits, on this machine
	$(BIN)/python -m fdscale.demo_finetune

claim: $(STAMP) ## does a student fine-tune better than its teacher? Fashion-MNIST, several seeds, on a CPU
	$(BIN)/python -m fdscale.claim

all: $(STAMP) ## everything that this machine can run: what CI runs
	$(BIN)/python -m pytest -m "not slurm and not faults and not long" $(SHARED) --durations=25
	$(BIN)/python -m pytest -m "slurm or faults or long" --durations=10

test: $(STAMP) ## all but the long ones: Slurm, the fault suite, and the marked
	$(BIN)/python -m pytest -m "not slurm and not faults and not long" $(SHARED)

quick: $(STAMP) ## the inner loop: tests that take a moment
	$(BIN)/python -m pytest -m "not slow" -n 2

faults: $(STAMP) ## every instant of the fault suite; figures to reliability.json
	FDSCALE_FAULTS=long FDSCALE_FAULTS_FIGURES=reliability.json $(BIN)/python -m pytest tests/faults

slurm: $(STAMP) ## the job scripts on a real Slurm on this machine
	$(BIN)/python -m pytest -rs tests/slurm

lint: $(STAMP) ## style and imports
	$(BIN)/ruff check fdscale tests setup.py docs/hooks.py
	$(BIN)/ruff format --check fdscale tests setup.py docs/hooks.py

types: $(STAMP) ## static types
	$(BIN)/mypy

format: $(STAMP) ## rewrite into the project's style
	$(BIN)/ruff format fdscale tests setup.py docs/hooks.py
	$(BIN)/ruff check --fix fdscale tests setup.py docs/hooks.py

bench: $(STAMP) ## measure data loading, attention, a training step and saving against what else there is
	$(BIN)/fdscale bench data
	$(BIN)/fdscale bench workers
	$(BIN)/fdscale bench shuffle
	$(BIN)/fdscale bench attention
	$(BIN)/fdscale bench loop
	$(BIN)/fdscale bench step demo
	$(BIN)/fdscale bench checkpoint
	$(BIN)/fdscale bench policies

# A machine with a GPU often has a torch of its own and no network: the suite takes what $(PYTHON) has, where it has one.
gpu: ## check and measure the kernels on this machine's GPU, in nine minutes: gpu-report/gpu.md
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -m fdscale.bench.gpu --out gpu-report; \
	else \
		$(MAKE) --no-print-directory $(STAMP) && $(BIN)/python -m fdscale.bench.gpu --out gpu-report; \
	fi

gpu-giant: ## measure SwinV2-G, 3 billion parameters, on this machine's GPU (80 GB or more): giant-report/giant.md
	@if $(PYTHON) -c 'import torch, deepspeed' 2>/dev/null; then \
		$(PYTHON) -m fdscale.bench.giant --out giant-report; \
	else \
		$(MAKE) --no-print-directory $(STAMP) && $(BIN)/python -m fdscale.bench.giant --out giant-report; \
	fi

site: $(STAMP) ## the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'site/index.html'

docs: $(STAMP) ## check that links and commands in the documents hold
	$(BIN)/python -m pytest tests/test_docs.py

clean: ## remove what these targets made
	rm -rf runs build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
