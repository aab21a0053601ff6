// SPDX-License-Identifier: Apache-2.0
//
// Why a call does not compile, in a sentence. A failed `requires` names a concept and not the
// mistake, so each verb has one more overload, of const references alone, which every other
// overload beats. Only calls of mistaken_calls.hpp reach it. Its body asks the functions below,
// which say what is wrong with the first argument at fault. They return true, for the static_assert
// that makes a compiler ask them before it complains of anything else.
//
// Such a call is an error inside `requires { lora::merge(W, l); }`, too, and not false. Generic
// code asks the public concepts instead: matrix_like of W, activations of x and y, low_rank or
// low_rank_range of l, adapter_kind or adapter_kind_range (lora/steps.hpp), peft::adapter_entry
// (lora/io/peft_entry.hpp).
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/argument_kinds.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/mistaken_calls.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

enum class verb {
  merge,
  unmerge,
  merged,
  merge_checked,
  delta_weight,
  apply,
  forward,
  embed,
  apply_through,
  mixed,
  scaled,
  linear,
  batch,
  pack,
  factors  // of an adapter, as they are given to its constructor
};

/// False, for a static_assert of a branch that is not to be taken.
template <class...>
inline constexpr bool never = false;

// --- An adapter, or a range of them. ---

template <verb V>
inline constexpr bool mixes = V == verb::apply || V == verb::forward;
/// Adapters of any kind, which say their steps.
template <verb V>
inline constexpr bool takes_kinds =
    V != verb::batch && V != verb::pack && V != verb::delta_weight && V != verb::factors;
template <verb V>
inline constexpr bool takes_ranges = V != verb::scaled && V != verb::linear && V != verb::pack;

template <verb V, class L>
concept adapter_argument =
    (V == verb::batch ? packed_adapter_like<L> : low_rank<L>) ||
    (mixes<V> && packed_adapter_like<L>) || (takes_kinds<V> && says_steps<L>);

template <verb V, class L>
inline constexpr bool takes_adapter = adapter_argument<V, L>;
template <verb V, range_like L>
  requires(!adapter_argument<V, L> && takes_ranges<V>)
inline constexpr bool takes_adapter<V, L> = adapter_argument<V, element_of<L>>;

/// Why L is no adapter although it has factors.
template <class L>
constexpr bool refuse_factors() {
  using adapter = bare<L>;
  if constexpr (!requires(const adapter& l) {
                  l.lora_A();
                  l.lora_B();
                })
    static_assert(never<L>,
                  "lora: lora_A() or lora_B() of this adapter is not a const function: the verbs "
                  "only read it");
  else if constexpr (!requires(const adapter& l) {
                       { l.lora_A() } -> matrix_like;
                       { l.lora_B() } -> matrix_like;
                     })
    static_assert(never<L>,
                  "lora: lora_A() or lora_B() of this adapter returns no matrix of float, double, "
                  "float16 or bfloat16");
  else if constexpr (!requires(const adapter& l) {
                       { l.scaling() } -> std::convertible_to<double>;
                     })
    static_assert(never<L>,
                  "lora: this adapter has no const function scaling() that returns a number, the s "
                  "of s * lora_B * lora_A");
  else
    static_assert(never<L>,
                  "lora: this adapter has no const function rank() that returns an integer, the "
                  "number of rows of lora_A()");
  return true;
}

/// Adapters of kinds that a verb does not take: those that need low-rank factors.
template <verb V, class L>
constexpr bool refuse_kind() {
  if constexpr (entry_like<L>)
    static_assert(never<L>,
                  "lora: an entry of a PEFT file may hold more than an adapter (a bias, a "
                  "magnitude, how W is stored): pass "
                  "entry.plain(), which throws when there is more");
  else if constexpr (V == verb::delta_weight && dora_like<L>)
    static_assert(never<L>,
                  "lora::delta_weight takes no DoRA adapter: it scales the rows of W, too, so what "
                  "it adds depends on W; its "
                  "low-rank part alone is factors()");
  else
    static_assert(
        never<L>,
        "lora: packed_adapter, batches of them and delta_weight take low-rank factors, and this "
        "adapter is of "
        "another kind: make a form of it, lora::mixed(W, l); a batch takes a vector of forms, too");
  return true;
}

/// Says why L is no adapter for this verb; nothing if it is one.
template <verb V, class L>
constexpr bool refuse_adapter() {
  if constexpr (takes_adapter<V, L>) {
  } else if constexpr (says_steps<L>) {
    refuse_kind<V, L>();
  } else if constexpr (form_like<L>) {
    static_assert(never<L>,
                  "lora: what lora::mixed returned goes alone, as the last argument, to merge, "
                  "unmerge, apply, forward, embed or "
                  "apply_through: make one form of all adapters of a call");
  } else if constexpr (packed_adapter_like<L>) {
    static_assert(never<L>,
                  "lora: a packed_adapter can only be mixed, by forward and apply, because its "
                  "panels do not give the factors "
                  "back: pass the adapter that it was packed from");
  } else if constexpr (file_like<L>) {
    static_assert(never<L>,
                  "lora: this is a whole file, and an adapter belongs to one module: for (const "
                  "auto& name : file.names()) "
                  "lora::merge(weight_of(name), file.at(name))");
  } else if constexpr (batch_like<L>) {
    static_assert(
        never<L>,
        "lora: a batch goes to lora::forward or lora::apply, as its last argument and alone");
  } else if constexpr (low_rank<L>) {
    static_assert(V != verb::batch,
                  "lora::batch takes packed adapters, which stay where they are: make a vector of "
                  "lora::packed_adapter of the adapters first, and give it a name");
  } else if constexpr (factors_like<L>) {
    refuse_factors<L>();
  } else if constexpr (pair_like<L>) {
    static_assert(never<L>,
                  "lora: this is a (name, adapter) pair, as a map gives when it is walked: pass "
                  "its second part, or walk the map "
                  "and call the verb for each, for (const auto& [name, l] : map)");
  } else if constexpr (any_matrix<L> || eigen_array<L>) {
    static_assert(never<L>,
                  "lora: a matrix stands where an adapter is expected; lora::adapter{lora_A, "
                  "lora_B, {.alpha = ...}} makes an "
                  "adapter of its factors");
  } else if constexpr (pointer_like<L>) {
    static_assert(never<L>,
                  "lora: this is a pointer where an adapter is expected: pass the adapter, "
                  "*pointer. A vector of what "
                  "lora::scaled(1, *pointer) returns looks at adapters that live elsewhere");
  } else if constexpr (range_like<L>) {
    if constexpr (!takes_ranges<V>)
      static_assert(
          never<L>,
          "lora: this is a range, and one adapter is expected: walk the range and pass each");
    else if constexpr (range_like<element_of<L>> && !any_matrix<element_of<L>>)
      static_assert(never<L>,
                    "lora: this is a range of ranges: pass ranges of adapters beside each other");
    else
      refuse_adapter<V, element_of<L>>();
  } else {
    static_assert(never<L>,
                  "lora: this is no adapter, which has the const functions lora_A(), lora_B(), "
                  "scaling() and rank() (the concept "
                  "lora::low_rank), nor a range of adapters");
  }
  return true;
}

// --- Elements. ---

/// Says why T is no element of a matrix; true if it is one.
template <class T>
constexpr bool refuse_element() {
  if constexpr (scalar<T>) {
  } else if constexpr (std::is_same_v<T, std::uint16_t> || std::is_same_v<T, std::int16_t>) {
    static_assert(never<T>,
                  "lora: 16-bit integers do not say which format their bits are: "
                  "lora::row_major<lora::bfloat16>(data, rows, cols) "
                  "or row_major<lora::float16> does");
  } else if constexpr (is_byte<T>) {
    static_assert(never<T>,
                  "lora: bytes do not say what their elements are: reinterpret_cast the pointer to "
                  "float*, double*, "
                  "lora::bfloat16* or lora::float16*");
  } else {
    static_assert(never<T>,
                  "lora: elements are float, double, float16 or bfloat16 (lora's or Eigen's), and "
                  "no other type");
  }
  return true;
}

/// A container that lora::row_major cannot view: of other elements, or a temporary.
template <class V>
concept refused_container =
    requires(std::remove_reference_t<V>& v) {
      std::size(v);
      *std::data(v);
    } && !any_matrix<V> && !std::is_array_v<std::remove_reference_t<V>> &&
    (!std::is_lvalue_reference_v<V> || !scalar_range<V>);

template <refused_container V>
constexpr bool refuse_container() {
  if constexpr (refuse_element<
                    bare<decltype(*std::data(std::declval<std::remove_reference_t<V>&>()))>>())
    static_assert(!scalar_range<V>,
                  "lora: the container is a temporary, and the view would outlive it: give it a "
                  "name first, or pass a std::span");
  return true;
}

/// The same of the elements of panels and layers, which are of our own formats.
template <class T>
constexpr bool refuse_panels() {
  static_assert(scalar<T> && is_own_format<T>,
                "lora: layers and panels hold float, double, lora::float16 or lora::bfloat16; "
                "Eigen's 16-bit types have the same "
                "bits, and matrices of them are taken, too");
  return true;
}

// --- A weight. ---

template <verb V, class M>
inline constexpr bool takes_weight = matrix_like<M> ||
                                     (V != verb::pack && V != verb::linear && V != verb::factors &&
                                      V != verb::embed && packed_weight_like<M>) ||
                                     ((V == verb::forward || V == verb::linear) && biased_like<M>);

/// Says why M is no weight for this verb; nothing if it is one.
template <verb V, class M>
constexpr bool refuse_weight() {
  if constexpr (takes_weight<V, M>) {
  } else if constexpr (recognisable<M>) {
    static_assert(never<M>,
                  "lora: an adapter stands where the weight is expected: the weight comes first, "
                  "then the adapters");
  } else if constexpr (eigen_array<M>) {
    static_assert(
        never<M>,
        "lora: this is an Eigen array, whose product is another one: pass its matrix, W.matrix()");
  } else if constexpr (any_matrix<M>) {
    static_assert(
        never<M>,
        "lora: the elements of this matrix are not float, double, float16 or bfloat16 (lora's or "
        "Eigen's): matrices "
        "of other types are not taken, because they could not hold the result; convert it first");
  } else if constexpr (linear_like<M>) {
    static_assert(never<M>,
                  "lora: a linear keeps its weight to itself: layer.attach(name, l), then "
                  "layer.merge(name) or "
                  "layer.forward(x, y); its weight as a matrix is layer.weight(), a copy");
  } else if constexpr (biased_like<M>) {
    static_assert(never<M>, "lora: with_bias(W, b) goes to forward and linear; here pass W alone");
  } else if constexpr (tensor_like<M>) {
    static_assert(
        never<M>,
        "lora: a tensor stands where a matrix is expected: pass its matrix(), or a slice's");
  } else if constexpr (packed_weight_like<M>) {
    static_assert(never<M>, "lora: a packed_weight is not taken here: pass the weight as a matrix");
  } else if constexpr (pointer_like<M> || range_like<M>) {
    static_assert(
        never<M>,
        "lora: a pointer, vector or span stands where a matrix is expected, and has no shape: pass "
        "lora::row_major(data, out_features, in_features) for a weight as PyTorch stores it");
  } else {
    static_assert(
        never<M>,
        "lora: this is no matrix: an Eigen matrix, a lora::matrix_view or an mdspan is expected");
  }
  return true;
}

// --- Activations and token numbers. ---

template <class X>
constexpr bool refuse_activations() {
  if constexpr (activations<X>) {
  } else if constexpr (eigen_array<X>) {
    static_assert(never<X>, "lora: x or y is an Eigen array: pass its matrix, x.matrix()");
  } else if constexpr (any_matrix<X>) {
    static_assert(never<X>,
                  "lora: the elements of x, y or a bias are not float, double, float16 or bfloat16 "
                  "(lora's or Eigen's): convert "
                  "integers to one of them first");
  } else if constexpr (low_rank<X> || low_rank_range<X>) {
    static_assert(never<X>,
                  "lora: an adapter stands where x or y is expected: apply(x, y, l...), forward(W, "
                  "x, y, l...)");
  } else if constexpr (pointer_like<X>) {
    static_assert(never<X>,
                  "lora: a pointer stands where x or y is expected, and has no shape: pass "
                  "lora::col_major(data, features, "
                  "tokens), which is PyTorch's row-major [tokens, features]");
  } else if constexpr (range_like<X>) {
    static_assert(
        never<X>,
        "lora: the elements of x, y or a bias are not float, double, float16 or bfloat16 (lora's "
        "or Eigen's): convert "
        "integers to one of them first; one token is a vector or span, several are a matrix");
  } else {
    static_assert(never<X>,
                  "lora: x and y are matrices features x tokens, or one token as a vector or span");
  }
  return true;
}

template <class R>
inline constexpr bool integer_range = false;
template <range_like R>
inline constexpr bool integer_range<R> = std::integral<element_of<R>>;

template <class R>
constexpr bool refuse_ids() {
  static_assert(integer_range<R>,
                "lora::embed: the ids are a vector, span or array of integers, one for each token");
  return true;
}

// --- Calls. ---

/// verb(W, l...), with or without something before W.
template <verb V, class M, class... L>
constexpr bool refuse_on_weight() {
  if constexpr (goes_first<M> && sizeof...(L) > 0) {
    refuse_on_weight<V, L...>();
  } else if constexpr (!takes_weight<V, M>) {
    refuse_weight<V, M>();
  } else if constexpr (!(takes_adapter<V, L> && ...)) {
    (refuse_adapter<V, L>(), ...);
  } else {
    static_assert(
        never<M>,
        "lora: this verb takes these arguments, but not together: a workspace (which is not const) "
        "or a rounding "
        "policy first, if any, then W, then adapters; a rounding policy goes with a plain matrix");
  }
  return true;
}

/// verb(l...).
template <verb V, class... L>
constexpr bool refuse_on_adapters() {
  (refuse_adapter<V, L>(), ...);
  return true;
}

/// verb(x, y, l...), with or without a workspace.
template <verb V, class X, class Y, class... L>
constexpr bool refuse_on_activations() {
  if constexpr (goes_first<X> && sizeof...(L) > 0) {
    refuse_on_activations<V, Y, L...>();
  } else if constexpr (!activations<X> || !activations<Y>) {
    if constexpr (!activations<X>)
      refuse_activations<X>();
    else
      refuse_activations<Y>();
  } else if constexpr (!(takes_adapter<V, L> && ...)) {
    (refuse_adapter<V, L>(), ...);
  } else {
    static_assert(V != verb::linear,
                  "lora::linear::forward takes x and y, or a workspace (which is not const), x and "
                  "y: its adapters are those that "
                  "are attached");
    static_assert(V == verb::linear,
                  "lora: x and y are followed by adapters, or by a batch or what lora::mixed "
                  "returned, alone; a workspace, which "
                  "is not const, may stand first");
  }
  return true;
}

/// verb(W, x, y, l...), with or without a workspace.
template <verb V, class M, class X, class... Rest>
constexpr bool refuse_on_layer() {
  if constexpr (goes_first<M> && sizeof...(Rest) > 1)
    refuse_on_layer<V, X, Rest...>();
  else if constexpr (!takes_weight<V, M>)
    refuse_weight<V, M>();
  else
    refuse_on_activations<V, X, Rest...>();
  return true;
}

/// with_bias(W, b).
template <class M, class B>
constexpr bool refuse_on_bias() {
  if constexpr (!takes_weight<verb::merge, M>)
    refuse_weight<verb::merge, M>();
  else
    refuse_activations<B>();
  return true;
}

/// embed(W, ids, y, l...): W is a matrix or scaled_embedding(W, c), which has no bias.
template <class M, class R, class Y, class... L>
constexpr bool refuse_on_embed() {
  constexpr bool scaled = requires(const M& m) { m.scale; };
  if constexpr (!scaled && !takes_weight<verb::embed, M>)
    refuse_weight<verb::embed, M>();
  else if constexpr (!integer_range<R>)
    refuse_ids<R>();
  else
    refuse_on_activations<verb::embed, Y, Y, L...>();
  return true;
}

/// apply_through(down, y, l...).
template <class Down, class Y, class... L>
constexpr bool refuse_on_product() {
  refuse_on_activations<verb::apply_through, Y, Y, L...>();
  return true;
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
