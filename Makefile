# `make` alone lists the targets. `make demo` and `make test` do all their own set-up in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EMBEDDED := models/SmolLM2-135M-Instruct/crosslore_model.json
EXTRAS := llamafactory,eval,bnb,dev
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format model webui benchmark ablation data docs docs-serve package test-release clean reproduce-all

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## Install everything into .venv with the tested versions (7 GB, a few minutes; once)

# The hook's files are copied into site-packages, so they are dependencies too.
$(STAMP): pyproject.toml constraints.txt src/_crosslore_hook.py src/crosslore_llamafactory.pth src/crosslore_llamafactory.start
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

model: $(EMBEDDED) ## Get and convert the embedded model, SmolLM2-135M-Instruct (once)

$(EMBEDDED): | $(STAMP)
	$(PY) scripts/get_model.py

demo: $(STAMP) $(EMBEDDED) ## Set up, fine-tune the embedded model, evaluate before and after (12 minutes on 2 cores)
	$(PY) scripts/demo.py

test: $(STAMP) $(EMBEDDED) ## Set up and run all checks and tests (PYTEST_ARGS="..." selects)
	@$(MAKE) --no-print-directory check
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)  # small tensors: more threads only wait

check: $(STAMP) ## Format, lint, types and size limits
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) scripts/check_sizes.py
	$(PY) scripts/make_methods_table.py --check
	$(PY) scripts/make_configs.py --check
	$(PY) scripts/make_small_tables.py --check
	$(PY) benchmarks/tables.py --check
	$(PY) benchmarks/ablation_report.py --check

format: $(STAMP) ## Format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

webui: $(STAMP) $(EMBEDDED) ## Open LLaMA-Factory's page on 127.0.0.1, CrossLore, the embedded model and bundled data chosen
	$(PY) scripts/webui.py

benchmark: $(STAMP) $(EMBEDDED) ## Measure step time, memory, subspace error and time split against the peers (1 hour on 2 idle cores; resumable)
	$(PY) benchmarks/run.py $(BENCHMARK_ARGS)

ablation: $(STAMP) $(EMBEDDED) ## Fine-tune with one choice changed at a time, E2E and GSM8K (3 hours on 2 idle cores; resumable; needs make data)
	$(PY) benchmarks/ablation.py $(ABLATION_ARGS)
	$(PY) benchmarks/ablation_report.py

# PROFILE=paper|small|smoke MODEL=[NAME=]DIR DATA=DIR SEEDS=N ONLY=method=crosslore,rank=16 JOBS=N
PROFILE ?= paper
REPRODUCE = $(PY) scripts/reproduce.py --profile $(PROFILE) $(foreach one,$(MODEL),--model $(one)) \
  $(if $(DATA),--data "$(DATA)") $(if $(SEEDS),--seeds $(SEEDS)) $(if $(ONLY),--only "$(ONLY)") $(if $(JOBS),--jobs $(JOBS)) \
  $(REPRODUCE_ARGS)

reproduce-all: $(STAMP) $(if $(filter paper,$(PROFILE)),,$(EMBEDDED)) ## Train and score every cell of the paper, then tables, figures, report
	$(REPRODUCE) all

# One target: reproduce-table1 ... reproduce-table10, reproduce-figure1 ... -figure4, reproduce-ablations. Resumable.
# A profile that tunes does so first, where it has not yet.
reproduce-%: $(STAMP) $(if $(filter paper,$(PROFILE)),,$(EMBEDDED))
	$(REPRODUCE) $(if $(filter small,$(PROFILE)),tuning) $*

data: $(STAMP) ## Prepare GSM8K, MAWPS and E2E for training (SOURCE=folder; from the hub without MAWPS)
	$(PY) scripts/prepare_data.py $(if $(SOURCE),--source $(SOURCE))

docs: $(STAMP) ## Build the documentation into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

docs-serve: $(STAMP) ## Show the documentation on 127.0.0.1:8000 and rebuild it at every change
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve --strict

package: $(STAMP) ## Build wheel and sdist into dist/, their contents and the installed wheel checked
	$(PY) scripts/check_package.py

# Its own environment; the pins but LLaMA-Factory's. A release that contradicts them: CONSTRAINTS=FILE with others.
CONSTRAINTS ?= constraints.txt
RELEASE_TESTS ?= tests/integrations tests/scripts/test_configs.py tests/docs/test_fields.py tests/docs/test_code_blocks.py
RELEASE_VENV := .venv-llamafactory-$(RELEASE)

test-release: ## Test with another LLaMA-Factory in an environment of its own (RELEASE=0.9.5; 7 GB)
	@test -n "$(RELEASE)" || { echo "Name a release of LLaMA-Factory, e.g. make test-release RELEASE=0.9.5"; exit 2; }
	test -x $(RELEASE_VENV)/bin/python || $(PYTHON) -m venv $(RELEASE_VENV)
	grep -v '^llamafactory==' $(CONSTRAINTS) > $(RELEASE_VENV)/constraints.txt
	$(RELEASE_VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
	  -c $(RELEASE_VENV)/constraints.txt -e ".[$(EXTRAS)]" "llamafactory==$(RELEASE)"
	$(RELEASE_VENV)/bin/python -m pip check
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RELEASE_VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS) $(RELEASE_TESTS)

clean: ## Remove .venv, the embedded model and training output
	rm -rf $(VENV) models saves data/prepared
