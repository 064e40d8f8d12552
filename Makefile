# Two commands: `make quickstart` and `make test`. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-export lint format install golden golden-plans

quickstart: install  ## raw pages and PDFs to a trained, evaluated, talking model, in runs/quickstart
	$(BIN)/python -m smoljax.flow --config=configs/quickstart.py --workdir=runs/quickstart

test: install lint  ## lint, format check and the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-export: install  ## build llama.cpp (minutes, needs a C++ compiler) and run exported GGUF files in it
	$(BIN)/python -m pip install --quiet -e '.[test-export]'
	$(BIN)/python -m pytest tests/interop/test_llama_cpp.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: install  ## rewrite tests/golden after a deliberate change of a config
	$(BIN)/python -m tests.golden.flatten

golden-plans: install  ## compile the large configs for TPU slices again and rewrite tests/golden/plan (about 15 minutes on one core)
	$(BIN)/python -m pip install --quiet -e '.[plan]'
	$(BIN)/python -m tests.planning.golden

install: $(INSTALLED)

$(INSTALLED): setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else f"smoljax needs Python 3.11 to 3.13, {sys.executable} is {sys.version.split()[0]}: run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[train,data,report,export,beam,test]'
	touch $@
