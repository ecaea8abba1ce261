# Everything a newcomer and CI run. Needs Python 3.11 or newer and git; all else goes into .venv. With a C++ compiler
# that includes hnswlib, the vector index, which ships no wheels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
# What our calls of TensorRT are checked against; they hold nothing of TensorRT itself.
BINDINGS := tensorrt-cu13-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106 tensorrt-rtx-cu13-bindings==1.7.1.116
# hnswlib compiles for the building machine's CPU unless told not to; its wheel may be cached and used on another.
export HNSWLIB_NO_NATIVE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check release install compiler clean

demo: install  ## train, export, verify and recommend in demo/; DATA=folder for real data
	rm -rf demo
	$(BIN)/unipinrec demo --out demo $(if $(DATA),--data $(DATA))

test: install  ## the fast tests
	$(BIN)/pytest -m "not slow and not gpu" --durations=15

check: install  ## lint, format, types, import rules, size
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python bench/size.py

release: install  ## sdist, wheel, notes and checksums in dist/
	PATH="$(abspath $(BIN)):$$PATH" .ci/release dist

install: $(VENV)/installed  ## a virtual environment with everything

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[cpu,train,serve,dev]'
	if $(MAKE) --silent --no-print-directory compiler; then $(BIN)/pip install --quiet --editable '.[hnsw]'; fi
	for bindings in $(BINDINGS); do \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target "$(VENV)/tensorrt-bindings/$$bindings" "$$bindings" || \
	    echo "no $$bindings for this Python or system: the test against it will be skipped"; done
	touch $@

compiler:
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "WITHOUT hnswlib, the vector index: it is compiled on installation, and no C++ compiler was found."; \
	  echo "All items are scanned instead: the same results, more slowly if there are hundreds of thousands of items."; \
	  echo "Debian/Ubuntu: apt-get install g++ python3-dev    Fedora: dnf install gcc-c++ python3-devel"; \
	  echo "Then: $(BIN)/pip install --editable '.[hnsw]'"; exit 1; }
	@$(PYTHON) -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('include'), 'Python.h').stat()" 2> /dev/null || { \
	  echo "WITHOUT hnswlib, the vector index: to be compiled it needs the headers of $(PYTHON), which were not found."; \
	  echo "All items are scanned instead: the same results, more slowly if there are hundreds of thousands of items."; \
	  echo "Debian/Ubuntu: apt-get install python3-dev    Fedora: dnf install python3-devel"; \
	  echo "Then: $(BIN)/pip install --editable '.[hnsw]'"; exit 1; }

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
