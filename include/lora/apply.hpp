// SPDX-License-Identifier: Apache-2.0
//
// apply(x, y, l...)       y := round(y + sum of s * lora_B * (lora_A * x))
// apply(x, y, form)       y := round(diag(g) y + sum of ... + c), for y = W x without bias: adapters of any kind (mixed.hpp)
// apply(space, x, y, l...)                the same with scratch that the caller keeps (workspace.hpp)
//
// The adapters' part alone, for an engine that has its own (quantized, BLAS, oneDNN) base product: compute y = W * x, then
// apply. The base weight is not touched, and adapters and weights may change between two calls.
//   shapes   x in_features x tokens, y out_features x tokens; tokens are columns (a row-major PyTorch activation
//            [tokens, features] is col_major(data, features, tokens)); a vector, std::vector or std::span is one token.
//   adapters any number of low_rank types, packed_adapter (nothing is packed in the call), and ranges of them; or a mixed
//            form alone. Adapters of other kinds are made a form in the call; those that look at W throw value_error: make
//            it by mixed(W, l...).
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

#include "lora/detail/mix_forms.hpp"
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

/// apply with a form; x is before any input map.
template <class Acc, class X, class Y>
void apply_form(workspace& space, const X& from, const Y& to, const mixed_form<Acc>& form) {
  using value = typename Y::value_type;
  static_assert(std::is_same_v<Acc, double> || !(holds_double<typename X::value_type> || holds_double<value>),
                "lora::apply: x or y holds double and the form float: make the form by mixed<double>(W, l...)");
  check_fit("apply", form.out_features(), form.in_features(), 1.0, to.rows(), from.rows());
  check_activations("apply", from, to);
  if (form.changes_nothing()) return;
  const form_state<Acc>* const state = &form.state();
  const form_list<Acc> list{{&state, 1}, {.parts = static_cast<index_t>(state->parts().size())}, state->rank()};
  const Acc* const gain = state->gain().empty() ? nullptr : state->gain().data();
  const Acc* const shift = state->term(1).shift;
  const auto pack_X = token_packer<Acc>(from);
  const auto write = token_writer<Acc>(to, [gain, shift](value& out, Acc sum, index_t output) {
    const Acc more = shift == nullptr ? sum : sum + shift[output];
    const Acc base = gain == nullptr ? widen<Acc>(out) : gain[output] * widen<Acc>(out);
    out = narrow<value>(base + more);
  });
  mix_forms<Acc>(space, to.rows(), from.rows(), to.cols(), weight_source<Acc, Acc>{}, list,
                 activation_source<Acc>{.widened = pack_X}, write);
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

/// y := round(diag(g) y + S + c) for y = W x without bias, with S the steps from zero and g the product of all gains. Rounding
/// as above; a gain rounds once more. Throws value_error when the form has an input map: then the product is W times what
/// form.input(x) holds, and the call apply(input, y, form).
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
void apply(workspace& space, const X& x, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  if (form.has_input_map())
    detail::raise_value("apply",
                        "an adapter changes what W is multiplied by: const auto input = form.input(x), then "
                        "y = W * input.matrix() and apply(input, y, form)");
  decltype(auto) input = detail::in_memory(x);
  detail::apply_form(space, detail::input_view(input), detail::output_view(y), form);
}
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
void apply(const X& x, Y&& y, const mixed_form<Acc>& form) {
  workspace space;
  apply(space, x, std::forward<Y>(y), form);
}
/// The same for y = W * input.matrix(), where the form made the input.
template <class Y, class Acc>
  requires activations<Y>
void apply(const mixed_input<Acc>& input, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  workspace space;
  detail::apply_form(space, as_matrix(form.raw("apply", input)), detail::output_view(y), form);
}

/// The same with adapters of any kind that need no W: makes their form in the call, at its cost.
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
void apply(workspace& space, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  using acc = accumulator_t<X, Y, L...>;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  apply(space, from, y,
        detail::form_alone<acc>("apply", step_use::product, detail::output_view(y).rows(), from.rows(), l...));
}
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
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
