// SPDX-License-Identifier: Apache-2.0
// All kernel bodies of one instruction set.
#pragma once

#include "cpu/dequantize-inl.h"
#include "cpu/histogram-inl.h"
#include "cpu/interleave-inl.h"
#include "cpu/linear-inl.h"
#include "cpu/linear_int8-inl.h"
#include "cpu/measure-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/salience-inl.h"
#include "cpu/split-inl.h"
#include "cpu/trellis-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static constexpr KernelTable make_table(const char* name) {
  return {name,          soft_threshold,      magnitude_digit, collect_magnitudes, mask_magnitudes, histogram,
          quantize_rows, quantize_split_rows, pack_rows,       unpack_rows,        dequantize_rows, measure_rows,
          linear_tiles,  interleave_rows,     kIntegerKernels};
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
