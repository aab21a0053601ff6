// SPDX-License-Identifier: Apache-2.0
//
// forward(W, x, y, l...)                  y := round(W * x + sum of s * lora_B * (lora_A * x))
// forward(with_bias(W, b), x, y, l...)    y := round(W * x + sum of s * lora_B * (lora_A * x) + b)
// forward(W, x, y, form)                  y := round(diag(g) W (T x) + ... + c): adapters of any
//                                         kind (mixed.hpp)
// forward(W, x, y, batch)                 the same with adapters that differ from token to token
//                                         (batch.hpp)
// forward(space, ...)                     the same with scratch that the caller keeps
//                                         (workspace.hpp)
//
// A layer with its adapters mixed (PEFT: unmerged), in one product: the ranks are R more steps of
// the base product's chains.
//   shapes   W out_features x in_features of any storage order or a packed_weight, x in_features x
//            tokens, y out_features x tokens, b out_features. Tokens are columns (see apply.hpp);
//            y's old content is not read.
//   rounding once, to y's scalar. Each output is one chain of multiply-adds from zero over
//            in_features, then over the stacked ranks, in float (double if W, x, y, b or any factor
//            is double); the bias is added last.
//   adapters low_rank types, packed_adapter, ranges of them; alone: a mixed form, or a batch.
//            Adapters of other kinds, and low_rank ones among them, are made a form in the call: a
//            pass over W, norms and packing each time.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (gamma_{in+R+1} |W| |x| + gamma_{in+R+3} sum
//            |s| |lora_B| |lora_A| |x| + u |b|) + eta_y/2, and what underflows; the names are those
//            of docs/numerics.md. A build for AVX512-BF16 multiplies a bfloat16 W, and lora_A of
//            adapters held in bfloat16, by a bfloat16 x with dot products: see
//            flush_threshold_of_product. intermediate_format::factors (packed_adapter.hpp) rounds
//            once more, and adds its term.
//   bits     a token's result does not depend on the other tokens, on threads or on tiles (of a
//            NaN: that it is one).
//   overflow counted nowhere: y holds the infinity. Which intermediates must not overflow is in
//            docs/numerics.md.
//   cost     2 (out * in + R (in + out)) FLOPs per token; W is read once per block of tokens: 16
//            tiles of 4, 6 (AVX2) or 8 (AVX-512) tokens, fewer where their activations, counted in
//            accumulators, exceed 2.5 MiB (AVX-512: 8 MiB), at least 4 tiles. A W that is not
//            packed is read, packed and read again in the first-level cache. Scratch as apply.
//   aliasing y must not overlap W, x, b or a factor: shape_error (the panels of packed ones are
//            nobody else's memory). An x that is an Eigen expression is evaluated first.
//   throws   shape_error, value_error (scaling not finite), std::bad_alloc, before anything is
//            written.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "lora/apply.hpp"
#include "lora/batch.hpp"
#include "lora/detail/call_parts.hpp"
#include "lora/detail/mix_forms.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/packed_weight.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A base weight with the bias that its layer adds. Looks at both.
template <class W, class B>
struct biased {
  W weight;  ///< matrix_view, or reference to a packed_weight, out_features x in_features
  B bias;    ///< matrix_view, out_features x 1
};

namespace detail {

/// A vector as out_features x 1: an Eigen row vector is turned, everything else is a column.
template <class V>
auto column_view(const V& b) {
  if constexpr (eigen_matrix<V>) {
    if constexpr (bare<V>::RowsAtCompileTime == 1 && bare<V>::ColsAtCompileTime != 1)
      return as_matrix(b).transpose();
    else
      return as_matrix(b);
  } else {
    return input_view(b);
  }
}

template <class V>
auto checked_bias(index_t out_features, index_t in_features, const V& b) {
  const auto bias = column_view(b);
  if (bias.rows() != out_features || bias.cols() != 1)
    raise_shape("with_bias", "the bias is " + shape_text(bias.rows(), bias.cols()) + " but W is " +
                                 shape_text(out_features, in_features) +
                                 " (out_features x in_features): it needs out_features elements");
  return bias;
}

/// Once more where it is read: biased has public members, and a packed weight may have changed
/// since.
template <class B>
void check_bias(const char* operation, index_t out_features, const B& bias) {
  if (bias.rows() != out_features || bias.cols() != 1)
    raise_shape(operation, "the bias is " + shape_text(bias.rows(), bias.cols()) + " and W has " +
                               std::to_string(out_features) + " outputs");
}

template <class M>
inline constexpr bool is_biased = false;
template <class W, class B>
inline constexpr bool is_biased<biased<W, B>> = true;

}  // namespace detail

/// W and b as one argument of forward and linear. b is a vector of out_features elements: Eigen row
/// or column, std::vector, std::span. Throws shape_error when the lengths differ. Both must outlive
/// the result.
template <class M, class V>
  requires matrix_like<M> && activations<V>
auto with_bias(const M& W, const V& b) {
  const auto weight = as_matrix(W);
  const auto bias = detail::checked_bias(weight.rows(), weight.cols(), b);
  return biased<std::remove_const_t<decltype(weight)>, std::remove_const_t<decltype(bias)>>{weight,
                                                                                            bias};
}
template <class T, class V>
  requires activations<V>
auto with_bias(const packed_weight<T>& W, const V& b) {
  const auto bias = detail::checked_bias(W.out_features(), W.in_features(), b);
  return biased<const packed_weight<T>&, std::remove_const_t<decltype(bias)>>{W, bias};
}
/// The same for a W as a form takes it, which may be stored in_features x out_features.
template <class M, class V, class Acc>
  requires matrix_like<M> && activations<V>
auto with_bias(const M& W, const V& b, const mixed_form<Acc>& form) {
  const auto weight = as_matrix(W);
  const auto bias = detail::checked_bias(form.out_features(), form.in_features(), b);
  return biased<std::remove_const_t<decltype(weight)>, std::remove_const_t<decltype(bias)>>{weight,
                                                                                            bias};
}
/// A mistaken call of it gets a sentence.
template <class M, class B>
  requires detail::mistaken_on_bias<M, B>
auto with_bias(const M&, const B&) {
  static_assert(detail::refuse_on_bias<M, B>());
}

/// Magnitudes below this count as zero inside W * x, for elements T of W and X of x and an
/// accumulator Acc: the smallest normal float where both are bfloat16, the accumulator is float and
/// the build has the processor's dot products (AVX512-BF16), which multiply twice as much in the
/// same time; 0 everywhere else. Where it is not 0 the same holds inside lora_A * x of adapters
/// that are held in bfloat16, and inside lora_B * U of those with intermediate_format::factors.
/// docs/numerics.md has the bound.
template <class Acc, class T, class X>
constexpr double flush_threshold_of_product() {
  return detail::by_dots<Acc, T, X> ? static_cast<double>(std::numeric_limits<float>::min()) : 0.0;
}

namespace detail {

/// Writes narrow(sum + (bias times gains + shifts)) for parts that have such terms; the bias may be
/// wider than the sums.
template <class Acc, class B, class Y, class Parts>
auto term_writer(const B* bias, const Y& y, const Parts& parts) {
  return [bias, y, &parts](index_t first, index_t count, index_t token, const Acc* sums) {
    using value = typename Y::value_type;
    using wide = accumulator_t<Acc, typename B::value_type>;
    const auto terms = parts.terms_of(token);
    if (bias == nullptr && terms.empty())  // not sum + 0, which turns -0 into +0
      return token_writer<Acc>(y, [](value& out, Acc sum, index_t) { out = narrow<value>(sum); })(
          first, count, token, sums);
    wide more[2 * tile_cols<Acc>];
    const wide* added = more;
    if (bias != nullptr)
      for (index_t j = 0; j < count; ++j) more[j] = widen<wide>((*bias)(first + j, 0));
    if constexpr (std::is_same_v<wide, Acc>)
      if (bias == nullptr && terms.size() == 1 && terms[0].shift != nullptr &&
          terms[0].strength == 1)
        added = terms[0].shift + first;  // what the loops below would copy
    if (added == more) {
      if (bias == nullptr) std::fill_n(more, count, wide(0));
      add_terms(terms, first, count, more);
    }
    token_writer<Acc>(y, [added, first](value& out, Acc sum, index_t output) {
      out = narrow<value>(static_cast<wide>(sum) + added[output - first]);
    })(first, count, token, sums);
  };
}

/// forward over a source of W: bias is a column view, or null; parts is one of the two above.
template <class Acc, class T, class B, class X, class Y, class Parts>
void forward_views(const char* operation, workspace& space, index_t out_features,
                   index_t in_features, const weight_source<Acc, T>& W, const B* bias, const X& x,
                   const Y& y, const Parts& parts) {
  if (x.rows() != in_features || y.rows() != out_features)
    raise_shape(
        operation,
        "W is " + shape_text(out_features, in_features) + " (out_features x in_features), x is " +
            shape_text(x.rows(), x.cols()) + " and y is " + shape_text(y.rows(), y.cols()) +
            ": x needs in_features rows, y out_features rows, both one column for each token");
  parts.check(operation, out_features, in_features, x.cols());
  check_activations(operation, x, y);
  if (bias != nullptr) {
    check_bias(operation, out_features, *bias);
    refuse_overlap(operation, "y", y, "the bias", *bias);
  }
  using value = typename Y::value_type;
  const auto widened = token_packer<Acc>(x);
  const auto pairs = pair_packer<Acc>(x);
  const auto write = [&](const auto& store) {
    parts.run(space, out_features, in_features, x.cols(), W, activation_source<Acc>{widened, pairs},
              finish_function<Acc>(token_writer<Acc>(y, store)));
  };
  if constexpr (requires { parts.terms_of(index_t()); }) {
    if (bias != nullptr || parts.any_terms())
      parts.run(space, out_features, in_features, x.cols(), W,
                activation_source<Acc>{widened, pairs},
                finish_function<Acc>(term_writer<Acc>(bias, y, parts)));
    else
      write([](value& out, Acc sum, index_t) { out = narrow<value>(sum); });
    return;
  }
  if (bias == nullptr)
    write([](value& out, Acc sum, index_t) { out = narrow<value>(sum); });
  else
    write([b = *bias](value& out, Acc sum, index_t output) {
      out = narrow<value>(sum + widen<Acc>(b(output, 0)));
    });
}

/// call(source, out_features, in_features): where a product of Acc with elements X finds a packed
/// weight.
template <class Acc, class X, class T, class Call>
void with_source(const packed_weight<T>& W, const Call& call) {
  if constexpr (std::is_same_v<accumulator_t<T>, Acc>) {
    call(weight_source<Acc, T>{.panels = W.panels(), .dots = by_dots<Acc, T, X>}, W.out_features(),
         W.in_features());
  } else {
    const auto convert = panel_converter<Acc>(W);
    call(weight_source<Acc, Acc>{.pack = convert}, W.out_features(), W.in_features());
  }
}
/// The same of a weight in rows or columns.
template <class Acc, class X, strided_matrix V, class Call>
void with_source(const V& W, const Call& call) {
  constexpr bool dots = by_dots<Acc, typename V::value_type, X>;
  using packed = std::conditional_t<dots, storage_t<typename V::value_type>, Acc>;
  const auto pack = weight_packer<Acc, packed>(W);
  call(weight_source<Acc, packed>{.pack = pack, .dots = dots}, W.rows(), W.cols());
}

/// What forward calls W: a view of a matrix, or the packed weight itself.
template <class M>
decltype(auto) weight_of_call(const M& W) {
  if constexpr (is_packed_weight<M>)
    return (W);
  else
    return as_matrix(W);
}

template <class M>
concept base_weight = matrix_like<M> || is_packed_weight<bare<M>>;
template <class M>
concept base = base_weight<M> || is_biased<bare<M>>;

/// forward with everything found out but the accumulator: Operands are what it depends on besides x
/// and y.
template <class... Operands, class M, class X, class Y, class Parts, class Each>
void forward_call(workspace& space, const M& W, const X& x, Y& y, const Parts& parts,
                  const Each& factors) {
  const default_environment environment;
  decltype(auto) input = in_memory(x);
  const auto from = input_view(input);
  const auto to = output_view(y);
  const auto run = [&]<class Acc, class B>(std::type_identity<Acc>, const auto& weight,
                                           const B* bias) {
    if constexpr (!is_packed_weight<bare<decltype(weight)>>)
      refuse_overlap("forward", "y", to, "W", weight);
    refuse_factor_overlap("forward", "y", to, factors);
    with_source<Acc, typename decltype(from)::value_type>(
        weight, [&](const auto& source, index_t out, index_t in) {
          forward_views("forward", space, out, in, source, bias, from, to, parts);
        });
  };
  if constexpr (is_biased<M>) {
    using acc = accumulator_t<decltype(W.weight), decltype(W.bias), X, Y, Operands...>;
    run(std::type_identity<acc>(), weight_of_call(W.weight), &W.bias);
  } else {
    const auto& weight = weight_of_call(W);
    run(std::type_identity<accumulator_t<M, X, Y, Operands...>>(), weight,
        static_cast<const decltype(from)*>(nullptr));
  }
}

/// forward with forms that accumulate in Acc. in_out: a matrix W is stored in_features x
/// out_features.
template <class Acc, class M, class X, class Y, class Parts>
void forward_forms(workspace& space, const M& W, bool in_out, const X& x, Y& y,
                   const Parts& parts) {
  const default_environment environment;
  decltype(auto) input = in_memory(x);
  const auto from = input_view(input);
  const auto to = output_view(y);
  const auto run = [&](const auto& weight, const auto* bias) {
    static_assert(std::is_same_v<Acc, double> ||
                      !(holds_double<bare<decltype(weight)>> || holds_double<bare<X>> ||
                        holds_double<typename std::remove_const_t<decltype(to)>::value_type>),
                  "lora::forward: W, x or y holds double and the form float: make the form by "
                  "mixed<double>(W, l...)");
    const auto call = [&](const auto& oriented) {
      with_source<Acc, typename decltype(from)::value_type>(
          oriented, [&](const auto& source, index_t out, index_t in) {
            forward_views("forward", space, out, in, source, bias, from, to, parts);
          });
    };
    if constexpr (is_packed_weight<bare<decltype(weight)>>) {
      call(weight);
    } else {
      refuse_overlap("forward", "y", to, "W", weight);
      if (in_out)
        call(weight.transpose());
      else
        call(weight);
    }
  };
  if constexpr (is_biased<M>)
    run(weight_of_call(W.weight), &W.bias);
  else
    run(weight_of_call(W), static_cast<const decltype(from)*>(nullptr));
}

/// The accumulator of a call with a weight, which may have a bias.
template <class M, class... Operands>
struct accumulator_of_call {
  using type = accumulator_t<M, Operands...>;
};
template <class W, class B, class... Operands>
struct accumulator_of_call<biased<W, B>, Operands...> {
  using type = accumulator_t<W, B, Operands...>;
};

}  // namespace detail

/// y := round(W * x (+ b) + sum of s * lora_B * (lora_A * x)); W is a matrix, a packed_weight, or
/// with_bias(either, b). See the top of this file.
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> && (detail::mixables<L> && ...)
void forward(workspace& space, const M& W, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  const auto each = detail::each_of(l...);
  detail::forward_call<L...>(space, W, x, y, detail::same_for_all<decltype(each)>{each}, each);
}
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> && (detail::mixables<L> && ...)
void forward(const M& W, const X& x, Y&& y, const L&... l) {
  workspace space;
  forward(space, W, x, std::forward<Y>(y), l...);
}

/// y := round(diag(g) W (T x) + ... + h b + c), the chain and the terms of mixed.hpp. W is as the
/// form was made from it: a matrix as it is stored, a packed_weight, or with_bias(either, b). The
/// error is in docs/numerics.md. Besides what forward throws: what a kind throws while its delta or
/// input map is computed (std::bad_alloc), before anything is written.
template <class M, class X, class Y, class Acc>
  requires detail::base<M> && activations<X> && activations<Y>
void forward(workspace& space, const M& W, const X& x, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  detail::forward_forms<Acc>(space, W, form.stored_in_out(), x, y, detail::one_form<Acc>(form));
}
template <class M, class X, class Y, class Acc>
  requires detail::base<M> && activations<X> && activations<Y>
void forward(const M& W, const X& x, Y&& y, const mixed_form<Acc>& form) {
  workspace space;
  forward(space, W, x, std::forward<Y>(y), form);
}

/// The same with adapters of any kind: makes their form in the call, at its cost (mixed.hpp).
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> &&
           (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
void forward(workspace& space, const M& W, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  using acc = typename detail::accumulator_of_call<M, X, Y, L...>::type;
  const auto make = [&](const auto& weight) {
    return detail::form_beside_stored<acc>("forward", step_use::product, weight, l...);
  };
  if constexpr (detail::is_biased<M>)
    forward(space, W, x, y, make(W.weight));
  else if constexpr (detail::is_packed_weight<M>)
    forward(space, W, x, y, make(W));
  else
    forward(space, W, x, y, make(as_matrix(W)));
}
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> &&
           (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
void forward(const M& W, const X& x, Y&& y, const L&... l) {
  workspace space;
  forward(space, W, x, std::forward<Y>(y), l...);
}

/// The same with adapters that differ from token to token: y_t := round(W x_t (+ b) + sum over
/// token t's entries of weight * s * lora_B * (lora_A * x_t)); of forms: as forward with the
/// token's forms one after the other. Throws shape_error also when the batch has another number of
/// tokens than x.
template <class M, class X, class Y, class F>
  requires detail::base<M> && activations<X> && activations<Y>
void forward(workspace& space, const M& W, const X& x, Y&& y, const batch<F>& who) {
  detail::refuse_temporary<Y>();
  if constexpr (detail::is_mixed_form<F>)
    detail::forward_forms<typename F::accumulator>(space, W, false, x, y, detail::by_token<F>{who});
  else
    detail::forward_call<batch<F>>(space, W, x, y, detail::by_token<F>{who}, [](const auto&) {});
}
template <class M, class X, class Y, class F>
  requires detail::base<M> && activations<X> && activations<Y>
void forward(const M& W, const X& x, Y&& y, const batch<F>& who) {
  workspace space;
  forward(space, W, x, std::forward<Y>(y), who);
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_layer<A...>
auto forward(const A&...) {
  static_assert(detail::refuse_on_layer<detail::verb::forward, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
