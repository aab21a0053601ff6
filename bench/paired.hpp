// SPDX-License-Identifier: Apache-2.0
//
// Two ways of doing one thing, timed in turns: what disturbs the machine disturbs both, and their ratio survives. A
// series is a number of pairs, the one first in even pairs and the other in odd ones; its result is the median of the
// pairs' ratios with a 95 % interval. Ratios decide, seconds never.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "limits.hpp"

namespace lora_bench {

/// A median and the interval that holds the true one with 95 %: two order statistics, so nothing is assumed about the
/// distribution but that the values are independent. (A disturbance that lasts longer than a pair makes it too narrow.)
struct estimate {
  double median = 0, low = 0, high = 0;
};

inline estimate estimate_median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  if (n == 0) return {};
  // Below the median lie k or fewer of n values with the probability that a fair coin falls k times or less.
  double below = 0;
  std::size_t cut = 0;
  for (std::size_t k = 0; k < n / 2; ++k) {
    const auto [total, heads] = std::pair(static_cast<double>(n), static_cast<double>(k));
    below +=
        std::exp(std::lgamma(total + 1) - std::lgamma(heads + 1) - std::lgamma(total - heads + 1) - total * std::log(2.0));
    if (below > 0.025) break;
    cut = k;
  }
  const double middle = n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  return {middle, values[cut], values[n - 1 - cut]};
}

/// Seconds of both ways in every pair.
struct series {
  std::vector<double> first, second;

  std::size_t pairs() const { return first.size(); }
  estimate first_time() const { return estimate_median(first); }
  estimate second_time() const { return estimate_median(second); }
  /// second / first.
  estimate ratio() const {
    std::vector<double> ratios(pairs());
    for (std::size_t k = 0; k < pairs(); ++k) ratios[k] = second[k] / first[k];
    return estimate_median(ratios);
  }
};

/// Pairs of one() and other() until `budget` seconds have gone; at least 7 (fewer have no 95 % interval), at most 2000.
template <class One, class Other>
series time_pairs(double budget, const One& one, const Other& other) {
  one();
  other();
  series result;
  double spent = 0;
  while (result.pairs() < 7 || (spent < budget && result.pairs() < 2000)) {
    double first = 0, second = 0;
    if (result.pairs() % 2 == 0) {
      first = time_of(one);
      second = time_of(other);
    } else {
      second = time_of(other);
      first = time_of(one);
    }
    result.first.push_back(first);
    result.second.push_back(second);
    spent += first + second;
  }
  return result;
}

}  // namespace lora_bench
