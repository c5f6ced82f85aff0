# pybind11 >= 2.13 (BSD-3-Clause), from the build environment's Python packages.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE _precal_pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _precal_pybind11_failed)
if(_precal_pybind11_failed)
  message(FATAL_ERROR "pybind11 was not found for ${Python_EXECUTABLE}; pip install pybind11")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 2.13 REQUIRED CONFIG PATHS "${_precal_pybind11_dir}" NO_DEFAULT_PATH)
