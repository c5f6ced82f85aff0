# The whole developer loop. `make demo` and `make test` need Python >= 3.10, a C++17 compiler and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
# The version that is tested. Another one: make demo TORCH=torch
TORCH ?= torch==2.13.0
# Compile the CUDA code wherever there is a compiler for it; a GPU is not needed.
export PRECAL_CUDA ?= $(if $(shell command -v nvcc),1,auto)
# Only the developers' own builds treat warnings as errors.
test lint: export PRECAL_WERROR ?= 1

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13,<4"

.PHONY: demo test test-serving lint build bench-recipes bench-quality bench-cpu bench-models fuzz tsan clean

# What `make fuzz` runs; the campaigns of docs/reliability.md had a million of each.
FUZZ ?= 1000000
SEED ?= 1

demo: $(VENV)/.build-tools
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation ".[hf]"
	cd demo && PATH="$(BIN):$$PATH" $(BIN)/precal demo llama-6m --text text.txt

test: build lint
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

# What takes minutes or needs a server's packages: inductor, ahead-of-time compilation, `transformers serve`.
test-serving: build
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[test,serving]"
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m heavy $(PYTEST_ARGS)

# Editable: tests run on the sources of this folder.
build: $(VENV)/.build-tools
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[test,dev]"

lint: build
	PATH="$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

$(VENV)/.build-tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)" $(BUILD_TOOLS)
	touch $@

# The table of docs/results.md; needs ../shared for the development models and texts.
bench-recipes: build
	PATH="$(BIN):$$PATH" $(BIN)/python bench/recipes.py
	PATH="$(BIN):$$PATH" $(BIN)/python bench/report.py

# precal's rows of docs/quality.md and docs/sqnr.md; other packages' rows stay as they are (bench/README.md).
bench-quality: build
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[bench]"
	PATH="$(BIN):$$PATH" $(BIN)/python bench/quality.py --ours
	PATH="$(BIN):$$PATH" $(BIN)/python bench/sqnr.py --ours
	PATH="$(BIN):$$PATH" $(BIN)/python bench/report.py

# docs/performance.md and the README's speeds, on a quiet machine; peers that are installed take part (bench/README.md).
bench-cpu: build
	PATH="$(BIN):$$PATH" $(BIN)/python bench/cpu.py $(BENCH_ARGS)
	PATH="$(BIN):$$PATH" $(BIN)/python bench/report.py

# The part of docs/performance.md about whole models; a quiet machine, 6 minutes, 3 GB of disk.
bench-models: build
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[hf]"
	PATH="$(BIN):$$PATH" $(BIN)/python bench/models.py $(BENCH_ARGS)
	PATH="$(BIN):$$PATH" $(BIN)/python bench/report.py

# Random calls of every op under ASan and UBSan, and random headers.
fuzz: build
	PATH="$(BIN):$$PATH" $(BIN)/python tests/fuzz_ops.py --calls $(FUZZ) --seed $(SEED)
	PATH="$(BIN):$$PATH" $(BIN)/python tests/fuzz_headers.py --headers $(FUZZ) --seed $(SEED)

# Every op on 1 to 8 threads under ThreadSanitizer, which must first report a race that is there.
tsan: $(VENV)/.build-tools
	PATH="$(BIN):$$PATH" cmake -G Ninja -S . -B build/tsan -DPRECAL_SANITIZE=thread -DPython_EXECUTABLE=$(BIN)/python
	PATH="$(BIN):$$PATH" cmake --build build/tsan --target threads
	! build/tsan/threads --race
	build/tsan/threads

clean:
	rm -rf build $(VENV) *.egg-info precal_ext/*.so
