// SPDX-License-Identifier: Apache-2.0
#define PRECAL_ISA_NAMESPACE avxvnni
#include "cpu/linear_int8-inl.h"

namespace precal::cpu {
const IntegerKernels k_avxvnni_kernels = avxvnni::kIntegerKernels;
}
