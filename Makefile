# `make` alone runs the exporter; `make help` tells the rest, docs/development.md more.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
# Old versions of pip look at what a locked package asks for and stumble over newer releases; the locks are complete.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
# One more than the cores of a small machine: many tests wait for processes and for time to pass.
WORKERS ?= 3
IMAGE ?= creatify-exporter
PYTEST_ARGS ?=
# A module or class goes to one worker; in the order of tests/conftest.py, not those with the most tests first.
SHARED := -n $(WORKERS) --dist loadscope --no-loadscope-reorder
ARGS ?=

# A shim of a version manager may be on PATH and still refuse to run, so each candidate is tried, not only looked up.
define FIND_PYTHON
tried=; \
for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do \
  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; \
  tried="$$tried $$python ($$("$$python" -V 2>&1 | head -n 1 | cut -c 1-40 || true))"; python=; \
done; \
if [ -z "$$python" ]; then \
  echo "make: Python 3.11 or later with venv and pip is needed (on Debian: apt-get install python3-venv). Tried:$$tried." >&2; \
  echo "make: name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; \
fi
endef

.PHONY: run help test test-all test-portable lint format bench soak mutants alerts-report generate dashboard docs lock dist image image-check clean

run: $(RUNTIME) ## run the exporter: with config.yaml, else with credentials of the environment, else the demo (ARGS="--flag=value")
	@if [ -f config.yaml ]; then \
	  exec $(PY) exporter.py --config.file=config.yaml $(ARGS); \
	elif [ -n "$${CREATIFY_API_ID:-}$${CREATIFY_API_ID_FILE:-}$${CREATIFY_API_KEY:-}$${CREATIFY_API_KEY_FILE:-}" ]; then \
	  exec $(PY) exporter.py $(ARGS); \
	else \
	  echo "Neither config.yaml nor CREATIFY_API_ID and CREATIFY_API_KEY: showing the demo, a simulated Creatify API."; \
	  echo "Open the URL that is logged below. Stop with Ctrl-C."; \
	  exec $(PY) exporter.py --demo $(ARGS); \
	fi

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: lint ## lint, all tests, and the gate of coverage
	@$(PY) -m tests.support.packages
	$(VENV)/bin/pytest $(SHARED) --cov --cov-report=term $(PYTEST_ARGS)

test-all: test ## what CI runs: `make test`, then `make test-portable` on every other supported Python that is found
	@$(PY) -m tests.support.pythons | while read -r version python; do \
	  echo "Python $$version:"; \
	  $(MAKE) test-portable PYTHON="$$python" VENV=".venv-$$version" </dev/null; \
	done

test-portable: $(DEV) ## the tests that any Python may break (PYTHON=/path/to/python3 VENV=.venv-other)
	$(VENV)/bin/pytest $(SHARED) -m "not process or every_python" $(PYTEST_ARGS)

lint: $(DEV) ## ruff (format and lint), mypy, and the order of imports
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

format: $(DEV) ## what ruff can mend
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(DEV) ## benchmarks (benchmarks/README.md)
	$(PY) -m benchmarks $(ARGS)

soak: $(DEV) ## the long form of the tests that look for leaks
	@$(PY) -m tests.support.packages
	$(VENV)/bin/pytest -m soak --soak $(PYTEST_ARGS)

mutants: $(DEV) ## break the code in small ways and see whether the tests notice (ARGS="--seed=1 --count=60")
	$(PY) -m tests.support.mutants $(ARGS)

alerts-report: $(DEV) ## simulate workspace-days, and write into docs/runbook.md what the alerts see (ARGS="--each=4" is shorter)
	$(PY) prometheus/simulate.py --write $(ARGS)

# What is made from something else and committed all the same; a test fails when one of them is stale.
generate: dashboard docs ## everything that is made from something else: dashboard and docs

dashboard: $(DEV) ## the Grafana dashboard, from the code in grafana/
	$(PY) grafana/generate.py

docs: $(DEV) ## the generated parts of docs/, the chart's schema and deploy/kubernetes
	$(PY) -m docs.generate_configuration
	$(PY) -m docs.generate_metrics
	$(PY) deploy/generate.py

# --no-emit-*: no lock names the place that its packages come from.
lock: $(DEV) ## the lock files, at the newest versions that pyproject.toml admits
	compile() { $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 "$$@"; }; \
	lock() { compile --upgrade --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$$@"; }; \
	lock pyproject.toml --extra postgres --output-file requirements.lock; \
	lock --group build --output-file requirements-build.lock; \
	lock pyproject.toml --extra postgres --group dev --constraint requirements.lock --constraint requirements-build.lock \
	  --output-file requirements-dev.lock; \
	mkdir -p build; \
	compile pyproject.toml --extra postgres --constraint requirements.lock --format pylock.toml --output-file build/pylock.toml; \
	$(PY) -m tests.support.locks build/pylock.toml > requirements.wheels

dist: $(DEV) ## sdist and wheel of the last commit, in dist/
	rm -rf build/dist && mkdir -p build/dist
	git archive HEAD | tar -x -C build/dist
	$(PY) -m build --no-isolation --outdir dist build/dist

image: ## the image, with docker, podman or buildah (IMAGE=name:tag)
	@for tool in docker podman buildah; do if "$$tool" info >/dev/null 2>&1; then break; fi; tool=; done; \
	if [ -z "$$tool" ]; then echo "make: docker, podman or buildah is needed, and none of them answers." >&2; exit 1; fi; \
	exec "$$tool" build --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" --tag $(IMAGE) .

image-check: $(DEV) ## build the image and try it: user 65534, read-only root, metrics, size (root and buildah)
	$(VENV)/bin/pytest -m image $(PYTEST_ARGS)

clean: ## remove what was made
	rm -rf .venv .venv-* build dist *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(FIND_PYTHON); \
	echo "Making $(VENV) with $$("$$python" --version) ..."; \
	"$$python" -m venv $(VENV)

$(RUNTIME): requirements.lock | $(PY)
	@echo "Installing the locked libraries ..."
	@$(PIP) --requirement requirements.lock
	@touch $@

$(DEV): requirements-dev.lock | $(PY)
	@echo "Installing the locked libraries and tools ..."
	@$(PIP) --requirement requirements-dev.lock
	@touch $(RUNTIME) $@
