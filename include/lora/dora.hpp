// SPDX-License-Identifier: Apache-2.0
//
// DoRA: a low-rank difference, and a magnitude m for each output.     W' = diag(m / n) (W + D),  n_i = |row i of (W + D)|
//
//   const lora::dora_adapter<float> style{A, B, {.alpha = 16}, m};
//   lora::merge(W, style);                                 // the merged weight
//   const auto layer = lora::attach(W, style);             // n is computed once, from W as it is now
//   y.noalias() = W * x;   lora::apply(x, y, layer);       // your product (without bias), our correction
//   lora::forward(lora::with_bias(W, b), x, y, layer);     // the layer; a bias is not scaled
//
// It is not additive: the base's own part is scaled too. attach(W, l...) takes any number of adapters, with and without
// magnitude, in order. With f = m / n (1 for one without magnitude), each n from the pristine W and its own delta alone:
//   W'_0 = W,  W'_k = diag(f_k) (W'_{k-1} + D_k),     so that    W' = diag(g_0) W + sum of diag(g_k) D_k,  g_k = f_k ... f_n
// The order matters, as it does in PEFT. The g are what attach keeps: the norms are not computed again for each token, and
// every verb on the result is a scaling of the base's rows and plain low-rank adapters.
//   shapes   W out_features x in_features, any storage order; m out_features. Weights stored in x
//            out, and embeddings, are passed as their transpose; a convolution's as out x (in *
//            kernel). (What attach of a PEFT entry returns knows how W is stored, and takes it so.)
//   rounding the norms in double; g W + sum in float (double if anything is double), then once to the stored scalar.
//   error    g_k is off by P_k, relative, where n_k is off by e_k = |row of gamma_{r_k+2} d_k| /
//            n_k, d_k = |s_k| |B_k| |A_k|: 1 + P_k is the product over f_j from k on of about 1 +
//            e_j + (in + 5) 2^-53. Where W + D cancels, e_k is large, and it reaches every column
//            of the row. |merged - exact| <= u_s |exact| + (1+u_s) e + eta_s/2,
//              e = (P_0 + (1+P_0) gamma_3) |g_0 W| + sum (P_k + (1+P_k) gamma_{R+3}) |g_k| d_k + underflow.
//            docs/numerics.md derives it, and has the same for unmerge, forward, apply, rows and
//            apply_through.
//   overflow a factor m / n that is not finite is refused; merge and unmerge report, mixing does not.
//   cost     attach: 2 r out in FLOPs per adapter with a magnitude and one pass over W; copies the factors. merge: as merge.
//   aliasing y must not overlap x, W or the bias: shape_error. What attach returns owns what it needs.
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
#include "lora/detail/row_norms.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"
#include "lora/rows.hpp"
#include "lora/steps.hpp"
#include "lora/through.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {

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

/// m_i / |row i of (W + delta)| for all rows.
template <class Acc, class T>
std::vector<Acc> gains_of(const step_request<Acc>& request, const low_rank_step& l, const std::vector<T>& magnitude) {
  const std::vector<scaled_norm> norms = norms_of_rows<Acc>(request.operation, *request.weight, l);
  std::vector<Acc> gains(norms.size());
  for (std::size_t i = 0; i < norms.size(); ++i)
    gains[i] = gain_of<Acc>(request.operation, static_cast<index_t>(i), widen<double>(magnitude[i]), norms[i]);
  return gains;
}

/// The steps of factors with a magnitude.
template <class Acc, class T>
std::vector<step<Acc>> dora_steps(const step_request<Acc>& request, const any_factors& factors, const std::vector<T>& magnitude) {
  if (request.weight == nullptr)
    raise_value(request.operation,
                "a DoRA adapter scales the base's part, too, by norms of W as it was before any merge: call "
                "lora::mixed(W, adapters...) then, once, and pass what it returns");
  const low_rank_step low{factors, request.strength};
  std::vector<step<Acc>> all;
  if (!is_zero(low.strength * factors.scaling())) all.push_back(low);
  all.push_back(gain_step<Acc>{.gain = gains_of(request, low, magnitude)});
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
    return detail::dora_steps(request, any_factors(factors_), *magnitude_);
  }

 private:
  std::shared_ptr<const lora::adapter<T>> factors_;
  std::shared_ptr<const std::vector<T>> magnitude_;
};
static_assert(adapter_kind<dora_adapter<float>> && detail::dora_like<dora_adapter<float>>);

/// A look at factors at some strength and a magnitude, or at factors alone (an empty span: a plain adapter in the order).
template <scalar T>
struct dora_view {
  scaled_adapter<lora::adapter<T>> factors;
  std::span<const T> magnitude;
};
static_assert(detail::dora_like<dora_view<float>>);

namespace dora_detail {

template <class L>
inline constexpr bool is_dora = false;
template <class T>
inline constexpr bool is_dora<scaled_kind<dora_adapter<T>>> = true;
template <class T>
inline constexpr bool is_dora<dora_adapter<T>> = true;
template <class T>
inline constexpr bool is_dora<dora_view<T>> = true;

template <class L>
struct scalar_of;
template <class T>
struct scalar_of<dora_adapter<T>> {
  using type = T;
};
template <class T>
struct scalar_of<scaled_kind<dora_adapter<T>>> {
  using type = T;
};
template <class T>
struct scalar_of<dora_view<T>> {
  using type = T;
};

}  // namespace dora_detail

/// An adapter with a magnitude.
template <class L>
concept weight_decomposed = dora_detail::is_dora<std::remove_cvref_t<L>>;

template <class R>
concept weight_decomposed_range = !weight_decomposed<R> && requires(const R& r) {
  { *std::begin(r) } -> weight_decomposed;
  { std::end(r) };
};

/// What attach takes: adapters with and without magnitude, and ranges of either.
template <class L>
concept attachable = weight_decomposed<L> || weight_decomposed_range<L> || detail::adapters<L>;

namespace dora_detail {

template <class L>
struct operand {
  using type = L;
};
template <weight_decomposed L>
struct operand<L> {
  using type = typename scalar_of<std::remove_cvref_t<L>>::type;
};
template <weight_decomposed_range R>
struct operand<R> : operand<std::remove_cvref_t<decltype(*std::begin(std::declval<const R&>()))>> {};
/// Double if the base or any factor is double, else float.
template <class T, class... L>
using acc_t = accumulator_t<T, typename operand<L>::type...>;

template <class Acc>
using column = Eigen::Matrix<Acc, Eigen::Dynamic, 1>;

/// m / n for each row of W + delta.
template <class Acc, class View, class M>
column<double> factors_of(const View& W, const adapter<Acc>& l, const M& magnitude) {
  constexpr index_t block = 64;
  column<double> result(W.rows());
  for (index_t first = 0; first < W.rows(); first += block) {
    const index_t rows = std::min(block, W.rows() - first);
    const auto delta = delta_weight(basic_adapter(as_matrix(l.lora_A()), as_matrix(l.lora_B()).middle_rows(first, rows),
                                                  {.alpha = l.scaling(), .rule = scaling_rule::fixed}));
    for (index_t i = 0; i < rows; ++i) {
      const detail::scaled_norm norm = detail::norm_of(
          W.cols(), [&](index_t j) { return detail::widen<double>(W(first + i, j)) + static_cast<double>(delta(i, j)); });
      result(first + i) = detail::gain_of<double>(
          "attach", first + i, detail::widen<double>(magnitude[static_cast<std::size_t>(first + i)]), norm);
    }
  }
  return result;
}

}  // namespace dora_detail

/// The adapters of attach(W, l...) with their norms: W' = diag(base_scale()) W + the sum of
/// adapters(). Owns copies of the factors, scaled by rows; it does not look at W any more. It is
/// right for that W alone: after W changed, attach again. Invariant: every adapter is for
/// out_features() x in_features(). It knows how W is stored: out x in, or in x out
/// (stored_in_out(): Conv1D, fan_in_fan_out), and its verbs take W as it is stored.
template <class Acc>
class attached_dora {
 public:
  /// Throws shape_error when an adapter is for another shape.
  attached_dora(dora_detail::column<Acc> base_scale, std::vector<adapter<Acc>> adapters, index_t in_features)
      : base_scale_(std::move(base_scale)), adapters_(std::move(adapters)), in_features_(in_features) {
    if (in_features_ < 0) detail::raise_shape("attached_dora", std::to_string(in_features_) + " in_features");
    for (const auto& l : adapters_) detail::check_adapter("attached_dora", l, out_features(), in_features_);
  }

  const dora_detail::column<Acc>& base_scale() const { return base_scale_; }
  const std::vector<adapter<Acc>>& adapters() const { return adapters_; }
  index_t out_features() const { return base_scale_.size(); }
  index_t in_features() const { return in_features_; }
  /// Whether merge, unmerge and forward take W in_features x out_features.
  bool stored_in_out() const { return stored_in_out_; }

  /// The same for a W that is stored, and passed, in_features x out_features.
  attached_dora for_in_out() && {
    stored_in_out_ = true;
    return std::move(*this);
  }
  /// No adapter and every factor 1: the verbs then leave every bit as it is.
  bool changes_nothing() const { return adapters_.empty() && (base_scale_.array() == Acc(1)).all(); }

 private:
  dora_detail::column<Acc> base_scale_;
  std::vector<adapter<Acc>> adapters_;
  index_t in_features_;
  bool stored_in_out_ = false;
};
static_assert(detail::attached_like<attached_dora<float>>);

namespace dora_detail {

/// Collects the adapters in order, then turns them into what attached_dora holds.
template <class Acc, class View>
class attacher {
 public:
  explicit attacher(const View& W) : W_(W) {}

  template <class L>
  void add(const L& l) {
    if constexpr (weight_decomposed<L>) {
      add_one(l.factors, l.magnitude);
    } else if constexpr (weight_decomposed_range<L>) {
      for (const auto& each : l) add(each);
    } else {
      detail::visit_adapters([&](const auto& one) { add_one(one, std::span<const Acc>()); }, l);
    }
  }
  template <class T>
  void add(const scaled_kind<dora_adapter<T>>& l) {
    add_one(scaled_adapter<adapter<T>>(l.strength(), l.of().factors()), std::span<const T>(l.of().magnitude()));
  }
  template <class T>
  void add(const dora_adapter<T>& l) {
    add_one(l.factors(), std::span<const T>(l.magnitude()));
  }

  attached_dora<Acc> finish() && {
    column<double> g = column<double>::Ones(W_.rows());
    std::vector<adapter<Acc>> scaled;
    for (std::size_t k = pieces_.size(); k-- > 0;) {
      const auto& [l, f] = pieces_[k];
      if (f.size() != 0) g.array() *= f.array();
      if (l.scaling() == 0) continue;  // at strength 0 an adapter is not read
      detail::row_major_matrix<Acc> B = l.lora_B();
      for (index_t i = 0; i < B.rows(); ++i)
        for (index_t j = 0; j < B.cols(); ++j) B(i, j) = static_cast<Acc>(g(i) * l.scaling() * static_cast<double>(B(i, j)));
      scaled.emplace(scaled.begin(), l.lora_A(), B, lora::scaling{.alpha = 1, .rule = scaling_rule::fixed});
    }
    return {base_scale(g), std::move(scaled), W_.cols()};
  }

 private:
  static column<Acc> base_scale(const column<double>& g) {
    column<Acc> result = g.template cast<Acc>();
    for (index_t i = 0; i < g.size(); ++i)
      if (!detail::is_finite(result(i)))
        detail::raise_value("attach", "output " + std::to_string(i) + " has magnitude / norm = " + std::to_string(g(i)) +
                                          ", which the accumulator does not hold");
    return result;
  }

  template <class L, class M>
  void add_one(const L& l, const M& magnitude) {
    detail::check_adapter("attach", l, W_.rows(), W_.cols());
    if (!magnitude.empty() && static_cast<index_t>(magnitude.size()) != W_.rows())
      detail::raise_shape("attach",
                          std::to_string(magnitude.size()) + " magnitudes for " + std::to_string(W_.rows()) + " outputs");
    adapter<Acc> copy(l.lora_A(), l.lora_B(), {.alpha = l.scaling(), .rule = scaling_rule::fixed});
    column<double> f = magnitude.empty() ? column<double>() : factors_of(W_, copy, magnitude);
    pieces_.push_back({std::move(copy), std::move(f)});
  }

  struct piece {
    adapter<Acc> factors;
    column<double> scale;  // empty without magnitude
  };
  const View& W_;
  std::vector<piece> pieces_;
};

/// Throws unless a weight of this stored shape is one that the adapters were attached to.
template <class Layer>
void check_stored(const char* operation, index_t rows, index_t cols, const Layer& layer, bool stored_in_out) {
  const index_t wanted_rows = stored_in_out ? layer.in_features() : layer.out_features();
  const index_t wanted_cols = stored_in_out ? layer.out_features() : layer.in_features();
  if (rows != wanted_rows || cols != wanted_cols)
    detail::raise_shape(operation, "W is " + detail::shape_text(rows, cols) + " and the adapters were attached to one of " +
                                       detail::shape_text(wanted_rows, wanted_cols) +
                                       (rows == wanted_cols && cols == wanted_rows ? ": pass W as it was attached" : ""));
}

/// call(W as out x in), for a W as the layer's verbs take it.
template <class View, class Acc, class Call>
auto with_weight(const char* operation, const View& stored, const attached_dora<Acc>& layer, const Call& call) {
  check_stored(operation, stored.rows(), stored.cols(), layer, layer.stored_in_out());
  return layer.stored_in_out() ? call(stored.transpose()) : call(stored);
}

/// x and y of a call: one column for each token, as many rows as the layer has inputs and outputs.
template <class X, class Y, class Layer>
void check_tokens(const char* operation, const X& x, const Y& y, const Layer& layer) {
  if (x.rows() != layer.in_features() || y.rows() != layer.out_features())
    detail::raise_shape(operation, "x is " + detail::shape_text(x.rows(), x.cols()) + ", y is " +
                                       detail::shape_text(y.rows(), y.cols()) + " and the layer is " +
                                       detail::shape_text(layer.out_features(), layer.in_features()) +
                                       " (out_features x in_features)");
  detail::check_activations(operation, x, y);
}

/// W(i, j) := step(W(i, j), delta(i, j), i) with the sum of the layer's adapters, in blocks of rows.
template <class Acc, class View, class Step>
merge_report each_element(const View& W, const attached_dora<Acc>& layer, const Step& step) {
  constexpr index_t block = 64;
  using value = typename View::value_type;
  using factor = matrix_view<const Acc, storage_order::row_major>;
  merge_report report;
  if (layer.changes_nothing()) return report;
  for (index_t first = 0; W.cols() != 0 && first < W.rows(); first += block) {
    const index_t rows = std::min(block, W.rows() - first);
    std::vector<basic_adapter<factor, factor>> part;
    for (const auto& l : layer.adapters())
      part.emplace_back(as_matrix(l.lora_A()), factor(as_matrix(l.lora_B())).middle_rows(first, rows),
                        lora::scaling{.alpha = l.scaling(), .rule = scaling_rule::fixed});
    Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic> delta;
    if (part.empty())
      delta.setZero(rows, W.cols());
    else
      delta = delta_weight(part);
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < W.cols(); ++j) {
        value& element = W(first + i, j);
        const bool was_finite = detail::is_finite(element);
        element = detail::narrow<value>(step(detail::widen<Acc>(element), delta(i, j), layer.base_scale()(first + i)));
        if (was_finite && !detail::is_finite(element)) ++report.became_nonfinite;
      }
  }
  return report;
}

}  // namespace dora_detail

/// The adapters in order, with their norms from W as it is now; see the top of this file.
template <class M, class... L>
  requires matrix_like<M> && (attachable<L> && ...)
auto attach(const M& W, const L&... l) {
  const detail::default_environment environment;
  const auto weight = as_matrix(W);
  using view = std::remove_const_t<decltype(weight)>;
  dora_detail::attacher<dora_detail::acc_t<typename view::value_type, L...>, view> result(weight);
  (result.add(l), ...);
  return std::move(result).finish();
}

/// W := round(diag(g_0) W + sum of deltas), for what was attached to this W.
template <class M, class Acc>
  requires matrix_like<M>
merge_report merge(M&& W, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  return dora_detail::with_weight("merge", detail::output_view(W), layer, [&](const auto& weight) {
    return dora_detail::each_element(weight, layer, [](Acc w, Acc delta, Acc g) { return g * w + delta; });
  });
}

/// W := round((W - sum of deltas) / diag(g_0)): the base within rounding, not bit for bit. Throws value_error when a
/// magnitude is 0: then the base's row is gone.
template <class M, class Acc>
  requires matrix_like<M>
merge_report unmerge(M&& W, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  return dora_detail::with_weight("unmerge", detail::output_view(W), layer, [&](const auto& weight) {
    for (index_t i = 0; i < layer.out_features(); ++i)
      if (layer.base_scale()(i) == Acc(0))
        detail::raise_value("unmerge", "output " + std::to_string(i) + " has the magnitude 0, so its row of W is lost");
    return dora_detail::each_element(weight, layer, [](Acc w, Acc delta, Acc g) { return (w - delta) / g; });
  });
}

/// y := round(diag(g_0) y + sum of deltas * x), for y = W * x without bias.
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
void apply(const X& x, Y&& y, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto to = detail::output_view(y);
  dora_detail::check_tokens("apply", detail::input_view(input), to, layer);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, Acc>;
  through_detail::matrix<acc> sums;
  sums.setZero(to.rows(), to.cols());
  if (layer.changes_nothing()) return;
  lora::apply(input, sums, layer.adapters());
  for (index_t j = 0; to.rows() != 0 && j < to.cols(); ++j)
    for (index_t i = 0; i < to.rows(); ++i)
      to(i, j) = detail::narrow<value>(static_cast<acc>(layer.base_scale()(i)) * detail::widen<acc>(to(i, j)) + sums(i, j));
}

/// W, as the layer's verbs take it, and the bias of its outputs as one argument of forward:
/// with_bias(W, b) for a W that may be stored in x out. Throws shape_error when b has another
/// length. Both must outlive the result.
template <class M, class V, class Acc>
  requires matrix_like<M> && activations<V>
auto with_bias(const M& W, const V& b, const attached_dora<Acc>& layer) {
  const auto weight = as_matrix(W);
  const auto bias = detail::checked_bias(layer.out_features(), layer.in_features(), b);
  return biased<std::remove_const_t<decltype(weight)>, std::remove_const_t<decltype(bias)>>{weight, bias};
}

/// y := round(diag(g_0) W x + sum of deltas * x (+ b)); W is a matrix or with_bias(W, b).
template <class M, class X, class Y, class Acc>
  requires(matrix_like<M> || detail::is_biased<M>) && activations<X> && activations<Y>
void forward(const M& W, const X& x, Y&& y, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto to = detail::output_view(y);
  dora_detail::check_tokens("forward", detail::input_view(input), to, layer);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  const auto finish = [&]<class A>(std::type_identity<A>, const auto& stored, const auto& bias) {
    detail::refuse_overlap("forward", "y", to, "W", stored);
    through_detail::matrix<A> sums(to.rows(), to.cols());
    dora_detail::with_weight("forward", stored, layer, [&](const auto& weight) { lora::forward(weight, input, sums); });
    lora::apply(input, sums, layer);
    for (index_t j = 0; to.rows() != 0 && j < to.cols(); ++j)
      for (index_t i = 0; i < to.rows(); ++i) to(i, j) = detail::narrow<value>(sums(i, j) + bias(i));
  };
  if constexpr (detail::is_biased<M>) {
    using acc = accumulator_t<value, Acc, X, decltype(W.weight), decltype(W.bias)>;
    detail::check_bias("forward", layer.out_features(), W.bias);
    detail::refuse_overlap("forward", "y", to, "the bias", W.bias);
    finish(std::type_identity<acc>(), W.weight, [&](index_t i) { return detail::widen<acc>(W.bias(i, 0)); });
  } else {
    using acc = accumulator_t<value, Acc, X, M>;
    finish(std::type_identity<acc>(), as_matrix(W), [](index_t) { return acc(0); });
  }
}

/// y(:, t) := round(c (g_0 W(ids[t], :) + sum of deltas)), for what was attached to W.transpose(); see rows.hpp.
template <class M, class R, class Y, class Acc>
  requires(matrix_like<M> || rows_detail::is_scaled_embedding<M>) && token_range<R> && activations<Y>
void rows(const M& W, const R& ids, Y&& y, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  const auto run = [&](const auto& weight, double scale) {
    using acc = accumulator_t<typename std::remove_cvref_t<decltype(weight)>::value_type, value, Acc>;
    const auto tokens = rows_detail::checked_ids("rows", ids, weight.rows());
    rows_detail::check_y("rows", to.rows(), to.cols(), weight.cols(), tokens.size());
    dora_detail::check_stored("rows", weight.rows(), weight.cols(), layer, true);
    detail::refuse_overlap("rows", "y", to, "W", weight);
    const auto each = detail::each_of(layer.adapters());
    const auto sum = rows_detail::gather<acc>("rows", each, tokens, weight.cols(), weight.rows());
    const rows_detail::times_constant<value, acc> scaled(scale);
    const bool untouched = layer.changes_nothing();
    sum.run(to, [&](value& element, acc delta, index_t i, index_t t) {
      const acc base = detail::widen<acc>(weight(tokens[static_cast<std::size_t>(t)], i));
      if (untouched) return void(element = scaled(base));
      element = scaled(static_cast<acc>(layer.base_scale()(i)) * base + delta);
    });
  };
  if constexpr (rows_detail::is_scaled_embedding<M>)
    run(W.weight, W.scale);
  else
    run(as_matrix(W), 1.0);
}

/// y := round(diag(g_0) y + sum of B * down(A)), for y the base's convolution without bias; see through.hpp.
template <class Down, class Y, class Acc>
  requires activations<Y>
void apply_through(const Down& down, Y&& y, const attached_dora<Acc>& layer) {
  detail::refuse_temporary<Y>();
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, Acc>;
  const auto each = detail::each_of(layer.adapters());
  if (to.rows() != layer.out_features())
    detail::raise_shape("apply_through", "y has " + std::to_string(to.rows()) + " rows and the layer " +
                                             std::to_string(layer.out_features()) + " outputs");
  const auto sum = through_detail::expand<acc>("apply_through", down, each, to.rows(), to.cols());
  if (layer.changes_nothing()) return;
  const detail::default_environment environment;
  sum.run(to, [&](value& element, acc delta, index_t i, index_t) {
    element = detail::narrow<value>(static_cast<acc>(layer.base_scale()(i)) * detail::widen<acc>(element) + delta);
  });
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto attach(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::attach, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
