# make run    the exporter on this machine: Python 3.11 or later is all it needs
# make test   everything that CI runs, own set-up included
# docs/development.md says what the other targets are for.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
WORKERS ?= 2
IMAGE ?= creatify-exporter:check
PYTEST_ARGS ?=
ARGS ?=

# A shim of a version manager may be on PATH and still refuse to run, so each candidate is tried, not only looked up.
define FIND_PYTHON
for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do \
  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; \
  python=; \
done; \
if [ -z "$$python" ]; then \
  echo "make: no Python 3.11 or later with venv and pip found (on Debian: apt-get install python3-venv)." >&2; \
  echo "make: name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; \
fi
endef

.PHONY: run test lint format bench soak generate dashboard docs lock dist image image-check clean

run: $(RUNTIME)
	@if [ -f config.yaml ]; then \
	  exec $(PY) exporter.py --config.file=config.yaml $(ARGS); \
	elif [ -n "$${CREATIFY_API_ID:-}$${CREATIFY_API_ID_FILE:-}$${CREATIFY_API_KEY:-}$${CREATIFY_API_KEY_FILE:-}" ]; then \
	  exec $(PY) exporter.py $(ARGS); \
	else \
	  echo "Neither config.yaml nor CREATIFY_API_ID and CREATIFY_API_KEY: showing the demo, a simulated Creatify API."; \
	  echo "Metrics: http://localhost:9877/metrics   (stop with Ctrl-C)"; \
	  exec $(PY) exporter.py --demo $(ARGS); \
	fi

test: lint
	@$(PY) -m tests.support.packages
	$(VENV)/bin/pytest -n $(WORKERS) --dist loadscope --cov --cov-report=term $(PYTEST_ARGS)

lint: $(DEV)
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy

format: $(DEV)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(DEV)
	$(PY) -m benchmarks $(ARGS)

soak: $(DEV)
	@$(PY) -m tests.support.packages
	$(VENV)/bin/pytest -m soak --soak $(PYTEST_ARGS)

# What is made from something else and committed all the same; a test fails when one of them is stale.
generate: dashboard docs

dashboard: $(DEV)
	$(PY) grafana/generate.py

docs: $(DEV)
	$(PY) -m docs.generate_configuration
	$(PY) -m docs.generate_metrics
	$(PY) deploy/kubernetes/prometheusrule.py

# The newest versions that pyproject.toml admits; --no-emit-*: no lock names the place that its packages come from.
lock: $(DEV)
	compile() { $(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$$@"; }; \
	compile pyproject.toml --extra postgres --output-file requirements.lock; \
	compile --group build --output-file requirements-build.lock; \
	compile pyproject.toml --extra postgres --group dev --constraint requirements.lock --constraint requirements-build.lock \
	  --output-file requirements-dev.lock

dist: $(DEV)
	$(PY) -m build --no-isolation --outdir dist

image:
	../shared/tools/build-image Dockerfile . $(IMAGE)

image-check: $(DEV)
	$(VENV)/bin/pytest -m image $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(FIND_PYTHON); \
	echo "Making $(VENV) with $$("$$python" --version) ..."; \
	"$$python" -m venv $(VENV)

$(RUNTIME): requirements.lock | $(PY)
	@echo "Installing the locked libraries ..."
	@$(PIP) --require-hashes --requirement requirements.lock
	@touch $@

$(DEV): requirements-dev.lock | $(PY)
	@echo "Installing the locked libraries and tools ..."
	@$(PIP) --require-hashes --requirement requirements-dev.lock
	@touch $(RUNTIME) $@
