// SPDX-License-Identifier: Apache-2.0
// prepack, unprepack, linear.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "cpu/interleave.h"
#include "cpu/ops.h"
#include "cpu/select.h"

namespace precal::cpu {

namespace {

using format::kTileRows;
using format::PrepackedHeader;
using format::ScaleType;
using format::TileLayout;
using format::WeightFormat;

PrepackedHeader make_header(const WeightFormat& f) {
  PrepackedHeader h{};
  h.magic = format::kPrepackedMagic;
  h.version = format::kPrepackedVersion;
  h.bits = uint8_t(f.bits);
  h.flags = format::prepacked_flags(f);
  h.N = f.N;
  h.K = f.K;
  h.group_size = f.group_size;
  h.c = f.c;
  h.grid_size = uint32_t(f.grid_size);
  h.total_bytes = format::tile_layout(f).total_bytes;
  h.segment = format::outlier_blocks(f).segment;
  return h;
}

// Row-major [N][count] elements of `bytes` <-> [count][16] of one tile. Rows past N are zero in the tile.
void rows_to_lanes(const uint8_t* rows, uint8_t* lanes, int64_t first_row, int64_t N, int64_t count, int64_t bytes) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (first_row + r >= N) continue;
    const uint8_t* from = rows + (first_row + r) * count * bytes;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(lanes + (i * kTileRows + r) * bytes, from + i * bytes, size_t(bytes));
  }
}

void lanes_to_rows(const uint8_t* lanes, uint8_t* rows, int64_t first_row, int64_t N, int64_t count, int64_t bytes) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (first_row + r >= N) continue;
    uint8_t* to = rows + (first_row + r) * count * bytes;
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * bytes, lanes + (i * kTileRows + r) * bytes, size_t(bytes));
  }
}

// One section of a tile and the canonical tensor it comes from.
struct Section {
  void* rows;
  int64_t offset, count, bytes;
};

std::vector<Section> sections(const WeightFormat& f, const TileLayout& t, void* packed, void* scale, void* row_scale,
                              void* outlier_index, void* outlier_value, void* outlier_scale, void* mask) {
  const int64_t groups = format::num_groups(f), entries = format::num_blocks(f) * f.c;
  const int64_t scale_bytes = format::scale_bytes(f.scale_type);
  std::vector<Section> list{{row_scale, 0, 1, 2}, {scale, t.scale, groups, scale_bytes}};
  if (t.chunk == 0) list.push_back({packed, t.head_bytes, format::num_words(f), 4});
  if (f.c > 0) {
    list.push_back({outlier_value, t.outlier_value, entries, 1});
    list.push_back({outlier_index, t.outlier_index, entries, 1});
  }
  if (f.split) {
    list.push_back({outlier_scale, t.outlier_scale, groups, scale_bytes});
    list.push_back({mask, t.mask, format::mask_bytes_per_row(f), 1});
  }
  return list;
}

void copy_to_float(const TensorView& t, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = t.dtype == DType::kFloat32    ? t.as<float>()[begin + i]
             : t.dtype == DType::kBFloat16 ? bf16_to_float(t.as<uint16_t>()[begin + i])
                                           : half_to_float(t.as<uint16_t>()[begin + i]);
  }
}

// Memory for activations as integers, and what the kernels must know of the order of columns.
struct IntegerRows {
  static constexpr int64_t kWorthAThread = 1 << 15;  // elements

  AlignedBuffer memory;

  // For up to M rows at a time.
  void prepare(const WeightFormat& f, const TileLayout& t, int planes, int64_t M, LinearArgs* args) {
    QuantizedRows& q = args->q;
    q.planes = planes;
    q.span = f.group_size;
    if (q.span > kMaxSpan) {
      q.span = kMaxSpan;
      while (f.group_size % q.span != 0) q.span /= 2;
    }
    q.num_spans = ceil_div(f.K, q.span);

    int64_t bytes = 0;
    const auto place = [&bytes](int64_t size) {
      const int64_t at = bytes;
      bytes += round_up(size, int64_t(AlignedBuffer::kAlignment));
      return at;
    };
    // Two bytes an integer: some kernels keep 8 bits as words.
    const int64_t x = place(M * 2 * t.num_chunks * t.chunk), start = place(M * planes * q.num_spans * 4),
                  scale = place(M * q.num_spans * 4), keep = place(t.num_chunks * 4);
    const int64_t transposed = f.c > 0 ? place(round_up(M, 16) * f.K * 4) : 0;
    memory = AlignedBuffer(bytes);
    q.x = memory.as<int8_t>(x);
    q.start = memory.as<int32_t>(start);
    q.scale = memory.as<float>(scale);
    q.transposed = f.c > 0 ? memory.as<float>(transposed) : nullptr;

    uint32_t* kept = memory.as<uint32_t>(keep);
    std::fill_n(kept, t.num_chunks, 0xFFFFFFFFu);
    const format::OutlierBlocks blocks = format::outlier_blocks(f);
    for (int64_t b = 0; b < blocks.num_blocks; ++b) {
      const int64_t k = format::block_begin(blocks, b), j = k % t.chunk / (t.chunk / 4);
      kept[k / t.chunk] &= ~(0xFFu << (8 * j));
    }
    args->keep = kept;
  }

  // How many tokens the kernels take together.
  static void arrange(LinearArgs* args) {
    QuantizedRows& q = args->q;
    const int64_t M = args->M;
    const IntegerKernels& integer = kernels().integer;
    q.lanes = M == 1 ? 1 : M <= 4 ? 4 : M <= 8 ? 8 : 16;
    // Panels of equal width, give or take one: a narrow one at the end would cost as much as a wide one.
    const int64_t most = M <= integer.few_tokens[q.planes - 1] ? M : integer.panel_tokens[q.planes - 1];
    const int64_t panels = ceil_div(M, most);
    q.panel = ceil_div(M, panels);
    q.wide = M - panels * (q.panel - 1);
  }

  static int64_t transpose_pieces(const LinearArgs& args) {
    return args.format.c == 0 ? 0 : ceil_div(args.M, args.q.lanes) * ceil_div(args.format.K, kTransposeColumns);
  }

  static void quantize_here(const LinearArgs& args) {
    const IntegerKernels& integer = kernels().integer;
    integer.quantize_activations(args, 0, args.M);
    if (args.format.c > 0) integer.transpose_activations(args, 0, transpose_pieces(args));
  }

  static void quantize_on_all_threads(const LinearArgs& args) {
    const IntegerKernels& integer = kernels().integer;
    parallel_for(0, args.M, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(args.format.K, 1)),
                 [&](int64_t begin, int64_t end) { integer.quantize_activations(args, begin, end); });
    parallel_for(0, transpose_pieces(args), kWorthAThread / (kTransposeColumns * args.q.lanes),
                 [&](int64_t begin, int64_t end) { integer.transpose_activations(args, begin, end); });
  }
};

Status check_float(const char* op, const char* name, const TensorView& t) {
  return check_dtype(op, name, t, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
}

}  // namespace

Status Prepack::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("prepack", &f));
  out[0] = {DType::kUInt8, {format::tile_layout(f).total_bytes}};
  return {};
}

Status Prepack::run(const TensorView* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("prepack", &f));
  float levels[256];
  PRECAL_RETURN_IF_ERROR(make_levels("prepack", weight.grid, f.bits, levels));
  const TileLayout t = format::tile_layout(f);
  const PrepackedHeader header = make_header(f);
  uint8_t* data = out[0].as<uint8_t>();
  advise_huge_pages(data, t.total_bytes);
  std::memset(data, 0, size_t(format::kPrepackedTilesOffset));
  std::memcpy(data, &header, sizeof(header));
  if (f.grid_size > 0) std::memcpy(data + format::kPrepackedGridOffset, weight.grid.data, size_t(f.grid_size));
  const std::vector<Section> list =
      sections(f, t, weight.packed.data, weight.scale.data, weight.row_scale.data, weight.outlier_index.data,
               weight.outlier_value.data, weight.outlier_scale.data, weight.mask.data);
  parallel_for(0, t.num_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const format::TilePlace place = format::tile_place(t, i);
      uint8_t *tile = data + place.head, *codes = data + place.codes;
      const int64_t row = i * kTileRows;
      const bool whole = row + kTileRows <= f.N;
      std::memset(tile, 0, size_t(t.head_bytes));
      const uint32_t* words = weight.packed.as<uint32_t>();
      int64_t chunks = 0;
      if (t.chunk > 0 && whole) {
        chunks = kernels().interleave_rows(f, t, words + row * format::num_words(f), codes, place.stride);
      }
      if (t.chunk == 0) std::memset(codes, 0, size_t(t.tile_bytes - t.head_bytes));
      for (int64_t n = chunks; n < t.num_chunks; ++n) std::memset(codes + n * place.stride, 0, size_t(t.chunk_bytes));
      for (const Section& s : list) {
        rows_to_lanes(static_cast<const uint8_t*>(s.rows), tile + s.offset, row, f.N, s.count, s.bytes);
      }
      if (t.chunk > 0) words_to_chunks(f, t, words, row, chunks, codes, place.stride);
    }
  });
  return {};
}

Status PrepackedWeight::check_numbers(const char* op, WeightFormat* f) const {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "prepacked", data, {DType::kUInt8}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "prepacked", data));
  constexpr int64_t kLimit = int64_t(1) << 30;
  if (N < 0 || N > kLimit || K < 0 || K > kLimit) {
    return invalid_value(op, ": N and K must lie in [0, 2^30], got ", N, " and ", K);
  }
  if (bits < format::kMinBits || bits > format::kMaxBits) {
    return invalid_value(op, ": bits must lie in [2, 8], got ", bits);
  }
  if (group_size < 1 || group_size > kLimit) {
    return invalid_value(op, ": group_size must lie in [1, 2^30], got ", group_size);
  }
  if (c < 0 || c > format::kMaxCapacity) {
    return invalid_value(op, ": c must lie in [0, ", format::kMaxCapacity, "], got ", c);
  }
  if (!format::grid_size_fits(grid_size, int(bits))) {
    return invalid_value(
        op, ": grid_size must be 0 (uniform), 2^bits or, for a trellis of 2 to 7 bits, 2^(bits+1), got ", grid_size);
  }
  if (scale_dtype != "e4m3" && scale_dtype != "float16") {
    return invalid_value(op, ": scale_dtype must be e4m3 or float16, got ", quoted(scale_dtype));
  }
  PRECAL_RETURN_IF_ERROR(check_segment(op, segment, K));
  f->N = N;
  f->K = K;
  f->bits = int(bits);
  f->group_size = group_size;
  f->c = int(c);
  f->grid_size = int(grid_size);
  f->split = split;
  f->scale_type = scale_dtype == "e4m3" ? ScaleType::kE4m3 : ScaleType::kFloat16;
  f->segment = segment;
  return {};
}

Status PrepackedWeight::check(const char* op, WeightFormat* f) const {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_numbers(op, f));
  const PrepackedHeader want = make_header(*f);
  if (data.ndim != 1 || data.shape[0] != want.total_bytes) {
    return invalid_value(op, ": prepacked must be [", want.total_bytes, "] bytes for N=", N, ", K=", K, ", bits=", bits,
                         ", group_size=", group_size, ", c=", c, ", grid_size=", grid_size, ", got ", shape_text(data));
  }
  if (data.data == nullptr || std::memcmp(data.data, &want, sizeof(want)) != 0) {
    return invalid_value(op,
                         ": prepacked must come from prepack() with the same N, K, bits, group_size, c, grid_size and "
                         "segment; its header says otherwise");
  }
  return {};
}

void unprepacked_specs(const WeightFormat& f, TensorSpec* out) {
  const int64_t groups = format::num_groups(f), blocks = format::num_blocks(f);
  const DType scale = f.scale_type == ScaleType::kE4m3 ? DType::kUInt8 : DType::kFloat16;
  out[0] = {DType::kInt32, {f.N, format::num_words(f)}};
  out[1] = {scale, {f.N, groups}};
  out[2] = {DType::kBFloat16, {f.N}};
  out[3] = {DType::kInt8, {f.grid_size > 0 ? 1 : 0, f.grid_size}};
  out[4] = {DType::kUInt8, {f.N, blocks, f.c}};
  out[5] = {DType::kUInt8, {f.N, blocks, f.c}};
  out[6] = {scale, {f.split ? f.N : 0, groups}};
  out[7] = {DType::kUInt8, {f.split ? f.N : 0, format::mask_bytes_per_row(f)}};
}

Status Unprepack::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("unprepack", &f));
  unprepacked_specs(f, out);
  return {};
}

Status Unprepack::run(const TensorView* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("unprepack", &f));
  const TileLayout t = format::tile_layout(f);
  const uint8_t* data = weight.data.as<uint8_t>();
  if (f.grid_size > 0) std::memcpy(out[3].data, data + format::kPrepackedGridOffset, size_t(f.grid_size));
  const std::vector<Section> list =
      sections(f, t, out[0].data, out[1].data, out[2].data, out[4].data, out[5].data, out[6].data, out[7].data);
  parallel_for(0, t.num_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const format::TilePlace place = format::tile_place(t, i);
      const uint8_t* tile = data + place.head;
      for (const Section& s : list) {
        lanes_to_rows(tile + s.offset, static_cast<uint8_t*>(s.rows), i * kTileRows, f.N, s.count, s.bytes);
      }
      if (t.chunk > 0) chunks_to_words(f, t, data + place.codes, place.stride, i * kTileRows, out[0].as<uint32_t>());
    }
  });
  return {};
}

Status Linear::plan(TensorSpec* out) const {
  constexpr const char* op = "linear";
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(check_float(op, "x", x));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "x", x));
  PRECAL_RETURN_IF_ERROR(weight.check(op, &f));
  if (x.ndim < 1 || x.shape[x.ndim - 1] != f.K) {
    return invalid_value(op, ": x must be [..., K] with K = ", f.K, ", got ", shape_text(x));
  }
  if (activations != "f32" && activations != "a16" && activations != "a8") {
    return invalid_value(op, ": activations must be f32, a16 or a8, got ", activations);
  }
  if (bias.present) {
    PRECAL_RETURN_IF_ERROR(check_float(op, "bias", bias));
    PRECAL_RETURN_IF_ERROR(check_contiguous(op, "bias", bias));
    PRECAL_RETURN_IF_ERROR(check_shape(op, "bias", bias, {bias.dtype, {f.N}}, "(N)"));
  }
  out[0] = x;
  out[0].shape[x.ndim - 1] = f.N;
  return {};
}

Status Linear::run(const TensorView* out) const {
  LinearArgs args{};
  PRECAL_RETURN_IF_ERROR(weight.check("linear", &args.format));
  const WeightFormat& f = args.format;
  int64_t M = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) M *= x.shape[i];
  if (M == 0 || f.N == 0) return {};

  const uint8_t* data = weight.data.as<uint8_t>();
  float levels[256];
  const int count = f.grid_size > 0 ? f.grid_size : 1 << f.bits;  // a power of two
  const int8_t* grid = reinterpret_cast<const int8_t*>(data + format::kPrepackedGridOffset);
  for (int u = 0; u < 256; ++u)
    levels[u] = f.grid_size > 0 ? float(grid[u & (count - 1)]) : float((u & (count - 1)) - count / 2);
  std::vector<float> bias_copy;
  if (bias.present) {
    bias_copy.resize(size_t(f.N));
    copy_to_float(bias, 0, f.N, bias_copy.data());
  }
  args.layout = format::tile_layout(f);
  args.prepacked = data;
  args.levels = levels;
  args.bias = bias.present ? bias_copy.data() : nullptr;
  args.y_dtype = out[0].dtype;
  args.y_stride = f.N;

  IntegerRows rows;
  const bool integers = activations != "f32" && args.layout.chunk > 0;
  const int64_t most = integers ? kInt8MaxRows : kLinearMaxRows;
  const int planes = activations == "a16" ? 2 : 1;
  // Few enough for every thread to make integers of its own: that is sooner done than they come from another core's
  // cache.
  const bool few = integers && M <= most && M * f.K <= IntegerRows::kWorthAThread;
  if (integers && !few) rows.prepare(f, args.layout, planes, std::min(M, most), &args);

  std::vector<float> x_copy;
  for (int64_t m = 0; m < M; m += most) {
    args.M = std::min(most, M - m);
    args.x_rows = x.as<uint8_t>() + m * f.K * dtype_bytes(x.dtype);
    args.x_dtype = x.dtype;
    args.y = out[0].as<uint8_t>() + m * f.N * dtype_bytes(out[0].dtype);
    if (few) {
      // Below, by every thread.
    } else if (integers) {
      IntegerRows::arrange(&args);
      IntegerRows::quantize_on_all_threads(args);
    } else if (x.dtype == DType::kFloat32) {
      args.x = x.as<float>() + m * f.K;
    } else {
      x_copy.resize(size_t(args.M * f.K));
      copy_to_float(x, m * f.K, args.M * f.K, x_copy.data());
      args.x = x_copy.data();
    }
    // A piece is worth a thread from about 32 thousand multiply-adds on.
    const int64_t tile_work = std::max<int64_t>(1, kTileRows * f.K * (args.M + 4));
    const int64_t unit = integers ? 2 : 1;  // tiles: pairs stay together
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (unit * tile_work));
    parallel_for(0, ceil_div(args.layout.num_tiles, unit), grain, [&](int64_t first, int64_t last) {
      const int64_t begin = first * unit, end = std::min(last * unit, args.layout.num_tiles);
      if (few) {
        LinearArgs own = args;
        IntegerRows own_rows;
        own_rows.prepare(f, args.layout, planes, M, &own);
        IntegerRows::arrange(&own);
        IntegerRows::quantize_here(own);
        const AlignedBuffer scratch(4 * int8_scratch_floats(M, end - begin));
        return kernels().integer.linear_tiles(own, begin, end, scratch.as<float>());
      }
      const AlignedBuffer scratch(4 * (integers ? int8_scratch_floats(args.M, end - begin) : linear_scratch_floats()));
      (integers ? kernels().integer.linear_tiles : kernels().linear_tiles)(args, begin, end, scratch.as<float>());
    });
  }
  return {};
}

}  // namespace precal::cpu
