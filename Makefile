# Each target works alone, in any order, from a fresh clone with nothing but make and Python 3.10 or newer.
# PYTHON names the interpreter that the virtual environments are made with: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
VENV_OLDEST_PEFT := .venv-oldest-peft
VENV_OLDEST := .venv-oldest
# The oldest PEFT that enable() supports; constraints.txt pins the newest.
OLDEST_PEFT := 0.19.1
# The lower bounds of pyproject.toml, on Python 3.12 where there is one: a shim of pyenv's may be there and not run.
OLDEST := $(shell sed -n 's/^    "\(torch\|triton\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml)
PYTHONS_3_12 = python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)
PYTHON_OLDEST ?= $(firstword $(foreach python,$(PYTHONS_3_12),$(shell $(python) -c 'print("$(python)")' 2>/dev/null)) $(PYTHON))
# Releases of Triton that neither constraints.txt pins nor test-oldest runs.
TRITONS := 3.8.0 3.9.0
# What the processors with other vector instructions have for kernels in OpenBLAS, as far as this one can run them.
CORETYPES = Prescott $(call if_cpu_has,avx2,Haswell Zen) $(call if_cpu_has,avx512vl,SkylakeX)
if_cpu_has = $(shell grep -qsw $(1) /proc/cpuinfo && echo $(2))
# The tests that run kernels: through NumPy in the interpreter.
KERNEL_TESTS := tests/kernels tests/test_ops.py tests/test_passes.py \
	$(patsubst %,tests/functional/test_%.py,functional nonfinite promises) \
	tests/quant/test_quantized.py tests/extras/test_serving.py
# Those, and what else hands tensors to kernels.
GUARDED_TESTS := $(KERNEL_TESTS) tests/quant/test_quant.py tests/runtime/test_autocast.py tests/extras/test_dvora.py \
	$(patsubst %,tests/functional/test_%.py,dropout parity properties rescale) \
	$(patsubst %,tests/adapters/test_peft_%.py,conv embedding) tests/reuse/test_shared_calls.py
# Which mutants the night draws; it is printed, and make nightly MUTANTS_SEED=20261125 draws the same again.
MUTANTS_SEED ?= $(shell date +%Y%m%d)
# How many processes make test runs side by side.
JOBS ?= 2
# How long make soak and the night walk, and from where; printed as well: make soak SECONDS=60 SEED=7
SECONDS ?= 1200
SEED ?= $(shell date +%Y%m%d)

# Not on the pretended GPU: LyCORIS measures the card for minutes, HQQ's and bitsandbytes' kernels need a driver, and
# sparse tensors are made while test_malformed.py is collected.
NOT_PRETENDED := $(patsubst %,adapters/test_%.py,conformance lycoris peft_quantized) \
	functional/test_malformed.py quant/test_quant.py

.PHONY: test lint demo bench soak nightly test-oldest test-tritons test-processors test-pretended-gpu test-guarded

# An idle OpenMP thread that spins takes the core from whoever has work: on two cores under a load of 4, thirty
# steps of the demo's training took 84 s, and 18 s when idle threads sleep.
test demo soak nightly test-oldest test-tritons test-processors test-pretended-gpu test-guarded: export OMP_WAIT_POLICY := passive

# One test after the other takes 16 minutes. loadfile: what the tests of a file share is made once.
test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# Needs g++. Its numbers are the host's; what holds on a CPU alone fails.
test-pretended-gpu: $(VENV)/installed
	files=$$(PYTHONPATH=.:tools $(VENV)/bin/python -m gpu_stages.device_tests $(NOT_PRETENDED)) \
	&& $(VENV)/bin/python -m pytest -p tools.pretended_gpu.plugin $$files

# A read or write beside a tensor ends the test's process. Not for the whole suite: a process for each test is slow.
test-guarded: $(VENV)/installed
	for side in end begin; do \
		$(VENV)/bin/python -m pytest -p tools.guard_pages --guard-pages=$$side $(GUARDED_TESTS) || exit 1; \
	done

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(VENV)/installed
	$(VENV)/bin/python -m dora_kernels demo

bench: $(VENV)/installed
	$(VENV)/bin/python -m pytest bench --benchmark-only -o python_files='bench_*.py'

nightly: $(VENV)/installed $(VENV_OLDEST_PEFT)/installed test-oldest test-tritons test-processors test-pretended-gpu test-guarded
	$(VENV)/bin/python -m pytest -m nightly
	$(VENV)/bin/python tools/peft_suite.py
	$(VENV_OLDEST_PEFT)/bin/python -m pytest tests/adapters/test_peft*.py
	$(VENV_OLDEST_PEFT)/bin/python tools/peft_suite.py
	$(VENV)/bin/python tools/mutate.py --sample 250 --seed $(MUTANTS_SEED) --seconds 5400
	$(VENV)/bin/python tools/soak.py --seconds $(SECONDS) --seed $(SEED)

# Random operations on an enabled model and on a stock twin, compared after each.
soak: $(VENV)/installed
	$(VENV)/bin/python tools/soak.py --seconds $(SECONDS) --seed $(SEED)

# The lower bounds, and none of the libraries whose models are read.
test-oldest: $(VENV_OLDEST)/installed
	$(VENV_OLDEST)/bin/python -m pytest

test-tritons: $(TRITONS:%=.venv-triton/%)
	for triton in $(TRITONS); do \
		export PYTHONPATH=$(CURDIR)/.venv-triton/$$triton; \
		$(VENV)/bin/python -c "import triton; assert triton.__version__ == '$$triton', triton.__path__" \
		&& $(VENV)/bin/python -m pytest $(KERNEL_TESTS) && $(VENV)/bin/python -m dora_kernels check || exit 1; \
	done

# A result may not hang on how a product is computed on this processor: by NumPy's BLAS, with fewer threads, or by torch.
test-processors: $(VENV)/installed
	for coretype in $(CORETYPES); do \
		OPENBLAS_CORETYPE=$$coretype $(VENV)/bin/python -m pytest $(KERNEL_TESTS) || exit 1; \
	done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(KERNEL_TESTS)
	cache=$$(mktemp -d) && trap 'rm -r "$$cache"' EXIT && \
	ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR="$$cache" $(VENV)/bin/python -m pytest

# $(call install,folder,constraints): setuptools comes first, so that the build backend is the pinned one too.
# Of torchtune the tests import one file (tests/support/library_layers.py says how): what its data sets require is not
# installed.
define install
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) setuptools
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) --no-build-isolation -e '.[dev]'
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) --no-deps torchtune
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(call install,$(VENV),constraints.txt)
	touch $@

$(VENV_OLDEST_PEFT)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV_OLDEST_PEFT)
	sed 's/^peft==.*/peft==$(OLDEST_PEFT)/' constraints.txt > $(VENV_OLDEST_PEFT)/constraints.txt
	$(call install,$(VENV_OLDEST_PEFT),$(VENV_OLDEST_PEFT)/constraints.txt)
	touch $@

$(VENV_OLDEST)/installed: pyproject.toml
	$(PYTHON_OLDEST) -m venv --clear $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e '.[demo]' hypothesis pytest
	touch $@

# The pinned environment's, but for Triton: a folder that comes before it on the path.
.venv-triton/%: | $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*
