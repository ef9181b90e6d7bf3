# The README's two commands, a quicker test run, and the linters. `make` is a convenience: nothing here needs it.
# `make wheel VENV=/path/to/python` takes an environment of yours that has PyTorch, PEFT and setuptools.
PYTHON ?= python3
VENV = .venv/bin/python
# What an environment is ready by: ours by a file written when it is, another by itself.
READY = $(if $(filter .venv/bin/python,$(VENV)),.venv/.ready,$(VENV))

.PHONY: setup quickstart test fast lint format wheel table

setup: $(READY)

.venv/.ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv && .venv/bin/python -m pip install -r requirements-dev.txt -e . && touch $@

quickstart: setup
	$(VENV) -m recipes.train.quickstart

test: setup
	$(VENV) -m pytest -n 2

# Every test function with one of its cases, without those that are `slow`: docs/tests.md.
fast: setup
	$(VENV) -m pytest -n 2 --fast

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

format: setup
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

# The kernels for all architectures in a wheel, in dist/: tag and size checked, installed into an empty environment, imported.
wheel: setup
	$(VENV) csrc/check_wheel.py

# The tables of decoding in README.md and recipes/benchmarks/README.md, from recipes/results/decode_h200.json.
table:
	$(PYTHON) -m recipes.benchmarks.decode.report
