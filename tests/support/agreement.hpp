// SPDX-License-Identifier: Apache-2.0
//
// The library's bounds for layers whose formats are known at run time: a weight and activations as
// doubles, the formats beside them. The formulas are those of lora/detail/error_terms.hpp.
#pragma once

#include <vector>

#include "lora/lora.hpp"

namespace agreement {

using format = lora::detail::rounding_unit;
using part = lora::detail::error_part;
using lora::detail::gamma;
using lora::detail::total_rank;

template <class T>
format format_of() {
  return lora::detail::unit_of<T>();
}

/// The formats of one evaluation. weight and output are zero where nothing is rounded to them.
struct formats {
  format accumulator, weight, output;
  /// Numbers below this count as zero in W x and A x: where dot products of bfloat16 compute them.
  double flushed = 0;
};
/// A weight stored in T, results stored in Y, accumulated in Acc; activations stored in X, as far
/// as that matters.
template <class T, class Y, class Acc, class X = Acc>
formats formats_of() {
  return {format_of<Acc>(), lora::detail::unit_of_stored<T, Acc>(),
          lora::detail::unit_of_stored<Y, Acc>(), lora::flush_threshold_of_product<Acc, T, X>()};
}

/// Where the adapters of a function are evaluated.
struct state {
  std::vector<part> merged, mixed;
};

template <class M>
Eigen::MatrixXd in_double(const M& m) {
  const auto view = lora::as_matrix(m);
  return lora::detail::widened(view);
}
/// An adapter of any format, for a merge in float and a product that may be one of dot products.
template <lora::low_rank L>
part part_of(const L& l) {
  auto result = lora::detail::error_part_of<float>(l);
  result.in_pairs = true;
  return result;
}

inline lora::detail::weight_error merge_error(const Eigen::MatrixXd& W,
                                              const std::vector<part>& merged, const formats& f) {
  return {merged, W.rows(), W.cols(), f.accumulator.u, 3, f.accumulator, f.weight};
}
/// |stored weight - (W + delta)| per element.
inline Eigen::MatrixXd merge_bound(const Eigen::MatrixXd& W, const std::vector<part>& merged,
                                   const formats& f) {
  lora::detail::weight_error::block size = W.cwiseAbs(), bound;
  merge_error(W, merged, f).of_rows(0, size, bound);
  return bound;
}

/// |computed y - exact y| per output and token, y = W x (+ bias) + sum over all parts of s B (A x),
/// with some of the parts merged and the others mixed in. bias is empty or out_features long. The
/// merge may have accumulated in another format than the product, which also looks at the
/// activations.
inline Eigen::MatrixXd error_bound(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias,
                                   const state& where, const Eigen::MatrixXd& x, const formats& f,
                                   const formats& merge) {
  lora::detail::product_error error(x, W.rows(), f.accumulator, f.flushed);
  const auto merged = merge_error(W, where.merged, merge);
  error.add_weight(
      [&](Eigen::Index first, auto& block) { block = W.middleRows(first, block.rows()); }, &merged);
  error.add_parts(0, x.cols(), lora::detail::at_own_strength(where.mixed));
  return std::move(error).stored(bias, f.output);
}
inline Eigen::MatrixXd error_bound(const Eigen::MatrixXd& W, const Eigen::VectorXd& bias,
                                   const state& where, const Eigen::MatrixXd& x, const formats& f) {
  return error_bound(W, bias, where, x, f, f);
}

}  // namespace agreement
