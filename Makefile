# Two commands for a fresh clone: `make demo` and `make test`. Each makes .venv first if there is none.
PYTHON ?= python3.11
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
SWEEP_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Tests never download; one thread each, since pytest-xdist runs two of them side by side
TEST_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1

.PHONY: help demo test test-all test-trl test-matrix test-vllm resolve package mutation-sweep lint docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a teacher and a student and distil, on a CPU, with a report (DEMO_ARGS=--full for longer)"
	@echo "make test      lint and the tests, but for those marked slow"
	@echo "make test-all  lint and all tests, the slow ones too"
	@echo "make test-trl  the tests that depend on TRL, on every release of the tested line (TRL_VERSIONS='1.16.0' for some)"
	@echo "make test-matrix  the tests that depend on other packages, with their lowest and newest versions"
	@echo "make test-vllm  the tests that need vLLM, with its build for CPUs in an environment of its own (4 GB)"
	@echo "make resolve   whether pip finds versions for the package and each extra, installing nothing"
	@echo "make package   wheel and sdist in dist/, checked, installed elsewhere, and the demo run from there"
	@echo "make lint      ruff, the ban list of the style guide, and mypy"
	@echo "make mutation-sweep  small faults in the core, and which test sees each (SWEEP_ARGS='--share 0.1' for some; hours)"
	@echo "make docs      the documentation as a site in site/ (index.html in it; $(BIN)/mkdocs serve shows it while you write)"
	@echo "make clean     remove .venv and caches"

$(INSTALLED): pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	touch $@

# The demo runs on a CPU, which DeepSpeed, once installed, otherwise warns of
demo: $(INSTALLED)
	DS_ACCELERATOR=cpu $(BIN)/minillm-trl demo $(DEMO_ARGS)

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: lint
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-trl: $(INSTALLED)
	$(BIN)/python tests/tools/trl_matrix.py $(TRL_VERSIONS)

test-matrix: $(INSTALLED)
	$(BIN)/python tests/tools/version_matrix.py

test-vllm: $(INSTALLED)
	$(BIN)/python tests/tools/vllm_environment.py

resolve: $(INSTALLED)
	$(BIN)/python tests/tools/resolve_extras.py

package: $(INSTALLED)
	$(BIN)/python tests/tools/package.py

mutation-sweep: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python tests/mutation_sweep.py $(SWEEP_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/words.py
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache site
