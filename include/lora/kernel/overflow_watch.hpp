// SPDX-License-Identifier: Apache-2.0
//
// How a merge knows that every element it stores is finite: it watches the results (`watch`), or it
// decides from the weight alone, before a tile is formed (`checks_weight_first`).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lora/float16.hpp"
#include "lora/kernel/simd.hpp"
#include "lora/kernel/tuning.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Whether all of the sums seen are finite in T after rounding.
template <class Acc, class T>
struct watch {
  using vectors = simd<Acc>;
  typename vectors::vector one = vectors::zero(), other = vectors::zero();

  /// Infinities and NaN stay in a sum; one that overflows although its terms are finite gives a
  /// false alarm. Two sums, because the additions of one wait for each other.
  LORA_DETAIL_INLINE void see(typename vectors::vector first, typename vectors::vector second) {
    one = vectors::add(one, first);
    other = vectors::add(other, second);
  }
  bool all_finite() const {
    auto total = vectors::add(one, other);
    as_it_came(total);
    return vectors::all_finite(total);
  }
};
#if defined(LORA_DETAIL_AVX2)
/// Of 16-bit elements, by what they were rounded to: the upper ends of the signed and of the
/// unsigned order.
template <class T>
  requires(sizeof(T) == 2)
struct watch<float, T> {
  using vectors = simd<float>;
  __m256i positive = _mm256_setzero_si256(), negative = _mm256_setzero_si256();

  LORA_DETAIL_INLINE void see(__m256, __m256, __m256 rounded) {
    positive = _mm256_max_epi16(positive, _mm256_castps_si256(rounded));
    negative = _mm256_max_epu16(negative, _mm256_castps_si256(rounded));
  }
  bool all_finite() const {
    constexpr short infinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
    const __m256i most = _mm256_set1_epi16(infinity - 1),
                  least = _mm256_set1_epi16(static_cast<short>(infinity | 0x8000));
    const __m256i below = _mm256_cmpeq_epi16(_mm256_max_epu16(negative, least), negative);
    return _mm256_movemask_epi8(_mm256_or_si256(_mm256_cmpgt_epi16(positive, most), below)) == 0;
  }
};
#else
/// Of 16-bit elements, by the largest magnitudes that do not round to infinity: below halfway from
/// the largest number to it.
template <class T>
  requires(sizeof(T) == 2)
struct watch<float, T> {
  using vectors = simd<float>;
  vectors::magnitudes seen{};

  LORA_DETAIL_INLINE void see(vectors::vector first, vectors::vector second, vectors::vector) {
    seen.see(first);
    seen.see(second);
  }
  bool all_finite() const {
    return !seen.exceed(std::is_same_v<T, bfloat16> ? 0x7f7f'7fffu : 0x477f'efffu);
  }
};
#endif

/// If true, a merge decides from W alone, before it computes a tile, that no result can become
/// non-finite. The stores then need not wait for a check.
template <class Acc, class T>
#if defined(LORA_DETAIL_AVX512)
inline constexpr bool checks_weight_first = std::is_same_v<Acc, float> && sizeof(T) == 2;
#else
inline constexpr bool checks_weight_first = false;
#endif
/// A safe element: |w| < 2 and, for bfloat16, |w| >= 2^-63 (so not zero). For such w and
/// |delta| < safe_delta the result is finite, with room for the rounding of the delta's sum. For
/// bfloat16 it is not subnormal either: if the delta lies within a factor of two of w, the
/// difference is exact (Sterbenz) and a multiple of 2^-87, so zero or not smaller; else it is not
/// smaller than |w| / 2.
template <class T>
inline constexpr float safe_delta = std::is_same_v<T, bfloat16> ? 0x1p125F : 0x1p14F;

}  // namespace lora::inline LORA_DETAIL_ABI::detail
