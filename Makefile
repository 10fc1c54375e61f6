# `make demo` and `make test` are the project's two commands; both install everything that they need into .venv.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

$(VENV)/demo: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[job]'
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install -q -e '.[dev,docs]'
	$(BIN)/python -m pip install -q --no-deps 'jax2onnx==0.17.1'
	touch $@

demo: $(VENV)/demo
	$(BIN)/python -m experiments.digits_r20 --config=configs/digits_r20.py --workdir=runs/demo

# A file of tests stays in one process, because its tests share what takes long to make. TESTS takes a part of them.
test: $(VENV)/dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/docs: $(VENV)/demo
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

# The site, into site/; warnings are errors.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site
