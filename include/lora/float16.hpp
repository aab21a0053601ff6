// SPDX-License-Identifier: Apache-2.0
//
// float16 (IEEE binary16) and bfloat16: storage types. They hold 16 bits and convert; they do not
// compute, because the library widens to float, accumulates there and narrows once.
//
// Widening to float or double is exact. Narrowing rounds to nearest, ties to even, once, also from
// double (no detour through float), in integer arithmetic: the same bits on every CPU, under every
// flag and rounding mode. Subnormals are kept, overflow gives infinity, a NaN stays a NaN, made
// quiet, with the upper bits of its payload. (The x86 instruction vcvtneps2bf16 flushes subnormals,
// and libraries that use it differ here.)
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// Round to nearest even of mantissa * 2^-shift, shift >= 1; the mantissa's highest bit is zero. No
/// branch on the digits that are lost, which nothing can predict.
template <class Unsigned>
constexpr Unsigned shift_right_even(Unsigned mantissa, int shift) {
  if (shift >= std::numeric_limits<Unsigned>::digits) return 0;
  const Unsigned below_half = (Unsigned{1} << (shift - 1)) - 1;
  return (mantissa + below_half + ((mantissa >> shift) & 1)) >> shift;
}

/// The 16 bits nearest to a double, in a format of the given widths (ExponentBits + MantissaBits =
/// 15).
template <int ExponentBits, int MantissaBits>
constexpr std::uint16_t narrow_double(double value) {
  constexpr std::uint64_t bias = (1ull << (ExponentBits - 1)) - 1,
                          infinity = ((1ull << ExponentBits) - 1) << MantissaBits;
  constexpr std::uint64_t smallest_normal = (1024 - bias) << 52, too_large = (1024 + bias)
                                                                             << 52;  // their bits
  constexpr int shift = 52 - MantissaBits;
  const auto bits = std::bit_cast<std::uint64_t>(value);
  const std::uint64_t sign = (bits >> 48) & 0x8000u;
  const std::uint64_t magnitude = bits & 0x7fff'ffff'ffff'ffffull;
  // A mantissa that rounds up to the next power of two carries into the exponent, of the largest
  // into infinity.
  if (magnitude - smallest_normal < too_large - smallest_normal)
    return static_cast<std::uint16_t>(
        sign | (shift_right_even(magnitude, shift) - ((1023 - bias) << MantissaBits)));
  if (magnitude > 0x7ff0'0000'0000'0000ull) {
    const std::uint64_t payload = (magnitude >> shift) & ((1ull << MantissaBits) - 1);
    return static_cast<std::uint16_t>(sign | infinity | payload | (1ull << (MantissaBits - 1)));
  }
  if (magnitude >= too_large) return static_cast<std::uint16_t>(sign | infinity);
  // Subnormal. (A subnormal double is far below half of the smallest value of either format.)
  const auto below = static_cast<int>((smallest_normal - (magnitude & ~((1ull << 52) - 1))) >> 52);
  const std::uint64_t mantissa = (magnitude & 0x000f'ffff'ffff'ffffull) | 0x0010'0000'0000'0000ull;
  return static_cast<std::uint16_t>(sign | shift_right_even(mantissa, shift + below));
}

constexpr std::uint16_t bfloat16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fff'ffffu) > 0x7f80'0000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr std::uint16_t float16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fff'ffffu;
  if (magnitude > 0x7f80'0000u)
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x4780'0000u)
    return static_cast<std::uint16_t>(sign | 0x7c00u);  // 2^16 and above
  if (magnitude >= 0x3880'0000u) {                      // 2^-14 and above: normal
    const std::uint32_t rebased = magnitude - 0x3800'0000u;
    return static_cast<std::uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  }
  const int biased = static_cast<int>(magnitude >> 23);
  const std::uint32_t mantissa = (magnitude & 0x7f'ffffu) | 0x80'0000u;
  return static_cast<std::uint16_t>(sign |
                                    (biased < 102 ? 0u : shift_right_even(mantissa, 126 - biased)));
}

constexpr float float_from_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return std::bit_cast<float>(sign | 0x7f80'0000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x3800'0000u));
  if (magnitude == 0) return std::bit_cast<float>(sign);
  const int leading_zeros =
      std::countl_zero(magnitude) - 21;  // inside the ten mantissa bits and the hidden one
  const std::uint32_t mantissa = (magnitude << (leading_zeros + 13)) & 0x7f'ffffu;
  return std::bit_cast<float>(sign | (static_cast<std::uint32_t>(113 - leading_zeros) << 23) |
                              mantissa);
}

/// Integers that a double holds exactly; anything wider would round twice.
template <class T>
concept small_integer = std::integral<T> && sizeof(T) <= 4;

}  // namespace detail

/// bfloat16: 1 sign, 8 exponent and 7 mantissa bits; unit roundoff 2^-8, range of float. Stored as
/// its 16 bits.
struct bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  constexpr explicit bfloat16(float value) : bits(detail::bfloat16_bits(value)) {}
  constexpr explicit bfloat16(double value) : bits(detail::narrow_double<8, 7>(value)) {}
  constexpr explicit bfloat16(detail::small_integer auto value)
      : bfloat16(static_cast<double>(value)) {}
  static constexpr bfloat16 from_bits(std::uint16_t bits) {
    bfloat16 result{0.0F};
    result.bits = bits;
    return result;
  }
  constexpr explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  constexpr explicit operator double() const {
    return static_cast<double>(static_cast<float>(*this));
  }
  /// Compares values as IEEE numbers: -0 equals 0, a NaN equals nothing. Compare `bits` for
  /// identity.
  friend constexpr bool operator==(bfloat16 a, bfloat16 b) {
    return static_cast<float>(a) == static_cast<float>(b);
  }
};

/// float16 (IEEE binary16): 1 sign, 5 exponent and 10 mantissa bits; unit roundoff 2^-11, largest
/// 65504, subnormal step 2^-24. Stored as its 16 bits.
struct float16 {
  std::uint16_t bits;

  float16() = default;
  constexpr explicit float16(float value) : bits(detail::float16_bits(value)) {}
  constexpr explicit float16(double value) : bits(detail::narrow_double<5, 10>(value)) {}
  constexpr explicit float16(detail::small_integer auto value)
      : float16(static_cast<double>(value)) {}
  static constexpr float16 from_bits(std::uint16_t bits) {
    float16 result{0.0F};
    result.bits = bits;
    return result;
  }
  constexpr explicit operator float() const { return detail::float_from_float16(bits); }
  constexpr explicit operator double() const {
    return static_cast<double>(static_cast<float>(*this));
  }
  /// Compares values as IEEE numbers: -0 equals 0, a NaN equals nothing. Compare `bits` for
  /// identity.
  friend constexpr bool operator==(float16 a, float16 b) {
    return static_cast<float>(a) == static_cast<float>(b);
  }
};

static_assert(sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<bfloat16>);
static_assert(sizeof(float16) == 2 && std::is_trivially_copyable_v<float16>);

namespace detail {
/// What std::numeric_limits says of a 16-bit format, from its limits' bit patterns.
template <class T, int Digits, int MinExponent, int MaxExponent, std::uint16_t Min,
          std::uint16_t Max, std::uint16_t Epsilon, std::uint16_t Infinity, std::uint16_t Nan>
struct small_float_limits : std::numeric_limits<float> {
  static constexpr int digits = Digits;
  static constexpr int digits10 = static_cast<int>((Digits - 1) * 0.30103);
  static constexpr int max_digits10 = static_cast<int>(Digits * 0.30103 + 2);
  static constexpr int min_exponent = MinExponent;
  static constexpr int max_exponent = MaxExponent;
  static constexpr int min_exponent10 = static_cast<int>((MinExponent - 1) * 0.30103);
  static constexpr int max_exponent10 = static_cast<int>(MaxExponent * 0.30103);
  static constexpr T min() { return T::from_bits(Min); }
  static constexpr T max() { return T::from_bits(Max); }
  static constexpr T lowest() { return T::from_bits(Max | 0x8000u); }
  static constexpr T epsilon() { return T::from_bits(Epsilon); }
  static constexpr T round_error() { return T(0.5F); }
  static constexpr T denorm_min() { return T::from_bits(1); }
  static constexpr T infinity() { return T::from_bits(Infinity); }
  static constexpr T quiet_NaN() { return T::from_bits(Nan); }
  static constexpr T signaling_NaN() { return T::from_bits(Infinity | 1u); }
};
}  // namespace detail
}  // namespace lora::inline LORA_DETAIL_ABI

template <>
struct std::numeric_limits<lora::bfloat16>
    : lora::detail::small_float_limits<lora::bfloat16, 8, -125, 128, 0x0080, 0x7f7f, 0x3c00, 0x7f80,
                                       0x7fc0> {};
template <>
struct std::numeric_limits<lora::float16>
    : lora::detail::small_float_limits<lora::float16, 11, -13, 16, 0x0400, 0x7bff, 0x1400, 0x7c00,
                                       0x7e00> {};
