// SPDX-License-Identifier: Apache-2.0
//
// scaled(w, adapter): the same adapter at w times its strength, as a view. Every verb takes it
// where it takes an adapter, so no verb has a parameter for strength.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/error.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Whether L only looks at factors that live elsewhere, so that a copy of L is cheap and outlives a
/// temporary L (as std::ranges::enable_view). Specialize it as true for a view type of your own;
/// the default treats L as an owner.
template <class L>
inline constexpr bool enable_adapter_view = false;

/// w * (an adapter). Holds a view by value and an owner by pointer, which must outlive it. It is
/// not a new adapter: the factors are those of the adapter, only scaling() differs.
template <low_rank L>
class [[nodiscard]] scaled_adapter {
 public:
  static constexpr bool holds_view = enable_adapter_view<L>;

  /// Throws value_error when the strength is not finite.
  scaled_adapter(double strength, const L& adapter) : strength_(strength), held_(hold(adapter)) {
    if (!detail::is_finite(strength)) detail::raise_value("scaled", "the strength is not finite");
  }

  decltype(auto) lora_A() const { return adapter().lora_A(); }
  decltype(auto) lora_B() const { return adapter().lora_B(); }
  index_t rank() const { return adapter().rank(); }
  double scaling() const { return strength_ * static_cast<double>(adapter().scaling()); }

  double strength() const { return strength_; }
  const L& adapter() const {
    if constexpr (holds_view)
      return held_;
    else
      return *held_;
  }

 private:
  static auto hold(const L& adapter) {
    if constexpr (holds_view)
      return adapter;
    else
      return std::addressof(adapter);
  }

  double strength_;
  std::conditional_t<holds_view, L, const L*> held_;
};

template <class L>
inline constexpr bool enable_adapter_view<scaled_adapter<L>> = true;

/// The adapter at weight times its own scaling; nothing is copied or computed. Weights multiply
/// when nested, in double, with one rounding each: the bounds of the verbs count from the product.
/// An adapter whose resulting scaling is 0 is not read by any verb (NaN in its factors then does no
/// harm). Weight is any finite number, negative too: -1 subtracts. Throws value_error otherwise. A
/// temporary owner is refused at compile time.
template <class L>
  requires low_rank<L>
auto scaled(double strength, L&& adapter) {
  using held = std::remove_cvref_t<L>;
  static_assert(std::is_lvalue_reference_v<L> || enable_adapter_view<held>,
                "lora::scaled: the adapter is a temporary that owns its factors, and the view "
                "would outlive it: give it a "
                "name first");
  return scaled_adapter<held>(strength, adapter);
}
/// What is no adapter gets a sentence.
template <class L>
  requires(!low_rank<L> && !detail::says_steps<L> && detail::recognisable<L>)
auto scaled(double, const L&) {
  static_assert(detail::refuse_adapter<detail::verb::scaled, L>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
