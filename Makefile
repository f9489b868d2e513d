# Everything sets itself up in .venv. PEERS=1 adds the tests against large libraries (torch, LiteRT).
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
comma := ,
EXTRAS := $(if $(PEERS),test$(comma)peers,test)
SELECT := $(if $(PEERS),,-m "not peers")

.PHONY: demo test check-fast lint types bench fuzz mutants clean

demo: .venv/.core
	@mkdir -p $(DEMO)
	$(BIN)/nibblecast inspect fixtures/tflite/cnn_int4_per_channel.tflite
	$(BIN)/nibblecast convert fixtures/tflite/cnn_int4_per_channel.tflite \
	    $(DEMO)/weights.h $(DEMO)/weights.safetensors $(DEMO)/model.onnx --verify
	$(CC) -std=c99 -Wall -Wextra -Wpedantic -Wconversion -Werror -c $(DEMO)/weights.c -o $(DEMO)/weights.o
	@echo "compiled without a warning; everything lies in $(DEMO)/"

test: .venv/.$(subst $(comma),-,$(EXTRAS)) lint types
	$(BIN)/python -m pytest $(SELECT)

# The tests for the inner loop: under two minutes
check-fast: .venv/.$(subst $(comma),-,$(EXTRAS))
	$(BIN)/python -m pytest -m "not slow and not peers"

lint: .venv/.$(subst $(comma),-,$(EXTRAS))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.$(subst $(comma),-,$(EXTRAS))
	$(BIN)/mypy

bench: .venv/.$(subst $(comma),-,$(EXTRAS))
	$(BIN)/python -m benchmarks

# MINUTES for all readers together; SEED for the same inputs each time (without coverage), EXECUTIONS for as many of each
# reader at most; READER for one of them
fuzz: .venv/.test-fuzz
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED)) \
	    $(if $(EXECUTIONS),--executions $(EXECUTIONS)) $(if $(READER),--reader $(READER))

# COUNT of mutants, drawn by SEED, of files whose path begins with BELOW; KEEP=1 uses the coverage of the last run
mutants: .venv/.test-mutants
	$(BIN)/python -m tests.mutants $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(BELOW),--below $(BELOW)) $(if $(KEEP),--keep-map)

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.test .venv/.test-peers .venv/.test-fuzz .venv/.test-mutants: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(subst -,$(comma),$(@:.venv/.%=%))]"
	@touch $@
