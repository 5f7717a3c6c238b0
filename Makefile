# Every target sets up what it needs: .venv holds everything, and a stamp file in it says what is
# installed. Needs Python 3.11 or newer and make; `make PYTHON=/path/to/python3` names the Python.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt
# Of 16,000 modules a third is ever imported, and compiled then.
QUICKLY := --quiet --no-compile
# The oldest Triton that pyproject.toml allows, for `make aot`, beside the installed one.
OLDEST := $(shell sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml)
OLDEST_TRITON := $(VENV)/triton-$(OLDEST)
AUDIT := $(VENV)/audit
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

# The main job, and the same in seconds for a check of an installation.
RUN := runs/digits_rdm_simsiam
ONE_EPOCH := rdm train digits_rdm_simsiam --optim.epochs 1 --optim.warmup-epochs 0 --log.knn-every 0

# A file's tests share fixtures and ranks, so one process runs them all. tests/conftest.py puts long
# files first.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark

# Tests start many processes, which would all compile the packages again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help train test test-all faults audit lint format types bench bench-check accuracy numbers numbers-quick aot aot-quick docs package check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.base ## train the embedded default on a CPU or GPU, then evaluate it
	$(BIN)/python train.py
	$(BIN)/python eval_linear.py $(RUN)

test: $(VENV)/.dev ## run the tests, two files at a time
	$(BIN)/python -m pytest $(TWO_FILES) -m 'not slow'

test-all: $(VENV)/.dev ## the same, and the tests that are slow by nature
	$(BIN)/python -m pytest $(TWO_FILES)

faults: $(VENV)/.dev ## break runs in every way, half an hour; write the table of docs/reliability.md
	RDM_FAULT_SIGNALS=200 RDM_FAULT_KILLS=20 $(BIN)/python -m pytest $(TWO_FILES) --timeout 7200 \
	  --fault-table docs/reliability.md tests/faults

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev ## check types
	$(BIN)/mypy

bench: $(VENV)/.dev ## run the benchmarks
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds,iterations \
	  --benchmark-json=.benchmarks/latest.json

bench-check: $(VENV)/.dev ## run every benchmark once, untimed, and the campaign's smallest form
	$(BIN)/python -m pytest bench --benchmark-disable
	rm -rf .benchmarks/campaign
	$(BIN)/python -m bench.campaign --smoke --out .benchmarks/campaign

accuracy: $(VENV)/.dev ## make the accuracy table of kernels/README.md; fails where a bound is broken
	$(BIN)/python -m bench.accuracy --engine gemm --device cpu --write kernels/README.md

numbers: $(VENV)/.dev ## measure the numbers on the pages again, about an hour; fails where one changed
	$(BIN)/python -m bench.numbers --check

numbers-quick: $(VENV)/.dev ## the same in two minutes, as in CI: one seed of digits, and probes
	$(BIN)/python -m bench.numbers --check --quick

aot: $(VENV)/.dev $(OLDEST_TRITON)/.installed ## compile every kernel for three GPUs, without one, with two Tritons
	$(BIN)/python -m rdm_kernels.aot
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m rdm_kernels.aot

aot-quick: $(VENV)/.dev $(OLDEST_TRITON)/.installed ## the same for one GPU, as in CI; with the oldest Triton one kind of size
	$(BIN)/python -m rdm_kernels.aot --cc 90
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m rdm_kernels.aot --cc 90 --common

# Not in CI: its database is on the network.
audit: $(VENV)/.dev $(AUDIT)/.installed ## look for known vulnerabilities, list licenses, refuse some
	$(AUDIT)/bin/pip-licenses --python $(BIN)/python --from=mixed --order=license \
	  --partial-match --fail-on='AGPL;Affero;NonCommercial;Non-Commercial'
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

docs: $(VENV)/.dev ## build the pages of docs/ as a site, in site/
	$(BIN)/mkdocs build --strict

# The wheel is built from the sdist, so what the sdist lacks is missed here.
package: $(VENV)/.dev ## build sdist and wheel, install the wheel in a clean environment, run it
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	@set -eu; room=$$(mktemp -d); trap 'rm -rf "$$room"' EXIT; \
	echo "installing the wheel in a clean environment"; \
	$(BIN)/python -m venv "$$room/venv"; \
	"$$room/venv/bin/python" -m pip --disable-pip-version-check install $(QUICKLY) -c constraints.txt dist/*.whl; \
	cd "$$room"; PATH="$$room/venv/bin:$$PATH"; \
	python -c 'import rdm_fast, rdm_kernels; print(rdm_fast.__file__, rdm_kernels.__file__)'; \
	$(ONE_EPOCH) --out "$$room/run"

check: ## all that CI does
	.ci/run

clean: ## delete what was built and cached; runs/ and .venv/ stay
	rm -rf dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.base: $(VENV)/.python $(REQUIREMENTS)
	@echo "installing rdm-fast into $(VENV) (once; torch takes minutes and about 6 GB)"
	@$(PIP) install $(QUICKLY) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(REQUIREMENTS)
	@echo "installing rdm-fast and its tools into $(VENV) (once; torch takes minutes and about 6 GB)"
	@$(PIP) install $(QUICKLY) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.base $@

$(OLDEST_TRITON)/.installed: $(VENV)/.python
	@echo "installing triton $(OLDEST) into $(OLDEST_TRITON) (once; about 650 MB)"
	@rm -rf $(OLDEST_TRITON)
	@$(PIP) install --quiet --no-deps --target $(OLDEST_TRITON) 'triton==$(OLDEST)'
	@touch $@

$(AUDIT)/.installed: $(VENV)/.python
	@$(BIN)/python -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip --disable-pip-version-check install --quiet pip-audit pip-licenses
	@touch $@

# An environment that is already there is kept, whoever made it.
$(VENV)/.python:
	@usable='import sys, pip; sys.exit(sys.version_info < (3, 11))'; \
	if [ -e $(VENV) ]; then \
	  $(BIN)/python -c "$$usable" 2>/dev/null || { \
	    echo "error: $(VENV) has no Python 3.11 or newer with pip: delete it and run make again" >&2; exit 1; }; \
	else \
	  found=; complete=; \
	  for python in $(PYTHONS); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    found=$$python; \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	    complete=$$python; break; \
	  done; \
	  [ -n "$$found" ] || { \
	    echo "error: no Python 3.11 or newer among: $(PYTHONS): install one, or name it with make PYTHON=..." >&2; exit 1; }; \
	  [ -n "$$complete" ] || { \
	    echo "error: $$found lacks venv and ensurepip: install them (on Debian: python3-venv)" >&2; exit 1; }; \
	  "$$complete" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi; \
	touch $@
