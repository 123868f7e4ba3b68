# Every target does its own set-up: a virtual environment in .venv, made once and reused.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/ready

.PHONY: demo test test-all test-oldest check docs benchmarks clean

demo: $(READY)
	$(BIN)/python -m recipes.digits demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy -p recipes -p benchmarks
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs: $(READY)
	$(BIN)/mkdocs serve

benchmarks: $(READY)
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.engine

clean:
	rm -rf $(VENV) $(OLDEST) build runs

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	touch $(READY)

# Every lower bound in pyproject.toml, as the version itself.
$(OLDEST_READY): pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9a-z.]+' pyproject.toml | sed -E 's/"//; s/\[.*\]//; s/>=/==/' \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[all,test]" --constraint $(OLDEST)/constraints.txt
	touch $(OLDEST_READY)
