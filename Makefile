# make quickstart   installs, fetches the policy, runs the whole method (ARGS="--seed=1" adds flags)
# make tour         installs, shows every stage in a minute and a half: a tiny policy guesses numbers
# make setup        installs into .venv (PYTHON=/path/to/python3.12 chooses the Python)
# make test         installs, runs the fast tests
# make test-slow    installs, fetches the policy, runs the slow tests
# make setup-peers  installs PyTorch and peft too, which some benchmarks and tests compare with
# make lint         ruff and mypy
# make docs         installs MkDocs, builds site/; a link that leads nowhere is an error
# make lock         writes locks/ anew: the newest versions that fit, for both Pythons
# make clean        removes .venv and caches; keeps models/ and runs/
#
# LOCKED=1 installs exactly the versions of locks/, which the published figures are of.
#
# Needs Python 3.11 or 3.12 (with venv), make and a C/C++ compiler; everything else goes into .venv.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart tour setup setup-peers setup-tpu policy test test-slow lint docs lock clean
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile
ALFWORLD := $(VENV)/installed-alfworld
ALL := $(VENV)/installed
POLICY := models/smollm2-135m-instruct
# Pythons that are tried, in this order: your own first.
PYTHON ?=
CANDIDATES = $(or $(PYTHON),python3 python3.12 python3.11)
ARGS ?=
LOCKED ?=
PYTEST_ARGS ?=

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

quickstart: policy
	$(PY) -m experiments.run_spa --flagfile=experiments/presets/quickstart.flags $(ARGS)

tour: $(ALFWORLD)
	$(PY) -m experiments.tour --flagfile=experiments/presets/tour.flags $(ARGS)

setup: $(ALL)

# 3.13 is refused: TextWorld 1.7, which plays the games, breaks there.
$(ALFWORLD): requirements.txt pyproject.toml
	@for python in $(CANDIDATES); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
	    || { tried="$$tried $$python (does not run),"; continue; }; \
	  case $$version in 3.11|3.12) ;; \
	    *) tried="$$tried $$python (is $$version),"; continue;; esac; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null \
	    || { tried="$$tried $$python (is $$version, but without venv: install python$$version-venv),"; \
	         continue; }; \
	  found=$$python; break; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Python 3.11 or 3.12 is needed; tried$$tried none will do." >&2; \
	  echo "  (TextWorld, the engine of the games, breaks on 3.13; JAX has left 3.10 behind.)" >&2; \
	  echo "  Install one of them, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$found (Python $$version)"; \
	  $$found -m venv --clear $(VENV) || exit 2; \
	fi; \
	$(INSTALL) --upgrade pip setuptools || exit 2
	@echo "installing into $(VENV): some minutes"
# TextWorld's planner and another of its parts are compiled here, while the rest is fetched; the
# set-up of one calls a program named python.  (Without --use-pep517 the pip of Python 3.11's first
# releases wants a package `wheel` beside it.)  Byte code is left to the first import: most modules
# of these packages never see one.
	@export PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; \
	if [ -n "$(LOCKED)" ]; then \
	  version=$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  $(INSTALL) --no-deps --require-hashes -r locks/python$$version.txt \
	    && $(INSTALL) --no-deps -e . && touch $(ALL); \
	  exit $$?; \
	fi; \
	$(PIP) wheel --use-pep517 --no-deps --wheel-dir $(VENV)/wheels fast-downward-textworld jericho & built=$$!; \
	$(INSTALL) -r requirements.txt || { kill $$built; exit 2; }; \
	wait $$built && $(INSTALL) --find-links $(VENV)/wheels -e ".[alfworld]" \
	  && rm -r $(VENV)/wheels
	@$(PY) -c 'import sys; print("installed for Python %d.%d" % sys.version_info[:2])'
	@touch $@

# The other environments, and what tests and lint need.
$(ALL): $(ALFWORLD)
	@$(INSTALL) -e ".[alfworld,webshop,dev]"
# VirtualHome's package pins old versions of much that its simulator does not need.
	@$(INSTALL) --no-deps virtualhome==2.3.0
	@touch $@

# The version that the figures in docs/results are of. Its CUDA build takes several GiB; a machine
# without a GPU can have the small one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
setup-peers: setup
	$(PIP) install torch==2.13.0
	$(PIP) install -e ".[peers]"

# The TPU's compiler, of the version that JAX names, for `plan --compile`. It lies apart: where JAX
# finds it, every program on a machine without a TPU complains that there is none.
setup-tpu: setup
	@$(PIP) install --quiet --no-deps --target $(VENV)/tpu --upgrade "$$($(PY) -c 'from importlib.metadata import requires; print(next(r for r in requires("jax") if r.startswith("libtpu")).split(";")[0])')"

policy: $(ALFWORLD)
	$(PY) -m experiments.fetch_policy --out $(POLICY)

# Neighbours share fixtures and shapes: whole stretches go to a process, and the idle one takes some.
test: setup
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# One at a time: they measure, kill and resume. The last -m counts, so this one undoes "not slow".
test-slow: setup policy setup-tpu
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check spa_jax experiments
	$(VENV)/bin/mypy

docs: setup
	$(INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

lock: setup
	$(PIP) install uv
	@for version in 3.11 3.12; do \
	  out=locks/python$$version.txt; \
	  compile="$(PY) -m uv --quiet pip compile --python-version $$version --generate-hashes --no-header --no-annotate"; \
	  { echo "# The versions that the published figures are of, on Python $$version (make setup LOCKED=1)."; \
	    echo "# Made by: make lock"; \
	    $$compile --extra alfworld --extra webshop --extra dev pyproject.toml; \
	    echo virtualhome==2.3.0 | $$compile --no-deps -; } > $$out || exit 2; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
