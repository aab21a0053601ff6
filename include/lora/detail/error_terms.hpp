// SPDX-License-Identifier: Apache-2.0
//
// The terms of which the bounds of docs/numerics.md are made, for formats that are known at run
// time: of a stored weight (weight_error) and of a product (product_error). All is computed in
// double from the exact values of the operands. A weight is read in blocks of rows; nothing here
// has its size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/forward.hpp"
#include "lora/workspace.hpp"

LORA_DETAIL_QUIET_BEGIN
namespace lora::inline LORA_DETAIL_ABI::detail {

/// a * b. In double by the library's own product: who includes Eigen first would get gcc 12's false
/// warnings of Eigen's.
template <class A, class B>
auto multiplied(const A& a, const B& b) {
  using real = typename A::Scalar;
  Eigen::Matrix<real, Eigen::Dynamic, Eigen::Dynamic> result(a.rows(), b.cols());
  if constexpr (std::is_same_v<real, double>) {
    const row_major_matrix<double> left = a;
    const Eigen::MatrixXd right = b;
    workspace space;
    lora::forward(space, left, right, result);
  } else {
    result.noalias() = a * b;
  }
  return result;
}

/// A format's unit roundoff and the step of its subnormal numbers; both 0 where nothing is rounded
/// to it.
struct rounding_unit {
  double u = 0;
  double eta = 0;
};
template <class T>
rounding_unit unit_of() {
  using limits = std::numeric_limits<storage_t<T>>;
  return {static_cast<double>(limits::epsilon()) / 2, static_cast<double>(limits::denorm_min())};
}
/// What storing in T rounds of an Acc.
template <class T, class Acc>
rounding_unit unit_of_stored() {
  return std::is_same_v<storage_t<T>, Acc> ? rounding_unit{} : unit_of<T>();
}

/// k u / (1 - k u): the relative error of k roundings. Infinite where k u reaches 1.
inline double gamma(index_t k, double u) {
  const double ku = static_cast<double>(k) * u;
  return ku < 1 ? ku / (1 - ku) : std::numeric_limits<double>::infinity();
}

// Real is double. These are templates so that a program without bounds does not compile their
// products: 4 s in each unit.
template <class Real>
using real_matrix = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic>;
template <class Real>
using real_column = Eigen::Matrix<Real, Eigen::Dynamic, 1>;
template <class Real>
using real_row = Eigen::Matrix<Real, 1, Eigen::Dynamic>;

/// An adapter in a bound: its factors, exact in double, and what its arithmetic loses beside
/// roundings.
template <class Real>
struct basic_error_part {
  real_matrix<Real> A, B;  ///< rank x in_features, out_features x rank
  double s;                ///< the double that the verbs multiply by
  rounding_unit U = {};    ///< to which s A x is rounded before B multiplies it; 0 where it is not
  double flushed = 0;    ///< numbers below this count as zero in a B A that is accumulated in float
  bool in_pairs = true;  ///< where W x is computed by dot products, A x is, too
  index_t rank() const { return A.rows(); }
};
using error_part = basic_error_part<double>;

template <class Real>
index_t total_rank(const std::vector<basic_error_part<Real>>& parts) {
  index_t rank = 0;
  for (const auto& p : parts) rank += p.rank();
  return rank;
}

/// Rows of a block: 256 KiB of doubles, and at least 8, so that a product of blocks is worth its
/// call.
inline index_t rows_of_block(index_t cols) {
  return std::clamp<index_t>((index_t{1} << 15) / std::max<index_t>(cols, 1), 8, 256);
}
/// call(first, rows) for all blocks of an out x in weight.
template <class Call>
void each_block(index_t out, index_t in, const Call& call) {
  const index_t most = rows_of_block(in);
  for (index_t first = 0; first < out; first += most) call(first, std::min(most, out - first));
}

/// How far a stored weight may be from W + delta: e + u_s (|W| + d + e) + eta_s / 2 with
///   e = of_W |W| + gamma_{R+more} d + eta (R + 1 + S_A) + dots,        d = sum |s| |B| |A|.
/// Without ranks nothing is computed, and the bound is 0.
template <class Real>
class basic_weight_error {
 public:
  using block = row_major_matrix<Real>;

  /// more: the roundings of a term beside those of the ranks.
  basic_weight_error(std::vector<basic_error_part<Real>> parts, index_t out, index_t in,
                     double of_W, index_t more, rounding_unit accumulator, rounding_unit stored)
      : parts_(std::move(parts)),
        rank_(total_rank(parts_)),
        of_W_(of_W),
        of_delta_(gamma(rank_ + more, accumulator.u)),
        stored_(stored) {
    by_row_.setZero(out);
    by_col_.setZero(in);
    for (const auto& p : parts_) {
      by_col_ += accumulator.eta * p.A.cwiseAbs().colwise().sum();
      // Dot products lose an operand, a product or a sum of each step, times s. They accumulate in
      // float.
      const double each = accumulator.u == unit_of<float>().u ? p.flushed * std::abs(p.s) : 0;
      if (each == 0) continue;
      everywhere_ += each * 2 * static_cast<double>(p.rank());
      by_col_ += each * p.A.cwiseAbs().colwise().sum();
      by_row_ += each * p.B.cwiseAbs().rowwise().sum();
    }
    everywhere_ += accumulator.eta * static_cast<double>(rank_ + 1);
  }

  const std::vector<basic_error_part<Real>>& parts() const { return parts_; }
  index_t rank() const { return rank_; }

  index_t rows() const { return by_row_.size(); }
  index_t cols() const { return by_col_.size(); }

  /// Takes |W| of some rows; makes size |W| + d of it, and error the bound.
  void of_rows(index_t first, block& size, block& error) const {
    const index_t rows = size.rows();
    if (rank_ == 0) {
      error.setZero(rows, cols());
      return;
    }
    block d = block::Zero(rows, cols());
    for (const auto& p : parts_)
      if (p.rank() != 0)
        d += std::abs(p.s) * multiplied(p.B.middleRows(first, rows).cwiseAbs(), p.A.cwiseAbs());
    error = of_W_ * size + of_delta_ * d;
    error.array() += everywhere_;
    error.rowwise() += by_col_;
    error.colwise() += by_row_.segment(first, rows);
    size += d;
    error += stored_.u * (size + error);
    error.array() += stored_.eta / 2;
  }
  /// The same of one element.
  double of_element(index_t row, index_t col, double W) const {
    if (rank_ == 0) return 0;
    double d = 0;
    for (const auto& p : parts_) {
      double sum = 0;
      for (index_t k = 0; k < p.rank(); ++k) sum += std::abs(p.B(row, k)) * std::abs(p.A(k, col));
      d += std::abs(p.s) * sum;
    }
    const double e =
        of_W_ * std::abs(W) + of_delta_ * d + everywhere_ + by_row_(row) + by_col_(col);
    return e + stored_.u * (std::abs(W) + d + e) + stored_.eta / 2;
  }

 private:
  std::vector<basic_error_part<Real>> parts_;
  index_t rank_;
  double of_W_, of_delta_, everywhere_ = 0;
  rounding_unit stored_;
  real_column<Real> by_row_;
  real_row<Real> by_col_;
};
using weight_error = basic_weight_error<double>;

/// A part of a product, at a strength.
template <class Real>
struct basic_strong_part {
  const basic_error_part<Real>* part;
  double s;
};
using strong_part = basic_strong_part<double>;

/// How far y = W x + sum of s B (A x) + b may be from exact: the weight first, then the parts of
/// every token, then b.
template <class Real>
class basic_product_error {
 public:
  /// flushed: numbers below it count as zero in W x.
  basic_product_error(real_matrix<Real> input, index_t out, rounding_unit accumulator,
                      double flushed)
      : x_(std::move(input)), unit_(accumulator), flushed_(flushed) {
    x_ = x_.cwiseAbs();
    sum_x_ = x_.colwise().sum();
    size_.setZero(out, x_.cols());
    error_.setZero(out, x_.cols());
    row_sums_.setZero(out);
  }

  /// read(first, block) writes rows of W. What is merged into it has an error of its own; null:
  /// nothing is.
  template <class Read>
  void add_weight(const Read& read, const basic_weight_error<Real>* merged) {
    each_block(size_.rows(), x_.rows(), [&](index_t first, index_t rows) {
      typename basic_weight_error<Real>::block size(rows, x_.rows()), error;
      read(first, size);
      size = size.cwiseAbs();
      if (merged != nullptr) {
        merged->of_rows(first, size, error);
        size += error;
        error_.middleRows(first, rows) += multiplied(error, x_);
      }
      size_.middleRows(first, rows) += multiplied(size, x_);
      row_sums_.segment(first, rows) = size.rowwise().sum();
    });
  }

  /// The parts of some tokens, once for each token.
  void add_parts(index_t first, index_t tokens, std::span<const basic_strong_part<Real>> parts) {
    const auto x = x_.middleCols(first, tokens);
    auto size = size_.middleCols(first, tokens);
    auto e = error_.middleCols(first, tokens);
    const auto sum_x = sum_x_.segment(first, tokens);
    const index_t n = x_.rows(), out = size_.rows();
    index_t R = 0;
    for (const auto& [p, s] : parts) R += p->rank();
    const double steps = static_cast<double>(n), of_parts = gamma(n + R + 3, unit_.u);
    e += gamma(n + R + 1, unit_.u) * size;
    real_column<Real> sum_B = real_column<Real>::Zero(out), sum_sB = sum_B, sum_pairs = sum_B;
    for (const auto& [p, strength] : parts) {
      if (p->rank() == 0) continue;
      const double s = std::abs(strength);
      const real_matrix<Real> B = p->B.cwiseAbs(), U = s * multiplied(p->A.cwiseAbs(), x),
                              through = multiplied(B, U);
      const real_column<Real> of_ranks = B.rowwise().sum();
      size += through;
      e += of_parts * through;
      sum_B += of_ranks;
      sum_sB += s * of_ranks;
      if (p->U.u != 0) {
        e += p->U.u * (1 + of_parts) * through;
        e.colwise() += (p->U.eta + flushed_) *
                       of_ranks;  // by dot products: the operands, products and sums of B U
        e.rowwise() += flushed_ * (U.array() + 2).matrix().colwise().sum();
      }
      if (flushed_ == 0 || !p->in_pairs) continue;
      sum_pairs += s * of_ranks;
      e.colwise() += flushed_ * s * (B * p->A.cwiseAbs().rowwise().sum());
    }
    // Results below the normal range: half a step for each operation. s B multiplies those of A x,
    // and B that of s U.
    e.colwise() +=
        unit_.eta * ((steps + static_cast<double>(R + 2)) * (sum_sB.array() + 1).matrix() + sum_B);
    if (flushed_ == 0) return;
    // An operand, a product or a sum of each step: of W x, and of A x, which s B multiplies.
    e.array() += flushed_ * 2 * steps;
    e.colwise() += flushed_ * row_sums_;
    e.rowwise() += flushed_ * sum_x;
    e += flushed_ * sum_pairs * (sum_x.array() + 2 * steps).matrix();
  }

  /// Of what is stored. b is added last: out x tokens, out x 1, or empty.
  real_matrix<Real> stored(const real_matrix<Real>& bias, rounding_unit output) && {
    if (bias.cols() == x_.cols() && bias.size() != 0) {
      size_ += bias.cwiseAbs();
      error_ += unit_.u * bias.cwiseAbs();
    } else if (bias.size() != 0) {
      size_.colwise() += bias.col(0).cwiseAbs();
      error_.colwise() += unit_.u * bias.col(0).cwiseAbs();
    }
    error_ += output.u * (size_ + error_);
    error_.array() += output.eta / 2;
    return std::move(error_);
  }

 private:
  real_matrix<Real> x_, size_, error_;  // |x|; sums of magnitudes; errors
  real_row<Real> sum_x_;
  real_column<Real> row_sums_;  // of the weight
  rounding_unit unit_;
  double flushed_;
};
using product_error = basic_product_error<double>;

}  // namespace lora::inline LORA_DETAIL_ABI::detail
LORA_DETAIL_QUIET_END
