// SPDX-License-Identifier: Apache-2.0
//
// apply(x, y, l...)       y := round(y + sum of s * lora_B * (lora_A * x))
// apply(x, y, form)       y := round(diag(g) y + sum of ... + c), for y = W x without bias:
//                         adapters of any kind (mixed.hpp)
// apply(x, y, batch)      y_t := the same with the adapters of token t: packed ones, or forms
//                         (batch.hpp)
// apply(space, x, y, ...) the same with scratch that the caller keeps (workspace.hpp)
//
// The adapters' part alone, for an engine that has its own (quantized, BLAS, oneDNN) base product:
// compute y = W * x, then apply. The base weight is not touched, and adapters and weights may
// change between two calls.
//   shapes   x in_features x tokens, y out_features x tokens; tokens are columns (a row-major
//            PyTorch activation [tokens, features] is col_major(data, features, tokens)); a vector,
//            std::vector or std::span is one token.
//   adapters any number of low_rank types, packed_adapter (nothing is packed in the call), and
//            ranges of them; or a mixed form alone. Adapters of other kinds are made a form in the
//            call; those that look at W throw value_error: make it by mixed(W, l...).
//   rounding once, to y's scalar: U = lora_A * x and the sum over the stacked ranks are chains of
//            multiply-adds from zero in float (double if x, y or any factor is double), U times s
//            in between; then y is added. intermediate_format::factors (packed_adapter.hpp) rounds
//            once more, and adds its term to the error.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (u |y| + gamma_{in+R+3} sum |s| |lora_B|
//            |lora_A| |x|) + eta_y/2, and what underflows; the names are those of docs/numerics.md.
//   overflow counted nowhere: y holds the infinity (docs/numerics.md).
//   cost     2 R (in + out) FLOPs per token; y is read and written once, tile by tile; scratch: the
//            activations and A x of a block of tokens, sums and a chunk of the weight for each
//            thread, for adapters that are not packed R (in + out) accumulators more.
//   aliasing y must not overlap x or a factor: shape_error. An x that is an Eigen expression is
//            evaluated first.
//   throws   shape_error, value_error (scaling not finite), before anything is written;
//            std::bad_alloc.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "lora/batch.hpp"
#include "lora/detail/call_parts.hpp"
#include "lora/detail/mix_forms.hpp"
#include "lora/detail/refusals.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// x and y of one call: y out_features x tokens, x in_features x tokens, apart in memory.
template <class X, class Y>
void check_activations(const char* operation, const X& x, const Y& y) {
  if (x.cols() != y.cols())
    raise_shape(operation, "x is " + shape_text(x.rows(), x.cols()) + " and y is " +
                               shape_text(y.rows(), y.cols()) +
                               "; both need one column for each token");
  refuse_overlap(operation, "y", y, "x", x);
}

/// What the terms of a token add to its outputs where there is no bias: null, a column of a term,
/// or `more`.
template <class Acc>
const Acc* shifts_of(std::span<const bias_term<Acc>> terms, index_t first, index_t count,
                     Acc* more) {
  if (terms.size() == 1 && (terms[0].shift == nullptr || terms[0].strength == 1))
    return terms[0].shift == nullptr ? nullptr : terms[0].shift + first;
  if (terms.empty()) return nullptr;
  std::fill_n(more, count, Acc(0));
  add_terms(terms, first, count, more);
  return more;
}
/// The product of a token's gains: null, a column of a form, or `product`.
template <class Acc>
const Acc* product_of(std::span<const Acc* const> gains, index_t first, index_t count,
                      Acc* product) {
  if (gains.size() < 2) return gains.empty() ? nullptr : gains[0] + first;
  std::copy_n(gains[0] + first, count, product);
  for (const Acc* const gain : gains.subspan(1))
    for (index_t j = 0; j < count; ++j) product[j] *= gain[first + j];
  return product;
}

/// apply with a form, or a batch of forms, that were checked; x is before any input map.
template <class Acc, class X, class Y, class Parts>
void apply_forms(workspace& space, const X& from, const Y& to, const Parts& parts) {
  using value = typename Y::value_type;
  static_assert(
      std::is_same_v<Acc, double> || !(holds_double<typename X::value_type> || holds_double<value>),
      "lora::apply: x or y holds double and the form float: make the form by mixed<double>(W, "
      "l...)");
  check_activations("apply", from, to);
  const auto pack_X = token_packer<Acc>(from);
  const auto write = [&](index_t first, index_t count, index_t token, const Acc* sums) {
    if (!parts.changes(token)) return;  // every bit of y stays
    Acc gains[2 * tile_cols<Acc>], shifts[2 * tile_cols<Acc>];
    const Acc* const gain = product_of(parts.gains_of(token), first, count, gains);
    const Acc* const shift = shifts_of(parts.terms_of(token), first, count, shifts);
    token_writer<Acc>(to, [gain, shift, first](value& out, Acc sum, index_t output) {
      const Acc more = shift == nullptr ? sum : sum + shift[output - first];
      const Acc base = gain == nullptr ? widen<Acc>(out) : gain[output - first] * widen<Acc>(out);
      out = narrow<value>(plus(base, more));
    })(first, count, token, sums);
  };
  parts.run(space, to.rows(), from.rows(), to.cols(), weight_source<Acc, Acc>{},
            activation_source<Acc>{.widened = pack_X}, finish_function<Acc>(write));
}
template <class Acc, class X, class Y>
void apply_form(workspace& space, const X& from, const Y& to, const mixed_form<Acc>& form) {
  const one_form<Acc> parts(form);
  parts.check("apply", to.rows(), from.rows(), from.cols());
  if (form.changes_nothing()) return check_activations("apply", from, to);
  apply_forms<Acc>(space, from, to, parts);
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
  const auto write = detail::token_writer<acc>(to, [](value& out, acc sum, index_t) {
    out = detail::narrow<value>(detail::widen<acc>(out) + sum);
  });
  detail::mix<acc>(space, to.rows(), from.rows(), to.cols(), detail::weight_source<acc, acc>{},
                   each, {.widened = pack_X}, write);
}
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::mixables<L> && ...)
void apply(const X& x, Y&& y, const L&... l) {
  workspace space;
  apply(space, x, std::forward<Y>(y), l...);
}

/// y := round(diag(g) y + S + c) for y = W x without bias, with S the steps from zero and g the
/// product of all gains. Rounding as above; a gain rounds once more. Throws value_error when the
/// form has an input map: then the product is W times what form.input(x) holds, and the call
/// apply(input, y, form).
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
void apply(workspace& space, const X& x, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  if (form.has_input_map())
    detail::raise_value(
        "apply",
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
  requires activations<X> && activations<Y> && (detail::any_adapters<L> && ...) &&
           (detail::kinds<L> || ...)
void apply(workspace& space, const X& x, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  using acc = accumulator_t<X, Y, L...>;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  apply(space, from, y,
        detail::form_alone<acc>("apply", step_use::product, detail::output_view(y).rows(),
                                from.rows(), l...));
}
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::any_adapters<L> && ...) &&
           (detail::kinds<L> || ...)
void apply(const X& x, Y&& y, const L&... l) {
  workspace space;
  apply(space, x, std::forward<Y>(y), l...);
}

/// The same with adapters that differ from token to token: y_t := round(y_t + sum over token t's
/// entries of weight * s * lora_B * (lora_A * x_t)). Of forms: y_t := round(diag(g) y_t + S + c),
/// for y_t = W x_t without bias, with the token's forms one after the other, S their steps from
/// zero, g the product of their gains (each further gain rounds once more) and c their shifts. A
/// token without adapters keeps every bit of its y, and no token's result depends on the others.
/// Throws as apply, and shape_error also when the batch has another number of tokens than x,
/// value_error for a form with an input map: W is then multiplied by another x, so apply it apart,
/// by form.input(x).
template <class X, class Y, class F>
  requires activations<X> && activations<Y>
void apply(workspace& space, const X& x, Y&& y, const batch<F>& who) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::output_view(y);
  const detail::by_token<F> parts{who};
  parts.check("apply", to.rows(), from.rows(), from.cols());  // the forms are those that were added
  if constexpr (detail::is_mixed_form<F>) {
    for (const auto& one : who.used())
      if (!one.state->maps().empty())
        detail::raise_value(
            "apply",
            "form " + std::to_string(who.place_of(one)) +
                " changes what W is multiplied by, and a batch multiplies no W: take it out, and "
                "apply(form.input(x), y, form) to its tokens");
    detail::apply_forms<typename F::accumulator>(space, from, to, parts);
  } else {
    using acc = accumulator_t<X, Y, batch<F>>;
    using value = typename std::remove_const_t<decltype(to)>::value_type;
    detail::check_activations("apply", from, to);
    const auto pack_X = detail::token_packer<acc>(from);
    const auto add = detail::token_writer<acc>(to, [](value& out, acc sum, index_t) {
      out = detail::narrow<value>(detail::widen<acc>(out) + sum);
    });
    const auto write = [&](index_t first, index_t count, index_t token, const acc* sums) {
      if (who.parts().count(token) != 0) add(first, count, token, sums);
    };
    parts.run(space, to.rows(), from.rows(), to.cols(), detail::weight_source<acc, acc>{},
              detail::activation_source<acc>{.widened = pack_X},
              detail::finish_function<acc>(write));
  }
}
template <class X, class Y, class F>
  requires activations<X> && activations<Y>
void apply(const X& x, Y&& y, const batch<F>& who) {
  workspace space;
  apply(space, x, std::forward<Y>(y), who);
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_activations<A...>
auto apply(const A&...) {
  static_assert(detail::refuse_on_activations<detail::verb::apply, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
