// SPDX-License-Identifier: Apache-2.0
//
// merge(rounding::as_peft, W, l...)        W := round(W + D_1), then W := round(W + D_2), ...
//                                          D_i the delta of adapter i
// merge(rounding::as_peft_safe, W, l...)   W := round(W + round(D_1)), ...
//                                          D_i rounded to W's format first
// unmerge(either, W, l...)                 W := round(W - round(D_n)), the last adapter first
//
// What Hugging Face PEFT stores when it merges (as_peft: safe_merge=False, the default;
// as_peft_safe: safe_merge=True), for those who must reproduce it. merge without a policy is more
// accurate: it rounds once for all adapters. Every verb above takes adapters of any kind, and
// entries of a PEFT file.
//   delta    D = (B * A) * s: the product in float (double if a factor is double), then one
//            multiplication by s, then rounded to B's format when that has 16 bits, as
//            get_delta_weight does on a CPU.
//   kinds    other kinds round where PEFT does: after each step. A DoRA weight is round(g round(W +
//            D)); the gains g are those of merge without a policy, where PEFT computes norms in W's
//            format.
//   exact    from D on, bit for bit what PEFT stores: the sum in the wider of the two formats,
//            nearest even. The product itself is a chain over the ranks here, while torch's order
//            of summation is not specified: D agrees with torch's within gamma_{r+2} * |s| |B| |A|,
//            and bit for bit where no step rounds (for factors of bfloat16: and nothing is
//            subnormal, see flush_threshold_of_delta).
//   error    of one low-rank adapter |result - exact| <= u_s |exact| + (1+u_s) (e_D + u (|W| + |D|
//            + e_D)) + eta_s/2, with e_D the error of D: t + u_F (|D| + t) + eta_F/2, t =
//            gamma_{r+2} |s| |B| |A| + eta (|s| r + 1), F the format of B. as_peft_safe rounds D to
//            W's format, too. Several adapters add up (docs/numerics.md).
//   drift    as_peft adds D and subtracts round(D), so a weight in 16 bits moves a little with each
//            merge and unmerge; lora::linear gives the base back bit for bit.
//   shapes, aliasing, throws   as merge (merge.hpp)
//   cost     2 r out in FLOPs for each adapter, one pass over W for all; all threads.
// huggingface/peft 0.21, tuners/lora/layer.py: Linear.merge, Linear.unmerge, get_delta_weight.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/merge_steps.hpp"
#include "lora/merge.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace rounding {

struct peft_policy {};
struct peft_safe_policy {};
inline constexpr peft_policy as_peft{};            ///< PEFT's merge with safe_merge=False
inline constexpr peft_safe_policy as_peft_safe{};  ///< PEFT's merge with safe_merge=True

}  // namespace rounding

/// The closed list of the policies above.
template <class P>
concept rounding_policy =
    std::same_as<P, rounding::peft_policy> || std::same_as<P, rounding::peft_safe_policy>;

namespace detail {

/// visit(the adapter without its scaling): PEFT multiplies by that afterwards.
template <class T>
auto without_scaling(const adapter_view<T>& one) {
  return [&one](const auto& visit) {
    visit(adapter_view<T>(one.lora_A(), one.lora_B(), {.alpha = 1, .rule = scaling_rule::fixed}));
  };
}

/// One low-rank step as PEFT has it: D = (B A) s, in the format of B where that has 16 bits.
template <class Acc>
class peft_delta {
 public:
  peft_delta(const char* operation, const low_rank_step& l, index_t out_features,
             index_t in_features)
      : rows_of_weight_(l.rows.of(out_features)), scale_(l.strength * l.factors.scaling()) {
    l.factors.visit([&]<class T>(const adapter_view<T>& one) {
      const auto each = without_scaling(one);  // in the accumulator of the factors
      if constexpr (std::is_same_v<T, double>)
        rows_ = std::make_unique<delta_rows<double>>(operation, each, rows_of_weight_.count,
                                                     in_features, 1.0);
      else
        rows_ = std::make_unique<delta_rows<float>>(operation, each, rows_of_weight_.count,
                                                    in_features, 1.0);
      format_ = std::type_identity<T>();
    });
  }

  const row_range& rows() const { return rows_of_weight_; }
  /// D of the block's rows, which are among rows(), to its scratch.
  void write(const row_block<Acc>& block) const {
    std::visit([&](const auto& rows, auto format) { write_in(*rows, format, block); }, rows_,
               format_);
  }

 private:
  template <class A, class T>
  void write_in(const delta_rows<A>& rows, std::type_identity<T>,
                const row_block<Acc>& block) const {
    if constexpr (sizeof(A) > sizeof(Acc)) {
      static_cast<void>(rows),
          static_cast<void>(block);  // double factors are accumulated in double
    } else {
      A* const own = reinterpret_cast<A*>(block.scratch);
      rows.write(block.first - rows_of_weight_.first, block.count, block.first_col, block.cols, own,
                 block.stride, block.ahead);
      for (index_t i = block.count; i-- > 0;) {  // the last row first: Acc may be wider than A
        A* const from = own + i * block.stride;
        const A s = static_cast<A>(scale_);
        for (index_t k = 0; k < block.cols; ++k) from[k] *= s;
        if constexpr (sizeof(T) == 2) round_all<T>(from, block.cols);
        if constexpr (!std::is_same_v<A, Acc>)
          widen_row(from, block.cols, block.scratch + i * block.stride);
      }
    }
  }
  /// Floats become doubles in memory that both share, from the end. By memcpy: a compiler takes it
  /// that floats and doubles lie apart.
  template <class A>
  static void widen_row(const A* from, index_t count, Acc* to) {
    constexpr index_t most = 64;
    for (index_t end = count; end > 0;) {
      const index_t some = (end - 1) % most + 1;
      A part[most];
      end -= some;
      std::memcpy(part, from + end, static_cast<std::size_t>(some) * sizeof(A));
      Acc wide[most];
      for (index_t k = 0; k < some; ++k) wide[k] = static_cast<Acc>(part[k]);
      std::memcpy(to + end, wide, static_cast<std::size_t>(some) * sizeof(Acc));
    }
  }

  row_range rows_of_weight_;
  double scale_;
  std::variant<std::unique_ptr<delta_rows<float>>, std::unique_ptr<delta_rows<double>>> rows_;
  std::variant<std::type_identity<float>, std::type_identity<double>, std::type_identity<float16>,
               std::type_identity<bfloat16>>
      format_;
};

/// The steps as PEFT takes them: rows are rounded to T after each. DeltaFirst: deltas are rounded
/// to T before they are added.
template <class Acc, class T>
class peft_change {
 public:
  /// Throws as row_change.
  peft_change(const char* operation, std::span<const step<Acc>> steps, index_t out_features,
              index_t in_features, double sign, bool delta_first)
      : sign_(sign == unmerging ? Acc(-1) : Acc(1)), delta_first_(delta_first) {
    for (std::size_t n = 0; n < steps.size(); ++n) {
      const auto& one = steps[sign == unmerging ? steps.size() - 1 - n : n];
      check_step(operation, one, out_features, in_features);
      if (!changes_weight(one)) continue;
      if (const auto* low = std::get_if<low_rank_step>(&one))
        parts_.emplace_back(peft_delta<Acc>(operation, *low, out_features, in_features));
      else if (const auto* delta = std::get_if<delta_step<Acc>>(&one))
        parts_.emplace_back(delta);
      else
        parts_.emplace_back(row_change<Acc>(operation, std::span<const step<Acc>>(&one, 1),
                                            out_features, in_features, sign));
    }
  }

  bool empty() const { return parts_.empty(); }
  bool needs_scratch() const { return true; }
  bool needs_rows() const {
    return std::any_of(parts_.begin(), parts_.end(), [](const auto& one) {
      if (const auto* change = std::get_if<row_change<Acc>>(&one)) return change->needs_rows();
      return std::holds_alternative<const delta_step<Acc>*>(one);
    });
  }
  bool touches(index_t, index_t) const { return true; }
  void operator()(const row_block<Acc>& block) const {
    for (const auto& one : parts_) std::visit([&](const auto& p) { run(p, block); }, one);
  }

 private:
  void run(const peft_delta<Acc>& delta, const row_block<Acc>& all) const {
    const row_block<Acc> block = within(all, delta.rows());
    if (block.count <= 0) return;
    delta.write(block);
    add(block);
  }
  void run(const delta_step<Acc>* delta, const row_block<Acc>& all) const {
    const row_block<Acc> block = within(all, delta->rows);
    if (block.count <= 0) return;
    delta->source->rows(block.first - delta->rows.first, block.count, block.scratch, block.stride);
    for (index_t i = 0; i < block.count; ++i)
      for (index_t k = 0; k < block.cols; ++k)
        block.scratch[i * block.stride + k] *= static_cast<Acc>(delta->scale);
    add(block);
  }
  void add(const row_block<Acc>& block) const {
    for (index_t i = 0; i < block.count; ++i) {
      Acc *const row = block.rows + i * block.stride, *const D = block.scratch + i * block.stride;
      if (delta_first_) round_all<T>(D, block.cols);
      for (index_t k = 0; k < block.cols; ++k) row[k] += sign_ * D[k];
      round_all<T>(row, block.cols);
    }
  }
  void run(const row_change<Acc>& change, const row_block<Acc>& block) const {
    change(block);
    for (index_t i = 0; i < block.count; ++i)
      round_all<T>(block.rows + i * block.stride, block.cols);
  }

  Acc sign_;
  bool delta_first_;
  std::vector<std::variant<peft_delta<Acc>, const delta_step<Acc>*, row_change<Acc>>> parts_;
};

/// The one step that changes the weight, if it is low-rank and its delta is formed in Acc; else
/// null.
template <class Acc>
const low_rank_step* only_low_rank(std::span<const step<Acc>> steps) {
  const low_rank_step* result = nullptr;
  for (const auto& one : steps) {
    if (!changes_weight(one)) continue;
    const auto* low = std::get_if<low_rank_step>(&one);
    if (low == nullptr || result != nullptr || !low->rows.all()) return nullptr;
    result = low;
  }
  if (result == nullptr) return nullptr;
  const bool in_acc = result->factors.visit(
      []<class T>(const adapter_view<T>&) { return std::is_same_v<accumulator_t<T>, Acc>; });
  return in_acc ? result : nullptr;
}

/// One adapter as PEFT merges it, in register tiles: one pass at the speed of a merge.
template <class Acc, class T, storage_order Order>
tally merge_one_as_peft(const char* operation, double sign, const matrix_view<T, Order>& W,
                        const low_rank_step& l, bool delta_first) {
  check_low_rank<Acc>(operation, l, W.rows(), W.cols());
  return l.factors.visit([&]<class F>(const adapter_view<F>& one) -> tally {
    if constexpr (!std::is_same_v<accumulator_t<F>, Acc>) {
      return {};
    } else {
      const update_of_rows<Acc, T, Order> update(operation, 1.0, W, without_scaling(one));
      return update.template run<writing::in_place>(peft_sum<Acc, storage_t<T>, F>{
          static_cast<Acc>(l.strength * l.factors.scaling()), sign == unmerging, delta_first});
    }
  });
}

template <class P, class M, class... L>
merge_report merge_as_peft(const char* operation, double sign, M& W, const L&... l) {
  return with_steps(
      operation, sign, W,
      [&]<class Acc>(auto& weight, std::span<const step<Acc>> steps) {
        using view = bare<decltype(weight)>;
        refuse_shifts(operation, steps);
        refuse_step_overlap(operation, weight, steps);
        const bool delta_first = sign == unmerging || std::same_as<P, rounding::peft_safe_policy>;
        if (const low_rank_step* const only = only_low_rank<Acc>(steps))
          return report_of(merge_one_as_peft<Acc>(operation, sign, weight, *only, delta_first),
                           weight.size());
        const peft_change<Acc, storage_t<typename view::value_type>> change(
            operation, steps, weight.rows(), weight.cols(), sign, delta_first);
        if (change.empty()) return untouched(weight.size());
        return report_of(row_pass<Acc>(rows_of<Acc>(weight), change), weight.size());
      },
      l...);
}

}  // namespace detail

/// W := PEFT's bits after merging the adapters one after the other; see the top of this file.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::any_adapters<L> && ...)
merge_report merge(P, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_as_peft<P>("merge", detail::merging, W, l...);
}

/// W := PEFT's bits after unmerging adapters that were merged in the order given: the last one
/// first.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::any_adapters<L> && ...)
merge_report unmerge(P, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  return detail::merge_as_peft<P>("unmerge", detail::unmerging, W, l...);
}

}  // namespace lora::inline LORA_DETAIL_ABI
