// SPDX-License-Identifier: Apache-2.0
//
// prepared_merge: a merge of one weight in blocks of rows, for a weight that is never whole in
// memory.
//
//   const lora::prepared_merge<lora::bfloat16> merge(out, in, style, lora::scaled(0.3, subject));
//   for (...) merge.rows(first, block);   // block: rows of W from `first` on
//
//   law      merging all blocks gives the bits of lora::merge(W, l...), for every block size,
//            format and storage order, in any order of the blocks and on any thread
//   shapes   W out_features x in_features; a block rows x in_features. T is W's scalar; Order the
//            storage of the blocks.
//   kinds    all. One that looks at W (DoRA's norms) needs a reader of all its rows: pass a
//            lora::weight_rows first; it is read once, when the merge is prepared.
//   cost     factors are packed once; then each block costs its share of merge
//   throws   the constructor as merge; rows: shape_error for rows outside W. Then nothing is
//            written.
#pragma once

#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/detail/merge_steps.hpp"
#include "lora/merge.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A merge of some adapters into a weight of T, ready for its rows. Copies the factors. Immutable;
/// rows may be called by several threads at once for different blocks.
template <class T, storage_order Order = storage_order::row_major, class Acc = accumulator_t<T>>
class prepared_merge {
 public:
  template <class... L>
    requires(detail::any_adapters<L> && ...)
  prepared_merge(index_t out_features, index_t in_features, const L&... l)
      : prepared_merge(out_features, in_features, nullptr, l...) {}
  template <class... L>
    requires(detail::any_adapters<L> && ...)
  explicit prepared_merge(const weight_rows<Acc>& W, const L&... l)
      : prepared_merge(W.out_features(), W.in_features(), &W, l...) {}
  /// What is no adapter gets a sentence.
  template <class... L>
    requires(detail::mistaken_on_adapters<L...> && !(detail::any_adapters<L> && ...))
  prepared_merge(index_t, index_t, const L&...) {
    static_assert(detail::refuse_on_adapters<detail::verb::merge, L...>());
  }
  prepared_merge(const prepared_merge&) = delete;
  prepared_merge& operator=(const prepared_merge&) = delete;

  index_t out_features() const { return out_features_; }
  index_t in_features() const { return in_features_; }

  /// W(first + i, :) := round(what the adapters make of it), for each row i of the block.
  template <matrix_like M>
  merge_report rows(index_t first, M&& block) const {
    detail::refuse_temporary<M>();
    const detail::default_environment environment;
    const auto view = detail::output_view(block);
    using value = typename std::remove_const_t<decltype(view)>::value_type;
    static_assert(std::is_same_v<detail::storage_t<value>, T>,
                  "lora::prepared_merge: the block has another scalar than T");
    static_assert(std::remove_const_t<decltype(view)>::order == Order,
                  "lora::prepared_merge: the block is stored in another order: give prepared_merge "
                  "that order");
    if (first < 0 || view.cols() != in_features_ || view.rows() > out_features_ ||
        first > out_features_ - view.rows())
      detail::raise_shape("prepared_merge::rows",
                          "the block is " + detail::shape_text(view.rows(), view.cols()) +
                              " from row " + std::to_string(first) + " on and W is " +
                              detail::shape_text(out_features_, in_features_));
    detail::refuse_step_overlap("prepared_merge::rows", view, std::span<const step<Acc>>(steps_));
    return detail::report_of(pass(first, view), view.size());
  }

 private:
  template <class... L>
  prepared_merge(index_t out_features, index_t in_features, const weight_rows<Acc>* W,
                 const L&... l)
      : out_features_(out_features), in_features_(in_features) {
    static_assert(std::is_same_v<accumulator_t<T, Acc, L...>, Acc>,
                  "lora::prepared_merge: double factors are accumulated in double: give the third "
                  "parameter, double");
    if (out_features < 0 || in_features < 0)
      detail::raise_shape("prepared_merge",
                          detail::shape_text(out_features, in_features) + " is no shape");
    const detail::default_environment environment;
    if (!std::is_same_v<Acc, double> && detail::any_holds_double_now(l...))
      detail::raise_value(
          "prepared_merge",
          "an adapter holds double: give prepared_merge its third parameter, double");
    if (detail::are_stored_in_out("prepared_merge", l...))
      detail::raise_value("prepared_merge",
                          "the base stores the weight of this adapter in x out, so blocks of its "
                          "rows are blocks of inputs: merge "
                          "it whole, or pass its factors and out x in blocks");
    steps_ = detail::steps_of(step_request<Acc>{"prepared_merge", 1.0, W}, out_features,
                              in_features, l...);
    const std::span<const step<Acc>> steps(steps_);
    detail::refuse_shifts("prepared_merge", steps);
    if (const auto list = detail::low_rank_steps(steps); list.all_low_rank() && list.all_rows)
      update_ = std::make_unique<const update>(space_, "prepared_merge",
                                               detail::each_low_rank(list.steps), out_features,
                                               in_features, detail::merging);
    else
      change_ = std::make_unique<const change>("prepared_merge", steps, out_features, in_features,
                                               detail::merging);
  }

  template <class View>
  detail::tally pass(index_t first, const View& view) const {
    if (change_ != nullptr)
      return detail::row_pass<Acc>(detail::rows_of<Acc>(view), *change_, first);
    if (update_->rank() == 0) return {};
    using sink = detail::rounding_sink<update, Acc, typename View::value_type, Order,
                                       detail::writing::in_place>;
    const index_t end = first + view.rows();
    const detail::window part = Order == storage_order::row_major
                                    ? detail::window{first, end, 0, in_features_}
                                    : detail::window{0, in_features_, first, end};
    return update_->run(sink(view), part);
  }

  using update =
      detail::rank_update<Acc, Order, detail::columns_of<Acc, T>, detail::has_dots<Acc, bfloat16>>;
  using change = detail::row_change<Acc>;

  index_t out_features_, in_features_;
  std::vector<step<Acc>> steps_;
  workspace space_;
  std::unique_ptr<const update> update_;  ///< of low-rank steps alone
  std::unique_ptr<const change> change_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
