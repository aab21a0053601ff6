// SPDX-License-Identifier: Apache-2.0
//
// Adapters of whole numbers, whose deltas are known without rounding.
#pragma once

#include <algorithm>
#include <vector>

#include "support/random.hpp"

namespace test {

/// Up to three adapters for one weight, each with its own scaling, and the exact sum of their
/// deltas. Small ranks, and now and then one beyond the dimensions.
template <class F>
struct whole_adapters {
  std::vector<lora::adapter<F>> all;
  exact_matrix delta;

  whole_adapters(random& g, lora::index_t out, lora::index_t in, int least_count, int largest)
      : delta(exact_matrix::Zero(out, in)) {
    for (lora::index_t n = g.integer(least_count, 3); n > 0; --n) {
      const lora::index_t rank = g.integer(1, g.one_in(3) ? 2 * std::max(out, in) : 6);
      const double s = 0.25 * static_cast<double>(g.integer(-9, 9));
      all.push_back({g.integers<F>(rank, in, largest),
                     g.integers<F>(out, rank, largest),
                     {.alpha = s, .rule = lora::scaling_rule::fixed}});
      delta += exact_delta(all.back());
    }
  }
};

}  // namespace test
