// SPDX-License-Identifier: Apache-2.0
//
// forward(W, x, y, l...)                  y := round(W * x + sum of s * lora_B * (lora_A * x))
// forward(with_bias(W, b), x, y, l...)    y := round(W * x + sum of s * lora_B * (lora_A * x) + b)
//
// A layer with its adapters mixed in, unmerged, in one product: the ranks are R more steps of the base product's chains.
//   shapes   W out_features x in_features of any storage order, x in_features x tokens, y out_features x tokens, b
//            out_features. Tokens are columns (see apply.hpp); y's old content is not read.
//   rounding once, to y's scalar. Each output is one chain of multiply-adds from zero over in_features, then over the
//            stacked ranks, in float (double if W, x, y, b or any factor is double); the bias is added last.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (gamma_{in+R+1} |W| |x| + gamma_{in+R+3} sum |s| |lora_B| |lora_A| |x|
//            + u |b|) + eta_y/2; the names are those of docs/numerics.md.
//   bits     a token's result does not depend on the other tokens, on threads or on tiles.
//   cost     2 (out * in + R (in + out)) FLOPs per token; W is read once per 256 tokens; allocates as apply.
//   aliasing y must not overlap W, x, b or a factor: shape_error. An x that is an Eigen expression is evaluated first.
//   throws   shape_error, value_error (scaling not finite), before anything is written.
#pragma once

#include <string>
#include <type_traits>

#include "lora/apply.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A base weight with the bias that its layer adds. Looks at both.
template <class W, class B>
struct biased {
  W weight;  ///< matrix_view, out_features x in_features
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

template <class M>
inline constexpr bool is_biased = false;
template <class W, class B>
inline constexpr bool is_biased<biased<W, B>> = true;

}  // namespace detail

/// W and b as one argument of forward and linear. b is a vector of out_features elements: Eigen row or column, std::vector,
/// std::span. Throws shape_error when the lengths differ. Both must outlive the result.
template <class M, class V>
  requires matrix_like<M> && activations<V>
auto with_bias(const M& W, const V& b) {
  const auto weight = as_matrix(W);
  const auto bias = detail::column_view(b);
  if (bias.rows() != weight.rows() || bias.cols() != 1)
    detail::raise_shape("with_bias", "the bias is " + detail::shape_text(bias.rows(), bias.cols()) + " but W is " +
                                         detail::shape_text(weight.rows(), weight.cols()) +
                                         " (out_features x in_features): it needs out_features elements");
  return biased<std::remove_const_t<decltype(weight)>, std::remove_const_t<decltype(bias)>>{weight, bias};
}

namespace detail {

/// forward over views: bias is a column view, or null.
template <class Acc, class W, class B, class X, class Y, class Each>
void forward_views(const char* operation, const W& weight, const B* bias, const X& x, const Y& y, const Each& each) {
  if (x.rows() != weight.cols() || y.rows() != weight.rows())
    raise_shape(operation, "W is " + shape_text(weight.rows(), weight.cols()) + " (out_features x in_features), x is " +
                               shape_text(x.rows(), x.cols()) + " and y is " + shape_text(y.rows(), y.cols()) +
                               ": x needs in_features rows, y out_features rows, both one column for each token");
  const stacked_factors<Acc> factors(operation, each, weight.rows(), weight.cols());
  check_activations(operation, x, y);
  refuse_overlap(operation, "y", y, "W", weight);
  if (bias != nullptr) refuse_overlap(operation, "y", y, "the bias", *bias);
  refuse_factor_overlap(operation, "y", y, each);
  const auto pack_weight = packer<Acc>(weight, tile_cols<Acc>);
  const pack_function<Acc> pack_W(pack_weight);
  using value = typename Y::value_type;
  if (bias == nullptr) {
    run_product<Acc>(x, y, &pack_W, factors, [](value& out, Acc sum, index_t) { out = narrow<value>(sum); });
  } else {
    run_product<Acc>(x, y, &pack_W, factors, [b = *bias](value& out, Acc sum, index_t output) {
      out = narrow<value>(sum + widen<Acc>(b(output, 0)));
    });
  }
}

}  // namespace detail

/// y := round(W * x (+ b) + sum of s * lora_B * (lora_A * x)); W is a matrix or with_bias(W, b). See the top of this file.
template <class M, class X, class Y, class... L>
  requires(matrix_like<M> || detail::is_biased<M>) && activations<X> && activations<Y> && (detail::adapters<L> && ...)
void forward(const M& W, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::output_view(y);
  const auto each = detail::each_of(l...);
  if constexpr (detail::is_biased<M>) {
    using acc = accumulator_t<decltype(W.weight), decltype(W.bias), X, Y, L...>;
    detail::forward_views<acc>("forward", W.weight, &W.bias, from, to, each);
  } else {
    const auto weight = as_matrix(W);
    using view = std::remove_const_t<decltype(weight)>;
    detail::forward_views<accumulator_t<M, X, Y, L...>>("forward", weight, static_cast<const view*>(nullptr), from, to,
                                                        each);
  }
}

}  // namespace lora::inline LORA_DETAIL_ABI
