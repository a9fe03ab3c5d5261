# Two commands are enough: "make report" and "make test". Both set up .venv first, and only when something has changed.
#   make PYTHON=python3.12             another Python (3.11 or newer)
#   make PIP_FLAGS="--index-url URL"   another package index, such as one with CPU builds of torch

PYTHON ?= python3
PIP_FLAGS ?=

VENV := .venv
INSTALLED := $(VENV)/installed

PYTHON_VERSION = $(shell "$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null)
PYTHON_SUITS = $(shell "$(PYTHON)" -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)
PYTHON_FOUND = $(if $(PYTHON_VERSION),$(PYTHON) is Python $(PYTHON_VERSION),there is no $(PYTHON))
WRONG_PYTHON = probe needs Python 3.11 or newer and $(PYTHON_FOUND); choose another: make PYTHON=python3.12

.PHONY: help report test lab check bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make report   routing report on the bundled corpus: report/index.html'
	@echo 'make test     all tests'
	@echo 'make lab      JupyterLab on the notebooks'
	@echo 'make check    linter, formatter, type checker'
	@echo 'make bench    benchmarks'
	@echo 'make clean    remove .venv, the report and caches'

report: $(INSTALLED)
	$(VENV)/bin/probe report --out report

test: $(INSTALLED)
	$(VENV)/bin/pytest

lab: $(INSTALLED)
	$(VENV)/bin/probe lab notebooks

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.record
	$(VENV)/bin/python -m benchmarks.batching
	$(VENV)/bin/python -m benchmarks.statistics

clean:
	rm -rf $(VENV) report build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is what makes a second run cheap: it is newer than the two files that say what to install.
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install $(PIP_FLAGS) --editable ".[all]" --constraint constraints.txt
	@touch $@

$(VENV)/bin/pip:
	$(if $(PYTHON_SUITS),,$(error $(WRONG_PYTHON)))
	"$(PYTHON)" -m venv $(VENV)
