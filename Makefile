# mambamic: every target sets up what it needs; a second call is quick.

PYTHON ?= python3
# The version that the project is tested with; any from 2.6 on works.
TORCH ?= torch==2.13.0
# Another package index, for torch alone: that of a CPU build or of one CUDA version, as
# pytorch.org lists them. Empty: pip's own index, which on Linux has a build for NVIDIA GPUs.
MAMBAMIC_TORCH_INDEX ?=
MODEL ?= model_store/mambamic_t_pbc
PORT ?= 8080
# Of make loadtest: where to, what, from how many at once, for how long, and how many requests a
# second (0: each of them sends the next one when it has its answer).
URL ?= http://127.0.0.1:8000
SCENARIO ?= Mixed
USERS ?= 16
SECONDS ?= 60
RATE ?= 0
REPORTS ?= runs/loadtest
# Of make test: processes that it runs in, two more than two cores, as many tests wait.
JOBS ?= 4

VENV := .venv
BIN := $(VENV)/bin
# What an editable installation is made from; other changes are seen without installing again.
BUILD := pyproject.toml setup.py constraints.txt $(wildcard kernels/native/*.[ch])
# Torch is exchanged only where the call names another one than that which was installed last.
ASKED := $(if $(filter-out file,$(origin TORCH)),$(TORCH)) $(MAMBAMIC_TORCH_INDEX)
OTHER_TORCH := $(filter-out $(shell cat $(VENV)/.torch 2>/dev/null),$(ASKED))

INDEX_URL := $(if $(MAMBAMIC_TORCH_INDEX),--index-url '$(MAMBAMIC_TORCH_INDEX)')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve stop test check audit soak loadtest other-torch

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'PYTHON=$(PYTHON)  TORCH=$(TORCH)  MAMBAMIC_TORCH_INDEX=$(MAMBAMIC_TORCH_INDEX)'
	@echo 'MAMBAMIC_TORCH_INDEX is the address of another package index for torch: CPU or CUDA.'

install: $(VENV)/.serve ## create .venv with all that serving needs: .venv/bin/mambamic
	@echo 'the command is $(BIN)/mambamic'

serve: $(VENV)/.serve ## start a server and print a first prediction (MODEL=, PORT=)
	@$(BIN)/mambamic serve --model $(MODEL) --port $(PORT)

stop: $(VENV)/.serve ## stop the server (PORT=)
	@$(BIN)/mambamic serve --stop --port $(PORT)

# The files in the order of tests/conftest.py. The processes fill the cores: threads of their own would
# only wait for one another, and those that wait do so without taking a core.
test: $(VENV)/.dev ## run the tests (ARGS= for pytest, JOBS=)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'not soak' -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev ## format, lint, types, and known holes where they can be looked up
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/python .ci/audit.py

audit: $(VENV)/.dev ## fail where an installed package has a known hole
	@$(BIN)/python .ci/audit.py --strict

soak: $(VENV)/.dev ## run the long versions of tests (ARGS= for pytest)
	@$(BIN)/python -m pytest -m soak $(ARGS)

loadtest: $(VENV)/.dev ## load a running server, with a report (URL=, SCENARIO=, USERS=, SECONDS=, RATE=)
	@mkdir -p $(REPORTS)
	PYTHONPATH=. $(BIN)/locust --locustfile loadtest/locustfile.py --headless --only-summary \
	  --host $(URL) --users $(USERS) --spawn-rate $(USERS) --run-time $(SECONDS)s \
	  --stop-timeout 60 --rate $(RATE) --html $(REPORTS)/$(SCENARIO).html \
	  --csv $(REPORTS)/$(SCENARIO) --record $(REPORTS)/$(SCENARIO).json $(SCENARIO)
	@echo 'the report is $(REPORTS)/$(SCENARIO).html'

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo '$(PYTHON) is older than Python 3.10: name a newer one, make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo '$(PYTHON) has no venv: on Debian, apt-get install python3-venv'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

other-torch:
$(VENV)/.torch: $(VENV)/.python $(if $(OTHER_TORCH),other-torch)
	@if test -e $@; then $(BIN)/pip uninstall --quiet --yes torch; fi
	$(BIN)/pip install --quiet $(INDEX_URL) '$(TORCH)'
	@echo '$(TORCH) $(MAMBAMIC_TORCH_INDEX)' > $@

$(VENV)/.serve: $(VENV)/.torch $(BUILD)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.serve
