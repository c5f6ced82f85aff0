// SPDX-License-Identifier: Apache-2.0
#define PRECAL_ISA_NAMESPACE avx2
#include "cpu/table-inl.h"

namespace precal::cpu {
const KernelTable k_avx2_kernels = avx2::make_table("avx2");
}
