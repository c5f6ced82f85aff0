// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"

namespace precal::cpu {

// The table for this machine, chosen once. PRECAL_ISA=scalar|avx2|avxvnni|avx512 forces one; an unknown or unsupported
// name is an error that every op reports.
const KernelTable& kernels();
Status kernels_status();

// For tests and benchmarks: use `name` from now on ("" returns to the automatic choice).
Status force_isa(const char* name);

// Names that this machine can run, best first, separated by commas.
const char* supported_isas();

}  // namespace precal::cpu
