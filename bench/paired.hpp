// SPDX-License-Identifier: Apache-2.0
//
// Several ways of doing one thing, timed in turns: what disturbs the machine disturbs all, and
// their ratios survive. A series is a number of rounds, each of which times every way once, in an
// order that changes from round to round; its
// results are medians over the rounds, of ratios between two ways, with a 95 % interval. Ratios
// decide, seconds never.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "limits.hpp"

namespace lora_bench {

/// A median and the interval that holds the true one with 95 %: two order statistics, so nothing is
/// assumed about the distribution but that the values are independent. (A disturbance that lasts
/// longer than a round makes it too narrow.)
struct estimate {
  double median = 0, low = 0, high = 0;
};

inline estimate estimate_median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  if (n == 0) return {};
  // Below the median lie k or fewer of n values with the probability that a fair coin falls k times
  // or less.
  double below = 0;
  std::size_t cut = 0;
  for (std::size_t k = 0; k < n / 2; ++k) {
    const auto [total, heads] = std::pair(static_cast<double>(n), static_cast<double>(k));
    below += std::exp(std::lgamma(total + 1) - std::lgamma(heads + 1) -
                      std::lgamma(total - heads + 1) - total * std::log(2.0));
    if (below > 0.025) break;
    cut = k;
  }
  const double middle = n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  return {middle, values[cut], values[n - 1 - cut]};
}

using way = std::function<void()>;

/// The seconds of every way in every round.
class series {
 public:
  explicit series(std::size_t ways = 0) : seconds_(ways) {}

  std::size_t rounds() const { return seconds_.empty() ? 0 : seconds_[0].size(); }
  void add(std::size_t which, double seconds) { seconds_[which].push_back(seconds); }

  estimate time(std::size_t which) const { return estimate_median(seconds_[which]); }
  const std::vector<double>& seconds(std::size_t which) const { return seconds_[which]; }
  estimate ratio(std::size_t over, std::size_t under) const {
    return combine(over, under, [](double a, double b) { return a / b; });
  }
  estimate difference(std::size_t of, std::size_t less) const {
    return combine(of, less, [](double a, double b) { return a - b; });
  }

 private:
  template <class F>
  estimate combine(std::size_t one, std::size_t other, const F& f) const {
    std::vector<double> values(rounds());
    std::transform(seconds_[one].begin(), seconds_[one].end(), seconds_[other].begin(),
                   values.begin(), f);
    return estimate_median(std::move(values));
  }

  std::vector<std::vector<double>> seconds_;
};

/// Rounds until `budget` seconds have gone, without what before_round() takes; at least 6 (fewer
/// have no 95 % interval), at most 2000.
inline series time_in_turns(double budget, const std::vector<way>& ways, const way& before_round) {
  for (const way& run : ways) run();
  series result(ways.size());
  double spent = 0;
  for (std::size_t round = 0; round < 6 || (spent < budget && round < 2000); ++round) {
    before_round();
    // Every way stands in every place, and every two of them follow each other both ways.
    for (std::size_t k = 0; k < ways.size(); ++k) {
      const std::size_t place = (round / 2 + k) % ways.size();
      const std::size_t next = round % 2 == 0 ? place : ways.size() - 1 - place;
      const double seconds = time_of(ways[next]);
      result.add(next, seconds);
      spent += seconds;
    }
  }
  return result;
}

}  // namespace lora_bench
