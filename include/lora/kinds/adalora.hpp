// SPDX-License-Identifier: Apache-2.0
//
// AdaLoRA: a low-rank difference with a value for each rank, of which training kept some.
//
//   W' = W + w alpha / (initial_rank + 1e-5) lora_B diag(lora_E) lora_A
//
//   const lora::adalora_adapter<float> style{A, B, E, {.alpha = 16, .initial_rank = 12}};
//
//   shapes   lora_A rank x in_features, lora_B out_features x rank, lora_E rank values; W
//            out_features x in_features.
//   scaling  initial_rank is PEFT's init_r, not the rank that training left (rank_pattern): PEFT
//            keeps the scaling of the start. An alpha of 0 or less counts as the rank, as in PEFT.
//   strength multiplies the scaling; at strength 0, and at rank 0, there is no step.
//   rounding lora_E is multiplied into lora_A in the accumulator's format: one rounding of each
//            element (none for float16 and bfloat16, whose products float holds, but for overflow
//            and underflow). lora_B is exact. The rest is a low_rank step.
//   error    as that of an adapter with these factors (docs/numerics.md), with gamma_{rank+1} for
//            gamma_{rank} wherever lora_A takes part. The scaling is off by 2 * 2^-53, relative.
//            (PEFT rounds initial_rank + 1e-5 to float.)
//   cost     steps copies the factors, in accumulators: rank (in + out); then as any adapter.
//   throws   shape_error when the ranks differ or initial_rank is below the rank; value_error when
//            alpha is not finite; std::bad_alloc.
// Zhang et al., arXiv 2303.10512; PEFT 0.21, tuners/adalora/layer.py and model.py.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/scaling.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// PEFT's lora_alpha and init_r, both by name.
struct adalora_scaling {
  detail::required_number alpha;
  index_t initial_rank;
};

/// lora_A, lora_B and lora_E of one layer, in the format that they are stored in. Owns them;
/// immutable. Invariant: they have one rank, at most the initial one, and the scaling is finite.
/// Values are not looked at. Not low_rank: a verb that read lora_A and lora_B alone would leave
/// lora_E out.
template <scalar T>
class [[nodiscard]] adalora_adapter {
 public:
  using value_type = T;

  /// Copies the factors, or takes row-major ones in T that are moved in. A narrower scalar is
  /// widened exactly; a wider one is refused at compile time.
  template <class A, class B>
    requires matrix_like<std::remove_cvref_t<A>> && matrix_like<std::remove_cvref_t<B>>
  adalora_adapter(A&& lora_A, B&& lora_B, std::vector<T> lora_E, const adalora_scaling& scale)
      : factors_(std::forward<A>(lora_A), std::forward<B>(lora_B),
                 resolved(scale, static_cast<index_t>(lora_E.size()))),
        lora_E_(std::move(lora_E)) {
    if (static_cast<index_t>(lora_E_.size()) != rank())
      detail::raise_shape("adalora_adapter", "lora_E has " + std::to_string(lora_E_.size()) +
                                                 " values and the rank is " +
                                                 std::to_string(rank()));
  }

  /// lora_A and lora_B without lora_E. Their scaling is alpha / (initial_rank + 1e-5).
  const adapter<T>& factors() const { return factors_; }
  const std::vector<T>& lora_E() const { return lora_E_; }
  index_t rank() const { return factors_.rank(); }
  index_t out_features() const { return factors_.out_features(); }
  index_t in_features() const { return factors_.in_features(); }

  /// One low_rank step, with diag(lora_E) lora_A as its lora_A.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (detail::is_zero(request.strength) || rank() == 0) return {};
    const detail::default_environment environment;
    using matrix = detail::row_major_matrix<Acc>;
    const auto widened = [](const T& value) { return detail::widen<double>(value); };
    const auto A = matrix::NullaryExpr(rank(), in_features(), [&](index_t i, index_t j) {
      const double e = widened(lora_E_[static_cast<std::size_t>(i)]);
      return static_cast<Acc>(e * widened(factors_.lora_A()(i, j)));
    });
    const auto B = matrix::NullaryExpr(out_features(), rank(), [&](index_t i, index_t j) {
      return static_cast<Acc>(widened(factors_.lora_B()(i, j)));
    });
    const lora::scaling scale{.alpha = factors_.scaling(), .rule = scaling_rule::fixed};
    return {low_rank_step{any_factors(std::make_shared<const adapter<Acc>>(A, B, scale)),
                          request.strength}};
  }

 private:
  static lora::scaling resolved(const adalora_scaling& scale, index_t rank) {
    const double alpha = scale.alpha;
    if (!detail::is_finite(alpha)) detail::raise_value("adalora_adapter", "alpha is not finite");
    if (scale.initial_rank < rank)
      detail::raise_shape("adalora_adapter", "the rank is " + std::to_string(rank) +
                                                 " and initial_rank (init_r) is " +
                                                 std::to_string(scale.initial_rank) +
                                                 "; training only takes ranks away");
    const double numerator = alpha > 0 ? alpha : static_cast<double>(rank);
    return {.alpha = numerator / (static_cast<double>(scale.initial_rank) + 1e-5),
            .rule = scaling_rule::fixed};
  }

  adapter<T> factors_;
  std::vector<T> lora_E_;
};

static_assert(!low_rank<adalora_adapter<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
