# `make` lists the targets. Python packages go into .venv, unless the active virtual environment has a torch that is new
# enough: then that environment is used, and its torch stays as it is.

PYTHON ?= python3
# What .venv gets; the developer tools are pinned in pyproject.toml.
TORCH := torch==2.14.1 torchvision==0.29.1
# The oldest torch the same binary runs with (`make smoke`).
TORCH_OLDEST := torch==2.13.0
EXTRAS := build test demo bench peers lint

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

ACTIVE := $(shell $(PYTHON) -c 'import os, sys; from importlib.metadata import version; \
    active = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ; \
    print(sys.prefix if active and tuple(map(int, version("torch").split(".")[:2])) >= (2, 13) else "")' 2>/dev/null)
ENV := $(or $(ACTIVE),$(CURDIR)/.venv)
STAMP := $(ENV)/.dsconv_ext-setup
PY := $(ENV)/bin/python
SMOKE := $(CURDIR)/.venv-smoke

export PATH := $(ENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CXX_FILES := find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu'

# The interpreter of the environment, for scripts.
python:
	@echo "$(PY)"

.PHONY: help python setup build demo test test-all lint format bench wheel wheel-check gpu-check smoke clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the environment: .venv, or what the active one lacks
	@echo "The environment is $(ENV)"

# The stamp comes last, so a .venv without one is an unfinished one and starts afresh.
$(STAMP): pyproject.toml
	@command -v "$${CXX:-g++}" >/dev/null || { echo "A C++20 compiler is needed: install g++ 12 or newer, or set CXX."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Development needs Python 3.11 or newer: put it on PATH or run make PYTHON=/path/to/python3.11."; exit 1; }
ifndef ACTIVE
	[ -e $@ ] || $(PYTHON) -m venv --clear "$(ENV)"
	"$(PY)" -m pip install $(TORCH)
endif
	"$(PY)" -c 'import tomllib; \
	    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	    print(*(line for name in "$(EXTRAS)".split() for line in extras[name]), sep="\n")' > "$@.requirements"
	"$(PY)" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > "$@.constraints"
	"$(PY)" -m pip install -r "$@.requirements" -c "$@.constraints"
	@touch $@

build: $(STAMP) ## compile what has changed (CUDA too if nvcc is found; DSCONV_CUDA=0|1 decides)
	@"$(PY)" setup.py --quiet build_ext --inplace

demo: build ## run the demo on a photograph, two MobileNets and a small training
	"$(PY)" examples/demo.py $(ARGS)

# One test per core, each with one thread: tests of threads ask for theirs.
test test-all: export OMP_NUM_THREADS = 1
test: build ## run the core tests and a sample of every family
	"$(PY)" -m pytest tests -q -n auto $(ARGS)

test-all: build ## run every test
	"$(PY)" -m pytest tests -q -n auto -m "" $(ARGS)

lint: $(STAMP) ## check style and types
	ruff check .
	ruff format --check .
	$(CXX_FILES) | xargs -r clang-format --dry-run --Werror
	mypy

format: $(STAMP) ## apply the style
	ruff check --fix .
	ruff format .
	$(CXX_FILES) | xargs -r clang-format -i

bench: build ## time the layers of MobileNetV2 (ARGS="run --shapes xception --pass fwd,bwd --json out.json")
	"$(PY)" -m bench $(or $(ARGS),run --shapes mobilenet_v2)

# build/lib*: setuptools would pack what was copied there before, removed modules too.
wheel: $(STAMP) ## build a wheel into dist/, print its size and contents
	rm -rf dist/*.whl build/lib*
	"$(PY)" -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	ls -l dist/*.whl
	"$(PY)" -m zipfile -l dist/*.whl

WHEEL_CHECK := $(CURDIR)/build/wheel-check

# Without the clone on the path, where pip would find the package installed already.
wheel-check: export PYTHONPATH :=
wheel-check: wheel ## test the wheel in fresh environments with this torch and with the oldest one
	rm -rf "$(WHEEL_CHECK)"
	mkdir -p "$(WHEEL_CHECK)"
	cp -r tests pyproject.toml "$(WHEEL_CHECK)"
	for what in "$(TORCH) test,demo" "$(TORCH_OLDEST) test"; do \
	    $(PYTHON) -m venv --clear "$(WHEEL_CHECK)/venv"; \
	    "$(WHEEL_CHECK)/venv/bin/python" -m pip install $${what% *} "$$(echo dist/*.whl)[$${what##* }]"; \
	    (cd "$(WHEEL_CHECK)" && venv/bin/python -m pytest -q -n auto tests); \
	done

gpu-check: build ## run the GPU tests, write build/gpu-report.txt
	@"$(PY)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo "gpu-check: torch sees no GPU on this machine; nothing was checked."; exit 1; }
	{ nvidia-smi; "$(PY)" -m dsconv_ext info; "$(PY)" -m pytest tests -q -m cuda; } 2>&1 \
	    | tee build/gpu-report.txt

smoke: build $(SMOKE)/.dsconv_ext-setup ## load the same library in the oldest supported torch and try it
	"$(SMOKE)/bin/python" tests/smoke.py

$(SMOKE)/.dsconv_ext-setup: Makefile
	$(PYTHON) -m venv --clear "$(SMOKE)"
	"$(SMOKE)/bin/python" -m pip install $(TORCH_OLDEST) numpy
	@touch $@

clean: ## remove what was built (the environments stay)
	rm -rf build dist *.egg-info dsconv_ext/_C.abi3.so .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
