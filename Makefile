# Everything from nothing: each target makes its own .venv on first use.
#   make demo    the whole road on a laptop CPU, in a few minutes
#   make test    the test suite
#   make check   tests, lint and types
#
# On Linux a plain `pip install torch` may fetch several GB of CUDA libraries that a CPU never uses. To choose the
# build yourself, say so: make demo TORCH="torch==2.13.0 <your index flags>"
TORCH ?= torch==2.13.0
# The interpreter that makes .venv; 3.11 or newer.
PYTHON ?= python3
# The versions this commit was tested with; `make test CONSTRAINTS=` takes the newest of everything.
CONSTRAINTS ?= constraints.txt
# Two processes of one thread each beat one process of two threads, on two cores or more.
TEST_FLAGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types check format clean

demo: $(STAMP)
	$(BIN)/gearshift demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

check: test lint types

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is touched last: an interrupted installation is started again, a finished one is not repeated.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Gearshift needs Python 3.11 or newer; say which: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[viz,dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
