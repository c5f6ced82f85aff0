#!/usr/bin/env bash
# Everything that needs a real GPU, in one call and without a network:
#   bench/gpu_day.sh [build|instructions|test|sanitize|bench]...      all of them by default
# Uses the python3 (PYTHON=...) and the CUDA compiler that are there; needs torch >= 2.11, cmake, ninja, pybind11, pytest,
# hypothesis. Results go to bench/results/gpu.jsonl, or to $OUT/gpu.jsonl where OUT is set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
parts=${*:-build instructions test sanitize bench}
failed=
mkdir -p build

for part in $parts; do
  echo "== $part"
  case $part in
    build)
      PRECAL_CUDA=1 "$PYTHON" setup.py build_ext --inplace > build/gpu-build.log 2>&1 || { tail -40 build/gpu-build.log; exit 1; }
      "$PYTHON" -c "import precal_ext; print(precal_ext._C.build_info())"
      ;;
    instructions)  # every function of csrc/cuda/ptx.cuh against what tests/cuda_on_cpu/ptx_host.h says
      nvcc -x cu -std=c++17 -arch=native -diag-suppress 177 -I csrc tests/cuda_on_cpu/selftest.cpp -o build/selftest_gpu
      for case in $(build/selftest_gpu || true); do
        echo "$case: $(build/selftest_gpu "$case" 0)" || failed="$failed $part"
      done
      ;;
    test)
      PRECAL_REQUIRE_CUDA=1 "$PYTHON" -m pytest -q -x -m cuda tests || failed="$failed $part"
      ;;
    sanitize)
      if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck synccheck; do
          PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m pytest -q -x -m cuda tests/test_cuda.py -k "example_of_every_op or graphs" \
            2>&1 | tail -15 || failed="$failed $part:$tool"
        done
      else
        echo "no compute-sanitizer here"
      fi
      ;;
    bench)
      "$PYTHON" bench/gpu.py --out "${OUT:-bench/results}/gpu.jsonl" || failed="$failed $part"
      ;;
    *)
      echo "gpu_day.sh: no such part: $part" >&2
      exit 2
      ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
