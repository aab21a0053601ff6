// SPDX-License-Identifier: Apache-2.0
//
// merge(W, l...)          W := round(W + sum of s * lora_B * lora_A)     any number of adapters and
//                         ranges of them
// merged(W, l...)         the same as a new matrix; W is read only
// merge_checked(W, l...)  merge if every element of the result is finite; otherwise throws and W is
//                         untouched
// unmerge(W, l...)        W := round(W - sum of s * lora_B * lora_A)
// merge, merge_checked and unmerge (space, W, l...): the same with scratch that the caller keeps
// (workspace.hpp)
//
//   shapes   W out_features x in_features, any storage order, block or transpose, or a
//            packed_weight; lora_A rank x in_features, lora_B out_features x rank. W stored
//            in_features x out_features (GPT-2's Conv1D) is passed as W.transpose().
//   rounding once, to W's scalar, nearest even: the adapters are accumulated apart from W in float
//            (double if W or any factor is double), from zero, in the order given; then W is added.
//            Merging two adapters in one call is not the same bits as in two calls, which round
//            twice. An element for which all products are 0 keeps its bits.
//   error    |result - exact| <= u_s |exact| + (1+u_s) (u |W| + gamma_{R+3} sum |s| |lora_B|
//            |lora_A|) + eta_s/2, with u of the accumulator, u_s and eta_s (subnormal step) of W's
//            scalar; both 0 where that is the accumulator; s the double that is multiplied by; and
//            what underflows in the accumulator (docs/numerics.md). A build for AVX512-BF16
//            multiplies factors of bfloat16 by dot products, with the same bound but for
//            subnormals: see flush_threshold_of_delta (delta.hpp). unmerge(merge(W)) is not W bit
//            for bit: each rounds; lora::linear unmerges exactly.
//   cost     2 R out in FLOPs (R = sum of ranks); reads and writes W once; allocates R (in + out)
//            accumulators, or nothing in a workspace that is large enough, never a matrix of W's
//            size (merged: the result). merge_checked runs the arithmetic twice at most.
//   aliasing W must not overlap a factor: shape_error.
//   throws   shape_error, value_error (scaling not finite), std::bad_alloc, before anything is
//            written. An adapter at scaling 0 is checked but its values are not read.
// The arithmetic follows Hu et al., arXiv 2106.09685; PEFT's merge (tuners/lora/layer.py) rounds
// once per adapter instead.
#pragma once

#include <string>
#include <utility>

#include "lora/detail/eigen.hpp"
#include "lora/detail/merge_steps.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/detail/row_norms.hpp"
#include "lora/kernel/merge/tile_sinks.hpp"
#include "lora/merge_report.hpp"
#include "lora/packed_weight.hpp"
#include "lora/steps.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {

/// The update that a weight takes, packed in the workspace, which must outlive it: in panels, and
/// in rows or columns.
template <class T, class... L>
auto update_for(workspace& space, const char* operation, double sign, const packed_weight<T>& W,
                const L&... l) {
  using acc = accumulator_t<T, L...>;
  return panel_update<acc, may_use_dots<acc, L...>>(space, operation, each_of(l...),
                                                    W.out_features(), W.in_features(), sign);
}
template <class T, storage_order Order, class... L>
auto update_for(workspace& space, const char* operation, double sign,
                const matrix_view<T, Order>& W, const L&... l) {
  using value = std::remove_const_t<T>;
  using acc = accumulator_t<value, L...>;
  return rank_update<acc, Order, columns_of<acc, storage_t<value>>, may_use_dots<acc, L...>>(
      space, operation, each_of(l...), W.rows(), W.cols(), sign);
}

/// weight := round(weight - the update), or nowhere: what that would make.
template <writing Where, class Acc, columns Columns, bool Dots, class T, storage_order Order>
tally round_into(const rank_update<Acc, Order, Columns, Dots>& update,
                 const matrix_view<T, Order>& weight) {
  return update.run(
      rounding_sink<rank_update<Acc, Order, Columns, Dots>, Acc, T, Order, Where>(weight));
}

inline merge_report report_of(const tally& seen, index_t elements) {
  return {.elements = static_cast<std::size_t>(elements),
          .changed = seen.changed,
          .nonfinite_before = seen.nonfinite - seen.became_nonfinite,  // nothing becomes finite
          .nonfinite_after = seen.nonfinite,
          .became_nonfinite = seen.became_nonfinite,
          .weights = 1};
}
/// The report of a merge of nothing, which has not looked.
inline merge_report untouched(index_t elements) { return report_of({}, elements); }

template <class M, class... L>
merge_report merge_signed(workspace& space, const char* operation, double sign, M& W,
                          const L&... l) {
  const default_environment environment;
  if constexpr (is_packed_weight<M>) {
    const auto update = update_for(space, operation, sign, W, l...);
    const index_t size = W.out_features() * W.in_features();
    return update.rank() == 0 ? untouched(size) : report_of(write_panels(update, W, W), size);
  } else {
    const auto weight = output_view(W);
    const auto update = update_for(space, operation, sign, weight, l...);
    refuse_factor_overlap(operation, "W", weight, each_of(l...));
    if (update.rank() == 0) return untouched(weight.size());
    return report_of(round_into<writing::in_place>(update, weight), weight.size());
  }
}

inline void refuse_nonfinite(const tally& seen, index_t size) {
  if (seen.nonfinite != 0)
    raise_value("merge_checked", std::to_string(seen.nonfinite) + " of " + std::to_string(size) +
                                     " elements would not be finite (" +
                                     std::to_string(seen.became_nonfinite) +
                                     " of them are finite now); W is untouched");
}

/// What merge_checked does before it writes: throws unless every element of the result is finite.
template <class View, class... L>
void check_merge(const View& weight, const L&... l) {
  const default_environment environment;
  workspace space;
  const auto update = update_for(space, "merge_checked", merging, weight, l...);
  refuse_nonfinite(round_into<writing::nowhere>(update, weight), weight.size());
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

/// A merged copy: the matrix or packed weight itself, and what the merge did to the numbers.
template <class M>
struct [[nodiscard]] merged_copy : M {
  using M::M;
  using M::operator=;
  merged_copy(M weight, const merge_report& seen) : M(std::move(weight)), report(seen) {}
  merge_report report;
};
namespace detail {
template <class T>
inline constexpr bool is_packed_weight<merged_copy<packed_weight<T>>> = true;
template <class T>
inline constexpr bool holds_double<merged_copy<packed_weight<T>>> = std::is_same_v<T, double>;
}  // namespace detail

/// round(W + sum of deltas) as a new Eigen matrix with W's scalar and storage order, or a new
/// packed_weight; the same bits as merge. The result is that matrix, with a member `report`.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
auto merged(const M& W, const L&... l) {
  const detail::default_environment environment;
  workspace space;
  if constexpr (detail::is_packed_weight<M>) {
    const auto update = detail::update_for(space, "merged", detail::merging, W, l...);
    const index_t size = W.out_features() * W.in_features();
    using packed = packed_weight<typename M::value_type>;
    if (update.rank() == 0) return merged_copy<packed>(packed(W), detail::untouched(size));
    packed result = packed::unfilled(W.out_features(), W.in_features());
    const detail::tally seen = detail::write_panels(update, static_cast<const packed&>(W), result);
    return merged_copy<packed>(std::move(result), detail::report_of(seen, size));
  } else {
    const auto weight = as_matrix(W);
    using view = std::remove_const_t<decltype(weight)>;
    using value = typename view::value_type;
    constexpr int options = view::is_row_major ? Eigen::RowMajor : Eigen::ColMajor;
    const auto update = detail::update_for(space, "merged", detail::merging, weight, l...);
    using matrix = Eigen::Matrix<value, Eigen::Dynamic, Eigen::Dynamic, options>;
    matrix result(weight.rows(), weight.cols());
    const auto destination = as_matrix(result);
    merge_report report = detail::untouched(weight.size());
    if (update.rank() == 0) {
      for (index_t k = 0; weight.inner_size() != 0 && k < weight.outer_size(); ++k)
        std::copy_n(weight.outer(k), weight.inner_size(), destination.outer(k));
    } else {
      using sink = detail::rounding_sink<detail::bare<decltype(update)>, accumulator_t<value, L...>,
                                         value, view::order, detail::writing::elsewhere>;
      report = detail::report_of(update.run(sink(weight, destination)), weight.size());
    }
    return merged_copy<matrix>(std::move(result), report);
  }
}

/// merge, or a value_error with W untouched when an element of the result is not finite (also one
/// that was not before).
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report merge_checked(workspace& space, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  if constexpr (detail::is_packed_weight<detail::bare<M>>) {
    const auto update = detail::update_for(space, "merge_checked", detail::merging, W, l...);
    const index_t size = W.out_features() * W.in_features();
    detail::refuse_nonfinite(detail::check_panels(update, W), size);
    return update.rank() == 0 ? detail::untouched(size)
                              : detail::report_of(detail::write_panels(update, W, W), size);
  } else {
    const auto weight = detail::output_view(W);
    const auto update = detail::update_for(space, "merge_checked", detail::merging, weight, l...);
    detail::refuse_factor_overlap("merge_checked", "W", weight, detail::each_of(l...));
    detail::refuse_nonfinite(detail::round_into<detail::writing::nowhere>(update, weight),
                             weight.size());
    if (update.rank() == 0) return detail::untouched(weight.size());
    return detail::report_of(detail::round_into<detail::writing::in_place>(update, weight),
                             weight.size());
  }
}

template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
merge_report merge_checked(M&& W, const L&... l) {
  workspace space;
  return merge_checked(space, std::forward<M>(W), l...);
}

namespace detail {

/// An argument list with an adapter that is more than low-rank factors.
template <class... L>
concept of_kinds = (any_adapters<L> && ...) && !(adapters<L> && ...);

/// Steps prepared from a weight, such as a mixed_form.
template <class F>
concept prepared_steps = requires(const F& f) {
  { f.steps()[0].index() } -> std::convertible_to<std::size_t>;
  { f.out_features() } -> std::convertible_to<index_t>;
};
template <prepared_steps F>
using accumulator_of = std::conditional_t<
    std::is_same_v<bare<decltype(std::declval<const F&>().steps()[0])>, step<double>>, double,
    float>;

/// call(W as out_features x in_features), for a W as the adapters' base stores it.
template <class M, class Call>
auto as_out_in(M& W, bool stored_in_out, const Call& call) {
  if constexpr (is_packed_weight<M>) {
    return call(W);
  } else {
    const auto weight = output_view(W);
    return stored_in_out ? call(weight.transpose()) : call(weight);
  }
}

/// A reader of a weight's rows, widened.
template <class Acc, class T, storage_order Order>
auto rows_of(const matrix_view<T, Order>& W) {
  return matrix_rows<Acc, T, Order>(W);
}
template <class Acc, class T>
auto rows_of(const packed_weight<T>& W) {
  return panel_rows<Acc, T>(W, nullptr);
}

/// The report of a pass with these steps, for a call that gave no bias.
template <class Acc>
merge_report report_of_steps(const tally& seen, index_t elements,
                             std::span<const step<Acc>> steps) {
  merge_report report = report_of(seen, elements);
  report.biases_left = std::any_of(steps.begin(), steps.end(), scales_bias<Acc>) ? 1 : 0;
  return report;
}

template <writing Where, class Acc, class T, storage_order Order>
merge_report merge_into(const char* operation, double sign, const matrix_view<T, Order>& W,
                        std::span<const step<Acc>> steps) {
  const tally seen = pass_over<Where, Acc>(operation, sign, W, steps);
  if constexpr (Where == writing::nowhere) refuse_nonfinite(seen, W.size());
  return report_of_steps(seen, W.size(), steps);
}
template <writing Where, class Acc, class T>
merge_report merge_into(const char* operation, double sign, packed_weight<T>& W,
                        std::span<const step<Acc>> steps) {
  static_assert(Where == writing::in_place,
                "lora::merge_checked: adapters of this kind are checked in a plain matrix");
  const tally seen = pass_over<Acc>(operation, sign, W, W, steps);
  return report_of_steps(seen, W.out_features() * W.in_features(), steps);
}

/// call(W out x in, its steps in Acc): what every verb for adapters of any kind does first.
template <class M, class Call, class... L>
auto with_steps(const char* operation, double sign, M& W, const Call& call, const L&... l) {
  const default_environment environment;
  return as_out_in(W, are_stored_in_out(operation, l...), [&](auto&& weight) {
    using acc = accumulator_t<bare<decltype(weight)>, L...>;
    const auto run = [&]<class Acc>(std::type_identity<Acc>) {
      const auto base = reader_of<Acc>(weight);
      // After a merge W is no longer what a kind may ask about.
      const step_request<Acc> request{operation, 1.0, sign == merging ? &base : nullptr};
      const auto steps = steps_of<Acc>(request, base.out_features(), base.in_features(), l...);
      return call(weight, std::span<const step<Acc>>(steps));
    };
    if constexpr (!std::is_same_v<acc, double>)
      if (any_holds_double_now(l...)) return run(std::type_identity<double>());
    return run(std::type_identity<acc>());
  });
}

/// Throws what merge(W, l...) would throw before it writes.
template <class M, class... L>
void check_can_merge(const char* operation, M& W, const L&... l) {
  with_steps(
      operation, merging, W,
      [&]<class Acc>(auto& weight, std::span<const step<Acc>> steps) {
        refuse_shifts(operation, steps);
        refuse_step_overlap(operation, weight, steps);
        const row_change<Acc> change(operation, steps, weight.rows(), weight.cols(), merging);
        static_cast<void>(change);
      },
      l...);
}

template <class M, class... L>
merge_report merge_kinds(const char* operation, double sign, M& W, const L&... l) {
  return with_steps(
      operation, sign, W,
      [&](auto& weight, auto steps) {
        refuse_shifts(operation, steps);
        return merge_into<writing::in_place>(operation, sign, weight, steps);
      },
      l...);
}

template <class M, class V, class... L>
merge_report merge_with_bias(const char* operation, double sign, M&& W, V&& bias, const L&... l) {
  refuse_temporary<M>();
  refuse_temporary<V>();
  const auto b = output_view(bias);
  return with_steps(
      operation, sign, W,
      [&]<class Acc>(auto& weight, std::span<const step<Acc>> steps) {
        if (steps.empty())
          return merge_into<writing::in_place>(operation, sign, weight,
                                               steps);  // for a b of any shape
        if constexpr (is_packed_weight<bare<decltype(weight)>>) {
          check_bias_shape(operation, b.rows(), b.cols(), weight.out_features());
        } else {
          check_bias_shape(operation, b.rows(), b.cols(), weight.rows());
          refuse_overlap(operation, "the bias", b, "W", weight);
        }
        const auto rows = rows_of<Acc>(weight);
        // Before anything is written.
        const bias_change change =
            bias_change_of(operation, steps, rows.out_features(), rows.in_features());
        if (sign == unmerging && std::any_of(change.gain.begin(), change.gain.end(),
                                             [](double g) { return is_zero(g); }))
          raise_value(operation, "an adapter scales an output by 0, so its bias is lost");
        merge_report seen = merge_into<writing::in_place>(operation, sign, weight, steps);
        seen.biases_left = 0;
        change_bias(b, sign, change);
        return seen;
      },
      l...);
}

template <class M, class F>
merge_report merge_prepared(const char* operation, double sign, M&& W, const F& form) {
  refuse_temporary<M>();
  const default_environment environment;
  using acc = accumulator_of<F>;
  static_assert(std::is_same_v<acc, double> || !holds_double<bare<M>>,
                "lora::merge: W holds double and the form float, which would round W: make the "
                "form by mixed<double>(W, l...)");
  return as_out_in(W, is_stored_in_out(form), [&](auto&& weight) {
    const auto rows = rows_of<acc>(weight);
    if (rows.out_features() != form.out_features() || rows.in_features() != form.in_features())
      raise_shape(operation,
                  "W is " + shape_text(rows.out_features(), rows.in_features()) +
                      " (out_features x in_features) and the form was made from one of " +
                      shape_text(form.out_features(), form.in_features()) +
                      (rows.out_features() == form.in_features() &&
                               rows.in_features() == form.out_features()
                           ? ": pass W as it was then"
                           : ""));
    const auto steps = std::span<const step<acc>>(form.steps());
    refuse_shifts(operation, steps);
    return merge_into<writing::in_place>(operation, sign, weight, steps);
  });
}

}  // namespace detail

/// The same for adapters of any kind, in order: each changes the rows that those before it made, in
/// the accumulator, and W is rounded once. A W that the base stores in x out is passed so.
template <class M, class... L>
  requires detail::mergeable<M> && detail::of_kinds<L...>
merge_report merge(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_kinds("merge", detail::merging, W, l...);
}
template <class M, class... L>
  requires detail::mergeable<M> && detail::of_kinds<L...>
merge_report unmerge(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_kinds("unmerge", detail::unmerging, W, l...);
}

/// The same with the bias of the layer, for adapters with a bias of their own (b := b + c) and
/// those that scale outputs with their bias (b := g b): computed in double, rounded once.
template <class M, class V, class... L>
  requires detail::mergeable<M> && activations<V> && (sizeof...(L) > 0) &&
           (detail::any_adapters<L> && ...)
merge_report merge(M&& W, V&& bias, const L&... l) {
  return detail::merge_with_bias("merge", detail::merging, std::forward<M>(W),
                                 std::forward<V>(bias), l...);
}
template <class M, class V, class... L>
  requires detail::mergeable<M> && activations<V> && (sizeof...(L) > 0) &&
           (detail::any_adapters<L> && ...)
merge_report unmerge(M&& W, V&& bias, const L&... l) {
  return detail::merge_with_bias("unmerge", detail::unmerging, std::forward<M>(W),
                                 std::forward<V>(bias), l...);
}

template <class M, class... L>
  requires matrix_like<M> && detail::of_kinds<L...>
merge_report merge_checked(M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::with_steps(
      "merge_checked", detail::merging, W,
      [](auto& weight, auto steps) {
        using detail::writing;
        detail::refuse_shifts("merge_checked", steps);
        detail::merge_into<writing::nowhere>("merge_checked", detail::merging, weight, steps);
        return detail::merge_into<writing::in_place>("merge_checked", detail::merging, weight,
                                                     steps);
      },
      l...);
}

template <class M, class... L>
  requires detail::mergeable<M> && detail::of_kinds<L...>
auto merged(const M& W, const L&... l) {
  auto result = lora::merged(W);  // a copy; merging in place then needs no second one
  result.report = merge(result, l...);
  return result;
}

/// The same for steps that were prepared from the weight as it was before any merge: what mixed(W,
/// l...) returned. unmerge gives the base back within rounding, not bit for bit; value_error where
/// it is lost.
template <class M, detail::prepared_steps F>
  requires detail::mergeable<M>
merge_report merge(M&& W, const F& form) {
  return detail::merge_prepared("merge", detail::merging, std::forward<M>(W), form);
}
template <class M, detail::prepared_steps F>
  requires detail::mergeable<M>
merge_report unmerge(M&& W, const F& form) {
  return detail::merge_prepared("unmerge", detail::unmerging, std::forward<M>(W), form);
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
