# Every target works alone on a fresh clone: what it needs is installed first.
# Needed on the machine: Linux and python3 >= 3.10 with venv and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help venv lint test demo clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

venv: $(STAMP) ## make .venv with the project (editable), the frameworks and the tools
	@echo "venv: $(VENV) is up to date"

# The stamp is written last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "venv: Python 3.10 or newer is needed, $$($(PYTHON) --version 2>&1 || echo '$(PYTHON) is missing');" \
	       "name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ ! -x $(BIN)/python ]; then echo "venv: creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "venv: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }; fi
	@echo "venv: updating pip"
	@$(PIP) install -qq --upgrade "pip>=23"
	@echo "venv: installing mnemo-ft (editable), torch, lightning, accelerate, test tools; a few minutes the first time"
	@$(PIP) install -qq --constraint constraints.txt --editable ".[all,dev]"
	@touch $@
	@echo "venv: ready, torch $$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"

lint: $(STAMP) ## ruff, mypy --strict, pyright, import-linter
	@echo "lint: ruff check";  $(BIN)/ruff check --quiet
	@echo "lint: ruff format"; $(BIN)/ruff format --check --quiet
	@echo "lint: mypy";        $(BIN)/mypy --no-error-summary
	@echo "lint: pyright";     $(BIN)/pyright --warnings
	@echo "lint: import-linter"; $(BIN)/lint-imports --no-logo

# Nodes in network namespaces need ip; where it cannot be installed, their tests say why they skip.
.PHONY: iproute2
iproute2:
	@command -v ip >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { \
	  echo "test: installing iproute2 (Debian package), for tests of several nodes"; \
	  apt-get install -qq --no-install-recommends iproute2 >/dev/null 2>&1 || { \
	  apt-get update -qq >/dev/null 2>&1 && apt-get install -qq --no-install-recommends iproute2 >/dev/null 2>&1; }; }; } \
	  || echo "test: iproute2 is missing and cannot be installed here; tests of several nodes are skipped"

# By file and in the order of directories: the long ones begin. Three, since they wait for
# a tenth of the time; four were no faster.
test: $(STAMP) iproute2 ## the default tests; about 12 minutes on 2 cores, meant to be under 10
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

demo: $(STAMP) ## train a small GPT twice, once with a rank killed, and compare; under 5 minutes
	@$(BIN)/python examples/lightning_gpt/demo.py $(ARGS)

clean: ## remove build products and caches; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache .mnemo lightning_logs
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
