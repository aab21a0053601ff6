// SPDX-License-Identifier: Apache-2.0
//
// Random layers for the laws, and what a layer computes in exact arithmetic, near enough: long
// double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "support/agreement.hpp"
#include "support/sanitized.hpp"

namespace layers {

/// The long tests run whole in a release build and a tenth under a sanitizer, which is ten to
/// twenty times slower.
inline constexpr int thinning = LORA_TEST_ASAN ? 10 : 1;

using generator = std::mt19937_64;

inline double uniform(generator& g, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(g);
}
/// Log-uniform, so that 1 and 2 are as likely as 30 and 60.
inline Eigen::Index size(generator& g, Eigen::Index largest) {
  return std::min(
      largest, static_cast<Eigen::Index>(std::exp(uniform(g, 0, std::log(double(largest) + 1)))));
}

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Normal numbers of a given spread, in T.
template <class T>
matrix<T> normal(generator& g, Eigen::Index rows, Eigen::Index cols, double spread) {
  std::normal_distribution<double> distribution(0, spread);
  matrix<T> m(rows, cols);
  for (Eigen::Index k = 0; k < m.size(); ++k) m.data()[k] = T(distribution(g));
  return m;
}

/// s from 1e-3 to 1e3, never 1, and factors so that the delta is 1e-4 ... 3 times the weight.
template <class T>
lora::adapter<T> adapter(generator& g, Eigen::Index out, Eigen::Index in, double weight_spread) {
  const Eigen::Index rank = size(g, 3 * std::min(out, in));
  const double s = std::pow(10.0, uniform(g, -3, 3)) * (g() % 2 == 0 ? 1 : -1);
  const double delta = weight_spread * std::pow(10.0, uniform(g, -4, 0.5));
  const double each = std::sqrt(delta / (std::abs(s) * std::sqrt(static_cast<double>(rank))));
  return {normal<T>(g, rank, in, each),
          normal<T>(g, out, rank, each),
          {.alpha = s, .rule = lora::scaling_rule::fixed}};
}

/// y = W x + b + sum of s B (A x) in long double (63 bits more than float, 11 more than double).
using exact_matrix = Eigen::Matrix<long double, Eigen::Dynamic, Eigen::Dynamic>;
inline exact_matrix reference(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias,
                              const std::vector<agreement::part>& parts, const Eigen::MatrixXd& x) {
  const exact_matrix xw = x.cast<long double>();
  exact_matrix y = W.cast<long double>().lazyProduct(xw);
  for (const auto& p : parts) {
    const exact_matrix u = p.A.cast<long double>().lazyProduct(xw);
    y += static_cast<long double>(p.s) * p.B.cast<long double>().lazyProduct(u);
  }
  if (bias.size() != 0) y.colwise() += bias.cast<long double>();
  return y;
}

/// The distribution of measured / bound over many comparisons.
class ratios {
 public:
  void add(double ratio) { all_.push_back(ratio); }
  std::size_t count() const { return all_.size(); }
  double quantile(double q) {
    std::sort(all_.begin(), all_.end());
    return all_.empty() ? 0
                        : all_[static_cast<std::size_t>(q * static_cast<double>(all_.size() - 1))];
  }

 private:
  std::vector<double> all_;
};

}  // namespace layers
