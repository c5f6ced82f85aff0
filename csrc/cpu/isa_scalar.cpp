// SPDX-License-Identifier: Apache-2.0
#define PRECAL_ISA_NAMESPACE scalar
#include "cpu/table-inl.h"

namespace precal::cpu {
const KernelTable k_scalar_kernels = scalar::make_table("scalar");
}
