# The front door. Every target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOB ?= jobs/practice.toml
RUN ?= last
IMAGE ?= practice
N ?= 1000
SEED ?= 7
EVERY ?= 1
SAMPLE ?= 40
TORCH ?= $(shell sed -n "s/^torch==//p" requirements.lock)
milktea := $(VENV)/bin/python -m ops.cli
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup rent-and-train plan resume reap status test test-slow test-versions lint crash-matrix fuzz write-faults mutants weather airgap image image-lock bundle push-image lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/ready ## a virtual environment with everything, once

$(VENV)/ready: requirements.lock pyproject.toml .ci/setup.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "milktea needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@.ci/setup.sh $(VENV)
	@touch $@

rent-and-train: setup ## the main job: JOB=jobs/practice.toml (no account needed), jobs/alpaca-zh.toml, yours
	@$(milktea) rent-and-train $(JOB)

plan: setup ## checks, offers and prices of JOB; rents nothing
	@$(milktea) plan $(JOB)

resume: setup ## go on with RUN
	@$(milktea) resume $(RUN)

reap: setup ## destroy whatever no live client looks after
	@$(milktea) reap

status: setup ## where every run stands
	@$(milktea) status

test: setup ## the test suite
	@$(VENV)/bin/python -m pytest -n 3 # more than the two cores: many tests wait for a clock

test-slow: setup ## the long proofs: kills, corruption, every architecture, Docker where an engine is; PARTS="tests/ops ..."
	@$(VENV)/bin/python -m pytest -m "(slow or docker) and not gpu and not live" -n 2 $(PARTS)

test-versions: setup ## the trainer's tests on every torch and transformers of docs/architecture.md; ROWS="train-cu130 ..."
	@$(VENV)/bin/python tests/versions.py $(ROWS)

lint: setup ## ruff, its format, and mypy, strict
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

crash-matrix: setup ## N client deaths, one later command each, boxes left: none
	@$(VENV)/bin/python tests/crash_matrix.py $(N)

fuzz: setup ## N=250000 spoiled inputs to every parser of a box, the API or a user; SEED=7
	@$(VENV)/bin/python tests/fuzz.py $(if $(filter-out file,$(origin N)),$(N),250000) --seed $(SEED)

weather: N = 300
weather: setup ## the main job through N seeds of bad days and deaths: adapters at home, boxes left, by kind
	@$(VENV)/bin/python tests/weather.py $(N)

airgap: N = 1000
airgap: setup ## a bundle of the practice image: N damages, 60 forgeries, 100 kills; goes on where it was; needs root and Docker
	@$(VENV)/bin/python tests/airgap.py $(or $(OUT),.milktea/airgap) --damages $(N)

write-faults: setup ## every write of the client fails once or for good: no box left, no traceback; EVERY=5 for a fifth, KEEP=1 of a run that is stopped and kept
	@$(VENV)/bin/python tests/write_faults.py --every $(EVERY) $(if $(KEEP),--keep)

mutants: setup ## single faults in a module that its own tests must notice; MODULES="ops.market.cost", SAMPLE=40
	@$(VENV)/bin/python tests/mutants.py $(MODULES) --sample $(SAMPLE) --seed $(SEED)

image: setup ## build IMAGE=practice, train-cu130, ... from its lock by docker build; BASE=... another Debian 12
	@$(milktea) image build $(IMAGE) $(if $(BASE),--base $(BASE))

image-lock: setup ## pin every package and file of IMAGE by hash
	@$(milktea) image lock $(IMAGE)

bundle: setup ## a signed folder for a server without a network: IMAGE=..., SINCE=the bundle before, INVENTORY=server.txt, FORMAT=oci
	@$(milktea) image bundle $(IMAGE) $(if $(SINCE),--since $(SINCE)) $(if $(INVENTORY),--inventory $(INVENTORY)) $(if $(VOLUME),--volume $(VOLUME)) $(if $(KEY),--key $(KEY)) $(if $(OUT),--out $(OUT)) $(if $(FORMAT),--format $(FORMAT)) $(if $(FROM),--image $(FROM))

push-image: setup ## to a registry that vast.ai's hosts pull from: IMAGE=..., REGISTRY=...
	@$(milktea) image push $(IMAGE) $(REGISTRY)

lock: ## resolve requirements.lock and the box's list anew from pyproject.toml, TORCH=2.13.0
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q uv
	@.ci/lock.sh .venv-lock/bin/uv $(TORCH)
	@rm -rf .venv-lock

clean: ## what can be made again, except runs/ and out/
	rm -rf $(VENV) .venv-versions .pytest_cache .ruff_cache .mypy_cache .milktea
