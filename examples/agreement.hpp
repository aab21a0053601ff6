// SPDX-License-Identifier: Apache-2.0
//
// How far a layer's output may be from exact arithmetic, for any state of merging: the bound that docs/numerics.md derives,
// element by element. Two states of the same adapters differ by at most the sum of their bounds; a larger difference is a
// mistake, not rounding. Everything here is computed in double from the exact values of the operands.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "lora/lora.hpp"

namespace agreement {

/// Unit roundoff and the distance of subnormal numbers.
struct format {
  double u = 0;
  double eta = 0;
};
template <class T>
format format_of() {
  using limits = std::numeric_limits<T>;
  return {static_cast<double>(limits::epsilon()) / 2, static_cast<double>(limits::denorm_min())};
}

/// The formats of one evaluation. weight and output are zero where nothing is rounded to them.
struct formats {
  format accumulator, weight, output;
  double flushed = 0;  ///< numbers below this count as zero in W x and A x: where dot products of bfloat16 compute them
};
/// A weight stored in T, results stored in Y, accumulated in Acc; activations stored in X, as far as that matters.
template <class T, class Y, class Acc, class X = Acc>
formats formats_of() {
  return {format_of<Acc>(), std::is_same_v<T, Acc> ? format{} : format_of<T>(),
          std::is_same_v<Y, Acc> ? format{} : format_of<Y>(), lora::smallest_in_product<Acc, T, X>()};
}

/// An adapter at its strength. s is the double that the verbs multiply by; factors are exact in
/// double.
struct part {
  Eigen::MatrixXd A, B;  ///< rank x in_features, out_features x rank
  double s;
  format U = {};       ///< to which s A x is rounded before B multiplies it (U_format::factors); zero where it is not
  double flushed = 0;  ///< numbers below this count as zero in a B A that is accumulated in float (smallest_in_delta)
};
/// Where the adapters of a function are evaluated.
struct state {
  std::vector<part> merged, mixed;
};

template <class M>
Eigen::MatrixXd in_double(const M& m) {
  const auto view = lora::as_matrix(m);
  Eigen::MatrixXd result(view.rows(), view.cols());
  for (Eigen::Index i = 0; i < view.rows(); ++i)
    for (Eigen::Index j = 0; j < view.cols(); ++j) result(i, j) = static_cast<double>(view(i, j));
  return result;
}
template <lora::low_rank L>
part part_of(const L& l) {
  return {in_double(l.lora_A()),
          in_double(l.lora_B()),
          static_cast<double>(l.scaling()),
          {},
          lora::smallest_in_delta<float, L>()};
}

/// gamma_k = k u / (1 - k u).
inline double gamma(Eigen::Index k, double u) {
  const double ku = static_cast<double>(k) * u;
  return ku / (1 - ku);
}
inline Eigen::Index total_rank(const std::vector<part>& parts) {
  Eigen::Index rank = 0;
  for (const part& p : parts) rank += p.A.rows();
  return rank;
}

/// |stored weight - (W + delta)| per element: the merge's own bound. d = sum |s| |B| |A|.
inline Eigen::MatrixXd merge_bound(const Eigen::MatrixXd& W, const std::vector<part>& merged, const formats& f) {
  if (merged.empty()) return Eigen::MatrixXd::Zero(W.rows(), W.cols());
  Eigen::MatrixXd d = Eigen::MatrixXd::Zero(W.rows(), W.cols());
  Eigen::RowVectorXd sum_A = Eigen::RowVectorXd::Zero(W.cols());
  for (const part& p : merged) {
    d += std::abs(p.s) * p.B.cwiseAbs() * p.A.cwiseAbs();
    sum_A += p.A.cwiseAbs().colwise().sum();
  }
  const Eigen::Index R = total_rank(merged);
  const double u = f.accumulator.u;
  Eigen::MatrixXd e = u * W.cwiseAbs() + gamma(R + 3, u) * d;
  e.array() += f.accumulator.eta * static_cast<double>(R + 1);
  e.rowwise() += f.accumulator.eta * sum_A;
  const bool in_float = u == format_of<float>().u;
  for (const part& p : merged) {
    if (!in_float || p.flushed == 0) continue;
    // An operand, a product or a sum of each step, times s.
    const double each = p.flushed * std::abs(p.s);
    e.array() += each * 2 * static_cast<double>(p.A.rows());
    e.rowwise() += each * p.A.cwiseAbs().colwise().sum();
    e.colwise() += each * p.B.cwiseAbs().rowwise().sum();
  }
  e += f.weight.u * (W.cwiseAbs() + d + e);
  e.array() += f.weight.eta / 2;
  return e;
}

/// |computed y - exact y| per output and token, y = W x (+ bias) + sum over all parts of s B (A x), evaluated with some of
/// the parts merged and the others mixed in. bias is empty or out_features long. The merge may have accumulated in another
/// format than the product, which also looks at the activations.
inline Eigen::MatrixXd error_bound(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias, const state& where,
                                   const Eigen::MatrixXd& x, const formats& f, const formats& merge) {
  const Eigen::MatrixXd ax = x.cwiseAbs();
  Eigen::MatrixXd stored = W.cwiseAbs();
  for (const part& p : where.merged) stored += std::abs(p.s) * p.B.cwiseAbs() * p.A.cwiseAbs();
  const Eigen::MatrixXd weight_error = merge_bound(W, where.merged, merge);
  stored += weight_error;
  const Eigen::MatrixXd through_weight = stored * ax;
  Eigen::MatrixXd through_factors = Eigen::MatrixXd::Zero(W.rows(), x.cols());
  Eigen::VectorXd sum_sB = Eigen::VectorXd::Zero(W.rows()), sum_B = Eigen::VectorXd::Zero(W.rows());
  for (const part& p : where.mixed) {
    const Eigen::MatrixXd Ax = p.A.cwiseAbs() * ax;
    through_factors += std::abs(p.s) * p.B.cwiseAbs() * Ax;
    sum_B += p.B.cwiseAbs().rowwise().sum();
    sum_sB += std::abs(p.s) * p.B.cwiseAbs().rowwise().sum();
  }
  const Eigen::Index n = W.cols(), R = total_rank(where.mixed);
  const double u = f.accumulator.u;
  Eigen::MatrixXd magnitude = through_weight + through_factors;
  Eigen::MatrixXd e = weight_error * ax + gamma(n + R + 1, u) * through_weight + gamma(n + R + 3, u) * through_factors;
  for (const part& p : where.mixed) {
    if (p.U.u == 0) continue;
    const Eigen::MatrixXd U = std::abs(p.s) * p.A.cwiseAbs() * ax;
    const Eigen::VectorXd of_ranks = p.B.cwiseAbs().rowwise().sum();
    e += p.U.u * (1 + gamma(n + R + 3, u)) * p.B.cwiseAbs() * U;
    e.colwise() += (p.U.eta + f.flushed) * of_ranks;  // B U by dot products: its operands, products and sums
    e.rowwise() += f.flushed * (U.array() + 2).matrix().colwise().sum();
  }
  if (bias.size() != 0) {
    magnitude.colwise() += bias.cwiseAbs();
    e.colwise() += u * bias.cwiseAbs();
  }
  // Results below the normal range: half a step for each operation; those of A x are multiplied by s B, that of s times
  // A x by B.
  e.colwise() += f.accumulator.eta * (static_cast<double>(n + R + 2) * (sum_sB.array() + 1).matrix() + sum_B);
  if (f.flushed != 0) {
    // An operand, a product or a sum of each step: of W x, and of A x, which is multiplied by s B.
    const Eigen::RowVectorXd sum_x = ax.colwise().sum();
    e.array() += f.flushed * 2 * static_cast<double>(n);
    e.colwise() += f.flushed * stored.rowwise().sum();
    e.rowwise() += f.flushed * sum_x;
    e += f.flushed * sum_sB * (sum_x.array() + 2 * static_cast<double>(n)).matrix();
    for (const part& p : where.mixed)
      e.colwise() += f.flushed * std::abs(p.s) * p.B.cwiseAbs() * p.A.cwiseAbs().rowwise().sum();
  }
  e += f.output.u * (magnitude + e);
  e.array() += f.output.eta / 2;
  return e;
}
inline Eigen::MatrixXd error_bound(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias, const state& where,
                                   const Eigen::MatrixXd& x, const formats& f) {
  return error_bound(W, bias, where, x, f, f);
}

}  // namespace agreement
