// SPDX-License-Identifier: Apache-2.0
//
// OFT: the inputs of a layer are turned, in blocks of b neighbours.
//
//   W' = W R^T,  so that  y = W (R^T x) + bias,  R = diag(R_1 ... R_k), k = in_features / b
//
// A block R_i comes from a skew matrix Q, of which the upper triangle is stored, row after row and
// without the diagonal. A single stored block stands for all k (PEFT's block_share).
//   cayley    R_i = (I - Q)(I + Q)^-1: orthogonal.
//   neumann   R_i = I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1), t terms: nearly orthogonal for a
//             small Q. PEFT's default, with t = 5. As in PEFT, t = 1 is I, t = 2 is I + 2 Q, and
//             t = 3 is the same as t = 4.
// The series is that of (I + Q)(I - Q)^-1, the inverse of the other formula: an adapter that was
// trained with one of them is wrong with the other. Several OFT adapters turn in the order of the
// call, as in PEFT's merge; PEFT's forward turns in the opposite order.
//   coft_eps  PEFT's eps where coft is on: a Q_i with a Frobenius norm above eps / sqrt(stored
//             blocks) is scaled down to it, here in double and without a change of what is stored.
//   shapes    blocks (PEFT's oft_R.weight) k x b (b - 1) / 2 or 1 x that; W out_features x
//             in_features. Convolutions are not offered: PEFT turns their patches.
//   strength  1, or 0 for no step. PEFT defines no other, and this is no sum: value_error.
//   rounding  R in double, then once to the accumulator. Each element of a turned row or token is
//             one chain of b multiply-adds from zero, whatever is turned beside it.
//   error     of row R^T in the accumulator: gamma_{b+1} |row| |R|^T, and |row| |E|^T for the
//             error E of R in double. neumann: E <= gamma_{t (b+1)} (I + sum of 2 |Q|^i), with
//             u = 2^-53; cayley: |E| about b^3 2^-53 (1 + max |Q|).
//   undo      cayley: row R, the transpose for the inverse. neumann: row R^-T, with the inverse
//             computed in double and rounded once; it multiplies the error of a stored row by
//             |R^-1|. For t = 5 an eigenvalue i q of Q becomes one of size |1 - q^4| of R, so that
//             q = 1 leaves no inverse. value_error where the error of R could make it singular.
//   cost      steps: 2 t b^2 in FLOPs in double; the map keeps 3 b in accumulators. Then 2 b in
//             FLOPs for each row or token, and scratch of 16 b accumulators for each call.
//   throws    shape_error for blocks that do not fit; value_error for fewer than 1 or more than
//             1000 terms, and for a coft_eps that is negative or not finite; std::bad_alloc.
// Qiu et al., arXiv 2306.07280; PEFT 0.21, tuners/oft/layer.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/steps.hpp"

#include <Eigen/LU>

namespace lora::inline LORA_DETAIL_ABI {

/// How a skew matrix becomes a rotation: PEFT's use_cayley_neumann on or off.
enum class oft_rotation { neumann, cayley };

/// What the blocks alone do not tell.
struct oft_settings {
  index_t out_features;
  index_t in_features;
  oft_rotation rotation = oft_rotation::neumann;
  int neumann_terms = 5;                ///< num_cayley_neumann_terms
  std::optional<double> coft_eps = {};  ///< eps, where coft is on
};

namespace detail {

using oft_block = Eigen::MatrixXd;

/// R_i, and an upper bound of the row sums of the magnitudes that were added up to it.
struct rotation {
  oft_block R;
  double magnitude;
};

inline rotation rotation_of(const oft_block& Q, const oft_settings& settings) {
  const oft_block I = oft_block::Identity(Q.rows(), Q.cols());
  if (settings.rotation == oft_rotation::cayley) {
    const oft_block transposed = Eigen::PartialPivLU<oft_block>(I - Q).solve(I + Q);
    return {transposed.transpose(), 1};
  }
  const int terms = settings.neumann_terms;
  const int highest = terms < 3 ? terms - 1 : std::max(terms, 4) - 1;
  const double size = Q.cwiseAbs().rowwise().sum().maxCoeff();
  rotation result{I, 1};
  oft_block power = I;
  double power_size = 1;
  for (int i = 1; i <= highest; ++i) {
    const double coefficient = i == highest && terms != 2 ? 1 : 2;
    power = power * Q;
    power_size *= size;
    result.R += coefficient * power;
    result.magnitude += coefficient * power_size;
  }
  return result;
}

/// R^T of blocks, or of one block for all.
template <class Acc>
class turn final : public input_map<Acc> {
 public:
  turn(const std::vector<rotation>& blocks, const oft_settings& settings)
      : in_features_(settings.in_features) {
    for (const rotation& each : blocks) {
      columns_.push_back(each.R.transpose().cast<Acc>());
      rows_.push_back(each.R.cast<Acc>());
      if (settings.rotation == oft_rotation::cayley)
        undo_.push_back(columns_.back());
      else
        undo_.push_back(inverse_of(each, settings.neumann_terms));
    }
  }

  void columns(Acc* x, index_t tokens, index_t stride) const override {
    multiply(columns_, x, tokens, stride);
  }
  void rows(Acc* rows, index_t count, index_t stride) const override {
    multiply(rows_, rows, count, stride);
  }
  void undo_rows(const char* operation, Acc* rows, index_t count, index_t stride) const override {
    for (std::size_t i = 0; i < undo_.size(); ++i)
      if (undo_[i].size() == 0)
        detail::raise_value(operation, "block " + std::to_string(i) +
                                           " of the OFT adapter has no inverse in this precision, "
                                           "so its columns of W are lost");
    multiply(undo_, rows, count, stride);
  }

 private:
  using matrix = Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic>;

  /// Empty where the error of R, in double or in the accumulator, could make it singular.
  static matrix inverse_of(const rotation& of, int terms) {
    const oft_block inverse = Eigen::PartialPivLU<oft_block>(of.R).inverse();
    const double in_double = 0x1p-53 * terms * (static_cast<double>(of.R.rows()) + 1);
    const double unit = std::max<double>(std::numeric_limits<Acc>::epsilon(), in_double);
    const double error = unit * of.magnitude * inverse.norm();  // a NaN anywhere reaches it
    return detail::is_finite(error) && error < 1 ? matrix(inverse.cast<Acc>()) : matrix();
  }

  /// v := M v for each vector. A block of M is read once for several vectors.
  void multiply(const std::vector<matrix>& M, Acc* to, index_t count, index_t stride) const {
    constexpr index_t together = 16;
    if (count == 0 || in_features_ == 0) return;
    const index_t b = M.front().rows();
    std::vector<Acc> scratch(static_cast<std::size_t>(together * b));
    for (index_t first = 0; first < count; first += together)
      for (index_t k = 0; k * b < in_features_; ++k)
        multiply_block(M[M.size() == 1 ? 0 : static_cast<std::size_t>(k)], scratch.data(),
                       to + first * stride + k * b, std::min(together, count - first), stride);
  }
  static void multiply_block(const matrix& M, Acc* from, Acc* to, index_t count, index_t stride) {
    const index_t b = M.rows();
    for (index_t v = 0; v < count; ++v) {
      std::copy_n(to + v * stride, b, from + v * b);
      std::fill_n(to + v * stride, b, Acc(0));
    }
    for (index_t j = 0; j < b; ++j)
      for (index_t v = 0; v < count; ++v) {
        const Acc factor = from[v * b + j];
        const Acc* const column = M.data() + j * b;
        Acc* const sum = to + v * stride;
        for (index_t i = 0; i < b; ++i) sum[i] += column[i] * factor;
      }
  }

  index_t in_features_;
  std::vector<matrix> columns_, rows_, undo_;  // R^T, R, and the inverse of R, or nothing
};

}  // namespace detail

/// The skew blocks of one layer, packed, in the format that they are stored in, and how they become
/// rotations. Owns them; immutable. Invariant: the blocks are as wide as in_features, all of them
/// together or one of them repeated. Values are not looked at. Two of them on one layer do not
/// commute, and neither adds to W.
template <scalar T>
class [[nodiscard]] oft_adapter {
 public:
  using value_type = T;

  /// Copies the blocks, or takes a row-major matrix in T that is moved in. A narrower scalar is
  /// widened exactly; a wider one is refused at compile time.
  template <class M>
    requires matrix_like<std::remove_cvref_t<M>>
  oft_adapter(M&& blocks, const oft_settings& settings)
      : blocks_(detail::taken<T>(std::forward<M>(blocks))),
        settings_(settings),
        block_size_(checked_size()) {
    if (settings.neumann_terms < 1 || settings.neumann_terms > 1000)
      detail::raise_value("oft_adapter",
                          std::to_string(settings.neumann_terms) +
                              " terms of the Neumann series; from 1 to 1000 are taken");
    if (settings.coft_eps && !(detail::is_finite(*settings.coft_eps) && *settings.coft_eps >= 0))
      detail::raise_value("oft_adapter", "coft_eps is negative or not finite");
  }

  const detail::row_major_matrix<T>& blocks() const { return blocks_; }
  const oft_settings& settings() const { return settings_; }
  index_t block_size() const { return block_size_; }
  index_t out_features() const { return settings_.out_features; }
  index_t in_features() const { return settings_.in_features; }

  /// One input step.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (detail::is_zero(request.strength)) return {};
    if (request.strength != 1)
      detail::raise_value(request.operation,
                          "an OFT adapter has the strength 1 or 0, not " +
                              std::to_string(request.strength) +
                              ": it turns the inputs, and PEFT does not define part of a turn");
    const detail::default_environment environment;
    std::vector<detail::rotation> rotations;
    for (index_t i = 0; i < blocks_.rows(); ++i)
      rotations.push_back(detail::rotation_of(skew(i), settings_));
    return {input_step<Acc>{std::make_shared<const detail::turn<Acc>>(rotations, settings_)}};
  }

 private:
  /// b of b (b - 1) / 2 stored numbers.
  index_t checked_size() const {
    const auto [count, packed] = std::pair<index_t, index_t>(blocks_.rows(), blocks_.cols());
    const auto [out, in] = std::pair(settings_.out_features, settings_.in_features);
    if (out < 0 || in < 0)
      detail::raise_shape("oft_adapter", "the layer is " + detail::shape_text(out, in) +
                                             " (out_features x in_features)");
    const auto b = static_cast<index_t>((1 + std::sqrt(1 + 8 * static_cast<double>(packed))) / 2);
    const std::string text = "the blocks are " + detail::shape_text(count, packed);
    if (b * (b - 1) / 2 != packed)
      detail::raise_shape("oft_adapter",
                          text + "; a block of b inputs is stored as b (b - 1) / 2 numbers");
    const bool all = in % b == 0 && in / b == count, shared = in % b == 0 && count == 1;
    if (!all && !shared)
      detail::raise_shape("oft_adapter", text + ", each for " + std::to_string(b) +
                                             " inputs, and in_features is " + std::to_string(in) +
                                             "; blocks cover the inputs once, or one block all");
    return b;
  }

  /// Q_i, within coft_eps.
  detail::oft_block skew(index_t i) const {
    detail::oft_block Q = detail::oft_block::Zero(block_size_, block_size_);
    for (index_t row = 0, packed = 0; row < block_size_; ++row)
      for (index_t col = row + 1; col < block_size_; ++col, ++packed) {
        Q(row, col) = detail::widen<double>(blocks_(i, packed));
        Q(col, row) = -Q(row, col);
      }
    if (!settings_.coft_eps) return Q;
    const double most = *settings_.coft_eps / std::sqrt(static_cast<double>(blocks_.rows()));
    const double norm = Q.norm();
    if (norm > most) Q *= most / norm;
    return Q;
  }

  detail::row_major_matrix<T> blocks_;
  oft_settings settings_;
  index_t block_size_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
