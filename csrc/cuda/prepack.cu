// SPDX-License-Identifier: Apache-2.0
// Canonical tensors <-> the GPU's order (format/cuda_tiles.h). Runs at load, so every kernel is the plain loop over
// what it writes; each element of the target is written once, padding included.
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t first_item() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t item_stride() { return int64_t(gridDim.x) * kThreads; }

// ---- header, grid, row scales --------------------------------------------------------------------------------------
struct HeadParams {
  PrepackParams p;
  format::PrepackedHeader header;
};

__global__ void __launch_bounds__(kThreads) prepack_head_kernel(HeadParams h) {
  const PrepackParams& p = h.p;
  const uint8_t* header = reinterpret_cast<const uint8_t*>(&h.header);
  uint16_t* row_scale = reinterpret_cast<uint16_t*>(p.prepacked + p.layout.row_scale);
  const int64_t rows = (p.layout.codes - p.layout.row_scale) / 2;
  for (int64_t i = first_item(); i < rows; i += item_stride()) {
    row_scale[i] = i < p.format.N ? p.weight.row_scale[i] : uint16_t(0);
  }
  for (int64_t i = first_item(); i < p.layout.row_scale; i += item_stride()) {
    uint8_t value = 0;
    if (i < int64_t(sizeof(h.header))) {
      value = header[i];
    } else if (i - format::kCudaGridOffset < p.format.grid_size) {
      value = uint8_t(p.weight.grid[i - format::kCudaGridOffset]);
    }
    p.prepacked[i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) unprepack_head_kernel(PrepackParams p) {
  const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.row_scale);
  for (int64_t i = first_item(); i < p.format.N; i += item_stride()) p.weight.row_scale[i] = row_scale[i];
  for (int64_t i = first_item(); i < p.format.grid_size; i += item_stride()) {
    p.weight.grid[i] = int8_t(p.prepacked[format::kCudaGridOffset + i]);
  }
}

// ---- codes ---------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) tile_codes_kernel(PrepackParams p) {
  const format::WeightFormat& f = p.format;
  const format::CudaLayout& layout = p.layout;
  uint32_t* codes = reinterpret_cast<uint32_t*>(p.prepacked + layout.codes);
  const int64_t words = format::num_words(f), all = layout.row_tiles * layout.panels * 4 * 32;
  for (int64_t i = first_item(); i < all; i += item_stride()) {  // one lane's words of one chunk
    const int lane = int(i % 32), chunk = int(i / 32 % 4);
    const int64_t panel = i / 128 % layout.panels, tile = i / 128 / layout.panels;
    uint32_t word[4] = {0, 0, 0, 0};
    for (int half = 0; half < 2; ++half) {
      const int64_t n = tile * format::kRowTile + lane / 4 + 8 * half;
      for (int c = 0; c < 16 && n < f.N; ++c) {
        const int64_t k = panel * format::kPanelColumns + chunk * format::kChunkColumns +
                          format::chunk_column(layout.run, lane % 4, c);
        if (k >= f.K) continue;
        const uint32_t code = format::code_at(p.weight.packed + n * words, k, f.bits);
        for (int b = 0; b < f.bits; ++b) {
          const int bit = half * 16 * f.bits +
                          (b == 0 ? format::code_low_bit(f.bits, c) : format::code_upper_bit(f.bits, c) + b - 1);
          word[bit / 32] |= ((code >> b) & 1u) << (bit % 32);
        }
      }
    }
    uint32_t* to = codes + (tile * layout.panels + panel) * f.bits * 128;
    for (int w = 0; w < f.bits; ++w) to[format::panel_word(f.bits, chunk, lane, w)] = word[w];
  }
}

__global__ void __launch_bounds__(kThreads) untile_codes_kernel(PrepackParams p) {
  const format::WeightFormat& f = p.format;
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(p.prepacked + p.layout.codes);
  const int64_t words = format::num_words(f), all = f.N * words;
  for (int64_t i = first_item(); i < all; i += item_stride()) {
    const int64_t n = i / words, first_bit = i % words * 32;
    uint32_t word = 0;
    for (int64_t k = first_bit / f.bits; k < f.K && k * f.bits < first_bit + 32; ++k) {
      const int shift = int(k * f.bits - first_bit);
      const uint32_t code = format::cuda_code_at(codes, f, p.layout, n, k);
      word |= shift >= 0 ? code << shift : code >> -shift;
    }
    p.weight.packed[i] = word;
  }
}

// ---- scales of a tiled weight: groups <-> units --------------------------------------------------------------------
template <typename T>
__device__ __forceinline__ void copy_scales(const PrepackParams& p, bool back) {
  const format::WeightFormat& f = p.format;
  const int64_t columns = p.layout.scale_columns, groups = format::num_groups(f);
  const int64_t count = back ? groups : ceil_div(f.K, columns), all = f.N * count;
  T *scale = static_cast<T*>(p.weight.scale), *tiled = reinterpret_cast<T*>(p.prepacked + p.layout.scale);
  for (int64_t i = first_item(); i < all; i += item_stride()) {
    const int64_t n = i / count, k = i % count * (back ? f.group_size : columns);
    T& slot = tiled[format::scale_slot(p.layout, n, k / columns)];
    T& canonical = scale[n * groups + k / f.group_size];
    if (back) {
      canonical = slot;
    } else {
      slot = canonical;
    }
  }
}

__global__ void __launch_bounds__(kThreads) tile_scales_kernel(PrepackParams p) {
  p.format.scale_type == format::ScaleType::kE4m3 ? copy_scales<uint8_t>(p, false) : copy_scales<uint16_t>(p, false);
}
__global__ void __launch_bounds__(kThreads) untile_scales_kernel(PrepackParams p) {
  p.format.scale_type == format::ScaleType::kE4m3 ? copy_scales<uint8_t>(p, true) : copy_scales<uint16_t>(p, true);
}

// ---- everything else with `count` elements a row
// ------------------------------------------------------------------------
struct SectionParams {
  void* rows;    // [N][count] elements of `bytes`
  void* tiled;   // tiled: [row tiles][count][8][2], else [N][count]
  void* values;  // outliers: a second tensor, the upper byte of the tiled uint16
  int64_t N, row_tiles, count;
  int bytes;
  bool is_tiled, back;
};

template <typename T>
__device__ __forceinline__ void copy_section(const SectionParams& s) {
  T* rows = static_cast<T*>(s.rows);
  T* tiled = static_cast<T*>(s.tiled);
  const int64_t all = (s.is_tiled ? s.row_tiles * format::kRowTile : s.N) * s.count;
  for (int64_t i = first_item(); i < all; i += item_stride()) {
    const int64_t n = i / s.count, j = i % s.count;
    const int64_t at = s.is_tiled ? (n / 16 * s.count + j) * 16 + format::row_slot(n) : i;
    if (s.back) {
      if (n < s.N) rows[i] = tiled[at];
    } else {
      tiled[at] = n < s.N ? rows[i] : T(0);
    }
  }
}

__global__ void __launch_bounds__(kThreads) section_kernel(SectionParams s) {
  if (s.values != nullptr) {
    uint8_t *index = static_cast<uint8_t*>(s.rows), *value = static_cast<uint8_t*>(s.values);
    uint16_t* tiled = static_cast<uint16_t*>(s.tiled);
    const int64_t all = s.row_tiles * format::kRowTile * s.count;
    for (int64_t i = first_item(); i < all; i += item_stride()) {
      const int64_t n = i / s.count, j = i % s.count;
      const int64_t at = (n / 16 * s.count + j) * 16 + format::row_slot(n);
      if (!s.back) {
        tiled[at] = n < s.N ? uint16_t(index[i] | value[i] << 8) : uint16_t(0);
      } else if (n < s.N) {
        index[i] = uint8_t(tiled[at]);
        value[i] = uint8_t(tiled[at] >> 8);
      }
    }
  } else if (s.bytes == 1) {
    copy_section<uint8_t>(s);
  } else if (s.bytes == 2) {
    copy_section<uint16_t>(s);
  } else {
    copy_section<uint32_t>(s);
  }
}

Status copy_sections(const char* op, const PrepackParams& p, bool back, cudaStream_t stream) {
  const format::WeightFormat& f = p.format;
  const format::CudaLayout& t = p.layout;
  const int64_t groups = format::num_groups(f), entries = format::num_blocks(f) * f.c;
  const int scale_bytes = int(format::scale_bytes(f.scale_type));
  const auto copy = [&](void* rows, int64_t offset, int64_t count, int bytes, void* values = nullptr) -> Status {
    if (f.N * count == 0) return {};
    const SectionParams s{rows, p.prepacked + offset, values, f.N, t.row_tiles, count, bytes, t.tiled, back};
    return launch(op, &section_kernel, blocks_for(t.row_tiles * 16 * count, kThreads), kThreads, 0, stream, s);
  };
  if (t.tiled) {
    if (f.N * groups > 0) {
      const int64_t work = f.N * (back ? groups : ceil_div(f.K, t.scale_columns));
      PRECAL_RETURN_IF_ERROR(launch(op, back ? &untile_scales_kernel : &tile_scales_kernel, blocks_for(work, kThreads),
                                    kThreads, 0, stream, p));
    }
    return f.c == 0 ? Status() : copy(p.weight.outlier_index, t.outliers, entries, 2, p.weight.outlier_value);
  }
  PRECAL_RETURN_IF_ERROR(copy(p.weight.scale, t.scale, groups, scale_bytes));
  PRECAL_RETURN_IF_ERROR(copy(p.weight.packed, t.codes, format::num_words(f), 4));
  if (f.c > 0) {
    PRECAL_RETURN_IF_ERROR(copy(p.weight.outlier_index, t.outliers, entries, 1));
    PRECAL_RETURN_IF_ERROR(copy(p.weight.outlier_value, t.outlier_value, entries, 1));
  }
  if (!f.split) return {};
  PRECAL_RETURN_IF_ERROR(copy(p.weight.outlier_scale, t.outlier_scale, groups, scale_bytes));
  return copy(p.weight.mask, t.mask, format::mask_bytes_per_row(f), 1);
}

}  // namespace

Status launch_prepack(const PrepackParams& p, cudaStream_t stream) {
  constexpr const char* op = "prepack";
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaMemsetAsync(p.prepacked, 0, size_t(p.layout.total_bytes), stream)));
  const HeadParams head{p, format::cuda_header(p.format)};
  PRECAL_RETURN_IF_ERROR(launch(op, &prepack_head_kernel, blocks_for(p.format.N, kThreads), kThreads, 0, stream, head));
  const int64_t chunks = p.layout.row_tiles * p.layout.panels * 128;
  if (p.layout.tiled && chunks > 0) {
    PRECAL_RETURN_IF_ERROR(launch(op, &tile_codes_kernel, blocks_for(chunks, kThreads), kThreads, 0, stream, p));
  }
  return copy_sections(op, p, false, stream);
}

Status launch_unprepack(const PrepackParams& p, cudaStream_t stream) {
  constexpr const char* op = "unprepack";
  const int64_t words = p.format.N * format::num_words(p.format);
  PRECAL_RETURN_IF_ERROR(launch(op, &unprepack_head_kernel, blocks_for(p.format.N, kThreads), kThreads, 0, stream, p));
  if (p.layout.tiled && words > 0) {
    PRECAL_RETURN_IF_ERROR(launch(op, &untile_codes_kernel, blocks_for(words, kThreads), kThreads, 0, stream, p));
  }
  return copy_sections(op, p, true, stream);
}

}  // namespace precal::cuda
