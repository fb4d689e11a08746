# Every target takes these; ARGS="key=value ..." passes overrides on.
TASK ?=
MODEL ?=
DATA ?=
GPUS ?=
PROCS ?=
EXPERIMENT ?=
INIT_FROM ?=
ARGS ?=

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c 'import sys; print("$(p)" if (3,11) <= sys.version_info[:2] < (3,13) else "")' 2>/dev/null)))
BIN := .venv/bin
INSTALLED := .venv/.installed
FLAGS = $(if $(TASK),--task $(TASK)) $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(GPUS),--gpus $(GPUS)) $(if $(PROCS),--procs $(PROCS))

.DEFAULT_GOAL := help
.PHONY: help install train evaluate preprocess ui test lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo; echo '  TASK MODEL DATA GPUS PROCS EXPERIMENT INIT_FROM GLUE_DIR ROBERTA_BPE_DIR ARGS="key=value ..."'

install: $(INSTALLED) ## make .venv and install everything (the other targets do it when needed)

$(INSTALLED): pyproject.toml requirements-no-deps.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-deps -r requirements-no-deps.txt
	$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@

train: $(INSTALLED) ## fine-tune on TASK (none: a one-minute demo), track in MLflow
	@$(BIN)/python -m lightning_glue.train $(FLAGS) $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) $(if $(INIT_FROM),--init-from $(INIT_FROM)) $(ARGS)

evaluate: $(INSTALLED) ## score RUN=<run id or directory> on the dev splits; PREDICT=<dir> writes test predictions
	@$(BIN)/python -m lightning_glue.evaluate $(RUN) $(if $(TASK),--task $(TASK)) $(if $(DATA),--data $(DATA)) $(if $(GPUS),--gpus $(GPUS)) $(if $(PROCS),--procs $(PROCS)) $(if $(PREDICT),--predict $(PREDICT)) $(ARGS)

preprocess: $(INSTALLED) ## write TASK in fairseq's binary layout, as preprocess_GLUE_tasks.sh does
	@$(BIN)/python -m lightning_glue.preprocess --task $(or $(TASK),ALL) $(if $(DATA),--data $(DATA)) $(ARGS)

ui: $(INSTALLED) ## browse and compare runs (plain `mlflow ui`)
	@$(BIN)/mlflow ui

test: $(INSTALLED) ## run the tests; GLUE_DIR and ROBERTA_BPE_DIR let them use real files
	@$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove .venv and caches; runs in mlruns/ and mlflow.db stay
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis
