// SPDX-License-Identifier: Apache-2.0
//
// From alpha and rank to the factor s of delta weight = s * B * A.
#pragma once

#include <cmath>
#include <concepts>
#include <string>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/error.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// How alpha becomes s.
enum class scaling_rule {
  standard,  ///< s = alpha / rank (Hu et al., arXiv 2106.09685)
  /// S = alpha / sqrt(rank) (rsLoRA: Kalajdzievski, arXiv 2312.03732; PEFT's use_rslora).
  rank_stabilized,
  fixed,  ///< s = alpha, whatever the rank (MLX's `scale`; a scaling that was resolved before)
};

namespace detail {
/// A number that must be given: it has no default, so `{}` and `{.rule = ...}` do not compile.
class required_number {
 public:
  template <class A>
    requires std::is_arithmetic_v<A>
  constexpr required_number(
      A value)  // NOLINT(google-explicit-constructor): written as {.alpha = 16}
      : value_(static_cast<double>(value)) {}
  constexpr operator double() const { return value_; }  // NOLINT(google-explicit-constructor)

 private:
  double value_;
};
}  // namespace detail

/// alpha (PEFT's lora_alpha) by name, and the rule: {.alpha = 16} or {.alpha = 4, .rule =
/// scaling_rule::rank_stabilized}.
struct scaling {
  detail::required_number alpha;
  scaling_rule rule = scaling_rule::standard;
};

/// s for a rank, in double as PEFT computes it (one division, and one square root for
/// rank_stabilized). Throws value_error when alpha is not finite, the rank is negative, or the rank
/// is 0 and the rule divides by it.
inline double resolve(const scaling& scale, index_t rank) {
  const double alpha = scale.alpha;
  if (!detail::is_finite(alpha)) detail::raise_value("scaling", "alpha is not finite");
  if (rank < 0) detail::raise_value("scaling", "rank " + std::to_string(rank) + " is negative");
  if (scale.rule == scaling_rule::fixed) return alpha;
  if (rank == 0)
    detail::raise_value(
        "scaling",
        "rank 0 leaves alpha / rank undefined; give the factor itself with scaling_rule::fixed");
  const auto r = static_cast<double>(rank);
  return scale.rule == scaling_rule::standard ? alpha / r : alpha / std::sqrt(r);
}

}  // namespace lora::inline LORA_DETAIL_ABI
