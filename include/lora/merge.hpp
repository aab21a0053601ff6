// SPDX-License-Identifier: Apache-2.0
//
// merge(W, l...)          W := round(W + sum of s * lora_B * lora_A)     any number of adapters and ranges of them
// merged(W, l...)         the same as a new matrix; W is read only
// merge_checked(W, l...)  merge if every element of the result is finite; otherwise throws and W is untouched
// unmerge(W, l...)        W := round(W - sum of s * lora_B * lora_A)
// merge, merge_checked and unmerge (space, W, l...): the same with scratch that the caller keeps (workspace.hpp)
//
//   shapes   W out_features x in_features, any storage order, block or transpose, or a packed_weight; lora_A rank x
//            in_features, lora_B out_features x rank. W stored in_features x out_features (GPT-2's Conv1D) is passed as
//            W.transpose().
//   rounding once, to W's scalar, nearest even: the adapters are accumulated apart from W in float (double if W or any
//            factor is double), from zero, in the order given; then W is added. Merging two adapters in one call is not
//            the same bits as in two calls, which round twice. An element for which all products are 0 keeps its bits.
//   error    |result - exact| <= u_s |exact| + (1+u_s) (u |W| + gamma_{R+3} sum |s| |lora_B|
//            |lora_A|) + eta_s/2, with u of the accumulator, u_s and eta_s (subnormal step) of W's
//            scalar; both 0 where that is the accumulator; s the double that is multiplied by; and
//            what underflows in the accumulator (docs/numerics.md). A build for AVX512-BF16
//            multiplies factors of bfloat16 by dot products, with the same bound but for
//            subnormals: see smallest_in_delta (delta.hpp). unmerge(merge(W)) is not W bit for bit:
//            each rounds; lora::linear unmerges exactly.
//   cost     2 R out in FLOPs (R = sum of ranks); reads and writes W once; allocates R (in + out) accumulators, or nothing
//            in a workspace that is large enough, never a matrix of W's size (merged: the result). merge_checked runs the
//            arithmetic twice at most.
//   aliasing W must not overlap a factor: shape_error.
//   throws   shape_error, value_error (scaling not finite), std::bad_alloc, before anything is written. An adapter at scaling
//            0 is checked but its values are not read.
// The arithmetic follows Hu et al., arXiv 2106.09685; PEFT's merge (tuners/lora/layer.py) rounds once per adapter instead.
#pragma once

#include <string>
#include <utility>

#include "lora/detail/eigen.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/detail/sinks.hpp"
#include "lora/packed_weight.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// What a merge did to the numbers.
struct merge_report {
  /// Elements that were finite and are now infinite or NaN: an overflow of W's format, or a factor that is not finite.
  std::size_t became_nonfinite = 0;
};

namespace detail {

/// The update that a weight takes, packed in the workspace, which must outlive it: in panels, and in rows or columns.
template <class T, class... L>
auto update_for(workspace& space, const char* operation, double sign, const packed_weight<T>& W, const L&... l) {
  using acc = accumulator_t<T, L...>;
  return panel_update<acc, may_use_dots<acc, L...>>(space, operation, each_of(l...), W.out_features(), W.in_features(),
                                                    sign);
}
template <class T, storage_order Order, class... L>
auto update_for(workspace& space, const char* operation, double sign, const matrix_view<T, Order>& W, const L&... l) {
  using value = std::remove_const_t<T>;
  using acc = accumulator_t<value, L...>;
  return rank_update<acc, Order, columns_of<acc, storage_t<value>>, may_use_dots<acc, L...>>(space, operation, each_of(l...),
                                                                                             W.rows(), W.cols(), sign);
}

/// weight := round(weight - the update), or nowhere: what that would make.
template <writing Where, class Acc, columns Columns, bool Dots, class T, storage_order Order>
tally subtract_update(const rank_update<Acc, Order, Columns, Dots>& update, const matrix_view<T, Order>& weight) {
  return update.run(rounding_sink<rank_update<Acc, Order, Columns, Dots>, Acc, T, Order, Where>(weight));
}

template <class M, class... L>
merge_report merge_signed(workspace& space, const char* operation, double sign, M& W, const L&... l) {
  const default_environment environment;
  if constexpr (is_packed_weight<M>) {
    const auto update = update_for(space, operation, sign, W, l...);
    return update.rank() == 0 ? merge_report{} : merge_report{write_panels(update, W, W).became_nonfinite};
  } else {
    const auto weight = output_view(W);
    const auto update = update_for(space, operation, sign, weight, l...);
    refuse_factor_overlap(operation, "W", weight, each_of(l...));
    if (update.rank() == 0) return {};
    return {subtract_update<writing::in_place>(update, weight).became_nonfinite};
  }
}

template <class M>
concept mergeable = matrix_like<M> || is_packed_weight<bare<M>>;

}  // namespace detail

/// W := round(W + sum of deltas); see the top of this file.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report merge(workspace& space, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_signed(space, "merge", detail::merging, W, l...);
}
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report merge(M&& W, const L&... l) {
  workspace space;
  return merge(space, std::forward<M>(W), l...);
}

/// W := round(W - sum of deltas); see the top of this file.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report unmerge(workspace& space, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_signed(space, "unmerge", detail::unmerging, W, l...);
}
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report unmerge(M&& W, const L&... l) {
  workspace space;
  return unmerge(space, std::forward<M>(W), l...);
}

/// round(W + sum of deltas) as a new Eigen matrix with W's scalar and storage order, or a new packed_weight; the same bits
/// as merge.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
auto merged(const M& W, const L&... l) {
  const detail::default_environment environment;
  workspace space;
  if constexpr (detail::is_packed_weight<M>) {
    const auto update = detail::update_for(space, "merged", detail::merging, W, l...);
    if (update.rank() == 0) return M(W);
    M result = M::unfilled(W.out_features(), W.in_features());
    detail::write_panels(update, W, result);
    return result;
  } else {
    const auto weight = as_matrix(W);
    using view = std::remove_const_t<decltype(weight)>;
    using value = typename view::value_type;
    constexpr int options = view::is_row_major ? Eigen::RowMajor : Eigen::ColMajor;
    const auto update = detail::update_for(space, "merged", detail::merging, weight, l...);
    Eigen::Matrix<value, Eigen::Dynamic, Eigen::Dynamic, options> result(weight.rows(), weight.cols());
    const auto destination = as_matrix(result);
    if (update.rank() == 0) {
      for (index_t k = 0; weight.inner_size() != 0 && k < weight.outer_size(); ++k)
        std::copy_n(weight.outer(k), weight.inner_size(), destination.outer(k));
    } else {
      using sink = detail::rounding_sink<detail::bare<decltype(update)>, accumulator_t<value, L...>, value, view::order,
                                         detail::writing::elsewhere>;
      update.run(sink(weight, destination));
    }
    return result;
  }
}

/// merge, or a value_error with W untouched when an element of the result is not finite (also one that was not before).
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
void merge_checked(workspace& space, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto judge = [](const detail::tally& seen, index_t size) {
    if (seen.nonfinite != 0)
      detail::raise_value("merge_checked", std::to_string(seen.nonfinite) + " of " + std::to_string(size) +
                                               " elements would not be finite (" + std::to_string(seen.became_nonfinite) +
                                               " of them are finite now); W is untouched");
  };
  if constexpr (detail::is_packed_weight<detail::bare<M>>) {
    const auto update = detail::update_for(space, "merge_checked", detail::merging, W, l...);
    judge(detail::check_panels(update, W), W.out_features() * W.in_features());
    if (update.rank() != 0) detail::write_panels(update, W, W);
  } else {
    const auto weight = detail::output_view(W);
    const auto update = detail::update_for(space, "merge_checked", detail::merging, weight, l...);
    detail::refuse_factor_overlap("merge_checked", "W", weight, detail::each_of(l...));
    judge(detail::subtract_update<detail::writing::nowhere>(update, weight), weight.size());
    if (update.rank() != 0) detail::subtract_update<detail::writing::in_place>(update, weight);
  }
}

template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
void merge_checked(M&& W, const L&... l) {
  workspace space;
  merge_checked(space, std::forward<M>(W), l...);
}

/// A mistaken call of these verbs gets a sentence.
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto merge(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::merge, A...>());
}
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto unmerge(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::unmerge, A...>());
}
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto merged(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::merged, A...>());
}
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto merge_checked(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::merge_checked, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
