# Every target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer); pip's own
# configuration and its PIP_* variables are respected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_WORKERS ?= 2
DEMO := demo

# Kernels are tested with these tritons too: the oldest that is supported, and the newest. They lie
# beside the environment's own. There are wheels for Linux only.
TRITONS := 3.6.0 3.9.0
ifeq ($(shell uname -s),Linux)
OTHER_TRITONS := $(TRITONS:%=$(VENV)/triton-%/.installed)
endif

export OMP_NUM_THREADS ?= 1
# What kernels compile to; kept, so that the tests compile everything only once.
export TRITON_CACHE_DIR ?= $(CURDIR)/$(VENV)/triton-cache

.PHONY: venv demo serve test test-slow audit lint format types layers support-table clean
.DEFAULT_GOAL := test

venv: $(INSTALLED) $(OTHER_TRITONS)

# The stamp makes pip run only when what it would install has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "autoq needs Python 3.11 or newer, got $$($(PYTHON) -V); set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing autoq and its tools into $(VENV) (minutes on the first run)"
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

# They do not depend on what the environment holds: the bar asks only that it is there.
$(VENV)/triton-%/.installed: | $(INSTALLED)
	@echo "installing triton $* for the tests of kernels into $(@D)"
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	@touch $@

demo: $(INSTALLED)
	mkdir -p $(DEMO)
	$(BIN)/autoq search "$$($(BIN)/python -c 'from autoq.bundled import model_path; print(model_path())')" \
	  --bits 5.0 --compare-uniform --store sqlite:///$(DEMO)/autoq.db \
	  --export $(DEMO)/checkpoint --report $(DEMO)/report.html --overwrite

# The service on the bundled model: searches, plans and exports in the browser. Ctrl-C ends it.
serve: $(INSTALLED)
	mkdir -p $(DEMO)/exports
	$(BIN)/autoq serve --store sqlite:///$(DEMO)/autoq.db --exports $(DEMO)/exports

test: venv
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow and not gpu"

test-slow: venv
	$(BIN)/python -m pytest -q -m "slow and not gpu"

# Known vulnerabilities of what is installed; asks the package index's own service.
audit: $(INSTALLED)
	.ci/audit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

# import-linter does not follow the links in autoq/ and passes over folders without __init__.py
# (kernels/ must not have one), so it reads a copy that has real folders and that file.
layers: $(INSTALLED)
	@set -eu; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	  cp -RL autoq "$$copy/autoq"; : > "$$copy/autoq/kernels/__init__.py"; \
	  config="$$PWD/pyproject.toml"; lint="$$PWD/$(BIN)/lint-imports"; \
	  cd "$$copy"; PYTHONPATH="$$copy" "$$lint" --config "$$config" --no-cache

# The table of models, formats and containers, from what comes of running them all.
support-table: $(INSTALLED)
	$(BIN)/python -m autoq.testing.architectures --write docs/support.md

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
