# `make demo` and `make test` need python3 >= 3.10, a C++20 compiler and nothing else. CONTRIBUTING.md lists all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# DATA=path: the demo on your own text. RUN=path: where it writes.
DATA ?=
RUN ?= runs/demo
# RESULTS=path: where bench and gpu-report write; committed results are in benchmarks/results.
RESULTS ?= runs/bench
# COMMIT=name, STEPS='name ...', LIBRARY=path/libblt_kernels.so, ARCHIVE=path.tar.gz, DRY=1: for gpu-report; see
# docs/benchmarks.md.
COMMIT ?=
STEPS ?=
LIBRARY ?=
ARCHIVE ?=
DRY ?=
# TORCH=version: the torch that test-torch installs in an environment of its own.
TORCH ?= 2.10.0

# BLT_BUILD_CUDA: 0 builds for the CPU alone, 1 insists on the CUDA kernels, auto builds them where there is an nvcc.
# Where it is not given, the demo compiles the CUDA kernels, which take minutes, only if there is a GPU or an earlier
# build in this checkout has them already.
GPU = $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo auto)
BUILT = $(shell sed -n 's/^BLT_BUILD_CUDA:STRING=//p' build/CMakeCache.txt 2>/dev/null)
DEMO_CUDA = $(or $(BLT_BUILD_CUDA),$(GPU),$(BUILT),0)
TEST_CUDA = $(or $(BLT_BUILD_CUDA),auto)
# Every target builds first, so that it gets the library that it wants; this takes 2 s when nothing has changed.
build = BLT_BUILD_CUDA=$(1) $(BIN)/python setup.py --quiet build_ext --inplace

.PHONY: demo test test-torch bench gpu-report sanitize lint docs wheel clean

demo: $(VENV)/installed-demo
	@echo 'The demo trains an entropy model and a BLT on the CPU: about four minutes on two cores.'
	@$(call build,$(DEMO_CUDA))
	$(BIN)/blt-kernels demo --run $(RUN) $(if $(DATA),--data $(DATA))

test: $(VENV)/installed
	@$(call build,$(TEST_CUDA))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

# The tests of ops, models and CUDA kernels with another torch, built and installed apart: TORCH=2.10.0 make test-torch.
test-torch:
	.ci/test-torch $(PYTHON) $(TORCH)

# The kernels at one size each and a short FLOP-matched pair, on the CPU: within ten minutes on two cores.
bench: $(VENV)/installed
	@$(call build,$(TEST_CUDA))
	$(BIN)/python -m benchmarks ops --quick --rounds 9 --environment measuring --out $(RESULTS)
	$(BIN)/python -m benchmarks matched --scale pair --out $(RESULTS)
	$(BIN)/python -m benchmarks report --results $(RESULTS)

# On a machine with a GPU, with the torch (2.10 or newer) that PYTHON has there; needs no network, no .venv and no .git.
gpu-report:
	$(PYTHON) -m benchmarks gpu --out $(RESULTS) $(if $(COMMIT),--commit '$(COMMIT)') $(if $(STEPS),--steps $(STEPS)) \
	  $(if $(LIBRARY),--library '$(LIBRARY)') $(if $(ARCHIVE),--archive '$(ARCHIVE)') $(if $(DRY),--dry)

# The CUDA kernels on host threads under the thread, address and undefined-behaviour sanitizers, and, where there is an
# nvcc, their compiled code in the interpreter of PTX.
sanitize: $(VENV)/installed
	@$(call build,$(TEST_CUDA))
	$(BIN)/python tests/sanitize.py thread
	$(BIN)/python tests/sanitize.py address,undefined
	$(BIN)/python tests/sanitize.py ptx

# What .pre-commit-config.yaml lists, on all files: format, style, types. What a tool can mend it mends, and fails.
lint: $(VENV)/installed
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# The pages of docs/ and the API reference, in build/site; a broken link or reference is an error.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --site-dir build/site

# dist/*.tar.gz and a wheel with a tag that package indexes take, CUDA kernels included where there is an nvcc.
wheel: $(VENV)/installed
	BLT_BUILD_CUDA=$(TEST_CUDA) .ci/wheel $(BIN)/python dist

# What the demo needs. A stamp older than a list of packages means that the environment is stale. Python compiles what
# it imports when it imports it: compiling all of torch at once would take another half minute.
$(VENV)/installed-demo: pyproject.toml requirements-build.txt
	@echo 'First time in this checkout: packages into $(VENV) (about a minute), the compiled library (about a minute; CUDA kernels: $(DEMO_CUDA)), then the demo (about four minutes): six minutes in all on two cores.'
	@$(make-venv)
	$(PIP) --no-compile -r requirements-build.txt
	$(call build,$(DEMO_CUDA))
	BLT_BUILD_CUDA=$(DEMO_CUDA) $(PIP) --no-compile --no-build-isolation -e '.[train]'
	@touch $@

# What everything else needs.
$(VENV)/installed: pyproject.toml requirements-build.txt requirements-dev.txt
	@echo 'First time in this checkout: packages into $(VENV) (about a minute) and the compiled library (a minute on two cores, five with CUDA kernels).'
	@$(make-venv)
	$(PIP) --no-compile -r requirements-build.txt -r requirements-dev.txt
	$(call build,$(TEST_CUDA))
	BLT_BUILD_CUDA=$(TEST_CUDA) $(PIP) --no-compile --no-build-isolation -e '.[test]'
	@touch $(VENV)/installed-demo $@

define make-venv
$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "blt_kernels needs Python >= 3.10")'
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
endef

clean:
	rm -rf build dist runs $(VENV) .venv-torch-* blt_kernels/libblt_kernels.so blt_kernels/build_record.json
