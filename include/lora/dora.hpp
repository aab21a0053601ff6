// SPDX-License-Identifier: Apache-2.0
//
// DoRA: a low-rank difference, and a magnitude m for each output.     W' = diag(m / n) (W + D),
//                                                                     n_i = |row i of (W + D)|
//
//   const lora::dora_adapter<float> style{A, B, {.alpha = 16}, m};
//   lora::merge(W, style);                                 // the merged weight
//   const auto layer = lora::mixed(W, style);              // n is computed once, from W now
//   y.noalias() = W * x;   lora::apply(x, y, layer);       // your product, our correction
//   lora::forward(lora::with_bias(W, b), x, y, layer);     // one product; a bias is not scaled
//
// A kind of two steps (steps.hpp): low_rank, then the gain f = m / n. Several adapters act in
// order, each n from the W before any of them and its own delta alone:
//   W'_0 = W,  W'_k = diag(f_k) (W'_{k-1} + D_k)        (f_k = 1 for an adapter without magnitude)
// The order matters, as it does in PEFT. Strength w means n and D of w * s; the magnitude stays, as
// in PEFT.
//   shapes   W out_features x in_features, any storage order; m out_features. Weights stored in x
//            out, and embeddings, are passed as their transpose; a convolution's as out x (in *
//            kernel). (An entry of a PEFT file knows how W is stored, and takes it so.)
//   rounding the norms in double, f once to the accumulator (float; double if anything is double);
//            then (W + D) f in the accumulator, each step rounding once, and once to the stored
//            scalar.
//   error    f is off by e = |row of gamma_{r+2} d| / n, relative, d = |s| |B| |A|; where W + D
//            cancels, e is large, and it reaches every column of the row. With K magnitudes in the
//            call, g_k = f_k ... f_K, g_0 that of W, and 1 + P_k the product over f_j from k on of
//            about 1 + e_j + (in + 5) 2^-53: |merged - exact| <= u_s |exact| + (1+u_s) E + eta_s/2,
//              E = (P_0 + (1+P_0) gamma_{3K+1}) |g_0 W|
//                  + sum (P_k + (1+P_k) gamma_{R+3K+3}) |g_k| d_k + underflow,
//            with fewer roundings for later adapters. docs/numerics.md derives it, and has the same
//            for unmerge, forward, apply, embed and apply_through; mixed_bounds.hpp computes them.
//   overflow a factor m / n that is not finite is refused; merge and unmerge report, mixing does
//            not.
//   cost     the norms: 2 r out in FLOPs and one pass over W; then as merge: two passes over W.
//   throws   value_error for a row of W + D that is zero (PEFT divides by it), a magnitude, norm or
//            quotient that is not finite; shape_error; before anything is written. unmerge(W, l)
//            always: its norms are those of W before the merge; keep what mixed(W, l) returned
//            then, and unmerge that.
// Liu et al., arXiv 2402.09353; PEFT 0.21, tuners/lora/dora.py and variants.py (the norm from the
// base weight as it was before any merge: peft#3609).
#pragma once

#include <cmath>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/detail/row_norms.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {

/// magnitude / norm as a finite Acc; value_error where it is not defined or not held.
template <class Acc>
Acc gain_of(const char* operation, index_t output, double magnitude, const scaled_norm& norm) {
  const auto refuse = [&](const std::string& what) {
    raise_value(operation, "output " + std::to_string(output) + " has " + what +
                               ", so that magnitude / norm is not defined");
  };
  if (!is_finite(magnitude)) refuse("a magnitude that is not finite");
  if (!is_finite(norm.value) || is_zero(norm.value))
    refuse("a row of W + delta whose norm is " + std::to_string(norm.value));
  const double result = norm.exponent == 0 ? magnitude / norm.value
                                           : std::ldexp(magnitude / norm.value, -norm.exponent);
  if (!is_finite(result))
    refuse("a row of W + delta whose norm is so small that magnitude / norm overflows");
  if (!is_finite(static_cast<Acc>(result)))
    raise_value(operation, "output " + std::to_string(output) + " has magnitude / norm = " +
                               std::to_string(result) + ", which the accumulator does not hold");
  return static_cast<Acc>(result);
}

/// m_i / |row i of (W + delta)| for all rows.
template <class Acc, class T>
std::vector<Acc> gains_of(const step_request<Acc>& request, const low_rank_step& l,
                          const std::vector<T>& magnitude) {
  const std::vector<scaled_norm> norms = norms_of_rows<Acc>(request.operation, *request.weight, l);
  std::vector<Acc> gains(norms.size());
  for (std::size_t i = 0; i < norms.size(); ++i)
    gains[i] = gain_of<Acc>(request.operation, static_cast<index_t>(i), widen<double>(magnitude[i]),
                            norms[i]);
  return gains;
}

/// The steps of factors with a magnitude.
template <class Acc, class T>
std::vector<step<Acc>> dora_steps(const step_request<Acc>& request, const any_factors& factors,
                                  const std::vector<T>& magnitude) {
  if (request.weight == nullptr)
    raise_value(request.operation,
                "a DoRA adapter scales the base's part, too, by norms of W as it was before any "
                "merge: keep what "
                "lora::mixed(W, adapters...) returned then, and pass that");
  const low_rank_step low{factors, request.strength};
  std::vector<step<Acc>> all;
  if (!is_zero(low.strength * factors.scaling())) all.push_back(low);
  all.push_back(gain_step<Acc>{.gain = gains_of(request, low, magnitude)});
  return all;
}

}  // namespace detail

/// Factors with their scaling, and a magnitude for each output. Immutable; copies share the
/// factors. It is not low_rank: what it adds depends on W.
template <scalar T>
class [[nodiscard]] dora_adapter {
 public:
  using value_type = T;

  /// Throws as adapter; shape_error when there is not one magnitude for each output.
  template <matrix_like A, matrix_like B>
  dora_adapter(const A& lora_A, const B& lora_B, const lora::scaling& scale,
               std::vector<T> magnitude)
      : dora_adapter(lora::adapter<T>(lora_A, lora_B, scale), std::move(magnitude)) {}
  dora_adapter(lora::adapter<T> factors, std::vector<T> magnitude)
      : factors_(std::make_shared<const lora::adapter<T>>(std::move(factors))),
        magnitude_(std::make_shared<const std::vector<T>>(std::move(magnitude))) {
    if (static_cast<index_t>(magnitude_->size()) != factors_->out_features())
      detail::raise_shape("dora_adapter", std::to_string(magnitude_->size()) + " magnitudes for " +
                                              std::to_string(factors_->out_features()) +
                                              " outputs");
  }

  const lora::adapter<T>& factors() const { return *factors_; }
  const std::vector<T>& magnitude() const { return *magnitude_; }
  index_t out_features() const { return factors_->out_features(); }
  index_t in_features() const { return factors_->in_features(); }

  /// The delta, then the gains m / n. At strength 0 the factors are not read and the gains stay, as
  /// in PEFT.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return detail::dora_steps(request, any_factors(factors_), *magnitude_);
  }

 private:
  std::shared_ptr<const lora::adapter<T>> factors_;
  std::shared_ptr<const std::vector<T>> magnitude_;
};
static_assert(adapter_kind<dora_adapter<float>> && detail::dora_like<dora_adapter<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
