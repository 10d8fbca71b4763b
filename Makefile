# Everything from nothing: each target makes its own .venv on first use.
#   make demo    the whole road on a laptop CPU, in a few minutes
#   make test    the test suite
#   make test-vllm   the vLLM plugin on a rig that needs no GPU, in an environment of its own
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
RIG := .rigvenv
RIG_REQUIREMENTS := tests/serve/vllm/rig/requirements.txt

.PHONY: demo test test-vllm lint types types-vllm check format clean

demo: $(STAMP)
	$(BIN)/gearshift demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

# vLLM's wheel without its native code, on Triton's interpreter: the real engine, without a GPU.
test-vllm: $(RIG)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=src $(RIG)/bin/python -m pytest tests/serve/vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types-vllm: $(STAMP) $(RIG)/.installed
	$(BIN)/pyright --project tests/serve/vllm/rig/pyrightconfig.json --pythonpath $(RIG)/bin/python

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
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[viz,train,dev]'
	touch $@

$(RIG)/.installed: $(RIG_REQUIREMENTS)
	$(PYTHON) -m venv $(RIG)
	$(RIG)/bin/python -m pip install --quiet $(TORCH)
	$(RIG)/bin/python -m pip install --quiet --requirement $(RIG_REQUIREMENTS)
	$(RIG)/bin/python -m pip install --quiet --no-deps vllm==0.26.0
	touch $@

clean:
	rm -rf $(VENV) $(RIG) .pytest_cache .ruff_cache .hypothesis
