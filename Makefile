# Two commands for a machine with Python 3.10+, g++ and make: `make demo` and `make test`.
# Each sets up .venv by itself. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
VENV_PPO := .venv-trl-ppo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-gpu test-trl-ppo bench lint format clean

demo: $(VENV)/installed
	$(BIN)/rlhf run --config examples/tiny_cpu.yaml

# Two files at a time; waiting OpenMP threads soon sleep and leave the core to the other file.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist loadfile

# On a machine with a CUDA device.
test-gpu: $(VENV)/installed-test
	$(BIN)/python -m pytest -m gpu

# TRL dropped its PPOTrainer after 1.12, so its last one runs in an environment of its own.
test-trl-ppo: $(VENV_PPO)/installed
	PYTHONPATH=. $(VENV_PPO)/bin/python tests/clients/trl_ppo.py

$(VENV_PPO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_PPO)
	grep -v '^trl==' constraints.txt > $(VENV_PPO)/constraints.txt
	$(VENV_PPO)/bin/python -m pip install --quiet --constraint $(VENV_PPO)/constraints.txt \
		--editable . peft pandas trl==1.12.0
	touch $@

# One thread, so that the clock can be its processor time; about five minutes.
bench: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/cuda_emulator/*' | grep -E '\.(h|cpp|cu|cuh)$$' | \
		xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) $(VENV_PPO) build dist *.egg-info

$(VENV)/python-ready:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python-ready pyproject.toml setup.py constraints.txt
	$(PIP) --editable .
	touch $@

# DeepSpeed without its compiled ops. Triton without its dependencies: its kernels are interpreted
# and compiled here, not run.
$(VENV)/installed-test: $(VENV)/installed
	DS_BUILD_OPS=0 $(PIP) --editable '.[test]'
	$(PIP) --no-deps triton
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(PIP) --editable '.[dev]'
	touch $@
