// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace precal::bindings {

void define_limits(pybind11::module_& m);  // _C.limit_names, _C.measure_limit

}  // namespace precal::bindings
