// SPDX-License-Identifier: Apache-2.0
//
// The product of a small matrix with the outer index of blocks of columns. mix.hpp would read such
// blocks with a stride, write them with one, and pad a small C to a panel; here both are read and
// written as they lie.
#pragma once

#include <algorithm>

#include "lora/kernel/memory.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/threads.hpp"
#include "lora/kernel/tile.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Y_t := X_t C^T for blocks X_t (inner x cols) and Y_t (inner x rows), column-major and adjacent.
/// Owns C (rows x cols), packed for the broadcast side of the tile. Each element is one chain of
/// `cols` multiply-adds from zero.
template <class Acc>
class mode_product {
 public:
  template <class S, storage_order Order>
  explicit mode_product(const matrix_view<S, Order>& C)
      : rows_(C.rows()), cols_(C.cols()), panels_(pieces(rows_, tile_rows) * panel()) {
    for (index_t p = 0; p < pieces(rows_, tile_rows); ++p)
      pack_padded(
          panels_.data() + p * panel(), tile_rows,
          C.middle_rows(p * tile_rows, std::min<index_t>(tile_rows, rows_ - p * tile_rows)));
  }

  void run(const Acc* X, index_t inner, index_t blocks, Acc* Y) const {
    const index_t strips = pieces(inner, width);
    const double work = static_cast<double>(rows_) * static_cast<double>(cols_) *
                        static_cast<double>(inner * blocks);
    parallel(threads_for(work), [&](const team& team) {
      team.for_each(strips * blocks, [&](index_t task) {
        const index_t t = task / strips, first = task % strips * width,
                      count = std::min(width, inner - first);
        const Acc* const from = X + t * inner * cols_ + first;
        Acc* const to = Y + t * inner * rows_ + first;
        if (count == width)
          strip<true>(from, to, inner, count);
        else
          strip<false>(from, to, inner, count);
      });
    });
  }

 private:
  static constexpr index_t width = tile_cols<Acc>;
  using v = simd<Acc>;

  index_t panel() const { return cols_ * tile_rows; }

  /// `count` elements of every column.
  template <bool Whole>
  LORA_DETAIL_APART void strip(const Acc* from, Acc* to, index_t inner, index_t count) const {
    Acc some[width] = {};
    for (index_t row = 0; row < rows_; row += tile_rows) {
      const Acc* left = panels_.data() + row / tile_rows * panel();
      const Acc* right = from;
      typename v::vector sum[tile_rows][2];
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) sum[i][0] = sum[i][1] = v::zero();
      for (index_t k = 0; k < cols_; ++k, left += tile_rows, right += inner) {
        if constexpr (!Whole) std::copy_n(right, count, some);
        const Acc* const values = Whole ? right : some;
        const typename v::vector columns[2] = {v::load(values), v::load(values + v::width)};
        multiply_step<mul_add<Acc>, tile_rows, 2, Acc>(sum, left, columns);
      }
      Acc results[tile_rows][width];
      const index_t rows = std::min<index_t>(tile_rows, rows_ - row);
      const bool direct = Whole && rows == tile_rows;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        Acc* const result = direct ? to + (row + i) * inner : results[i];
        v::store(result, sum[i][0]);
        v::store(result + v::width, sum[i][1]);
      }
      if (!direct)
        for (index_t i = 0; i < rows; ++i) std::copy_n(results[i], count, to + (row + i) * inner);
    }
  }

  index_t rows_, cols_;
  array<Acc> panels_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
