// SPDX-License-Identifier: Apache-2.0
//
// How far the results of rounding.hpp may be from exact arithmetic; see bounds.hpp.
//
//   merge_bound(rounding::as_peft, W, l...)       of merge(rounding::as_peft, W, l...); W as it is
//   before
//                                              the merge
//   merge_bound(rounding::as_peft_safe, W, l...)  of merge(rounding::as_peft_safe, W, l...)
//   unmerge_bound(either, W, l...)             of unmerge(either, W, l...)
//
//   formula  docs/numerics.md, "PEFT's rounding". Adapters are so many steps, each with the bound
//            of the weight that it meets, at most |W| + what the steps before it added; their
//            errors add.
//   result   a weight_bound: elements and rows when they are asked for, nothing of W's size.
//   cost     16 R (in + out) bytes; 2 R FLOPs for an element, 2 R out in for all
//   throws   as the verb
#pragma once

#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/bounds.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/rounding.hpp"

LORA_DETAIL_QUIET_BEGIN
namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// What a step adds to a delta's own roundings.
struct policy_step {
  rounding_unit accumulator;  ///< of B A
  rounding_unit factor;       ///< of D: B's format where that has 16 bits
  rounding_unit first;        ///< of D once more: W's format under peft_safe
  double sum;                 ///< u of the format in which W and D are added
  rounding_unit stored;       ///< of W, where that is another format

  /// The errors of W after this step: of size, |W| before it, and d = |s| |B| |A|; underflow is
  /// that of D.
  template <class T>
  T of(const T& size, const T& d, const T& underflow, index_t rank) const {
    const T t = gamma(rank + 2, accumulator.u) * d + underflow;
    const T once = t + factor.u * (d + t) + factor.eta / 2;
    const T twice = once + first.u * (d + once) + first.eta / 2;
    const T e = twice + sum * (size + d + twice);
    return e + stored.u * (size + d + e) + stored.eta / 2;
  }
};

/// weight_error for adapters that are rounded into W one after the other.
class stepwise_error {
 public:
  using block = weight_error::block;
  stepwise_error(std::vector<error_part> parts, std::vector<policy_step> steps, index_t in)
      : parts_(std::move(parts)), steps_(std::move(steps)), in_(in) {}

  template <class Block>
  void of_rows(index_t first, Block& size, Block& error) const {
    using array = Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const index_t rows = size.rows();
    array reached = size.array(), sum = array::Zero(rows, in_);
    for (std::size_t k = 0; k < parts_.size(); ++k) {
      const auto& p = parts_[k];
      array d = array::Zero(rows, in_), underflow = array::Constant(rows, in_, underflow_of(k));
      if (p.rank() != 0) {
        const Block B = p.B.middleRows(first, rows).cwiseAbs();
        d = (std::abs(p.s) * multiplied(B, p.A.cwiseAbs())).array();
        const double each = p.flushed * std::abs(p.s);
        if (each != 0) {
          underflow.rowwise() += each * p.A.cwiseAbs().colwise().sum().array();
          underflow.colwise() += each * B.rowwise().sum().array();
        }
      }
      const array e = steps_[k].of(reached, d, underflow, p.rank());
      sum += e;
      reached += d + e;
    }
    error = sum.matrix();
    size = reached.matrix();
  }
  double of_element(index_t row, index_t col, double W) const {
    double reached = std::abs(W), sum = 0;
    for (std::size_t k = 0; k < parts_.size(); ++k) {
      const auto& p = parts_[k];
      double d = 0, operands = 0;
      for (index_t r = 0; r < p.rank(); ++r) {
        d += std::abs(p.B(row, r)) * std::abs(p.A(r, col));
        operands += std::abs(p.B(row, r)) + std::abs(p.A(r, col));
      }
      d *= std::abs(p.s);
      const double e = steps_[k].of(
          reached, d, underflow_of(k) + p.flushed * std::abs(p.s) * operands, p.rank());
      sum += e;
      reached += d + e;
    }
    return sum;
  }

 private:
  double underflow_of(std::size_t k) const {
    const auto& p = parts_[k];
    const auto rank = static_cast<double>(p.rank());
    return steps_[k].accumulator.eta * (std::abs(p.s) * rank + 1) +
           p.flushed * std::abs(p.s) * 2 * rank;
  }

  std::vector<error_part> parts_;
  std::vector<policy_step> steps_;
  index_t in_;
};

template <class M, class... L>
auto policy_bound(const char* operation, bool delta_first, double sign, const M& W, const L&... l) {
  const default_environment environment;
  const auto weight = rows_of_weight(W);
  using rows = std::remove_const_t<decltype(weight)>;
  using T = storage_t<typename rows::value_type>;
  const auto each = each_of(l...);
  checked_total_rank(operation, each, weight.rows(), weight.cols());
  std::vector<error_part> parts;
  std::vector<policy_step> steps;
  each([&]<class One>(const One& one) {
    if (!is_read(one)) return;
    using acc = accumulator_t<One>;
    using factor = storage_t<factor_scalar_B<One>>;
    using delta = std::conditional_t<sizeof(factor) == 2, factor, acc>;
    using sum = accumulator_t<T, delta>;
    auto part = error_part_of<acc>(one);
    // B A is formed without s, by dot products for every s.
    part.flushed = part.rank() >= least_rank_of_dots ? flush_threshold_of_delta<acc, One>() : 0;
    parts.push_back(std::move(part));
    steps.push_back({.accumulator = unit_of<acc>(),
                     .factor = unit_of_stored<delta, acc>(),
                     .first = delta_first ? unit_of_stored<T, delta>() : rounding_unit{},
                     .sum = unit_of<sum>().u,
                     .stored = unit_of_stored<T, sum>()});
  });
  return weight_bound<float, rows, stepwise_error>(
      weight, {std::move(parts), std::move(steps), weight.cols()}, sign);
}

}  // namespace detail

/// Of merge with a policy; see the top of this file.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
auto merge_bound(P, const M& W, const L&... l) {
  return detail::policy_bound("merge_bound", std::same_as<P, rounding::peft_safe_policy>, 1, W,
                              l...);
}
/// Of unmerge with a policy, which rounds each delta first.
template <rounding_policy P, class M, class... L>
  requires matrix_like<M> && (detail::adapters<L> && ...)
auto unmerge_bound(P, const M& W, const L&... l) {
  return detail::policy_bound("unmerge_bound", true, -1, W, l...);
}

}  // namespace lora::inline LORA_DETAIL_ABI
LORA_DETAIL_QUIET_END
