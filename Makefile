# The two commands that do all the set-up:   make demo   and   make test
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/core
	$(BIN)/python experiments/doctor.py

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

gpu:  # everything that needs a GPU, checked and timed; with $(PYTHON)'s own torch and transformers if it has them
	if $(PYTHON) -c "import torch, transformers" 2> /dev/null; then $(PYTHON) bench/gpu.py; \
	else make .venv/core && $(BIN)/python bench/gpu.py; fi

world: .venv/core  # make data/society anew
	$(BIN)/python data/society/make_world.py

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/core
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo gpu test world
