# The two commands are `make demo` and `make test`; both work from a bare machine with python3 >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DATA=path: the demo on your own text. RUN=path: where it writes.
DATA ?=
RUN ?= runs/demo

# RESULTS=path: where bench and gpu-report write; committed results are in benchmarks/results.
RESULTS ?= runs/bench

.PHONY: demo test bench gpu-report sanitize lint wheel clean

# The stamp is older than a build input exactly when the environment or the library is stale.
$(VENV)/installed: pyproject.toml requirements-dev.txt setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "blt_kernels needs Python >= 3.10")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[bench]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/blt-kernels demo --run $(RUN) $(if $(DATA),--data $(DATA))

test: $(VENV)/installed
	$(BIN)/python -m pytest

# The kernels at one size each and a short FLOP-matched pair, on the CPU: within ten minutes on two cores.
bench: $(VENV)/installed
	$(BIN)/blt-kernels bench --quick --rounds 9 --environment measuring --out $(RESULTS)
	$(BIN)/python -m benchmarks.flop_matched --scale pair --out $(RESULTS)
	$(BIN)/python -m benchmarks.report --results $(RESULTS)

# On a machine with a GPU, with the torch (2.10 or newer) that PYTHON has there; needs no network and no .venv.
gpu-report:
	$(PYTHON) benchmarks/gpu_report.py --out $(RESULTS)

# The CUDA kernels on host threads under the thread, address and undefined-behaviour sanitizers.
sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py thread
	$(BIN)/python tests/sanitize.py address,undefined

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/installed
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist runs $(VENV) blt_kernels/libblt_kernels.so blt_kernels/build_record.json
