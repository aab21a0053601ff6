// SPDX-License-Identifier: Apache-2.0
//
// forward(W, x, y, l...)                  y := round(W * x + sum of s * lora_B * (lora_A * x))
// forward(with_bias(W, b), x, y, l...)    y := round(W * x + sum of s * lora_B * (lora_A * x) + b)
// forward(space, ...)                     the same with scratch that the caller keeps (workspace.hpp)
//
// A layer with its adapters mixed in, unmerged, in one product: the ranks are R more steps of the base product's chains.
//   shapes   W out_features x in_features of any storage order or a packed_weight, x in_features x tokens, y out_features x
//            tokens, b out_features. Tokens are columns (see apply.hpp); y's old content is not read.
//   rounding once, to y's scalar. Each output is one chain of multiply-adds from zero over in_features, then over the
//            stacked ranks, in float (double if W, x, y, b or any factor is double); the bias is added last.
//   adapters low_rank types, packed_adapter, ranges of them.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (gamma_{in+R+1} |W| |x| + gamma_{in+R+3} sum |s| |lora_B| |lora_A| |x|
//            + u |b|) + eta_y/2; the names are those of docs/numerics.md.
//   bits     a token's result does not depend on the other tokens, on threads or on tiles.
//   cost     2 (out * in + R (in + out)) FLOPs per token; W is read once per 96 tokens (128 with AVX-512); a W that is not
//            packed is read, packed and read again in the first-level cache. Scratch as apply.
//   aliasing y must not overlap W, x, b or a factor: shape_error. An x that is an Eigen expression is evaluated first.
//   throws   shape_error, value_error (scaling not finite), before anything is written.
#pragma once

#include <string>
#include <type_traits>

#include "lora/apply.hpp"
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
  const auto bias = detail::checked_bias(weight.rows(), weight.cols(), b);
  return biased<std::remove_const_t<decltype(weight)>, std::remove_const_t<decltype(bias)>>{weight, bias};
}
template <class T, class V>
  requires activations<V>
auto with_bias(const packed_weight<T>& W, const V& b) {
  const auto bias = detail::checked_bias(W.out_features(), W.in_features(), b);
  return biased<const packed_weight<T>&, std::remove_const_t<decltype(bias)>>{W, bias};
}

namespace detail {

/// forward over a source of W: bias is a column view, or null.
template <class Acc, class T, class B, class X, class Y, class Each>
void forward_views(const char* operation, workspace& space, index_t out_features, index_t in_features,
                   const weight_source<Acc, T>& W, const B* bias, const X& x, const Y& y, const Each& each) {
  if (x.rows() != in_features || y.rows() != out_features)
    raise_shape(operation, "W is " + shape_text(out_features, in_features) + " (out_features x in_features), x is " +
                               shape_text(x.rows(), x.cols()) + " and y is " + shape_text(y.rows(), y.cols()) +
                               ": x needs in_features rows, y out_features rows, both one column for each token");
  checked_total_rank(operation, each, out_features, in_features);
  check_activations(operation, x, y);
  if (bias != nullptr) refuse_overlap(operation, "y", y, "the bias", *bias);
  refuse_factor_overlap(operation, "y", y, each);
  using value = typename Y::value_type;
  const auto pack_X = token_packer<Acc>(x);
  const auto write = [&](const auto& store) {
    mix<Acc>(space, out_features, in_features, x.cols(), W, each, pack_X, token_writer<Acc>(y, store));
  };
  if (bias == nullptr)
    write([](value& out, Acc sum, index_t) { out = narrow<value>(sum); });
  else
    write([b = *bias](value& out, Acc sum, index_t output) { out = narrow<value>(sum + widen<Acc>(b(output, 0))); });
}

/// call(source, out_features, in_features): where a product of Acc finds a packed weight.
template <class Acc, class T, class Call>
void with_source(const packed_weight<T>& W, const Call& call) {
  if constexpr (std::is_same_v<accumulator_t<T>, Acc>) {
    call(weight_source<Acc, T>{.panels = W.panels()}, W.out_features(), W.in_features());
  } else {
    const auto convert = panel_converter<Acc>(W);
    call(weight_source<Acc, Acc>{.pack = convert}, W.out_features(), W.in_features());
  }
}
/// The same of a weight in rows or columns.
template <class Acc, strided_matrix V, class Call>
void with_source(const V& W, const Call& call) {
  const auto pack = weight_packer<Acc>(W);
  call(weight_source<Acc, Acc>{.pack = pack}, W.rows(), W.cols());
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

}  // namespace detail

/// y := round(W * x (+ b) + sum of s * lora_B * (lora_A * x)); W is a matrix, a packed_weight, or with_bias(either, b). See
/// the top of this file.
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> && (detail::mixables<L> && ...)
void forward(workspace& space, const M& W, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::output_view(y);
  const auto each = detail::each_of(l...);
  const auto run = [&]<class Acc, class B>(std::type_identity<Acc>, const auto& weight, const B* bias) {
    if constexpr (!detail::is_packed_weight<detail::bare<decltype(weight)>>)
      detail::refuse_overlap("forward", "y", to, "W", weight);
    detail::with_source<Acc>(weight, [&](const auto& source, index_t out, index_t in) {
      detail::forward_views("forward", space, out, in, source, bias, from, to, each);
    });
  };
  if constexpr (detail::is_biased<M>) {
    using acc = accumulator_t<decltype(W.weight), decltype(W.bias), X, Y, L...>;
    run(std::type_identity<acc>(), detail::weight_of_call(W.weight), &W.bias);
  } else {
    const auto& weight = detail::weight_of_call(W);
    run(std::type_identity<accumulator_t<M, X, Y, L...>>(), weight, static_cast<const decltype(from)*>(nullptr));
  }
}
template <class M, class X, class Y, class... L>
  requires detail::base<M> && activations<X> && activations<Y> && (detail::mixables<L> && ...)
void forward(const M& W, const X& x, Y&& y, const L&... l) {
  workspace space;
  forward(space, W, x, std::forward<Y>(y), l...);
}

}  // namespace lora::inline LORA_DETAIL_ABI
