# The commands promised to users and contributors. A target sets up whatever it needs in .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled afterwards, by all processors. Not left to the first import: where PYTHONDONTWRITEBYTECODE is set, that is
# every import of every process, and a deployment starts half as fast.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
PROMPT ?= A red circle moves to the right on a white background
FPS ?=
NODES ?= 3
LANES ?= 2
CLUSTER ?=

.PHONY: help setup demo serve cluster test test-fast test-all coverage bench bench-gpu lint format docs docs-reference image clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# The stamp says that .venv holds what these two files ask for.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV), once: a few minutes and 2.3 GB, or several more with PyTorch's CUDA build"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON has value $(PYTHON), expected Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  1 of 4: PyTorch"
	@$(PIP) "$$(grep -E '^torch==' constraints.txt)" $(TORCH_INDEX)
	@echo "  2 of 4: all other packages"
	@$(PIP) -e '.[dev]'
	@echo "  3 of 4: compiling them"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some ship files in the syntax of later Pythons
	@echo "  4 of 4: a trial import"
	@DS_ACCELERATOR=cpu $(BIN)/python -W ignore -c 'import deepspeed, serve_app.server, serve_app.wan.generate'
	@touch $@

setup: $(VENV)/ready ## set up .venv

demo: setup ## start the embedded default, make one video (PROMPT="..." FPS=32), stop
	@$(BIN)/wan-serve demo "$(PROMPT)" $(if $(FPS),--fps-out $(FPS))

serve: setup ## the embedded default on http://127.0.0.1:8000 until Ctrl-C
	@exec $(BIN)/wan-serve up configs/tiny.yaml

cluster: setup ## several hosts on this machine until Ctrl-C (NODES=3 CLUSTER="--gpus 1:1 --redis auto")
	@exec $(BIN)/python -m cluster.dev up --nodes $(NODES) $(CLUSTER)

test: setup ## all tests that this machine can run, in two lanes (LANES=2)
	@$(BIN)/python -m pytest -n $(LANES)

test-fast: setup ## the tests without Ray, databases, GPUs and groups of processes
	@$(BIN)/python -m pytest -n $(LANES) -m unit

test-all: setup ## also the slow ones, one by one: every fault between hosts (root, iproute2, redis-server)
	@$(BIN)/python -m pytest --slow

coverage: setup ## the tests of test-fast, and the lines that they do not run
	@$(BIN)/python -m pytest -q -n $(LANES) -m unit --cov=serve_app --cov=cluster --cov-report=term-missing:skip-covered

bench: setup ## the benchmarks that this machine can run
	@$(BIN)/python -m benchmarks.serving.serving_tax
	@$(BIN)/python -m benchmarks.serving.cold_start
	@$(BIN)/python -m benchmarks.model.parity --model serve_app/tiny/checkpoint
	@$(BIN)/python -m benchmarks.model.rank_memory
	@$(BIN)/python -m benchmarks.model.loading
	@$(BIN)/python -m benchmarks.model.collectives
	@$(BIN)/python -m benchmarks.serving.engine_throughput
	@$(BIN)/python -m benchmarks.serving.mixed_trace
	@$(BIN)/python -m benchmarks.serving.engine_overhead
	@$(BIN)/python -m benchmarks.serving.metrics_cost
	@$(BIN)/python -m benchmarks.model.cpu_vae
	@$(BIN)/python -m benchmarks.serving.gateway
	@$(BIN)/python -m benchmarks.serving.api_fuzz
	@$(BIN)/python -m benchmarks.faults.job_chaos

bench-gpu: setup ## those of A14B's size, on CUDA devices, with random weights
	@$(BIN)/python -m benchmarks.model.a14b_forward --attention auto cudnn --compile also --diffusers
	@$(BIN)/python -m benchmarks.model.a14b_memory --compile
	@$(BIN)/python -m benchmarks.model.vae_decode
	@$(BIN)/python -m benchmarks.model.loading --device cuda --layers 8
	@$(BIN)/python -m benchmarks.serving.a14b_serve

image: ## an image of this tree, without a daemon (root, buildah, debootstrap; BUILD_ARGS="--build-arg TORCH=cuda")
	@cluster/image/build.sh

lint: setup ## ruff, codespell, the borders of imports, mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/lint-imports --no-logo && $(BIN)/mypy

format: setup ## let ruff rewrite
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

docs-reference: setup ## write docs/reference from the code
	@$(BIN)/python -m docs.generate

docs: docs-reference ## one static site of docs/, in site/
	@$(PIP) -e '.[docs]'
	@$(BIN)/python -m docs.site

clean: ## remove .venv, out/, data/ and site/
	rm -rf $(VENV) out data site
