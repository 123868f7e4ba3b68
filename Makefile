# Every target does its own set-up: a virtual environment, made once and reused. What is in which, and how the tested
# versions are refreshed, is told in CONTRIBUTING.md.

PYTHON ?= python3
CONSTRAINTS := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/ready
NEWEST := .venv-newest
RESOLVER := .venv-constraints

.PHONY: demo test test-all test-oldest test-newest check docs benchmarks benchmarks-gpu constraints clean $(NEWEST)

demo: $(READY)
	$(BIN)/python -m recipes.digits demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-newest: $(NEWEST)
	$(NEWEST)/bin/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

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
	$(BIN)/python -m benchmarks.inference --batch-size 1 --keep-ratio 1 --pairs 121 --name hooks-cpu
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.training --schedule gathered --batch-size 16 --pairs 11 --name training-gathered-cpu
	$(BIN)/python -m benchmarks.training --checkpointing --batch-size 16 --pairs 7 --name training-checkpointing-cpu
	$(BIN)/python -m benchmarks.training --compile --batch-size 16 --pairs 5 --name training-compile-cpu
	$(BIN)/python -m benchmarks.training --schedule masked --schedule gathered --model digits_vit --batch-size 128 \
		--keep-ratio 0.5 --pairs 11 --name training-digits-cpu
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.varlen
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.frozen --pairs 13
	$(BIN)/python -m benchmarks.frozen --model digits_vit --batch-size 1 --batch-size 64 --pairs 61 \
		--name frozen-digits-cpu
	$(BIN)/python -m benchmarks.frozen --model vit_small_patch16_dinov3 --pairs 21 --name frozen-dinov3-cpu
	$(BIN)/python -m benchmarks.frozen --runtime onnx --pairs 15 --name frozen-onnx-cpu
	$(BIN)/python -m benchmarks.frozen --runtime compile --pairs 11 --name frozen-compile-cpu
	$(BIN)/python -m benchmarks.frozen --runtime onnx --model digits_vit --batch-size 1 --batch-size 64 --pairs 61 \
		--name frozen-digits-onnx-cpu
	$(BIN)/python -m benchmarks.frozen --runtime compile --model digits_vit --batch-size 1 --batch-size 64 --pairs 61 \
		--name frozen-digits-compile-cpu
	$(BIN)/python -m benchmarks.hierarchies
	$(BIN)/python -m benchmarks.prefill
	for take in 1 2; do \
		$(BIN)/python -m benchmarks.peers --pairs 7 --take $$take && \
		$(BIN)/python -m benchmarks.peers --runtime eager --runtime compile --batch-size 256 --pairs 4 --take $$take && \
		$(BIN)/python -m benchmarks.peers --runtime onnx --batch-size 256 --pairs 4 --at-once 2 --take $$take || \
		exit 1; \
	done

benchmarks-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# The newest versions, direct and indirect, for every Python that pyproject.toml allows. UPGRADE= keeps those that are
# there and adds only what is new.
UPGRADE ?= --upgrade
constraints:
	test -x $(RESOLVER)/bin/python || $(PYTHON) -m venv $(RESOLVER)
	$(RESOLVER)/bin/python -m pip install --quiet --upgrade uv
	$(RESOLVER)/bin/uv pip compile pyproject.toml --all-extras --group build $(UPGRADE) --universal \
		--python-version "$$(sed -n 's/^requires-python = ">=\(.*\)"$$/\1/p' pyproject.toml)" --no-python-downloads \
		--no-annotate --custom-compile-command "make constraints" --quiet --output-file $(CONSTRAINTS)

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RESOLVER) build runs

# The tested versions, of the build tools as well.
$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet pip --constraint $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]" --constraint $(CONSTRAINTS) \
		--build-constraint $(CONSTRAINTS)
	touch $(READY)

# Every lower bound in pyproject.toml, as the version itself, and the tested build tools.
$(OLDEST_READY): pyproject.toml $(CONSTRAINTS)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet pip --constraint $(CONSTRAINTS)
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9a-z.]+' pyproject.toml | sed -E 's/"//; s/\[.*\]//; s/>=/==/' \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[all,test]" --constraint $(OLDEST)/constraints.txt \
		--build-constraint $(CONSTRAINTS)
	touch $(OLDEST_READY)

# Today's newest versions: whenever it is asked for, since tomorrow there are others.
$(NEWEST):
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[all,test]"
