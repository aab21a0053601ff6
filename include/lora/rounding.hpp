// SPDX-License-Identifier: Apache-2.0
//
// merge(rounding::peft, W, l...)        W := round(W + D_1), then W := round(W + D_2), ...      D_i the delta of adapter i
// merge(rounding::peft_safe, W, l...)   W := round(W + round(D_1)), ...                         D_i rounded to W's format first
// unmerge(either, W, l...)              W := round(W - round(D_n)), ..., W := round(W - round(D_1))
// add_delta(either, W, D)               one such step for a delta that is there already; subtract_delta(W, D)
//
// What Hugging Face PEFT stores when it merges (peft: safe_merge=False, the default; peft_safe: safe_merge=True), for those
// who must reproduce it. merge without a policy is more accurate: it rounds once for all adapters.
//   delta    D = (B * A) * s: the product in float (double if a factor is double), then one multiplication by s, then rounded
//            to B's format when that has 16 bits, as get_delta_weight does on a CPU.
//   exact    from D on, bit for bit what PEFT stores: the sum in the wider of the two formats, nearest even. The product
//            itself is a chain over the ranks here, while torch's order of summation is not specified: D agrees with torch's
//            within gamma_{r+2} * |s| |B| |A|, and bit for bit where no step rounds (for factors of bfloat16: and nothing is
//            subnormal, see smallest_in_delta).
//   error    of one adapter |result - exact| <= u_s |exact| + (1+u_s) (e_D + u (|W| + |D| + e_D)) +
//            eta_s/2, with e_D the error of D: t + u_F (|D| + t) + eta_F/2, t = gamma_{r+2} |s| |B|
//            |A| + eta (|s| r + 1), F the format of B. peft_safe rounds D to W's format, too.
//            Several adapters add up (docs/numerics.md).
//   drift    peft adds D and subtracts round(D), so a weight in 16 bits moves a little with each merge and unmerge;
//            lora::linear gives the base back bit for bit.
//   shapes, aliasing, throws   as merge (merge.hpp); but std::bad_alloc may come after some rows are written
//   cost     2 r out in FLOPs and one pass over W per adapter; deltas of 64 rows at a time in memory.
// huggingface/peft 0.21, tuners/lora/layer.py: Linear.merge, Linear.unmerge, get_delta_weight.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lora/adapter.hpp"
#include "lora/delta.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/merge.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace rounding {

struct peft_policy {};
struct peft_safe_policy {};
inline constexpr peft_policy peft{};            ///< PEFT's merge with safe_merge=False
inline constexpr peft_safe_policy peft_safe{};  ///< PEFT's merge with safe_merge=True

}  // namespace rounding

template <class P>
concept rounding_policy = std::same_as<P, rounding::peft_policy> || std::same_as<P, rounding::peft_safe_policy>;

namespace rounding_detail {

/// W(i, j) := step(W(i, j), D(i, j)) and counts what became non-finite. D has W's shape.
template <class View, class D, class Step>
std::size_t each_element(const View& W, const D& delta, const Step& step) {
  std::size_t became_nonfinite = 0;
  for (index_t i = 0; W.cols() != 0 && i < W.rows(); ++i)
    for (index_t j = 0; j < W.cols(); ++j) {
      auto& element = W(i, j);
      const bool was_finite = lora::detail::is_finite(element);
      element = step(element, delta(i, j));
      if (was_finite && !lora::detail::is_finite(element)) ++became_nonfinite;
    }
  return became_nonfinite;
}

/// The format in which two stored formats are added: the wider one; float for two different 16-bit formats.
template <class T, class D>
using sum_t = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<D, double>, double, float>;

template <class T, class D>
T rounded_sum(const T& w, const D& d, bool delta_first, double sign) {
  using acc = sum_t<T, D>;
  auto delta = lora::detail::widen<acc>(d);
  if (delta_first) delta = lora::detail::widen<acc>(lora::detail::narrow<T>(delta));
  return lora::detail::narrow<T>(lora::detail::widen<acc>(w) + static_cast<acc>(sign) * delta);
}

/// (B * A) * s for some rows of B, in the format in which PEFT has it.
template <class L>
auto stored_delta(const L& l, index_t row, index_t rows) {
  using acc = accumulator_t<L>;
  using factor = lora::detail::storage_t<lora::detail::factor_scalar_B<L>>;
  using stored = std::conditional_t<sizeof(factor) == 2, factor, acc>;
  const auto& lora_A = l.lora_A();
  const auto& lora_B = l.lora_B();
  const auto A = as_matrix(lora_A);
  const auto B = as_matrix(lora_B).middle_rows(row, rows);
  const auto product = delta_weight(basic_adapter(A, B, {.alpha = 1, .rule = scaling_rule::fixed}));
  Eigen::Matrix<stored, Eigen::Dynamic, Eigen::Dynamic> result(product.rows(), product.cols());
  for (index_t k = 0; k < product.size(); ++k)
    result.data()[k] = lora::detail::narrow<stored>(product.data()[k] * static_cast<acc>(static_cast<double>(l.scaling())));
  return result;
}

template <class View, class L>
std::size_t step(const View& W, const L& l, bool delta_first, double sign) {
  if (!lora::detail::is_read(l) || W.cols() == 0) return 0;
  using value = typename View::value_type;
  constexpr index_t block = 64;
  std::size_t became_nonfinite = 0;
  for (index_t row = 0; row < W.rows(); row += block) {
    const index_t rows = std::min(block, W.rows() - row);
    const auto delta = stored_delta(l, row, rows);
    became_nonfinite += each_element(W.middle_rows(row, rows), delta, [&](const value& w, const auto& d) {
      return rounded_sum<value>(w, d, delta_first, sign);
    });
  }
  return became_nonfinite;
}

template <class View, class Each>
void check(const char* operation, const View& W, const Each& each) {
  lora::detail::checked_total_rank(operation, each, W.rows(), W.cols());
  lora::detail::refuse_factor_overlap(operation, "W", W, each);
}

}  // namespace rounding_detail

/// W := PEFT's bits after merging the adapters one after the other; see the top of this file.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
merge_report merge(P, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto weight = detail::output_view(W);
  const auto each = detail::each_of(l...);
  rounding_detail::check("merge", weight, each);
  merge_report report;
  each([&](const auto& one) {
    report.became_nonfinite += rounding_detail::step(weight, one, std::same_as<P, rounding::peft_safe_policy>, 1.0);
  });
  return report;
}

/// W := PEFT's bits after unmerging adapters that were merged in the order given: the last one first.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
merge_report unmerge(P, M&& W, const L&... l) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto weight = detail::output_view(W);
  const auto each = detail::each_of(l...);
  rounding_detail::check("unmerge", weight, each);
  index_t remaining = 0;
  each([&](const auto&) { ++remaining; });
  merge_report report;
  // Walked anew for each step: a range may make its adapters as it is walked, so none can be kept for later.
  while (remaining-- > 0) {
    index_t k = 0;
    each([&](const auto& one) {
      if (k++ == remaining) report.became_nonfinite += rounding_detail::step(weight, one, true, -1.0);
    });
  }
  return report;
}

/// W := round(W + D) or round(W + round(D)) for a delta of W's shape. Throws shape_error.
template <rounding_policy P, class M, class D>
  requires matrix_like<M> && matrix_like<D>
merge_report add_delta(P, M&& W, const D& delta) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto weight = detail::output_view(W);
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  const auto from = as_matrix(delta);
  if (from.rows() != weight.rows() || from.cols() != weight.cols())
    detail::raise_shape("add_delta", "W is " + detail::shape_text(weight.rows(), weight.cols()) + " and the delta is " +
                                         detail::shape_text(from.rows(), from.cols()));
  detail::refuse_overlap("add_delta", "W", weight, "the delta", from);
  return {rounding_detail::each_element(weight, from, [](const value& w, const auto& d) {
    return rounding_detail::rounded_sum<value>(w, d, std::same_as<P, rounding::peft_safe_policy>, 1.0);
  })};
}

/// W := round(W - round(D)), as PEFT unmerges. Throws shape_error.
template <class M, class D>
  requires matrix_like<M> && matrix_like<D>
merge_report subtract_delta(M&& W, const D& delta) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto weight = detail::output_view(W);
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  const auto from = as_matrix(delta);
  if (from.rows() != weight.rows() || from.cols() != weight.cols())
    detail::raise_shape("subtract_delta", "W is " + detail::shape_text(weight.rows(), weight.cols()) + " and the delta is " +
                                              detail::shape_text(from.rows(), from.cols()));
  detail::refuse_overlap("subtract_delta", "W", weight, "the delta", from);
  return {rounding_detail::each_element(
      weight, from, [](const value& w, const auto& d) { return rounding_detail::rounded_sum<value>(w, d, true, -1.0); })};
}

}  // namespace lora::inline LORA_DETAIL_ABI
