// SPDX-License-Identifier: Apache-2.0
//
// merge(W, l...)          W := round(W + sum of s * lora_B * lora_A)     any number of adapters and ranges of them
// merged(W, l...)         the same as a new matrix; W is read only
// merge_checked(W, l...)  merge if every element of the result is finite; otherwise throws and W is untouched
// unmerge(W, l...)        W := round(W - sum of s * lora_B * lora_A)
//
//   shapes   W out_features x in_features, any storage order, block or transpose; lora_A rank x in_features, lora_B
//            out_features x rank. W stored in_features x out_features (GPT-2's Conv1D) is passed as W.transpose().
//   rounding once, to W's scalar, nearest even: the adapters are accumulated apart from W in float (double if W or any
//            factor is double), from zero, in the order given; then W is added. Merging two adapters in one call is not
//            the same bits as in two calls, which round twice. An element whose delta is 0 keeps its bits.
//   error    |result - exact| <= u_s |exact| + (1+u_s) (u |W| + gamma_{R+2} sum |s| |lora_B| |lora_A|) + eta/2, with u of
//            the accumulator, u_s and eta (subnormal step) of W's scalar; u_s = eta = 0 where that is the accumulator.
//            unmerge(merge(W)) is not W bit for bit: each rounds; lora::linear unmerges exactly.
//   cost     2 R out in FLOPs (R = sum of ranks); reads and writes W once; allocates R (in + out) accumulators, never a
//            matrix of W's size (merged: the result). merge_checked runs the arithmetic twice.
//   aliasing W must not overlap a factor: shape_error.
//   throws   shape_error, value_error (scaling not finite), before anything is written. An adapter at scaling 0 is checked
//            but its values are not read.
// The arithmetic follows Hu et al., arXiv 2106.09685; PEFT's merge (tuners/lora/layer.py) rounds once per adapter instead.
#pragma once

#include <Eigen/Core>
#include <string>
#include <utility>

#include "lora/detail/update.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// What a merge did to the numbers.
struct merge_report {
  /// Elements that were finite and are now infinite or NaN: an overflow of W's format, or a factor that is not finite.
  std::size_t became_nonfinite = 0;
};

namespace detail {

/// destination := round(source + sign * sum of deltas); both of one shape, possibly the same memory.
template <class Acc, class T, storage_order Order>
tally write_sum(const rank_update<Acc, Order>& update, const matrix_view<const T, Order>& source,
                const matrix_view<T, Order>& destination) {
  return update.run([&](tally& seen, index_t outer, index_t inner, index_t count, const Acc* delta) {
    add_and_round(seen, source.outer(outer) + inner, destination.outer(outer) + inner, delta, count);
  });
}

template <class M, class... L>
merge_report merge_signed(const char* operation, double sign, M& W, const L&... l) {
  const auto weight = output_view(W);
  using view = std::remove_const_t<decltype(weight)>;
  using value = typename view::value_type;
  const auto each = each_of(l...);
  const rank_update<accumulator_t<value, L...>, view::order> update(operation, each, weight.rows(), weight.cols(), sign);
  refuse_factor_overlap(operation, "W", weight, each);
  if (update.rank() == 0) return {};
  return {write_sum(update, matrix_view<const value, view::order>(weight), weight).became_nonfinite};
}

}  // namespace detail

/// W := round(W + sum of deltas); see the top of this file.
template <class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
merge_report merge(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_signed("merge", 1.0, W, l...);
}

/// W := round(W - sum of deltas); see the top of this file.
template <class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
merge_report unmerge(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_signed("unmerge", -1.0, W, l...);
}

/// round(W + sum of deltas) as a new Eigen matrix with W's scalar and storage order; the same bits as merge.
template <class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
auto merged(const M& W, const L&... l) {
  const auto weight = as_matrix(W);
  using view = std::remove_const_t<decltype(weight)>;
  using value = typename view::value_type;
  constexpr int options = view::is_row_major ? Eigen::RowMajor : Eigen::ColMajor;
  const auto each = detail::each_of(l...);
  const detail::rank_update<accumulator_t<value, L...>, view::order> update("merged", each, weight.rows(), weight.cols(),
                                                                            1.0);
  Eigen::Matrix<value, Eigen::Dynamic, Eigen::Dynamic, options> result(weight.rows(), weight.cols());
  const auto destination = as_matrix(result);
  if (update.rank() == 0) {
    for (index_t k = 0; k < weight.outer_size(); ++k)
      std::copy_n(weight.outer(k), weight.inner_size(), destination.outer(k));
  } else {
    detail::write_sum(update, matrix_view<const value, view::order>(weight), destination);
  }
  return result;
}

/// merge, or a value_error with W untouched when an element of the result is not finite (also one that was not before).
template <class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
void merge_checked(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  const auto weight = detail::output_view(W);
  using view = std::remove_const_t<decltype(weight)>;
  using value = typename view::value_type;
  using acc = accumulator_t<value, L...>;
  const auto each = detail::each_of(l...);
  const detail::rank_update<acc, view::order> update("merge_checked", each, weight.rows(), weight.cols(), 1.0);
  detail::refuse_factor_overlap("merge_checked", "W", weight, each);
  const detail::tally seen =
      update.run([&](detail::tally& mine, index_t outer, index_t inner, index_t count, const acc* delta) {
        value rounded[detail::tile_cols<acc>];
        detail::add_and_round(mine, weight.outer(outer) + inner, rounded, delta, count);
      });
  if (seen.nonfinite != 0)
    detail::raise_value("merge_checked", std::to_string(seen.nonfinite) + " of " + std::to_string(weight.size()) +
                                             " elements would not be finite (" + std::to_string(seen.became_nonfinite) +
                                             " of them are finite now); W is untouched");
  if (update.rank() != 0) detail::write_sum(update, matrix_view<const value, view::order>(weight), weight);
}

}  // namespace lora::inline LORA_DETAIL_ABI
