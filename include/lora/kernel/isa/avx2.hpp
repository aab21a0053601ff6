// SPDX-License-Identifier: Apache-2.0
//
// simd<float> and simd<double> by AVX2 with FMA. simd.hpp includes this in builds for it.
#pragma once

#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX2)

#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lora/float16.hpp"
#include "lora/kernel/compiler.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

template <class T>
struct simd;

/// Counts in lanes the elements of T whose bits changed. At most 2^15 vectors.
template <class T>
struct changed_lanes {
  __m256i same = _mm256_setzero_si256();  ///< minus the number of lanes that stayed
  int vectors = 0;

  LORA_DETAIL_INLINE void see(__m256i before, __m256i after) {
    ++vectors;
    if constexpr (sizeof(T) == 2)
      same = _mm256_add_epi16(same, _mm256_cmpeq_epi16(before, after));
    else if constexpr (sizeof(T) == 4)
      same = _mm256_add_epi32(same, _mm256_cmpeq_epi32(before, after));
    else
      same = _mm256_add_epi64(same, _mm256_cmpeq_epi64(before, after));
  }
  LORA_DETAIL_INLINE void see(__m256 before, __m256 after) {
    see(_mm256_castps_si256(before), _mm256_castps_si256(after));
  }
  LORA_DETAIL_INLINE void see(__m256d before, __m256d after) {
    see(_mm256_castpd_si256(before), _mm256_castpd_si256(after));
  }
  template <class Vector>
  LORA_DETAIL_INLINE void see(const T* before, Vector after) {
    see(std::bit_cast<Vector>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(before))), after);
  }
  /// Lanes of 32 bits, or of 64.
  LORA_DETAIL_INLINE __m256i words() const {
    if constexpr (sizeof(T) == 2)
      return _mm256_madd_epi16(same, _mm256_set1_epi16(1));
    else
      return same;
  }
};
/// The sum of many.
template <class T>
struct changed_count {
  __m256i same = _mm256_setzero_si256();
  std::size_t vectors = 0;

  LORA_DETAIL_INLINE void add(const changed_lanes<T>& some) {
    same = sizeof(T) == 8 ? _mm256_add_epi64(same, some.words())
                          : _mm256_add_epi32(same, some.words());
    vectors += static_cast<std::size_t>(some.vectors);
  }
  std::size_t count() const {
    using word = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    word words[32 / sizeof(word)];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), same);
    std::int64_t sum = 0;
    for (const word one : words) sum += one;
    return vectors * (32 / sizeof(T)) - static_cast<std::size_t>(-sum);
  }
};

template <>
struct simd<float> {
  using vector = __m256;
  static constexpr int width = 8;
  static vector zero() { return _mm256_setzero_ps(); }
  static vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, vector v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, vector v) { _mm256_stream_ps(p, v); }
  static vector broadcast(float v) { return _mm256_set1_ps(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
  static vector multiply(vector a, vector b) { return _mm256_mul_ps(a, b); }
  static vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
  static vector subtract(vector a, vector b) { return _mm256_sub_ps(a, b); }
  static bool all_finite(vector v) {
    const __m256i exponent = _mm256_set1_epi32(0x7f80'0000);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(
               _mm256_and_si256(_mm256_castps_si256(v), exponent), exponent)) == 0;
  }
  static vector load_even(const bfloat16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static vector load_odd(const bfloat16* p) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                         _mm256_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static vector join_pairs(vector even, vector odd) {
    const __m256i e = _mm256_srli_epi32(rounded_up(even), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(e, rounded_up(odd), 0xaa));
  }
  /// What join_pairs joined.
  static void split_pairs(vector pairs, vector& even, vector& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs),
                                               _mm256_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  /// What join_halves joined.
  static void split_halves(vector halves, vector& first, vector& second) {
    float16 both[2 * width];
    store(reinterpret_cast<float*>(both), halves);
    first = load_half(both);
    second = load_half(both + width);
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const auto ordered = [](vector v) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
    };
    const vector evens = ordered(_mm256_shuffle_ps(first, second, 0x88));
    second = ordered(_mm256_shuffle_ps(first, second, 0xdd));
    first = evens;
  }
#if defined(__F16C__)
  static vector load_half(const float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static vector join_halves(vector first, vector second) {
    const __m256i low = _mm256_castsi128_si256(_mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    return _mm256_castsi256_ps(
        _mm256_inserti128_si256(low, _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), 1));
  }
#else
  static vector load_half(const float16* p) {
    float values[width];
    for (int k = 0; k < width; ++k) values[k] = static_cast<float>(p[k]);
    return load(values);
  }
  static vector join_halves(vector first, vector second) {
    float values[2 * width];
    store(values, first);
    store(values + width, second);
    float16 halves[2 * width];
    for (int k = 0; k < 2 * width; ++k) halves[k] = float16(values[k]);
    return load(reinterpret_cast<const float*>(halves));
  }
#endif
  /// Adds up (a[k] + b[k])^2 in double, lane by lane.
  struct squares {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    LORA_DETAIL_INLINE void see(vector a, vector b) {
      const __m256d first = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                                          _mm256_cvtps_pd(_mm256_castps256_ps128(b)));
      const __m256d second = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)),
                                           _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)));
      low = _mm256_fmadd_pd(first, first, low);
      high = _mm256_fmadd_pd(second, second, high);
    }
    LORA_DETAIL_INLINE void add_to(double* to) const {
      _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
      _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), high));
    }
  };

 private:
  /// Bits plus what carries into the upper half when rounding to nearest even.
  static __m256i rounded_up(vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    // -1 where the last bit that stays is 0: a comparison, because early Zen has one unit for
    // shifts.
    const __m256i even = _mm256_cmpeq_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x1'0000)),
                                            _mm256_setzero_si256());
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), even);
  }
};
template <>
struct simd<double> {
  using vector = __m256d;
  static constexpr int width = 4;
  static vector zero() { return _mm256_setzero_pd(); }
  static vector load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, vector v) { _mm256_storeu_pd(p, v); }
  static void stream(double* p, vector v) { _mm256_stream_pd(p, v); }
  static vector broadcast(double v) { return _mm256_set1_pd(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_pd(a, b, c); }
  static vector multiply(vector a, vector b) { return _mm256_mul_pd(a, b); }
  static vector add(vector a, vector b) { return _mm256_add_pd(a, b); }
  static vector subtract(vector a, vector b) { return _mm256_sub_pd(a, b); }
  static bool all_finite(vector v) {
    const __m256i exponent = _mm256_set1_epi64x(0x7ff0'0000'0000'0000);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi64(
               _mm256_and_si256(_mm256_castpd_si256(v), exponent), exponent)) == 0;
  }
  struct squares {
    vector sums = _mm256_setzero_pd();
    LORA_DETAIL_INLINE void see(vector a, vector b) {
      const vector sum = _mm256_add_pd(a, b);
      sums = _mm256_fmadd_pd(sum, sum, sums);
    }
    LORA_DETAIL_INLINE void add_to(double* to) const {
      _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), sums));
    }
  };
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail

#endif
