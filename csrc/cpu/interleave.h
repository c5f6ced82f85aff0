// SPDX-License-Identifier: Apache-2.0
// Codes of one tile between canonical words and chunks (format/interleave.h).
#pragma once

#include "format/prepacked.h"

namespace precal::cpu {

// Rows [first_row, first_row + 16) of `words` [N][num_words], chunks from `first_chunk` on, into the zeroed chunks of a
// tile, `stride` bytes apart; rows past N stay zero.
void words_to_chunks(const format::WeightFormat& f, const format::TileLayout& t, const uint32_t* words,
                     int64_t first_row, int64_t first_chunk, uint8_t* codes, int64_t stride);

void chunks_to_words(const format::WeightFormat& f, const format::TileLayout& t, const uint8_t* codes, int64_t stride,
                     int64_t first_row, uint32_t* words);

}  // namespace precal::cpu
