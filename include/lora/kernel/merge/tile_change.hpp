// SPDX-License-Identifier: Apache-2.0
//
// What becomes of an element of the weight and the sum that a tile formed for it, before the result
// is rounded and stored. A change has
//   safe                       whether a result is finite where overflow_watch.hpp calls W safe
//   move(rows, cols)           goes on in the weight, as it is in memory
//   change(w, sum, row)        sum := the result, for two vectors of a row of the tile; w is used
//                              up
//   change(w, sum, j)          the same of one element, j columns from where the change stands
//   keeps_nan(sum, result)     whether a NaN of W keeps its bits
#pragma once

#include <type_traits>

#include "lora/detail/convert.hpp"
#include "lora/kernel/simd.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

template <class Acc>
using two_vectors = typename simd<Acc>::vector[2];

/// W - sum.
template <class Acc>
struct subtracted_sum {
  static constexpr bool safe = true;

  void move(index_t, index_t) {}
  LORA_DETAIL_INLINE void operator()(two_vectors<Acc>& w, two_vectors<Acc>& sum, int) const {
    sum[0] = simd<Acc>::subtract(w[0], sum[0]);
    sum[1] = simd<Acc>::subtract(w[1], sum[1]);
  }
  Acc operator()(Acc w, Acc sum, index_t) const { return w - sum; }
  static bool keeps_nan(Acc sum, Acc) { return is_zero(sum); }
};

/// gain * (W - sum), a gain for each output. Columns of T as a tile has them.
template <class Acc, class T, storage_order Order>
struct gained_sum {
  static constexpr bool safe = false;  // a gain may overflow whatever the element is
  static constexpr bool outputs_are_rows = Order == storage_order::row_major;
  const Acc* gain;  ///< of the first output

  void move(index_t rows, index_t cols) { gain += outputs_are_rows ? rows : cols; }
  LORA_DETAIL_INLINE void operator()(two_vectors<Acc>& w, two_vectors<Acc>& sum, int row) const {
    using v = simd<Acc>;
    two_vectors<Acc> g;
    if constexpr (outputs_are_rows) {
      g[0] = g[1] = v::broadcast(gain[row]);
    } else {
      g[0] = v::load(gain);
      g[1] = v::load(gain + v::width);
      if constexpr (std::is_same_v<T, bfloat16>) v::unzip(g[0], g[1]);
    }
    sum[0] = v::multiply(v::subtract(w[0], sum[0]), g[0]);
    sum[1] = v::multiply(v::subtract(w[1], sum[1]), g[1]);
  }
  Acc operator()(Acc w, Acc sum, index_t j) const {
    return (w - sum) * gain[outputs_are_rows ? 0 : j];
  }
  static bool keeps_nan(Acc sum, Acc) { return is_zero(sum); }
};

/// Rounds the lanes of two vectors to T, in place. Exact for finite lanes; others stay infinite or
/// NaN.
template <class T, class Acc>
LORA_DETAIL_INLINE void round_lanes(two_vectors<Acc>& lanes) {
  using v = simd<Acc>;
  if constexpr (std::is_same_v<T, bfloat16>)
    v::split_pairs(v::join_pairs(lanes[0], lanes[1]), lanes[0], lanes[1]);
  else if constexpr (std::is_same_v<T, float16>)
    v::split_halves(v::join_halves(lanes[0], lanes[1]), lanes[0], lanes[1]);
}

/// W + sign * round(s * sum) as PEFT merges one adapter whose lora_B is F: the scaled delta is
/// rounded to F where F has 16 bits, and with delta_first to the weight's T.
template <class Acc, class T, class F>
struct peft_sum {
  static constexpr bool safe = false;
  Acc scale;
  bool negative, delta_first;

  void move(index_t, index_t) {}
  LORA_DETAIL_INLINE void operator()(two_vectors<Acc>& w, two_vectors<Acc>& sum, int) const {
    using v = simd<Acc>;
    const auto s = v::broadcast(scale);
    sum[0] = v::multiply(sum[0], s);
    sum[1] = v::multiply(sum[1], s);
    as_it_came(sum[0]);  // not fused with the sum below
    as_it_came(sum[1]);
    if constexpr (sizeof(F) == 2) round_lanes<F, Acc>(sum);
    if constexpr (sizeof(T) == 2)
      if (delta_first) round_lanes<T, Acc>(sum);
    sum[0] = negative ? v::subtract(w[0], sum[0]) : v::add(w[0], sum[0]);
    sum[1] = negative ? v::subtract(w[1], sum[1]) : v::add(w[1], sum[1]);
  }
  Acc operator()(Acc w, Acc sum, index_t) const {
    Acc delta = sum * scale;
    as_it_came(delta);
    if constexpr (sizeof(F) == 2) delta = widen<Acc>(narrow<F>(delta));
    if constexpr (!std::is_same_v<T, Acc>)
      if (delta_first) delta = widen<Acc>(narrow<T>(delta));
    return negative ? w - delta : w + delta;
  }
  static bool keeps_nan(Acc, Acc result) { return is_nan(result); }
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
