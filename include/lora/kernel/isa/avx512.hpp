// SPDX-License-Identifier: Apache-2.0
//
// simd<float> and simd<double> by AVX-512. simd.hpp includes this in builds for it.
#pragma once

#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX512)

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lora/float16.hpp"
#include "lora/kernel/compiler.hpp"
#include "lora/kernel/tuning.hpp"

// As in detail/eigen.hpp: gcc 12 calls uninitialized what its AVX-512 intrinsics leave undefined on
// purpose.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

template <class T>
struct simd;

/// Counts the elements of T whose bits changed. Elements of 32 and 64 bits in lanes: a comparison
/// and a subtraction for each vector. Elements of 16 bits by a population count of the mask:
/// rounding them keeps the vector units busy, so that the scalar ones are free.
template <class T>
struct changed_lanes {
  __m512i lanes = _mm512_setzero_si512();

  LORA_DETAIL_INLINE void see(__m512i before, __m512i after) {
    const __m512i minus_one = _mm512_set1_epi32(-1);
    if constexpr (sizeof(T) == 4)
      lanes =
          _mm512_mask_sub_epi32(lanes, _mm512_cmpneq_epi32_mask(before, after), lanes, minus_one);
    else
      lanes =
          _mm512_mask_sub_epi64(lanes, _mm512_cmpneq_epi64_mask(before, after), lanes, minus_one);
  }
  template <class Vector>
  LORA_DETAIL_INLINE void see(const T* before, Vector after) {
    see(_mm512_loadu_si512(before), std::bit_cast<__m512i>(after));
  }
};
template <class T>
  requires(sizeof(T) == 2)
struct changed_lanes<T> {
  std::size_t changed = 0;

  template <class Vector>
  LORA_DETAIL_INLINE void see(const T* before, Vector after) {
    changed += static_cast<std::size_t>(_mm_popcnt_u32(
        _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(before), std::bit_cast<__m512i>(after))));
  }
};
/// The sum of many.
template <class T>
struct changed_count {
  __m512i lanes = _mm512_setzero_si512();

  LORA_DETAIL_INLINE void add(const changed_lanes<T>& some) {
    lanes =
        sizeof(T) == 8 ? _mm512_add_epi64(lanes, some.lanes) : _mm512_add_epi32(lanes, some.lanes);
  }
  std::size_t count() const {
    using word = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
    word words[64 / sizeof(word)];
    _mm512_storeu_si512(words, lanes);
    std::size_t sum = 0;
    for (const word one : words) sum += one;
    return sum;
  }
};
template <class T>
  requires(sizeof(T) == 2)
struct changed_count<T> {
  std::size_t changed = 0;

  LORA_DETAIL_INLINE void add(const changed_lanes<T>& some) { changed += some.changed; }
  std::size_t count() const { return changed; }
};

template <>
struct simd<float> {
  using vector = __m512;
  static constexpr int width = 16;
  static vector zero() { return _mm512_setzero_ps(); }
  static vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, vector v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, vector v) { _mm512_stream_ps(p, v); }
  static vector broadcast(float v) { return _mm512_set1_ps(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
  static vector multiply(vector a, vector b) { return _mm512_mul_ps(a, b); }
  static vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
  static vector subtract(vector a, vector b) { return _mm512_sub_ps(a, b); }
  static bool all_finite(vector v) {
    const __m512i exponent = _mm512_set1_epi32(0x7f80'0000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(v), exponent), exponent) ==
           0;
  }
  /// The largest magnitude, as bits, of the lanes seen.
  struct magnitudes {
    __m512i most = _mm512_setzero_si512();
    LORA_DETAIL_INLINE void see(vector v) {
      most = _mm512_max_epi32(
          most, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff'ffff)));
    }
    bool exceed(std::uint32_t limit) const {
      return _mm512_cmpgt_epi32_mask(most, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
    }
  };
  static vector load_even(const bfloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static vector load_odd(const bfloat16* p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static vector join_pairs(vector even, vector odd) {
    const __m512i e = _mm512_srli_epi32(rounded_up(even), 16);
    const __m512i o =
        _mm512_and_si512(rounded_up(odd), _mm512_set1_epi32(static_cast<int>(0xffff'0000u)));
    return _mm512_castsi512_ps(_mm512_or_si512(e, o));
  }
  /// What join_pairs joined.
  static void split_pairs(vector pairs, vector& even, vector& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs),
                                               _mm512_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const vector evens = _mm512_permutex2var_ps(first, even, second);
    second = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
    first = evens;
  }
  static vector load_half(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static vector join_halves(vector first, vector second) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_castsi512_ps(
        _mm512_inserti64x4(low, _mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), 1));
  }
  /// What join_halves joined.
  static void split_halves(vector halves, vector& first, vector& second) {
    const __m512i bits = _mm512_castps_si512(halves);
    first = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
  }
  /// As join_pairs or join_halves, for safe elements (see checks_weight_first): for bfloat16 no
  /// subnormal numbers, which the instruction takes for zero.
  template <class T>
  static vector join_safe(vector first, vector second) {
    if constexpr (std::is_same_v<T, float16>) {
      return join_halves(first, second);
    } else {
#if defined(LORA_DETAIL_DOTS)
      const __m512i lanes =
          _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i joined = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      return _mm512_castsi512_ps(_mm512_permutexvar_epi16(lanes, joined));
#else
      return join_pairs(first, second);
#endif
    }
  }
  /// Adds up (a[k] + b[k])^2 in double, lane by lane.
  struct squares {
#if defined(LORA_DETAIL_EMULATED)
    double sums[width] = {};
    void see(vector a, vector b) {
      float x[width], y[width];
      store(x, a);
      store(y, b);
      for (int k = 0; k < width; ++k) {
        const double sum = static_cast<double>(x[k]) + static_cast<double>(y[k]);
        sums[k] = std::fma(sum, sum, sums[k]);
      }
    }
    void add_to(double* to) const {
      for (int k = 0; k < width; ++k) to[k] += sums[k];
    }
#else
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    LORA_DETAIL_INLINE void see(vector a, vector b) {
      const __m512d first = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)),
                                          _mm512_cvtps_pd(_mm512_castps512_ps256(b)));
      const __m512d second = _mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)),
                                           _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)));
      low = _mm512_fmadd_pd(first, first, low);
      high = _mm512_fmadd_pd(second, second, high);
    }
    LORA_DETAIL_INLINE void add_to(double* to) const {
      _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
      _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
    }
#endif
  };
#if defined(LORA_DETAIL_DOTS)
  /// c plus the two products of each 32-bit lane's pair of bfloat16, one addition after the other.
  /// Subnormal operands and
  /// results count as zero.
  static vector add_dots(vector a, vector b, vector c) {
#if defined(__clang__) && __clang_major__ >= 16 && __clang_major__ <= 18
    // The code generator of clang 16 crashes where an operand of the intrinsic is a broadcast. 18
    // has faults of the kind, too (llvm/llvm-project#83358); 14, 15, 19 and 22 have none.
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return _mm512_dpbf16_ps(c, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
#endif
  }
#endif

 private:
  /// Bits plus what carries into the upper half when rounding to nearest even.
  static __m512i rounded_up(vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
};
template <>
struct simd<double> {
  using vector = __m512d;
  static constexpr int width = 8;
  static vector zero() { return _mm512_setzero_pd(); }
  static vector load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, vector v) { _mm512_storeu_pd(p, v); }
  static void stream(double* p, vector v) { _mm512_stream_pd(p, v); }
  static vector broadcast(double v) { return _mm512_set1_pd(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_pd(a, b, c); }
  static vector multiply(vector a, vector b) { return _mm512_mul_pd(a, b); }
  static vector add(vector a, vector b) { return _mm512_add_pd(a, b); }
  static vector subtract(vector a, vector b) { return _mm512_sub_pd(a, b); }
  static bool all_finite(vector v) {
    const __m512i exponent = _mm512_set1_epi64(0x7ff0'0000'0000'0000);
    return _mm512_cmpeq_epi64_mask(_mm512_and_si512(_mm512_castpd_si512(v), exponent), exponent) ==
           0;
  }
  struct squares {
    vector sums = _mm512_setzero_pd();
    LORA_DETAIL_INLINE void see(vector a, vector b) {
      const vector sum = _mm512_add_pd(a, b);
      sums = _mm512_fmadd_pd(sum, sum, sums);
    }
    LORA_DETAIL_INLINE void add_to(double* to) const {
      _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), sums));
    }
  };
};

/// Whether all elements of a tile are safe, `stride` elements from row to row. A function of its
/// own: gcc otherwise moves the tile's operands into memory.
template <class T>
LORA_DETAIL_APART bool all_safe(const T* tile, std::ptrdiff_t stride) {
  // Of the exponent: of bfloat16 the upper bits are 01, of float16 the upper bit is 0. Of two
  // elements in a lane.
  constexpr bool is_bfloat16 = std::is_same_v<T, bfloat16>;
  constexpr int upper_bits = is_bfloat16 ? 0x6000'6000 : 0x4000'4000,
                wanted_bits = is_bfloat16 ? 0x2000'2000 : 0;
  const __m512i upper = _mm512_set1_epi32(upper_bits), wanted = _mm512_set1_epi32(wanted_bits);
  __m512i differs = _mm512_setzero_si512(), other = _mm512_setzero_si512();
  constexpr int or_a_difference = 0xf6;  // a | (b ^ c)
  LORA_DETAIL_UNROLL
  for (int i = 0; i < tile_rows; i += 2) {
    differs = _mm512_ternarylogic_epi32(differs, _mm512_loadu_si512(tile + i * stride), wanted,
                                        or_a_difference);
    other = _mm512_ternarylogic_epi32(other, _mm512_loadu_si512(tile + (i + 1) * stride), wanted,
                                      or_a_difference);
  }
  return _mm512_test_epi32_mask(_mm512_or_si512(differs, other), upper) == 0;
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic pop
#endif

#endif
