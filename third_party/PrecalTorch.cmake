# torch >= 2.11 (BSD-3-Clause), headers and libraries of the build environment's package, found without importing it.
# Only the stable ABI is used: the result loads in every torch from 2.11 on.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin))"
  OUTPUT_VARIABLE _precal_torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _precal_torch_failed)
if(_precal_torch_failed OR NOT EXISTS "${_precal_torch_dir}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "torch >= 2.11 with its headers was not found for ${Python_EXECUTABLE}; "
                      "pip install torch, or build with --no-build-isolation in an environment that has it")
endif()

add_library(precal_torch_headers INTERFACE)
add_library(precal::torch_headers ALIAS precal_torch_headers)
target_include_directories(precal_torch_headers SYSTEM INTERFACE "${_precal_torch_dir}/include")
target_compile_definitions(precal_torch_headers INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch.so pulls in libtorch_cuda.so where there is one: its stream shim must be found without being linked here.
target_link_directories(precal_torch_headers INTERFACE "${_precal_torch_dir}/lib")
target_link_libraries(precal_torch_headers INTERFACE -Wl,--no-as-needed torch torch_cpu -Wl,--as-needed)
