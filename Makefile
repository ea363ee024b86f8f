# `make repro` and `make test` are all that a fresh clone needs: Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test check install install-dev bench pictures clean

repro: install          ## run the whole pipeline and show the comparison
	@dvc repro
	@lora report

test: install-dev       ## every check: lint, types, import contracts, all tests
	@$(MAKE) --no-print-directory check
	@pytest -n 2

check: install-dev      ## lint, format, types, import contracts
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

bench: install-dev      ## speed, as ratios measured in one run
	@python -m bench

pictures: install-dev   ## the README's pictures, from the real program
	@dvc repro --quiet
	@python -m docs.pictures

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:                  ## remove results and run state; keeps the environment
	rm -rf artifacts/base artifacts/expanded artifacts/full_finetuned artifacts/layer_frozen \
	  artifacts/lora_adapter artifacts/lora_merged runs .lora-cache dvc.lock
