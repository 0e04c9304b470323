# `make` alone lists the targets. Every target installs what it needs into .venv first.
PYTHON ?= python3
PY := .venv/bin/python
RECIPE ?= recipes/quickstart.yaml
ARGS ?=
ROWS ?=
BENCHMARKS := fix start_up first_step prepare step source_losses settings monitoring time_estimate end_to_end gpu

.PHONY: help install quickstart train check test prove lint docs notebooks bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt --group dev -e .
	@touch $@

install: .venv/installed  ## make .venv with the tested versions

quickstart: .venv/installed  ## a first run, seconds on two cores
	$(PY) -m trl_sft recipes/quickstart.yaml

train: .venv/installed  ## make train RECIPE=my.yaml [ARGS='train.max_steps=10']
	$(PY) -m trl_sft $(RECIPE) $(ARGS)

check: .venv/installed  ## make check RECIPE=my.yaml: all that needs no weights
	$(PY) -m trl_sft check $(RECIPE) $(ARGS)

test: .venv/installed  ## the tests, in as many processes as there are cores, four at most
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

prove: .venv/installed  ## the long proofs; their table goes into docs/development/log.md
	$(PY) -m pytest -m long --timeout 14400 --durations=0 -v

lint: .venv/installed  ## ruff and mypy
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: .venv/installed  ## the documentation as HTML, in build/docs; a broken link fails
	$(PY) -m pip install --quiet -c constraints.txt --group docs
	$(PY) scripts/build_reference.py build/docs-source
	$(PY) -m zensical build --clean --strict

notebooks: .venv/installed  ## run every notebook
	@$(PY) scripts/run_notebooks.py notebooks

bench: .venv/installed  ## every benchmark: docs/development/benchmarks.md (ROWS=FILE.jsonl for the whole run)
	@for name in $(BENCHMARKS); do \
		test $$name = end_to_end && rows="$(ROWS)" || rows=; \
		echo "== benchmarks/$$name.py $$rows"; $(PY) benchmarks/$$name.py $$rows || exit 1; \
	done

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
