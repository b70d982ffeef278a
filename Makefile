# Each target works alone, in any order, from a fresh clone with nothing but make and Python 3.10 or newer.
# PYTHON names the interpreter that the virtual environments are made with: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest-peft
# The oldest PEFT that enable() supports; constraints.txt pins the newest.
OLDEST_PEFT := 0.19.1
# Which mutants the night draws; it is printed, and make nightly MUTANTS_SEED=20261125 draws the same again.
MUTANTS_SEED ?= $(shell date +%Y%m%d)

# What a GPU can break: kernels and operators, the layers over them, and the promises of graphs, streams and threads.
DEVICE_TESTS := kernels ops bounds nonfinite promises graphs modules passes rescale peft faults reuse serving merging \
    accumulation frozen_adapters checkpointing autocast addresses functional quantized properties dropout dvora parity \
    structures shared_calls shared_inputs peft_embedding peft_conv peft_model reference fallback launch plan testing \
    compile export

.PHONY: test test-pretended-gpu lint demo bench nightly

# An idle OpenMP thread that spins takes the core from whoever has work: on two cores under a load of 4, thirty
# steps of the demo's training took 84 s, and 18 s when idle threads sleep.
test test-pretended-gpu demo nightly: export OMP_WAIT_POLICY := passive

test: lint
	$(VENV)/bin/python -m pytest

# Needs g++. Its numbers are the host's; what holds on a CPU alone fails.
test-pretended-gpu: $(VENV)/installed
	$(VENV)/bin/python -m pytest -p tools.pretended_gpu.plugin $(DEVICE_TESTS:%=tests/test_%.py)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

demo: $(VENV)/installed
	$(VENV)/bin/python -m dora_kernels demo

bench: $(VENV)/installed
	$(VENV)/bin/python -m pytest bench --benchmark-only -o python_files='bench_*.py'

nightly: $(VENV)/installed $(VENV_OLDEST)/installed
	$(VENV)/bin/python -m pytest -m nightly
	$(MAKE) test-pretended-gpu
	$(VENV)/bin/python tools/peft_suite.py
	$(VENV_OLDEST)/bin/python -m pytest tests/test_peft*.py
	$(VENV_OLDEST)/bin/python tools/peft_suite.py
	$(VENV)/bin/python tools/mutate.py --sample 250 --seed $(MUTANTS_SEED) --seconds 5400

# $(call install,folder,constraints): setuptools comes first, so that the build backend is the pinned one too.
# Of torchtune the tests import one file (tests/libraries.py says how): none of what its data sets require is installed.
define install
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) setuptools
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) --no-build-isolation -e '.[dev]'
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) --no-deps torchtune
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(call install,$(VENV),constraints.txt)
	touch $@

$(VENV_OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV_OLDEST)
	sed 's/^peft==.*/peft==$(OLDEST_PEFT)/' constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(call install,$(VENV_OLDEST),$(VENV_OLDEST)/constraints.txt)
	touch $@
