// SPDX-License-Identifier: Apache-2.0
#define PRECAL_ISA_NAMESPACE avx512
#include "cpu/table-inl.h"

namespace precal::cpu {
const KernelTable k_avx512_kernels = avx512::make_table("avx512");
}
