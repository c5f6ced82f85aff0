// SPDX-License-Identifier: Apache-2.0
// Codes <-> little-endian bit stream (format/bitstream.h).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static bool pack_rows(const PackArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t words = format::words_per_row(args.K, args.bits);
  uint32_t seen = 0;
  for (int64_t n = row_begin; n < row_end; ++n) {
    const uint8_t* codes = args.codes + n * args.K;
    uint32_t* out = args.packed + n * words;
    uint64_t pending = 0;
    int filled = 0;
    for (int64_t k = 0; k < args.K; ++k) {
      seen |= codes[k];
      pending |= uint64_t(codes[k]) << filled;
      filled += args.bits;
      if (filled >= 32) {
        *out++ = uint32_t(pending);
        pending >>= 32;
        filled -= 32;
      }
    }
    if (filled > 0) *out = uint32_t(pending);
  }
  return (seen >> args.bits) == 0;
}

static void unpack_rows(const UnpackArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t words = format::words_per_row(args.K, args.bits);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const uint32_t* row = args.packed + n * words;
    uint8_t* codes = args.codes + n * args.K;
    for (int64_t k = 0; k < args.K; ++k) codes[k] = uint8_t(format::code_at(row, k, args.bits));
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
