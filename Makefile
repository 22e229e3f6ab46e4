# quickthaw: `make help` lists the targets. Everything that they fetch or build stays under build/.
SHELL := /bin/bash
VENV := build/venv
PY := $(VENV)/bin/python
comma := ,
CODE := hook shim tests packaging gpu
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: attacks bench faults help setup lint format protos test test-unit test-node demo gpu-bundle soak storm crash fuzz packages clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

$(VENV)/.ready: setup.cfg
	tests/setup-machine
	/usr/bin/python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q $$($(VENV)/bin/python packaging/requirements.py install dev)
	touch $@

setup: $(VENV)/.ready ## install what building and testing need

format: setup ## let the formatter have its way
	$(VENV)/bin/ruff format $(CODE)
	$(VENV)/bin/ruff check --fix $(CODE)

lint: setup ## formatter, linter, types, import layers, shell, generated code, language
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	shellcheck $$(git grep -lE '^\#!/bin/(sh|bash)|^\#!/usr/bin/env bash' -- ':!*.md' ':!*.py' ':!Makefile')
	$(PY) protos/generate.py --check
	$(PY) -m tests.english

protos: setup ## generate the Python code of protos/*.proto
	$(PY) protos/generate.py

test-unit: setup ## seconds, no node
	$(PY) -m pytest tests/unit

# What is tested and shown is what is shipped: both install the deb.
attacks bench demo faults test test-node soak storm: KINDS = deb

demo: packages ## the main job on real input: cold start, capture, restores; writes build/demo.json
	$(PY) -m tests.demo

bench: packages ## four ways to start side by side; QUICK=1, PARTS, SIZES, RUNS… see docs/benchmarks.md; writes build/bench.json
	$(PY) -m tests.bench

test: packages ## unit tests and end-to-end tests on nodes with real containerd, side by side (26 minutes)
	$(PY) -m tests.side_by_side 'tests/node -k forky' 'tests/node -k "not forky"' 'nice tests/unit tests/fuzz tests/crash tests/storm'

crash: setup ## kill -9 and power loss at every step of the store, at length (half an hour)
	QUICKTHAW_CRASH=all $(PY) -m pytest tests/crash --timeout 1800

fuzz: setup ## every parser under atheris, MINUTES=15 in all; KEEP=1 adds what is new to the corpus
	nice $(PY) -m tests.fuzz --minutes $(or $(MINUTES),15) $(if $(KEEP),--keep)

test-node: packages ## end-to-end tests alone; K=EXPRESSION takes some of them, as pytest -k
	$(PY) -m pytest tests/node $(if $(K),-k "$(K)")

soak: packages ## pods come and go, nothing may grow; RESTORES=1000 CAPTURES=200; writes build/soak.json
	$(PY) -m tests.soak

storm: packages ## everything happens to memory that is being filled: MINUTES=10 or SECONDS, LEVELS=direct,node; writes build/storm.json
	$(PY) -m tests.storm --seconds $(or $(SECONDS),$(shell expr 60 \* $(or $(MINUTES),10))) --levels $(or $(LEVELS),direct$(comma)node) --suite $(or $(SUITE),forky) $(if $(SEED),--seed $(SEED))

gpu-bundle: setup ## build/gpu/bundle: what tests/gpu needs on a bare GPU machine without network
	$(PY) -m tests.gpu.bundle

packages: setup ## the deb and the rpm, in build/packages (KINDS=deb: only that)
	@mkdir -p build/packages
	flock build/packages/lock sh -c '$(PY) packaging/vendor.py tree build/packages/vendor && $(PY) packaging/build.py $(KINDS)'

faults: packages ## everything fails once, on a node: FAULTS=restore.shm,*CRIU takes some, SUITE=forky,trixie; writes build/faults.json
	$(PY) -m tests.faults --only "$(FAULTS)" --suite "$(or $(SUITE),forky)"

attacks: packages ## pods attack a node and each other: SUITE=forky,trixie, K=EXPRESSION; writes build/attacks.json
	$(PY) -m tests.attacks --suite "$(or $(SUITE),forky)" $(if $(K),-k "$(K)")

clean: ## remove everything that was built
	rm -rf build
