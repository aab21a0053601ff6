// SPDX-License-Identifier: Apache-2.0
//
// Between what is stored and what is computed: widening is exact, narrowing rounds once. One pair
// of functions for every scalar of the library, so that Eigen's 16-bit types get our conversions
// and no kernel knows a format.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lora/detail/eigen.hpp"
#include "lora/float16.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Our storage type for a scalar: itself, or the twin of an Eigen type.
template <class T>
struct storage {
  using type = T;
};
template <>
struct storage<Eigen::half> {
  using type = float16;
};
template <>
struct storage<Eigen::bfloat16> {
  using type = bfloat16;
};
template <class T>
using storage_t = typename storage<T>::type;
/// Float, double and our 16-bit formats, and not Eigen's.
template <class T>
inline constexpr bool is_own_format = std::is_same_v<T, storage_t<T>>;

/// Exact: Acc is float or double and at least as wide as T.
template <class Acc, class T>
Acc widen(const T& value) {
  if constexpr (std::is_same_v<storage_t<T>, T>) {
    return static_cast<Acc>(value);
  } else {
    return static_cast<Acc>(storage_t<T>::from_bits(std::bit_cast<std::uint16_t>(value)));
  }
}

/// One rounding, to nearest even.
template <class T, class Acc>
T narrow(Acc value) {
  if constexpr (std::is_same_v<storage_t<T>, T>) {
    return static_cast<T>(value);
  } else {
    return std::bit_cast<T>(storage_t<T>(value).bits);
  }
}

/// Neither infinite nor NaN, told by the bits: std::isfinite is folded away under -ffast-math.
template <class T>
bool is_finite(const T& value) {
  if constexpr (std::is_same_v<T, double>) {
    return (std::bit_cast<std::uint64_t>(value) & 0x7ff0'0000'0000'0000ull) !=
           0x7ff0'0000'0000'0000ull;
  } else if constexpr (std::is_same_v<T, float>) {
    return (std::bit_cast<std::uint32_t>(value) & 0x7f80'0000u) != 0x7f80'0000u;
  } else {
    constexpr auto infinity = std::numeric_limits<storage_t<T>>::infinity().bits;
    return (std::bit_cast<std::uint16_t>(value) & infinity) != infinity;
  }
}

/// By the bits, in every floating-point mode.
template <class T>
bool is_nan(const T& value) {
  if (is_finite(value)) return false;
  if constexpr (std::is_same_v<T, double>)
    return (std::bit_cast<std::uint64_t>(value) << 12) != 0;
  else if constexpr (std::is_same_v<T, float>)
    return (std::bit_cast<std::uint32_t>(value) << 9) != 0;
  else
    return (std::bit_cast<std::uint16_t>(value) & 0x7fff) >
           std::numeric_limits<storage_t<T>>::infinity().bits;
}

/// By the bits, too: under -ffast-math NaN may compare equal to zero.
template <class T>
bool is_zero(const T& value) {
  using bits = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
  return (std::bit_cast<bits>(value) & (~bits(0) >> 1)) == 0;
}
/// base + more; where more is 0 the base keeps its bits, also -0.
template <class Acc>
Acc plus(Acc base, Acc more) {
  return is_zero(more) ? base : base + more;
}

/// Whether every From is a To: the same format, or a wider one.
template <class To, class From>
inline constexpr bool holds_exactly =
    std::is_same_v<storage_t<To>, storage_t<From>> || std::is_same_v<To, double> ||
    (std::is_same_v<To, float> && !std::is_same_v<From, double>);

/// The same number in a format that holds it; in its own format the same bits, those of a signaling
/// NaN too.
template <class To, class From>
To exactly(const From& value) {
  static_assert(holds_exactly<To, From>);
  if constexpr (std::is_same_v<storage_t<To>, storage_t<From>>)
    return std::bit_cast<To>(value);
  else
    return widen<To>(value);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
