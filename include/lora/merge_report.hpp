// SPDX-License-Identifier: Apache-2.0
//
// What a merge did to the numbers of a weight.
#pragma once

#include <cstddef>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Counts of one merge, or of several: reports add up. A merge into 16 bits that rounds everything
/// away has changed == 0. A call that has nothing to merge (strength 0) does not look at W: all is
/// 0 but elements and weights.
struct merge_report {
  std::size_t elements = 0;          ///< of the weights that were merged into
  std::size_t changed = 0;           ///< other bits after than before
  std::size_t nonfinite_before = 0;  ///< infinite or NaN before
  std::size_t nonfinite_after = 0;   ///< infinite or NaN after
  /// Elements that were finite and are now infinite or NaN: an overflow of W's format, or a factor
  /// that is not finite.
  std::size_t became_nonfinite = 0;
  std::size_t weights = 0;  ///< matrices that were merged into: layers, or experts of a stack
  /// Weights whose adapters also scale the layer's bias (IA3), where the call gave none: merge(W,
  /// bias, l...) scales it.
  std::size_t biases_left = 0;

  merge_report& operator+=(const merge_report& other) {
    elements += other.elements;
    changed += other.changed;
    nonfinite_before += other.nonfinite_before;
    nonfinite_after += other.nonfinite_after;
    became_nonfinite += other.became_nonfinite;
    weights += other.weights;
    biases_left += other.biases_left;
    return *this;
  }
};

}  // namespace lora::inline LORA_DETAIL_ABI
