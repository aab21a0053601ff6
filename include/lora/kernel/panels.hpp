// SPDX-License-Identifier: Apache-2.0
//
// Panels: the layout that the register tile reads. A matrix of `outer` rows and `depth` columns is
// cut into panels of `width` rows; inside a panel the rows' elements at one depth lie side by side,
// so that one step of the tile is one load. bfloat16 lies in pairs of depths (see simd.hpp), an odd
// depth padded with zero. Rows that pad the last panel are zero.
#pragma once

#include <algorithm>
#include <cstddef>

#include "lora/detail/convert.hpp"
#include "lora/kernel/isa/transpose_x86.hpp"
#include "lora/kernel/tile.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Elements of one panel of T.
template <class T>
constexpr index_t panel_size(index_t depth, index_t width) {
  return pieces(depth, depth_group<T>) * depth_group<T> * width;
}
/// Where row i at depth k lies in a panel of T.
template <class T>
constexpr index_t panel_offset(index_t i, index_t k, index_t width) {
  if constexpr (depth_group<T> == 1)
    return k * width + i;
  else
    return k / 2 * 2 * width + 2 * i + k % 2;
}

/// A widened or rounded copy of one element: exact wherever To holds From.
template <class To, class From>
To converted(const From& value) {
  if constexpr (holds_exactly<To, From>)
    return exactly<To>(value);
  else
    return narrow<To>(widen<double>(value));
}

/// destination[k * rows + i] = row(i)[k] for up to eight rows, as many depths from the first on as
/// blocks of eight can write; returns how many: none where the rows are too few to pay. A block of
/// fewer than eight writes past its end, which the next one overwrites; the last is left.
template <class Row>
index_t transpose_rows(const Row& row, index_t rows, index_t depth, float* destination) {
  index_t k = 0;
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  for (; rows > 2 && k + (rows < 8 ? 16 : 8) <= depth; k += 8)
    transpose_block([&](int i) { return row(std::min<index_t>(i, rows - 1)) + k; },
                    destination + k * rows, rows);
#else
  static_cast<void>(row), static_cast<void>(rows), static_cast<void>(depth),
      static_cast<void>(destination);
#endif
  return k;
}

/// Packs what blocks of eight by eight can of a row-major source, and says how many rows and depths
/// that was.
template <class To, class From>
std::pair<index_t, index_t> pack_blocks(To* panel, index_t width, index_t first_row,
                                        const From* source, index_t stride, index_t rows,
                                        index_t depth) {
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  using from = storage_t<From>;
  // A pair of bfloat16 is a word, and is moved as one.
  constexpr bool pairs = std::is_same_v<To, bfloat16> && std::is_same_v<from, bfloat16>;
  constexpr bool to_float = std::is_same_v<To, float> && !std::is_same_v<from, double>;
  if constexpr (pairs || to_float) {
    constexpr index_t step = pairs ? 16 : 8;
    const index_t whole_rows = rows / 8 * 8, whole_depth = depth / step * step;
    for (index_t i = 0; i < whole_rows; i += 8)
      for (index_t k = 0; k < whole_depth; k += step) {
        const From* const block = source + i * stride + k;
        To* const to = panel + panel_offset<To>(first_row + i, k, width);
        if constexpr (pairs)
          transpose_block(
              [&](int row) { return reinterpret_cast<const float*>(block + row * stride); },
              reinterpret_cast<float*>(to), width);
        else
          transpose_block(
              [&](int row) { return reinterpret_cast<const from*>(block + row * stride); }, to,
              width);
      }
    return {whole_rows, whole_depth};
  }
#endif
  static_cast<void>(panel), static_cast<void>(width), static_cast<void>(first_row),
      static_cast<void>(source);
  static_cast<void>(stride), static_cast<void>(rows), static_cast<void>(depth);
  return {0, 0};
}

/// Writes source (rows x depth) into a panel of T from its row first_row on; what it does not cover
/// stays.
template <class T, class S, storage_order Order>
void pack(T* panel, index_t width, index_t first_row, const matrix_view<S, Order>& source) {
  const index_t rows = source.rows(), depth = source.cols();
  if constexpr (Order == storage_order::row_major) {
    const auto [done_rows, done_depth] =
        pack_blocks(panel, width, first_row, source.data(), source.outer_stride(), rows, depth);
    for (index_t i = 0; i < rows; ++i) {
      const S* const row = source.outer(i);
      for (index_t k = i < done_rows ? done_depth : 0; k < depth; ++k)
        panel[panel_offset<T>(first_row + i, k, width)] = converted<T>(row[k]);
    }
  } else {
    for (index_t k = 0; k < depth; ++k) {
      const S* const column = source.outer(k);
      T* const to = panel + panel_offset<T>(first_row, k, width);
      for (index_t i = 0; i < rows; ++i) to[i * depth_group<T>] = converted<T>(column[i]);
    }
  }
}

/// A panel of T, `width` rows of which those from first_row on are a block of a matrix; the rest
/// becomes zero.
template <class T, class S, storage_order Order>
void pack_padded(T* panel, index_t width, const matrix_view<S, Order>& block,
                 index_t first_row = 0) {
  if (block.rows() < width || block.cols() % depth_group<T> != 0)
    std::fill_n(panel, panel_size<T>(block.cols(), width), T(0));
  pack(panel, width, first_row, block);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
