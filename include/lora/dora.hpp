// SPDX-License-Identifier: Apache-2.0
//
// DoRA: a low-rank difference, and a magnitude m for each output.     W' = diag(m / n) (W + D),  n_i = |row i of (W + D)|
//
//   const lora::dora_adapter<float> style{A, B, {.alpha = 16}, m};
//   lora::merge(W, style);                                 // the merged weight
//   const auto layer = lora::mixed(W, style);              // n is computed once, from W as it is now
//   y.noalias() = W * x;   lora::apply(x, y, layer);       // your product (without bias), our correction
//   lora::forward(lora::with_bias(W, b), x, y, layer);     // the layer; a bias is not scaled
//
// It is not additive: the base's own part is scaled too. mixed(W, l...) takes any number of adapters, with and without
// magnitude, in order. With f = m / n (1 for one without magnitude), each n from the pristine W and its own delta alone:
//   W'_0 = W,  W'_k = diag(f_k) (W'_{k-1} + D_k),     so that    W' = diag(g_0) W + sum of diag(g_k) D_k,  g_k = f_k ... f_n
// The order matters, as it does in PEFT. The f are what mixed keeps: the norms are not computed again for each token. A product
// multiplies its sums by them where they are (mixed.hpp); rows and apply_through fold the g into lora_B.
//   shapes   W out_features x in_features, any storage order; m out_features. Weights stored in x
//            out, and embeddings, are passed as their transpose; a convolution's as out x (in *
//            kernel). (What mixed makes of a PEFT entry knows how W is stored, and takes it so.)
//   rounding the norms in double; g W + sum in float (double if anything is double), then once to the stored scalar.
//   error    g_k is off by P_k, relative, where n_k is off by e_k = |row of gamma_{r_k+2} d_k| /
//            n_k, d_k = |s_k| |B_k| |A_k|: 1 + P_k is the product over f_j from k on of about 1 +
//            e_j + (in + 5) 2^-53. Where W + D cancels, e_k is large, and it reaches every column
//            of the row. |merged - exact| <= u_s |exact| + (1+u_s) e + eta_s/2,
//              e = (P_0 + (1+P_0) gamma_3) |g_0 W| + sum (P_k + (1+P_k) gamma_{R+3}) |g_k| d_k + underflow.
//            docs/numerics.md derives it, and has the same for unmerge, forward, apply, rows and
//            apply_through.
//   overflow a factor m / n that is not finite is refused; merge and unmerge report, mixing does not.
//   cost     mixed: 2 r out in FLOPs per adapter with a magnitude and one pass over W; copies the factors. merge: as merge.
//   aliasing y must not overlap x, W or the bias: shape_error. What mixed returns owns what it needs.
//   throws   value_error for a row of W + D that is zero (PEFT divides by it), a magnitude, norm or
//            quotient that is not finite; shape_error; before anything is written. std::bad_alloc:
//            merge and unmerge may have written some rows.
// Liu et al., arXiv 2402.09353; PEFT 0.21, tuners/lora/dora.py and variants.py (the norm from the base weight as it was before
// any merge: peft#3609).
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/delta.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/detail/row_pass.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"
#include "lora/rows.hpp"
#include "lora/steps.hpp"
#include "lora/through.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {

/// A norm as value * 2^exponent: that of a row of doubles may lie outside of double's range.
struct scaled_norm {
  double value;
  int exponent;
};

/// The norm of numbers that come in parts, in double: at(j), j = 0, 1, ... of each part. The squares are added in 32 sums,
/// which a compiler keeps in vectors that do not wait for each other.
class norm_sum {
 public:
  template <class At>
  void add(index_t count, const At& at) {
    const index_t whole = count / lanes * lanes;
    double sums[lanes];  // in registers, which members of an object need not be
    std::copy_n(sums_, lanes, sums);
    for (index_t j = 0; j < whole; j += lanes)
      for (index_t n = 0; n < lanes; ++n) sums[n] += at(j + n) * at(j + n);
    for (index_t j = whole; j < count; ++j) sums[j - whole] += at(j) * at(j);
    std::copy_n(sums, lanes, sums_);
  }
  double squares() const {
    double all = 0;
    for (const double sum : sums_) all += sum;
    return all;
  }
  /// Squares of numbers below 1e-145 lose digits, and those of numbers above 1e154 overflow.
  bool is_accurate() const {
    constexpr double smallest = 0x1p-960;  // what each of the squares loses to underflow is 2^-114 of this
    return is_finite(squares()) && squares() >= smallest;
  }

 private:
  static constexpr index_t lanes = 32;
  double sums_[lanes] = {};
};

/// The norm of `count` numbers at(j). Rows that norm_sum does not square accurately are scaled by a power of two first.
template <class At>
scaled_norm norm_of(index_t count, const At& at) {
  norm_sum plain;
  plain.add(count, at);
  if (plain.is_accurate()) return {std::sqrt(plain.squares()), 0};
  double largest = 0;
  for (index_t j = 0; j < count; ++j) {
    if (!is_finite(at(j))) return {std::abs(at(j)), 0};
    largest = std::max(largest, std::abs(at(j)));
  }
  if (is_zero(largest)) return {0, 0};
  const int exponent = std::ilogb(largest);
  norm_sum scaled;
  scaled.add(count, [&](index_t j) { return std::ldexp(at(j), -exponent); });
  return {std::sqrt(scaled.squares()), exponent};
}

/// magnitude / norm as a finite Acc; value_error where it is not defined or not held.
template <class Acc>
Acc gain_of(const char* operation, index_t output, double magnitude, const scaled_norm& norm) {
  const auto refuse = [&](const std::string& what) {
    raise_value(operation, "output " + std::to_string(output) + " has " + what + ", so that magnitude / norm is not defined");
  };
  if (!is_finite(magnitude)) refuse("a magnitude that is not finite");
  if (!is_finite(norm.value) || is_zero(norm.value))
    refuse("a row of W + delta whose norm is " + std::to_string(norm.value));
  const double result =
      norm.exponent == 0 ? magnitude / norm.value : std::ldexp(magnitude / norm.value, -norm.exponent);
  if (!is_finite(result)) refuse("a row of W + delta whose norm is so small that magnitude / norm overflows");
  if (!is_finite(static_cast<Acc>(result)))
    raise_value(operation, "output " + std::to_string(output) + " has magnitude / norm = " + std::to_string(result) +
                               ", which the accumulator does not hold");
  return static_cast<Acc>(result);
}

/// The norm of each row of W + delta.
template <class Acc>
class row_norms {
 public:
  row_norms(const weight_rows<Acc>& W, const delta_rows<Acc>& delta) : W_(W), delta_(delta) {}

  /// In one pass over W, in double. Rows whose squares are not accurate are read once more.
  std::vector<scaled_norm> all() const {
    std::vector<norm_sum> sums(static_cast<std::size_t>(W_.out_features()));
    const pass_options options{W_.granule(), false, true};
    each_block<Acc>(W_.out_features(), W_.in_features(), options, [&](const row_block<Acc>& block, tally&) {
      read(block);
      for (index_t i = 0; i < block.count; ++i)
        sums[static_cast<std::size_t>(block.first + i)].add(block.cols, elements(block, i));
    });
    std::vector<scaled_norm> norms;
    norms.reserve(sums.size());
    for (std::size_t i = 0; i < sums.size(); ++i)
      norms.push_back(sums[i].is_accurate() ? scaled_norm{std::sqrt(sums[i].squares()), 0} : norm_of_row(static_cast<index_t>(i)));
    return norms;
  }

 private:
  void read(const row_block<Acc>& b) const {
    W_.read(b.first, b.count, b.first_col, b.cols, b.rows, b.stride);
    if (delta_.rank() != 0)
      delta_.write(b.first, b.count, b.first_col, b.cols, b.scratch, b.stride,
                   W_.memory(b.next_first, b.next_col));
    else
      std::fill_n(b.scratch, b.count * b.stride, Acc(0));
  }
  /// W + delta of row i of a block: j -> the sum, in double.
  static auto elements(const row_block<Acc>& b, index_t i) {
    return [w = b.rows + i * b.stride, d = b.scratch + i * b.stride](index_t j) {
      return static_cast<double>(w[j]) + static_cast<double>(d[j]);
    };
  }
  scaled_norm norm_of_row(index_t i) const {
    const index_t in = W_.in_features();
    std::vector<Acc> memory(static_cast<std::size_t>(2 * in));
    const row_block<Acc> row{.first = i,
                             .count = 1,
                             .first_col = 0,
                             .cols = in,
                             .rows = memory.data(),
                             .scratch = memory.data() + in,
                             .stride = in};
    if (in != 0) read(row);
    return norm_of(in, elements(row, 0));
  }

  const weight_rows<Acc>& W_;
  const delta_rows<Acc>& delta_;
};

/// m_i / |row i of (W + delta)| for all rows.
template <class Acc, class T>
std::vector<Acc> gains_of(const step_request<Acc>& request, const low_rank_step& l, std::span<const T> magnitude) {
  const weight_rows<Acc>& W = *request.weight;
  const delta_rows<Acc> delta(request.operation, std::span<const low_rank_step>(&l, 1), W.out_features(), W.in_features(), 1.0);
  const std::vector<scaled_norm> norms = row_norms<Acc>(W, delta).all();
  std::vector<Acc> gains(norms.size());
  for (std::size_t i = 0; i < norms.size(); ++i)
    gains[i] = gain_of<Acc>(request.operation, static_cast<index_t>(i), widen<double>(magnitude[i]), norms[i]);
  return gains;
}

/// The steps of factors with a magnitude.
template <class Acc, class T>
std::vector<step<Acc>> dora_steps(const step_request<Acc>& request, const any_factors& factors,
                                  std::span<const T> magnitude) {
  if (request.weight == nullptr)
    raise_value(request.operation,
                "a DoRA adapter scales the base's part, too, by norms of W as it was before any merge: call "
                "lora::mixed(W, adapters...) then, once, and pass what it returns");
  const low_rank_step low{factors, request.strength};
  std::vector<step<Acc>> all;
  if (!is_zero(low.strength * factors.scaling())) all.emplace_back(low);
  all.emplace_back(gain_step<Acc>{.gain = gains_of(request, low, magnitude)});
  return all;
}

}  // namespace detail

/// Factors with their scaling, and a magnitude for each output. Immutable; copies share the factors. It is not
/// low_rank: what it adds depends on W.
template <scalar T>
class [[nodiscard]] dora_adapter {
 public:
  using value_type = T;

  /// Throws as adapter; shape_error when there is not one magnitude for each output.
  template <matrix_like A, matrix_like B>
  dora_adapter(const A& lora_A, const B& lora_B, const lora::scaling& scale, std::vector<T> magnitude)
      : dora_adapter(lora::adapter<T>(lora_A, lora_B, scale), std::move(magnitude)) {}
  dora_adapter(lora::adapter<T> factors, std::vector<T> magnitude)
      : factors_(std::make_shared<const lora::adapter<T>>(std::move(factors))),
        magnitude_(std::make_shared<const std::vector<T>>(std::move(magnitude))) {
    if (static_cast<index_t>(magnitude_->size()) != factors_->out_features())
      detail::raise_shape("dora_adapter", std::to_string(magnitude_->size()) + " magnitudes for " +
                                              std::to_string(factors_->out_features()) + " outputs");
  }

  const lora::adapter<T>& factors() const { return *factors_; }
  const std::vector<T>& magnitude() const { return *magnitude_; }
  index_t out_features() const { return factors_->out_features(); }
  index_t in_features() const { return factors_->in_features(); }

  /// The delta, then the gains m / n. At strength 0 the factors are not read and the gains stay, as in PEFT.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return detail::dora_steps(request, any_factors(factors_), std::span<const T>(*magnitude_));
  }

 private:
  std::shared_ptr<const lora::adapter<T>> factors_;
  std::shared_ptr<const std::vector<T>> magnitude_;
};
static_assert(adapter_kind<dora_adapter<float>> && detail::dora_like<dora_adapter<float>>);

/// A look at factors at some strength and a magnitude, or at factors alone (an empty span: a plain adapter in the order).
template <scalar T>
struct dora_view {
  using value_type = T;

  scaled_adapter<lora::adapter<T>> factors;
  std::span<const T> magnitude;

  index_t out_features() const { return factors.adapter().out_features(); }
  index_t in_features() const { return factors.adapter().in_features(); }
  template <class Acc>
  std::vector<step<Acc>> steps(step_request<Acc> request) const {
    request.strength *= factors.weight();
    const any_factors held = any_factors::view_of(factors.adapter());
    if (!magnitude.empty()) {
      if (static_cast<index_t>(magnitude.size()) != out_features())
        detail::raise_shape(request.operation, std::to_string(magnitude.size()) + " magnitudes for " +
                                                   std::to_string(out_features()) + " outputs");
      return detail::dora_steps(request, held, magnitude);
    }
    if (detail::is_zero(request.strength * held.scaling())) return {};
    return {low_rank_step{held, request.strength}};
  }
};
static_assert(adapter_kind<dora_view<float>> && detail::dora_like<dora_view<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
