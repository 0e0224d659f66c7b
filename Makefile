# Two commands on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BOARD_PYTHON ?= python3.10
BOARD_VENV := .venv-board-$(notdir $(BOARD_PYTHON))
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-fast test-board lint types peers clean

demo: $(VENV)/.package
	$(VENV)/bin/cdkd-edge demo

# Lint, types and the whole suite.
test: lint types
	$(VENV)/bin/python -m pytest -n 2

# Without the paper-size network.
test-fast: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

# What a board needs: the package without torch, on BOARD_PYTHON.
test-board: $(BOARD_VENV)/.tests
	$(BOARD_VENV)/bin/pip install --quiet --no-deps --force-reinstall .
	$(BOARD_VENV)/bin/pytest

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.tests
	$(VENV)/bin/mypy

# Our CPU engine beside PyTorch and ONNX Runtime on a naive export (about six minutes).
peers: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet -c constraints.txt onnxscript
	$(VENV)/bin/python benchmarks/cpu_peers.py --rounds 15 --output benchmarks/results/cpu-peers.json

$(VENV)/.package: $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[export]'
	touch $@

$(VENV)/.tests: $(VENV)/.package
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[export,test]'
	touch $@

$(BOARD_VENV)/.tests: $(INPUTS)
	$(BOARD_PYTHON) -m venv $(BOARD_VENV)
	$(BOARD_VENV)/bin/pip install --quiet -c constraints.txt . pytest hypothesis
	@! $(BOARD_VENV)/bin/python -c 'import torch' 2>/dev/null || { echo "torch came along; the board profile must not need it"; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) .venv-board-* cdkd-edge-demo
