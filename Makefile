# make install | quickstart | test | test-slow | notebooks | lint | lock | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= $(if $(INPUT),runs/quickstart-input,runs/quickstart)

.PHONY: install quickstart test test-slow notebooks lint lock clean

# Versions come from the lock, which holds for every supported Python and every extra.
$(VENV)/installed: setup.py requirements.lock
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "Python 3.11 to 3.13 is needed (make PYTHON=...)"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[data,dev]'
	touch $@

install: $(VENV)/installed
	@echo "installed: \`. $(BIN)/activate\` makes \`ctllm\` a command of this shell"

quickstart: $(VENV)/installed
	$(BIN)/ctllm quickstart --workdir=$(WORKDIR) $(if $(INPUT),--config.input="('$(INPUT)',)")

# A worker that dies ends the run, which names its test: pytest-xdist may wait for ever for what would replace it.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --max-worker-restart=0

test: $(VENV)/installed
	$(PYTEST)

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

notebooks: $(VENV)/installed
	timeout --signal=INT 600 $(BIN)/python -m pytest -m slow tests/test_notebooks.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock:
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile setup.py --extra data --extra dataflow --extra gcs --extra serve --extra tpu --extra cuda --extra wandb --extra dev --universal \
		--python-version 3.11 --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
