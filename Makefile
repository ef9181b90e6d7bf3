# The README's two commands, and the linters. `make` is a convenience: nothing here needs it.
PYTHON ?= python3
VENV = .venv/bin/python

.PHONY: setup quickstart test lint format wheel

setup:
	$(PYTHON) -m venv .venv && $(VENV) -m pip install -r requirements-dev.txt -e .

quickstart: setup
	$(VENV) recipes/quickstart.py

test: setup
	$(VENV) -m pytest -n 2

lint:
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

format:
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

wheel: setup
	$(VENV) csrc/check_wheel.py
