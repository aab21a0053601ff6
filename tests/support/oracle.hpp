// SPDX-License-Identifier: Apache-2.0
//
// Tells rounding from a mistake. Two tests: no output may be further from exact than the hard
// bound, and the root mean square over all outputs may not exceed what independent roundings of
// that size add up to. The second sees what the first cannot: an adapter of 1 % of a bfloat16
// weight, dropped, hides below the hard bound of every single output.
#pragma once

#include "support/layers.hpp"

namespace oracle {

struct verdict {
  double hard;       ///< largest |difference| / hard bound
  double aggregate;  ///< root mean square of the differences / of the expected roundings
  bool is_rounding() const { return hard <= 1 && aggregate <= 1; }
};

/// Expected size of one output's error if its roundings are independent with mean zero: each is at
/// most its bound, so its standard deviation is too, and variances add (Higham and Mary, SIAM J.
/// Sci. Comput. 41(5), 2019).
inline Eigen::MatrixXd expected(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias,
                                const agreement::state& where, const Eigen::MatrixXd& x,
                                const agreement::formats& f) {
  const Eigen::MatrixXd in_weight = agreement::merge_bound(W, where.merged, f);
  Eigen::MatrixXd magnitude = W.cwiseAbs() * x.cwiseAbs();
  for (const auto* parts : {&where.merged, &where.mixed})
    for (const auto& p : *parts)
      magnitude += std::abs(p.s) * p.B.cwiseAbs() * (p.A.cwiseAbs() * x.cwiseAbs());
  if (bias.size() != 0) magnitude.colwise() += bias.cwiseAbs();
  const auto steps = static_cast<double>(W.cols() + agreement::total_rank(where.mixed) + 3);
  const Eigen::MatrixXd variance = (in_weight.cwiseAbs2() * x.cwiseAbs2()) +
                                   (f.accumulator.u * std::sqrt(steps) * magnitude).cwiseAbs2() +
                                   (f.output.u * magnitude).cwiseAbs2();
  return variance.cwiseSqrt();
}

inline verdict compare(const Eigen::MatrixXd& y, const layers::exact_matrix& exact,
                       const Eigen::MatrixXd& W, const Eigen::VectorXd& bias,
                       const agreement::state& where, const Eigen::MatrixXd& x,
                       const agreement::formats& f) {
  const Eigen::ArrayXXd difference = (y.cast<long double>() - exact).cwiseAbs().cast<double>();
  const Eigen::ArrayXXd bound = agreement::error_bound(W, bias, where, x, f).array();
  const double hard = (difference <= bound).all() ? (difference / bound).maxCoeff()
                                                  : 2 + (difference / bound).maxCoeff();
  return {hard, difference.matrix().norm() / expected(W, bias, where, x, f).norm()};
}

}  // namespace oracle
