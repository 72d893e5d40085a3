# The two commands are `make demo` and `make test`; both work from a bare machine with python3 >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DATA=path: the demo on your own text. RUN=path: where it writes.
DATA ?=
RUN ?= runs/demo

.PHONY: demo test sanitize lint wheel clean

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
