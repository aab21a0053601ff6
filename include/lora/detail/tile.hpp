// SPDX-License-Identifier: Apache-2.0
//
// The register tile: the one loop that multiplies. Each of its elements is one chain of multiply-adds in the order of the
// depth; an accumulator that is stored and loaded again between two calls continues the same chain, so how the depth is
// cut changes no bit. Merging calls it with (B, A) along the ranks, a product with (X, W) along in_features.
#pragma once

#include "lora/concepts.hpp"
#include "lora/detail/simd.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// accumulators[i * tile_cols + j] += sum over k of left[k * tile_rows + i] * right[k * tile_cols + j], for i < Rows.
template <int Rows, class Acc>
void multiply_rows(Acc* accumulators, const Acc* left, const Acc* right, index_t depth) {
  using v = simd<Acc>;
  typename v::vector sum[Rows][2];
  for (int i = 0; i < Rows; ++i) {
    sum[i][0] = v::load(accumulators + i * tile_cols<Acc>);
    sum[i][1] = v::load(accumulators + i * tile_cols<Acc> + v::width);
  }
  for (index_t k = 0; k < depth; ++k) {
    const auto right0 = v::load(right + k * tile_cols<Acc>);
    const auto right1 = v::load(right + k * tile_cols<Acc> + v::width);
    for (int i = 0; i < Rows; ++i) {
      const auto one = v::broadcast(left[k * tile_rows + i]);
      sum[i][0] = v::multiply_add(one, right0, sum[i][0]);
      sum[i][1] = v::multiply_add(one, right1, sum[i][1]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    v::store(accumulators + i * tile_cols<Acc>, sum[i][0]);
    v::store(accumulators + i * tile_cols<Acc> + v::width, sum[i][1]);
  }
}

/// The same for the first `rows` of a tile: one or two tokens do not pay for eight.
template <class Acc>
void multiply(int rows, Acc* accumulators, const Acc* left, const Acc* right, index_t depth) {
  if (rows == 1)
    multiply_rows<1>(accumulators, left, right, depth);
  else if (rows == 2)
    multiply_rows<2>(accumulators, left, right, depth);
  else if (rows <= tile_rows / 2)
    multiply_rows<tile_rows / 2>(accumulators, left, right, depth);
  else
    multiply_rows<tile_rows>(accumulators, left, right, depth);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
