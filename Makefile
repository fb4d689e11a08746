# What targets take; ARGS is passed on as it is.
TASK ?=
TASKS ?=
SEEDS ?=
MODEL ?=
DATA ?=
GPUS ?=
PROCS ?=
EXPERIMENT ?=
INIT_FROM ?=
RESUME ?=
TRIALS ?=
WORKERS ?=
STUDY ?=
STORAGE ?=
DB ?=
ARTIFACTS ?=
HOSTS ?=
JOBS_PER_GPU ?=
KEEP ?=
ARGS ?=

PROGRAMS := tests/system/test_glue.py tests/execution tests/inference tests/export tests/pipeline # of make torture, for coverage
BENCHMARKS ?= forward train paired tracking tune glue preprocess startup scaling scale predict serve

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c 'import sys; print("$(p)" if (3,11) <= sys.version_info[:2] < (3,13) else "")' 2>/dev/null)))
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install -q -c requirements.lock
# $(call option,--flag,value): nothing where there is no value, which may hold blanks and quotes; ARGS alone is split.
home = $(if $(filter ~/%,$(firstword $(1))),$(patsubst ~/%,$(HOME)/%,$(1)),$(1))
option = $(if $(2),$(1) '$(subst ','\'',$(call home,$(2)))')
needs = test -n '$(subst ','\'',$($(1)))' || { echo "error: $(1)= is missing; it names $(or $(2),a run by its id$(comma) which a training and make report tell)" >&2; exit 2; }
comma := ,
a_model := a run by its id$(comma) models:/<name>@champion or a folder
where = $(call option,--task,$(TASK)) $(call option,--data,$(DATA)) $(call option,--gpus,$(GPUS)) $(call option,--procs,$(PROCS))
FLAGS = $(where) $(call option,--model,$(MODEL))

# Addresses with passwords reach a command in its environment, which no other user of the machine can read.
ifneq ($(STORAGE),)
export OPTUNA_STORAGE := $(STORAGE)
endif
ifneq ($(DB),)
export MLFLOW_BACKEND_STORE_URI := $(DB)
endif

# A variable that no target knows is most likely a known one, misspelt.
KNOWN := TASK TASKS SEEDS JOBS_PER_GPU KEEP MODEL DATA GPUS PROCS EXPERIMENT INIT_FROM RESUME TRIALS WORKERS STUDY STORAGE DB ARTIFACTS HOSTS ARGS RUN PREDICT TO OUT \
	BENCHMARKS PYTHON GLUE_DIR ROBERTA_BPE_DIR TORTURE_SEED TORTURE_KILLS TORTURE_MINUTES
ENVIRONMENT := MLFLOW_% OPTUNA_% LIGHTNING_GLUE_% CUDA_% OMP_% HF_% MASTER_% PATH HOME SHELL BIN PIP
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(KNOWN) $(ENVIRONMENT) MAKE% -%,$(GIVEN))
ifneq ($(UNKNOWN),)
$(error unknown variable $(UNKNOWN); expected one of $(KNOWN))
endif

.DEFAULT_GOAL := help
.PHONY: help install train tune glue dashboard evaluate preprocess sync bench bench-gpu report convert submit register serve server ui test coverage mutate torture picture lint dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26
	@echo; echo '  TASK TASKS SEEDS MODEL DATA GPUS JOBS_PER_GPU PROCS WORKERS KEEP EXPERIMENT INIT_FROM RESUME GLUE_DIR ROBERTA_BPE_DIR'; echo '  ARGS="key=value ...": what the target'\''s command takes besides'

install: $(INSTALLED) ## make .venv and install everything (the other targets do it when needed)

$(INSTALLED): pyproject.toml setup.py requirements.lock requirements-no-deps.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or set PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing into .venv: some 2 GB, a few minutes ..." >&2
	@$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-deps -r requirements-no-deps.txt
	@# --no-warn-conflicts: fairseq asks for torchaudio, which nothing here uses
	$(PIP) --no-warn-conflicts -e '.[test]'
	@touch $@

train: $(INSTALLED) ## fine-tune on TASK (none: a one-minute demo), track in MLflow
	@$(BIN)/python -m lightning_glue.train $(FLAGS) $(call option,--experiment,$(EXPERIMENT)) $(call option,--init-from,$(INIT_FROM)) $(call option,--resume,$(RESUME)) $(ARGS)

tune: $(INSTALLED) ## search TASK's hyperparameters with Optuna: TRIALS WORKERS STUDY STORAGE; again: goes on
	@$(BIN)/python -m lightning_glue.tune $(FLAGS) $(call option,--experiment,$(EXPERIMENT)) $(call option,--trials,$(TRIALS)) $(call option,--workers,$(WORKERS)) $(call option,--study,$(STUDY)) $(ARGS)

glue: $(INSTALLED) ## the whole benchmark: TASKS (none: all nine) with SEEDS each, report and submission; again: what is missing
	@$(BIN)/python -m lightning_glue.glue $(call option,--tasks,$(TASKS)) $(call option,--seeds,$(SEEDS)) $(call option,--model,$(MODEL)) $(call option,--data,$(DATA)) $(call option,--gpus,$(GPUS)) $(call option,--procs,$(PROCS)) $(call option,--workers,$(WORKERS)) $(call option,--jobs-per-gpu,$(JOBS_PER_GPU)) $(call option,--keep,$(KEEP)) $(call option,--experiment,$(EXPERIMENT)) $(ARGS)

dashboard: $(INSTALLED) ## look at the studies in optuna-dashboard
	@$(BIN)/python -m lightning_glue.dashboard $(ARGS)

evaluate: $(INSTALLED) ## score RUN=<run id, models:/name@alias, directory> on the dev splits; PREDICT=<dir> writes test predictions
	@$(call needs,RUN)
	@$(BIN)/python -m lightning_glue.evaluate $(call option,,$(RUN)) $(where) $(call option,--predict,$(PREDICT)) $(ARGS)

preprocess: $(INSTALLED) ## write TASK (none: all) in fairseq's binary layout, as preprocess_GLUE_tasks.sh does
	@$(BIN)/python -m lightning_glue.preprocess $(call option,--task,$(or $(TASK),ALL)) $(call option,--data,$(DATA)) $(ARGS)

sync: $(INSTALLED) ## deliver to the tracking server what trainings could not; RUN=<id> only that run
	@$(BIN)/python -m lightning_glue.sync $(RUN) $(ARGS)

record = $(CURDIR)/benchmarks/records/$$(date +%Y-%m-%d-%H%M).json
bench: $(INSTALLED) ## measure on the CPU beside fairseq, Hugging Face and MLflow (some two hours); kept in benchmarks/records/
	@$(PIP) -e '.[bench]'
	@export BENCH_RECORD=$(record); \
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(ARGS) || exit; done

bench-gpu: $(INSTALLED) ## measure on a GPU beside fairseq in fp16 and Trainer: speed, MFU, kernels, memory; kept in benchmarks/records/
	@$(PIP) -e '.[bench]'
	@BENCH_RECORD=$(record) $(BIN)/python benchmarks/gpu.py $(ARGS)

report: $(INSTALLED) ## table of the runs over their seeds, of TASK or of all; ARGS="--out DIR" writes Markdown and HTML
	@$(BIN)/python -m lightning_glue.report $(call option,--task,$(TASK)) $(ARGS)

convert: $(INSTALLED) ## write MODEL (a run, folder or file) for transformers, fairseq or ONNX: TO=hf OUT=<folder>
	@$(call needs,MODEL,$(a_model))
	@$(call needs,TO,the format: hf$(comma) fairseq or onnx)
	@$(call needs,OUT,a new folder)
	@$(BIN)/python -m lightning_glue.convert $(call option,,$(MODEL)) $(call option,--to,$(TO)) $(call option,,$(OUT)) $(call option,--data,$(DATA)) $(ARGS)

submit: $(INSTALLED) ## write the leaderboard's zip of a benchmark; ARGS="NAME --from ensemble", ARGS="--check ZIP"
	@$(BIN)/python -m lightning_glue.submit $(ARGS)

register: $(INSTALLED) ## register the best model of RUN=<run id>; the best of its task is champion
	@$(call needs,RUN)
	@$(BIN)/python -m lightning_glue.registry $(call option,,$(RUN)) $(ARGS)

serve: $(INSTALLED) ## serve MODEL=<run id, models:/glue-rte@champion, directory> on 127.0.0.1:5001; ARGS="--port 8000"
	@$(call needs,MODEL,$(a_model))
	@$(BIN)/python -m lightning_glue.serve $(call option,,$(MODEL)) $(call option,--gpus,$(GPUS)) $(ARGS)

server: $(INSTALLED) ## serve the runs on 127.0.0.1:5000; DB=postgresql://... ARTIFACTS=s3://... HOSTS=names: for a team
	@$(BIN)/python -m lightning_glue.server $(if $(MLFLOW_BACKEND_STORE_URI),--host 0.0.0.0) $(call option,--artifacts,$(ARTIFACTS)) $(call option,--allowed-hosts,$(HOSTS)) $(ARGS)

ui: $(INSTALLED) ## browse and compare runs: `mlflow ui` with one process, without its job runners
	@PYTHONWARNINGS='ignore:starlette.middleware.wsgi' MLFLOW_DISABLE_TELEMETRY=$${MLFLOW_DISABLE_TELEMETRY:-true} MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 --uvicorn-opts='--lifespan off' $(ARGS)

test: $(INSTALLED) ## run the tests, many minutes; GLUE_DIR and ROBERTA_BPE_DIR let them use real files
	@echo "the whole suite takes about eight minutes on two cores; one file: ARGS='-n0 tests/data/test_reader.py'" >&2
	@$(BIN)/python -m pytest -rs $(ARGS)

coverage: $(INSTALLED) ## line coverage by the tests and by whole programs of make torture; ARGS="tests/data" only by those
	@rm -f .coverage .coverage.*
	@export COVERAGE_FILE=$(CURDIR)/.coverage; \
	$(BIN)/python -m coverage run -m pytest $(ARGS); status=$$?; \
	$(if $(ARGS),,$(BIN)/python -m coverage run -m pytest -m torture --timeout 900 $(PROGRAMS) || status=$$?;) \
	$(BIN)/python -m coverage combine -q; $(BIN)/python -m coverage report && exit $$status

mutate: $(INSTALLED) ## make ten lines wrong, one after the other, in a copy: a test has to notice each
	@$(BIN)/python tests/helpers/mutations.py $(ARGS)

torture: $(INSTALLED) ## the longer tests: kills, power cuts, full disks, whole programs; TORTURE_SEED=<n> repeats a run
	@$(BIN)/python -m pytest -m torture --timeout 900 $(ARGS)

picture: $(INSTALLED) ## take the README's picture again, of the runs of SST-2 here
	@$(BIN)/python tests/helpers/browser.py . glue-sst-2 docs/compare.png

lint: $(INSTALLED) ## check style, types and the direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

dist: $(INSTALLED) ## build the wheel and the sdist into dist/
	@$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove .venv, caches and what was built; runs in mlruns/ and mlflow.db stay
	rm -rf .venv *.egg-info build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
