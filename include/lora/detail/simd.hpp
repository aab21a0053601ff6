// SPDX-License-Identifier: Apache-2.0
//
// The thin wrapper around the machine's vectors. The compiler's -march picks the widest of AVX-512, AVX2 with FMA, 16-byte
// vectors of the GNU extension (SSE2, NEON), or plain scalars; kernels are written once over these few operations.
//
// multiply_add is fused where the hardware has it and a product followed by a sum where it has not; within one build it is
// always the same of the two, so that a result does not depend on which tile or edge computed it.
//
// 16-bit elements: load_even, load_odd and join_pairs see bfloat16 as pairs inside 32-bit lanes, where widening is a shift and a
// mask and no lane is crossed; load_half and store_half convert float16. Both narrow to the bits of float16.hpp as long as
// no lane is infinite or NaN, and the kernels ask exceeds() before they store.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lora/float16.hpp"
#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
#include <immintrin.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Before a loop of a constant number of turns over registers: gcc 12 otherwise unrolls it too late to keep an array of
/// vectors out of memory.
#if defined(__clang__)
#define LORA_DETAIL_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define LORA_DETAIL_UNROLL _Pragma("GCC unroll 16")
#else
#define LORA_DETAIL_UNROLL
#endif
#if defined(__GNUC__)
#define LORA_DETAIL_INLINE __attribute__((always_inline)) inline
#else
#define LORA_DETAIL_INLINE inline
#endif

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  static_cast<void>(p);
#endif
}

/// The same some bytes from p, where there may be nothing: an address and no pointer.
inline void prefetch_at(const void* p, std::ptrdiff_t bytes) {
  prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes)));
}

#if defined(LORA_DETAIL_AVX512)

template <class T>
struct simd;

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
  static vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
  /// delta == 0 ? kept : sum
  static vector keep_where_zero(vector delta, vector kept, vector sum) {
    return _mm512_mask_mov_ps(sum, _mm512_cmp_ps_mask(delta, _mm512_setzero_ps(), _CMP_EQ_OQ), kept);
  }
  /// Whether the magnitude of any lane, read as bits, is above a limit.
  static bool exceeds(vector a, vector b, std::uint32_t limit) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fff'ffff);
    const __m512i most = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                          _mm512_and_si512(_mm512_castps_si512(b), magnitude));
    return _mm512_cmpgt_epi32_mask(most, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
  }
  /// The largest and smallest magnitude, as bits, of the lanes seen.
  struct range {
    __m512i most = _mm512_setzero_si512(), least = _mm512_set1_epi32(0x7fff'ffff);
    LORA_DETAIL_INLINE void see(vector v) {
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff'ffff));
      most = _mm512_max_epi32(most, bits);
      least = _mm512_min_epi32(least, bits);
    }
    /// No lane was zero or above a limit.
    bool is_inside(std::uint32_t limit) const {
      return (_mm512_cmpgt_epi32_mask(most, _mm512_set1_epi32(static_cast<int>(limit))) |
              _mm512_cmpeq_epi32_mask(least, _mm512_setzero_si512())) == 0;
    }
  };
  static vector load_even(const bfloat16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static vector load_odd(const bfloat16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static void join_pairs(bfloat16* p, vector even, vector odd) {
    const __m512i e = _mm512_srli_epi32(rounded_up(even), 16);
    const __m512i o = _mm512_and_si512(rounded_up(odd), _mm512_set1_epi32(static_cast<int>(0xffff'0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(e, o));
  }
  static vector load_half(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_half(float16* p, vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#if defined(LORA_DETAIL_DOTS)
  /// c plus the two products of each 32-bit lane's pair of bfloat16, one addition after the other. Subnormal operands and
  /// results count as zero.
  static vector add_dots(vector a, vector b, vector c) {
    return _mm512_dpbf16_ps(c, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
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
  static vector add(vector a, vector b) { return _mm512_add_pd(a, b); }
  static vector keep_where_zero(vector delta, vector kept, vector sum) {
    return _mm512_mask_mov_pd(sum, _mm512_cmp_pd_mask(delta, _mm512_setzero_pd(), _CMP_EQ_OQ), kept);
  }
  static bool exceeds(vector a, vector b, std::uint64_t limit) {
    const __m512i magnitude = _mm512_set1_epi64(0x7fff'ffff'ffff'ffff);
    const __m512i most = _mm512_max_epi64(_mm512_and_si512(_mm512_castpd_si512(a), magnitude),
                                          _mm512_and_si512(_mm512_castpd_si512(b), magnitude));
    return _mm512_cmpgt_epi64_mask(most, _mm512_set1_epi64(static_cast<long long>(limit))) != 0;
  }
  struct range {
    __m512i most = _mm512_setzero_si512(), least = _mm512_set1_epi64(0x7fff'ffff'ffff'ffff);
    LORA_DETAIL_INLINE void see(vector v) {
      const __m512i bits = _mm512_and_si512(_mm512_castpd_si512(v), _mm512_set1_epi64(0x7fff'ffff'ffff'ffff));
      most = _mm512_max_epi64(most, bits);
      least = _mm512_min_epi64(least, bits);
    }
    bool is_inside(std::uint64_t limit) const {
      return (_mm512_cmpgt_epi64_mask(most, _mm512_set1_epi64(static_cast<long long>(limit))) |
              _mm512_cmpeq_epi64_mask(least, _mm512_setzero_si512())) == 0;
    }
  };
};
/// Of 32 registers: 8 x 2 accumulators, 2 of the right operand, 1 broadcast.
inline constexpr int tile_rows = 8;

#elif defined(LORA_DETAIL_AVX2)

template <class T>
struct simd;

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
  static vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
  /// delta == 0 ? kept : sum
  static vector keep_where_zero(vector delta, vector kept, vector sum) {
    return _mm256_blendv_ps(sum, kept, _mm256_cmp_ps(delta, _mm256_setzero_ps(), _CMP_EQ_OQ));
  }
  /// Whether the magnitude of any lane, read as bits, is above a limit.
  static bool exceeds(vector a, vector b, std::uint32_t limit) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fff'ffff);
    const __m256i most = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), magnitude),
                                          _mm256_and_si256(_mm256_castps_si256(b), magnitude));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(most, _mm256_set1_epi32(static_cast<int>(limit)))) != 0;
  }
  /// The largest and smallest magnitude, as bits, of the lanes seen.
  struct range {
    __m256i most = _mm256_setzero_si256(), least = _mm256_set1_epi32(0x7fff'ffff);
    LORA_DETAIL_INLINE void see(vector v) {
      const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff'ffff));
      most = _mm256_max_epi32(most, bits);
      least = _mm256_min_epi32(least, bits);
    }
    /// No lane was zero or above a limit.
    bool is_inside(std::uint32_t limit) const {
      const __m256i above = _mm256_cmpgt_epi32(most, _mm256_set1_epi32(static_cast<int>(limit)));
      return _mm256_movemask_epi8(_mm256_or_si256(above, _mm256_cmpeq_epi32(least, _mm256_setzero_si256()))) == 0;
    }
  };
  static vector load_even(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static vector load_odd(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                                _mm256_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static void join_pairs(bfloat16* p, vector even, vector odd) {
    const __m256i e = _mm256_srli_epi32(rounded_up(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(e, rounded_up(odd), 0xaa));
  }
#if defined(__F16C__)
  static vector load_half(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_half(float16* p, vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static vector load_half(const float16* p) {
    float values[width];
    for (int k = 0; k < width; ++k) values[k] = static_cast<float>(p[k]);
    return load(values);
  }
  static void store_half(float16* p, vector v) {
    float values[width];
    store(values, v);
    for (int k = 0; k < width; ++k) p[k] = float16(values[k]);
  }
#endif

 private:
  /// Bits plus what carries into the upper half when rounding to nearest even.
  static __m256i rounded_up(vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    // -1 where the last bit that stays is 0: a comparison, because early Zen has one unit for shifts.
    const __m256i even = _mm256_cmpeq_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x1'0000)), _mm256_setzero_si256());
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
  static vector add(vector a, vector b) { return _mm256_add_pd(a, b); }
  static vector keep_where_zero(vector delta, vector kept, vector sum) {
    return _mm256_blendv_pd(sum, kept, _mm256_cmp_pd(delta, _mm256_setzero_pd(), _CMP_EQ_OQ));
  }
  static bool exceeds(vector a, vector b, std::uint64_t limit) {
    const __m256i magnitude = _mm256_set1_epi64x(0x7fff'ffff'ffff'ffff);
    const __m256i most = _mm256_set1_epi64x(static_cast<long long>(limit));
    const __m256i over = _mm256_or_si256(_mm256_cmpgt_epi64(_mm256_and_si256(_mm256_castpd_si256(a), magnitude), most),
                                         _mm256_cmpgt_epi64(_mm256_and_si256(_mm256_castpd_si256(b), magnitude), most));
    return _mm256_movemask_epi8(over) != 0;
  }
  /// As that of floats; AVX2 compares 64-bit integers but has no maximum of them.
  struct range {
    __m256i most = _mm256_setzero_si256(), zeros = _mm256_setzero_si256();
    LORA_DETAIL_INLINE void see(vector v) {
      const __m256i bits = _mm256_and_si256(_mm256_castpd_si256(v), _mm256_set1_epi64x(0x7fff'ffff'ffff'ffff));
      most = _mm256_blendv_epi8(most, bits, _mm256_cmpgt_epi64(bits, most));
      zeros = _mm256_or_si256(zeros, _mm256_cmpeq_epi64(bits, _mm256_setzero_si256()));
    }
    bool is_inside(std::uint64_t limit) const {
      const __m256i above = _mm256_cmpgt_epi64(most, _mm256_set1_epi64x(static_cast<long long>(limit)));
      return _mm256_movemask_epi8(_mm256_or_si256(above, zeros)) == 0;
    }
  };
};
/// Of 16 registers: 6 x 2 accumulators, 2 of the right operand, 1 broadcast.
inline constexpr int tile_rows = 6;

#else

#if defined(__GNUC__)
template <class T>
struct vector_of {
  typedef T type __attribute__((vector_size(16)));
  static constexpr int width = 16 / sizeof(T);
};
#else
template <class T>
struct vector_of {
  struct type {
    T value;
    T operator[](int) const { return value; }
    T& operator[](int) { return value; }
  };
  static constexpr int width = 1;
};
#endif

template <class T>
struct simd {
  using vector = typename vector_of<T>::type;
  using bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  static constexpr int width = vector_of<T>::width;
  static vector zero() { return broadcast(T(0)); }
  static vector load(const T* p) {
    vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, vector v) { std::memcpy(p, &v, sizeof v); }
  static void stream(T* p, vector v) { store(p, v); }
  static vector broadcast(T value) {
    return each([&](int) { return value; });
  }
  static vector multiply_add(vector a, vector b, vector c) {
#if defined(LORA_DETAIL_FMA)
    return each([&](int k) { return std::fma(a[k], b[k], c[k]); });
#elif defined(__GNUC__)
    return a * b + c;
#else
    return each([&](int k) { return a[k] * b[k] + c[k]; });
#endif
  }
  static vector add(vector a, vector b) {
    return each([&](int k) { return a[k] + b[k]; });
  }
  /// delta == 0 ? kept : sum
  static vector keep_where_zero(vector delta, vector kept, vector sum) {
    return each([&](int k) { return delta[k] == T(0) ? kept[k] : sum[k]; });
  }
  /// Whether the magnitude of any lane, read as bits, is above a limit.
  static bool exceeds(vector a, vector b, bits limit) {
    bool any = false;
    for (int k = 0; k < width; ++k) any = any || magnitude(a[k]) > limit || magnitude(b[k]) > limit;
    return any;
  }
  /// Whether a lane was zero, and the largest magnitude, as bits, of the lanes seen.
  struct range {
    bits most = 0;
    bool zero = false;
    void see(vector v) {
      for (int k = 0; k < width; ++k) {
        most = std::max(most, magnitude(v[k]));
        zero = zero || magnitude(v[k]) == 0;
      }
    }
    bool is_inside(bits limit) const { return !zero && most <= limit; }
  };
  static vector load_even(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k]); });
  }
  static vector load_odd(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k + 1]); });
  }
  static void join_pairs(bfloat16* p, vector even, vector odd) {
    for (int k = 0; k < width; ++k) {
      p[2 * k] = bfloat16(even[k]);
      p[2 * k + 1] = bfloat16(odd[k]);
    }
  }
  static vector load_half(const float16* p) {
    return each([&](int k) { return static_cast<T>(p[k]); });
  }
  static void store_half(float16* p, vector v) {
    for (int k = 0; k < width; ++k) p[k] = float16(v[k]);
  }

 private:
  template <class F>
  static vector each(const F& f) {
    vector v;
    for (int k = 0; k < width; ++k) v[k] = f(k);
    return v;
  }
  static bits magnitude(T value) { return std::bit_cast<bits>(value) & (~bits(0) >> 1); }
};
/// Of 16 registers: 4 x 2 accumulators and room for the product that a machine without FMA needs.
inline constexpr int tile_rows = 4;

#endif

/// Whether W * x of elements T is computed by dot products of pairs, where the elements of x are T, too.
template <class Acc, class T>
#if defined(LORA_DETAIL_DOTS)
inline constexpr bool has_dots = std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16>;
#else
inline constexpr bool has_dots = false;
#endif

/// Columns of a register tile: two vectors.
template <class T>
inline constexpr int tile_cols = 2 * simd<T>::width;

/// Makes what this thread streamed past the caches visible to the others.
inline void finish_streaming() {
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  _mm_sfence();
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
