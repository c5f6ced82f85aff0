// SPDX-License-Identifier: Apache-2.0
// All kernel bodies of one instruction set.
#pragma once

#include "cpu/dequantize-inl.h"
#include "cpu/histogram-inl.h"
#include "cpu/linear-inl.h"
#include "cpu/linear_int8-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/salience-inl.h"
#include "cpu/trellis-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static constexpr KernelTable make_table(const char* name) {
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)
  constexpr auto int8_tiles = linear_int8_tiles;
  constexpr auto activations = quantize_activations;
#else
  constexpr decltype(KernelTable::linear_int8_tiles) int8_tiles = nullptr;
  constexpr decltype(KernelTable::quantize_activations) activations = nullptr;
#endif
  return {name,        soft_threshold,  magnitude_digit, histogram,  quantize_rows, pack_rows,
          unpack_rows, dequantize_rows, linear_tiles,    int8_tiles, activations};
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
