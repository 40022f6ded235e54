# Set-up is a prerequisite of every target: a virtual environment from requirements.txt, made once.
#
#   CONFIG      a dataset (configs/NAME), a row or a YAML file       GPUS    processes (torchrun), one per GPU
#   METHODS     rows of the dataset instead of its default ones, as METHODS="seesaw bags_cosine"
#   POOL        the rows that choose chooses from: quick or full
#   CHECKPOINT  what eval and predict use                            ARGS    section.key=value overrides, or flags
#   IMAGES      what predict looks at                                RUNS    run folders that table compares
#   RUN, OTHER  run folders: what report is about, and what it is compared with
#   TABLE       which table of the paper (1, 2, 3, 4, fig4, coco_lt), or methods
#   PYTHON      the interpreter that makes VENV                      VENV    an existing environment can be used
#   INSTALL     yes: install what is missing into a VENV that make has not made

CONFIG ?= configs/glyphs-100
CHECKPOINT ?= runs/glyphs-100/bags/last.pth
IMAGES ?= data/glyphs-100/val
RUNS ?= runs/glyphs-100
RUN ?= runs/glyphs-100/bags
OTHER ?=
GPUS ?= 1
ARGS ?=
METHODS ?=
POOL ?= quick
TABLE ?=
PYTHON ?= python3
VENV ?= .venv
INSTALL ?=

BIN = $(VENV)/bin
READY = $(VENV)/.bags-ready
READY_DEV = $(VENV)/.bags-ready-dev
ifeq ($(filter-out 1,$(GPUS)),)
LAUNCH = $(BIN)/python
else
LAUNCH = $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node $(GPUS)
endif

.PHONY: help train choose eval predict test lint table report check-gpu clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "make %-9s %s\n", $$1, $$2}'

train: $(READY)  ## Train CONFIG (default: softmax, its control and BAGS on the embedded dataset) and compare
	$(LAUNCH) scripts/train.py $(CONFIG) $(if $(METHODS),--methods $(METHODS)) $(ARGS)

choose: $(READY)  ## Find the best classifier for CONFIG, with an honest estimate of its gain; POOL=full tries more rows
	$(BIN)/python scripts/choose.py $(CONFIG) --pool $(POOL) $(ARGS)

eval: $(READY)  ## Evaluate CHECKPOINT on its validation set
	$(LAUNCH) scripts/evaluate.py $(CHECKPOINT) $(ARGS)

predict: $(READY)  ## Draw what CHECKPOINT finds in IMAGES (a file or a folder) to predictions/
	$(BIN)/python scripts/predict.py $(CHECKPOINT) $(IMAGES) $(ARGS)

table: $(READY)  ## Compare the finished runs in RUNS; or TABLE=1, 2, 3, 4, fig4, coco_lt or methods, running what CONFIG lacks
	$(if $(TABLE),$(LAUNCH) scripts/tables.py --paper $(TABLE) $(CONFIG),$(BIN)/python scripts/tables.py $(RUNS)) $(ARGS)

report: $(READY)  ## Write RUN/report.html, one file about that run; with OTHER also what changed from OTHER to RUN
	$(BIN)/python scripts/report.py $(RUN) $(OTHER) $(ARGS)

check-gpu: $(READY)  ## Check on a GPU, in at most 6 minutes, what a CPU cannot show; result in runs/check_gpu.json
	$(BIN)/python scripts/check_gpu.py $(ARGS)

test: $(READY_DEV)  ## Run the tests
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(READY_DEV)  ## Check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:  ## Remove the environment and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that make has not made, which has no .bags-made, belongs to someone else: it is only looked at.
MADE = $(VENV)/.bags-made
OURS = [ -e $(MADE) ] || [ -e $(READY) ] || [ "$(VENV)" = .venv ] || [ "$(INSTALL)" = yes ]
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(READY): requirements.txt
	@if [ -e $(VENV) ]; then $(OURS) || [ -x $(BIN)/python ] || { echo "VENV=$(VENV): is no environment: bin/python is missing" >&2; exit 2; }; \
	else $(PYTHON) -m venv $(VENV) && touch $(MADE); fi
	@if $(OURS); then $(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make clean, then make PYTHON=... names one")'
	@if $(OURS); then echo "installing requirements.txt into $(VENV) (once)"; $(PIP) -r requirements.txt && touch $@; \
	else $(BIN)/python scripts/requirements.py requirements.txt; fi

$(READY_DEV): $(READY) requirements-dev.txt
	@if $(OURS); then echo "installing requirements-dev.txt into $(VENV) (once)"; $(PIP) -r requirements-dev.txt && touch $@; \
	else $(BIN)/python scripts/requirements.py requirements-dev.txt; fi
