// SPDX-License-Identifier: Apache-2.0
//
// Which calls get a sentence of refusals.hpp. A verb is found by argument-dependent look-up
// wherever an argument is of the library, a matrix of lora::bfloat16 too, and an overload that
// takes everything would beat a user's own function of that name that needs a conversion. So such
// an overload takes part only in calls of which each argument is known here, one of them is an
// adapter of some kind, and the order is that of the verb or its exchange. Matrices, spans and
// types of a user alone never are such a call; a number or a type of a user among the arguments, or
// a class that derives from one of the library, ends it too. Nothing here asks for a complete type.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/argument_kinds.hpp"

namespace lora::inline LORA_DETAIL_ABI {

class workspace;
template <class W, class B>
struct biased;
template <class T>
class packed_weight;
template <class F>
class packed_adapter;
template <scalar F>
class scaled_packed_adapter;
template <class F>
class batch;
template <class T>
class linear;
template <scalar T>
class dora_adapter;
template <class Acc>
class mixed_form;
template <scalar T>
class replaced_rows;
template <class W>
struct embedding_view;
namespace rounding {
struct peft_policy;
struct peft_safe_policy;
}  // namespace rounding
namespace peft {
template <scalar T>
class entry;
template <scalar T>
class adapter_file;
}  // namespace peft

namespace detail {

// --- Classes of the library, and what derives from them. ---

/// Declared only: the class of the library that a pointer's class is, or derives from.
template <class W, class B>
std::type_identity<biased<W, B>> class_of_ours(const biased<W, B>*);
template <class T>
std::type_identity<packed_weight<T>> class_of_ours(const packed_weight<T>*);
template <class F>
std::type_identity<packed_adapter<F>> class_of_ours(const packed_adapter<F>*);
template <class F>
std::type_identity<scaled_packed_adapter<F>> class_of_ours(const scaled_packed_adapter<F>*);
template <class F>
std::type_identity<batch<F>> class_of_ours(const batch<F>*);
template <class T>
std::type_identity<linear<T>> class_of_ours(const linear<T>*);
template <class T>
std::type_identity<dora_adapter<T>> class_of_ours(const dora_adapter<T>*);
template <class Acc>
std::type_identity<mixed_form<Acc>> class_of_ours(const mixed_form<Acc>*);
template <class T>
std::type_identity<replaced_rows<T>> class_of_ours(const replaced_rows<T>*);
template <class W>
std::type_identity<embedding_view<W>> class_of_ours(const embedding_view<W>*);
template <class T>
std::type_identity<peft::entry<T>> class_of_ours(const peft::entry<T>*);
template <class T>
std::type_identity<peft::adapter_file<T>> class_of_ours(const peft::adapter_file<T>*);

template <class A>
concept ours_or_derived = requires(const A* a) { detail::class_of_ours(a); };
template <class A>
concept exactly_ours = ours_or_derived<A> && requires(const A* a) {
  requires std::same_as<decltype(detail::class_of_ours(a)), std::type_identity<A>>;
};
/// Overloads for the base take it by a conversion, which one that takes it as it is would beat.
template <class A>
concept derived_from_ours = ours_or_derived<A> && !exactly_ours<A>;

// --- Kinds of arguments. ---

/// What a verb takes as an adapter, or is given instead of one.
template <class A>
concept adapter_like =
    !derived_from_ours<A> && (factors_like<A> || says_steps<A> || form_like<A> ||
                              packed_adapter_like<A> || file_like<A> || batch_like<A>);
template <class A>
concept pointer_to_adapter =
    pointer_like<A> && adapter_like<bare<decltype(*std::declval<const bare<A>&>())>>;
template <class A>
concept pair_with_adapter =
    pair_like<A> && adapter_like<bare<decltype(std::declval<const bare<A>&>().second)>>;
template <class R>
concept range_of_adapters =
    range_like<R> && (adapter_like<element_of<R>> || pointer_to_adapter<element_of<R>> ||
                      pair_with_adapter<element_of<R>>);
template <class R>
concept range_of_ranges = range_like<R> && range_of_adapters<element_of<R>>;
/// A pointer alone is none: a user's own function may take one to const.
template <class A>
concept recognisable =
    adapter_like<A> || pair_with_adapter<A> || range_of_adapters<A> || range_of_ranges<A>;

/// Elements of weights, activations and ids, right or wrong; text is none.
template <class T>
concept number = scalar<T> || (std::integral<T> && sizeof(T) > 1 && !std::same_as<T, wchar_t> &&
                               !std::same_as<T, char16_t> && !std::same_as<T, char32_t>);
template <class A>
concept pointer_to_numbers =
    pointer_like<A> && number<bare<decltype(*std::declval<const bare<A>&>())>>;
template <class A>
concept range_of_numbers = range_like<A> && number<element_of<A>>;
/// A matrix, or what is given instead of one: of other elements, an array, or without a shape.
template <class A>
concept matrix_kind =
    any_matrix<A> || eigen_array<A> || pointer_to_numbers<A> || range_of_numbers<A>;
template <class A>
concept weight_kind = matrix_kind<A> || exactly_ours<A>;

template <class... A>
inline constexpr bool known = ((recognisable<A> || weight_kind<A>)&&...);

// --- Calls. ---

/// What may stand before W or x: a workspace, or a rounding policy.
template <class A>
inline constexpr bool goes_first =
    std::is_same_v<A, workspace> || std::is_same_v<A, rounding::peft_policy> ||
    std::is_same_v<A, rounding::peft_safe_policy>;

/// verb(W, l...), or an adapter before W.
template <class... A>
inline constexpr bool mistaken_on_weight = false;
template <class First, class... Rest>
  requires goes_first<First>
inline constexpr bool mistaken_on_weight<First, Rest...> = mistaken_on_weight<Rest...>;
template <class M, class... L>
  requires(!goes_first<M>)
inline constexpr bool mistaken_on_weight<M, L...> =
    known<M, L...> &&
    ((weight_kind<M> && (recognisable<L> || ...)) || (recognisable<M> && (weight_kind<L> || ...)));

/// verb(x, y, l...).
template <class... A>
inline constexpr bool mistaken_on_activations = false;
template <class First, class... Rest>
  requires goes_first<First>
inline constexpr bool mistaken_on_activations<First, Rest...> = mistaken_on_activations<Rest...>;
template <class X, class Y, class... L>
  requires(!goes_first<X>)
inline constexpr bool mistaken_on_activations<X, Y, L...> =
    matrix_kind<X> && matrix_kind<Y> && known<L...> && (recognisable<L> || ...);

/// linear::forward(x, y): anything wrong beside an x or y, for it is found in no other place.
template <class... A>
inline constexpr bool mistaken_on_linear = false;
template <class First, class... Rest>
  requires goes_first<First>
inline constexpr bool mistaken_on_linear<First, Rest...> = mistaken_on_linear<Rest...>;
template <class X, class Y, class... L>
  requires(!goes_first<X>)
inline constexpr bool mistaken_on_linear<X, Y, L...> =
    (matrix_kind<X> || recognisable<X>)&&(matrix_kind<Y> || recognisable<Y>)&&known<L...>;

/// verb(W, x, y, l...), embed(W, ids, y, l...).
template <class... A>
inline constexpr bool mistaken_on_layer = false;
template <class First, class... Rest>
  requires goes_first<First>
inline constexpr bool mistaken_on_layer<First, Rest...> = mistaken_on_layer<Rest...>;
template <class M, class... Rest>
  requires(!goes_first<M>)
inline constexpr bool mistaken_on_layer<M, Rest...> =
    weight_kind<M> && mistaken_on_activations<Rest...>;

/// apply_through(down, y, l...): down is a function.
template <class... A>
inline constexpr bool mistaken_on_product = false;
template <class Down, class Y, class... L>
inline constexpr bool mistaken_on_product<Down, Y, L...> =
    matrix_kind<Y> && known<L...> && (recognisable<L> || ...);

/// delta_weight(l...).
template <class... A>
inline constexpr bool mistaken_on_adapters = sizeof...(A) > 0 && (recognisable<A> && ...);

/// with_bias(W, b) of a b that is wrong. No adapter tells that it is ours. A W of built-in numbers
/// or panels does: such a call is found by its name alone.
template <class M, class B>
inline constexpr bool mistaken_on_bias = false;
template <class M, class B>
  requires any_matrix<M>
inline constexpr bool mistaken_on_bias<M, B> =
    std::is_arithmetic_v<element_t<M>> && matrix_kind<B> && !activations<B>;
template <class M, class B>
  requires(exactly_ours<M> && packed_weight_like<M>)
inline constexpr bool mistaken_on_bias<M, B> = matrix_kind<B> && !activations<B>;

// --- Constructors. std::is_constructible asks, so they take what is a mistake beyond doubt. ---

template <class Base>
concept mistaken_base = !matrix_like<Base> && (any_matrix<Base> || eigen_array<Base>);
template <class L>
concept mistaken_adapter = adapter_like<L> && !low_rank<L>;
/// The list of a batch.
template <class R>
concept mistaken_list = recognisable<R> && !batch_like<R>;
/// lora_A and lora_B.
template <class A, class B>
concept mistaken_factors = (matrix_like<A> || mistaken_base<A>)&&(
    matrix_like<B> || mistaken_base<B>)&&!(matrix_like<A> && matrix_like<B>);

}  // namespace detail
}  // namespace lora::inline LORA_DETAIL_ABI
