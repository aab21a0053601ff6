// SPDX-License-Identifier: Apache-2.0
//
// apply(x, y, l...)       y := round(y + sum of s * lora_B * (lora_A * x))
// apply(space, x, y, l...)                the same with scratch that the caller keeps (workspace.hpp)
//
// The adapters' part alone, for an engine that has its own (quantized, BLAS, oneDNN) base product: compute y = W * x, then
// apply. The base weight is not touched, and adapters and weights may change between two calls.
//   shapes   x in_features x tokens, y out_features x tokens; tokens are columns (a row-major PyTorch activation
//            [tokens, features] is col_major(data, features, tokens)); a vector, std::vector or std::span is one token.
//   adapters any number of low_rank types, packed_adapter (nothing is packed in the call), and ranges of them.
//   rounding once, to y's scalar: U = lora_A * x and the sum over the stacked ranks are chains of multiply-adds from zero
//            in float (double if x, y or any factor is double), U times s in between; then y is added. U_format::factors
//            (packed_adapter.hpp) rounds once more, and adds its term to the error.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (u |y| + gamma_{in+R+3} sum |s| |lora_B| |lora_A| |x|) + eta_y/2, and
//            what underflows; the names are those of docs/numerics.md.
//   overflow counted nowhere: y holds the infinity (docs/numerics.md).
//   cost     2 R (in + out) FLOPs per token; y is read and written once, tile by tile; scratch: the activations and A x
//            of a block of tokens, sums and a chunk of the weight for each thread, for adapters that are not packed
//            R (in + out) accumulators more.
//   aliasing y must not overlap x or a factor: shape_error. An x that is an Eigen expression is evaluated first.
//   throws   shape_error, value_error (scaling not finite), before anything is written; std::bad_alloc.
#pragma once

#include "lora/detail/mix.hpp"
#include "lora/detail/refusals.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// x and y of one call: y out_features x tokens, x in_features x tokens, apart in memory.
template <class X, class Y>
void check_activations(const char* operation, const X& x, const Y& y) {
  if (x.cols() != y.cols())
    raise_shape(operation, "x is " + shape_text(x.rows(), x.cols()) + " and y is " + shape_text(y.rows(), y.cols()) +
                               "; both need one column for each token");
  refuse_overlap(operation, "y", y, "x", x);
}

}  // namespace detail

/// y := round(y + sum of s * lora_B * (lora_A * x)); see the top of this file.
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::mixables<L> && ...)
void apply(workspace& space, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::output_view(y);
  using acc = accumulator_t<X, Y, L...>;
  const auto each = detail::each_of(l...);
  const index_t rank = detail::checked_total_rank("apply", each, to.rows(), from.rows());
  detail::check_activations("apply", from, to);
  detail::refuse_factor_overlap("apply", "y", to, each);
  if (rank == 0) return;
  using value = typename decltype(to)::value_type;
  const auto pack_X = detail::token_packer<acc>(from);
  const auto write = detail::token_writer<acc>(
      to, [](value& out, acc sum, index_t) { out = detail::narrow<value>(detail::widen<acc>(out) + sum); });
  detail::mix<acc>(space, to.rows(), from.rows(), to.cols(), detail::weight_source<acc, acc>{}, each, {.widened = pack_X},
                   write);
}
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::mixables<L> && ...)
void apply(const X& x, Y&& y, const L&... l) {
  workspace space;
  apply(space, x, std::forward<Y>(y), l...);
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_activations<A...>
auto apply(const A&...) {
  static_assert(detail::refuse_on_activations<detail::verb::apply, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
