# Every target makes its own virtual environment first. On a new machine, `make demo` or `make test` is enough.

PYTHON ?= python3
# Asked for first and by version, so that pip does not choose a build for the other dependencies. A machine that has a
# CPU build of it to hand takes that; elsewhere, install the build you want beforehand, or set TORCH.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Two files of tests at a time, a thread each.
TWO := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The server of nvidia-pytriton wants an older NumPy than everything else.
SERVED := build/triton
SERVING := $(SERVED)/.installed
SERVER := OMP_NUM_THREADS=1 $(SERVED)/bin/pytest tests/serve/test_triton_server.py

.PHONY: help demo test check lint bench docs triton clean
.DEFAULT_GOAL := help

help:  ## Show what there is to make.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

# Modules are compiled as they are first imported, which few of all that are installed are.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile -e '.[cpu,rtx,test]'
	@touch $@

demo: $(READY)  ## Build the example checkpoint to fp8 with an engine, generate some Python, show the report.
	$(BIN)/v4export build examples/tiny-v3 -o demo-out --precision fp8 --force
	@echo
	$(BIN)/v4export run demo-out --prompt 'def read_lines(self, path):' --max-new-tokens 96
	@echo
	@echo "The report: demo-out/report.html"

test: lint $(SERVING)  ## Run everything that needs no GPU: quick tests, oracles, engines, whole builds, a real server.
	$(TWO) -m 'not gpu' --durations=60
	$(SERVER)

check: $(READY)  ## Run the quick tests.
	$(TWO) -m 'not slow and not gpu'

lint: $(READY)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Measure export, prefill and decode beside transformers and llama.cpp; writes docs/benchmarks.md.
	$(BIN)/pip install --quiet --no-compile -e '.[bench]'
	$(BIN)/python benchmarks/cpu.py

docs: $(READY)  ## Build the documentation into build/site.
	$(BIN)/python docs/operators.py
	$(BIN)/mkdocs build --strict

$(SERVING): pyproject.toml
	$(PYTHON) -m venv $(SERVED)
	$(SERVED)/bin/pip install --quiet --upgrade pip
	$(SERVED)/bin/pip install --quiet --no-compile "$(TORCH)"
	$(SERVED)/bin/pip install --quiet --no-compile -e '.[triton]' pytest pytest-timeout hypothesis transformers starlette httpx
	@touch $@

triton: $(SERVING)  ## Test a packaged bundle in a real Triton Inference Server, in an environment of its own.
	$(SERVER)

clean:  ## Remove what the targets made.
	rm -rf demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
