// SPDX-License-Identifier: Apache-2.0
//
// The thin wrapper around the machine's vectors. The compiler's -march picks the widest of AVX-512, AVX2 with FMA, 16-byte
// vectors of the GNU extension (SSE2, NEON), or plain scalars; kernels are written once over these few operations.
//
// multiply_add is fused where the hardware has it and a product followed by a sum where it has not; within one build it is
// always the same of the two, so that a result does not depend on which tile or edge computed it.
//
// 16-bit elements: load_even, load_odd and join_pairs see bfloat16 as pairs inside 32-bit lanes, where widening is a shift
// and a mask and no lane is crossed; load_half and join_halves convert float16. Both narrow to the bits of float16.hpp as
// long as no lane is infinite or NaN; kernels ask a watch before they store.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "lora/float16.hpp"
#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
#include <immintrin.h>
#endif

// As in detail/eigen.hpp: gcc 12 calls uninitialized what its AVX-512 intrinsics leave undefined on purpose.
#if defined(LORA_DETAIL_AVX512) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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
#define LORA_DETAIL_APART __attribute__((noinline))
#else
#define LORA_DETAIL_INLINE inline
#define LORA_DETAIL_APART
#endif

/// As an instruction and no builtin: gcc 12 takes a function that does nothing but the builtin for one without effect, and
/// drops calls of it that it has not inlined yet.
LORA_DETAIL_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  asm volatile("prefetcht0 %a0" : : "p"(p));
#elif defined(__GNUC__)
  __builtin_prefetch(p);
#else
  static_cast<void>(p);
#endif
}

/// `bytes` from p, where there may be nothing: an address and no pointer. Fetches the lines of `Size` bytes.
template <int Size>
LORA_DETAIL_INLINE void prefetch_at(const void* p, std::ptrdiff_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes);
  for (std::uintptr_t b = 0; b < Size; b += 64) prefetch(reinterpret_cast<const void*>(first + b));
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
  static vector multiply(vector a, vector b) { return _mm512_mul_ps(a, b); }
  static vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
  static vector subtract(vector a, vector b) { return _mm512_sub_ps(a, b); }
  static bool all_finite(vector v) {
    const __m512i exponent = _mm512_set1_epi32(0x7f80'0000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(v), exponent), exponent) == 0;
  }
  /// The largest magnitude, as bits, of the lanes seen.
  struct magnitudes {
    __m512i most = _mm512_setzero_si512();
    LORA_DETAIL_INLINE void see(vector v) {
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff'ffff)));
    }
    bool exceed(std::uint32_t limit) const {
      return _mm512_cmpgt_epi32_mask(most, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
    }
  };
  static vector load_even(const bfloat16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static vector load_odd(const bfloat16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static vector join_pairs(vector even, vector odd) {
    const __m512i e = _mm512_srli_epi32(rounded_up(even), 16);
    const __m512i o = _mm512_and_si512(rounded_up(odd), _mm512_set1_epi32(static_cast<int>(0xffff'0000u)));
    return _mm512_castsi512_ps(_mm512_or_si512(e, o));
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const vector evens = _mm512_permutex2var_ps(first, even, second);
    second = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
    first = evens;
  }
  static vector load_half(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static vector join_halves(vector first, vector second) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_castsi512_ps(_mm512_inserti64x4(low, _mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), 1));
  }
  /// As join_pairs or join_halves, for usual elements (see looks_first): for bfloat16 no subnormal
  /// numbers, which the instruction takes for zero.
  template <class T>
  static vector join_usual(vector first, vector second) {
    if constexpr (std::is_same_v<T, float16>) {
      return join_halves(first, second);
    } else {
#if defined(LORA_DETAIL_DOTS)
      const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                             23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i joined = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      return _mm512_castsi512_ps(_mm512_permutexvar_epi16(lanes, joined));
#else
      return join_pairs(first, second);
#endif
    }
  }
  /// sums[k] += (a[k] + b[k])^2 in double, for all elements.
  static void add_squares(vector a, vector b, double* sums) {
#if defined(LORA_DETAIL_EMULATED)
    for (int k = 0; k < width; ++k) {
      float x[width], y[width];
      store(x, a);
      store(y, b);
      const double sum = static_cast<double>(x[k]) + static_cast<double>(y[k]);
      sums[k] = std::fma(sum, sum, sums[k]);
    }
#else
    const auto add = [](__m256 x, __m256 y, double* to) {
      const __m512d sum = _mm512_add_pd(_mm512_cvtps_pd(x), _mm512_cvtps_pd(y));
      _mm512_storeu_pd(to, _mm512_fmadd_pd(sum, sum, _mm512_loadu_pd(to)));
    };
    add(_mm512_castps512_ps256(a), _mm512_castps512_ps256(b), sums);
    add(_mm512_extractf32x8_ps(a, 1), _mm512_extractf32x8_ps(b, 1), sums + 8);
#endif
  }
  /// Elements of T in memory whose bits are not those of v.
  template <class T>
  static std::size_t differing(const T* p, vector v) {
    const __m512i before = _mm512_loadu_si512(p), after = _mm512_castps_si512(v);
    if constexpr (sizeof(T) == 2)
      return static_cast<std::size_t>(_mm_popcnt_u32(_mm512_cmpneq_epi16_mask(before, after)));
    else
      return static_cast<std::size_t>(_mm_popcnt_u32(_mm512_cmpneq_epi32_mask(before, after)));
  }
#if defined(LORA_DETAIL_DOTS)
  /// c plus the two products of each 32-bit lane's pair of bfloat16, one addition after the other. Subnormal operands and
  /// results count as zero.
  static vector add_dots(vector a, vector b, vector c) {
#if defined(__clang__) && __clang_major__ >= 16 && __clang_major__ <= 18
    // The code generator of clang 16 crashes where an operand of the intrinsic is a broadcast. 18 has faults of the kind, too
    // (llvm/llvm-project#83358); 14, 15, 19 and 22 have none.
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
    return _mm512_cmpeq_epi64_mask(_mm512_and_si512(_mm512_castpd_si512(v), exponent), exponent) == 0;
  }
  static void add_squares(vector a, vector b, double* sums) {
    const vector sum = _mm512_add_pd(a, b);
    _mm512_storeu_pd(sums, _mm512_fmadd_pd(sum, sum, _mm512_loadu_pd(sums)));
  }
  static std::size_t differing(const double* p, vector v) {
    return static_cast<std::size_t>(_mm_popcnt_u32(_mm512_cmpneq_epi64_mask(_mm512_loadu_si512(p), _mm512_castpd_si512(v))));
  }
};
/// Of 32 registers: 8 x 2 accumulators, 2 of the right operand, 1 broadcast.
inline constexpr int tile_rows = 8;
/// A tile of two panels has at most so many rows: 4 x 4 accumulators, 4 of the right operand, 1 broadcast.
inline constexpr int paired_rows = 4;
/// Where W passes from memory through taller tiles, they take turns after so many bytes of two panels; 0: they take one.
inline constexpr int bytes_between_panels = 4096;
/// Bytes of a widened chunk of W that two or three tiles pass, and of the activations that may stay in the caches while all
/// of W passes: what was best on a machine of 48 KiB, 1 MiB and 32 MiB.
inline constexpr std::ptrdiff_t few_tiles_chunk = std::ptrdiff_t{64} << 10, block_bytes = std::ptrdiff_t{8} << 20;
/// Bytes of the factors' panels along a band of a merge, which stay in the second-level cache while all bands beside it pass.
inline constexpr std::ptrdiff_t strip_bytes = std::ptrdiff_t{512} << 10;
/// Tiles ahead of a merge whose rows of the weight are fetched.
inline constexpr int tiles_ahead = 4;

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
  static vector multiply(vector a, vector b) { return _mm256_mul_ps(a, b); }
  static vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
  static vector subtract(vector a, vector b) { return _mm256_sub_ps(a, b); }
  static bool all_finite(vector v) {
    const __m256i exponent = _mm256_set1_epi32(0x7f80'0000);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), exponent), exponent)) == 0;
  }
  static vector load_even(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static vector load_odd(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                                _mm256_set1_epi32(static_cast<int>(0xffff'0000u))));
  }
  static vector join_pairs(vector even, vector odd) {
    const __m256i e = _mm256_srli_epi32(rounded_up(even), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(e, rounded_up(odd), 0xaa));
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const auto ordered = [](vector v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
    const vector evens = ordered(_mm256_shuffle_ps(first, second, 0x88));
    second = ordered(_mm256_shuffle_ps(first, second, 0xdd));
    first = evens;
  }
#if defined(__F16C__)
  static vector load_half(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static vector join_halves(vector first, vector second) {
    const __m256i low = _mm256_castsi128_si256(_mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    return _mm256_castsi256_ps(_mm256_inserti128_si256(low, _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), 1));
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
  /// sums[k] += (a[k] + b[k])^2 in double, for all elements.
  static void add_squares(vector a, vector b, double* sums) {
    const auto add = [](__m128 x, __m128 y, double* to) {
      const __m256d sum = _mm256_add_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
      _mm256_storeu_pd(to, _mm256_fmadd_pd(sum, sum, _mm256_loadu_pd(to)));
    };
    add(_mm256_castps256_ps128(a), _mm256_castps256_ps128(b), sums);
    add(_mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(b, 1), sums + 4);
  }
  /// Elements of T in memory whose bits are not those of v.
  template <class T>
  static std::size_t differing(const T* p, vector v) {
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), after = _mm256_castps_si256(v);
    const __m256i same = sizeof(T) == 2 ? _mm256_cmpeq_epi16(before, after) : _mm256_cmpeq_epi32(before, after);
    return static_cast<std::size_t>(std::popcount(~static_cast<std::uint32_t>(_mm256_movemask_epi8(same)))) / sizeof(T);
  }

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
  static vector multiply(vector a, vector b) { return _mm256_mul_pd(a, b); }
  static vector add(vector a, vector b) { return _mm256_add_pd(a, b); }
  static vector subtract(vector a, vector b) { return _mm256_sub_pd(a, b); }
  static bool all_finite(vector v) {
    const __m256i exponent = _mm256_set1_epi64x(0x7ff0'0000'0000'0000);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_castpd_si256(v), exponent), exponent)) == 0;
  }
  static void add_squares(vector a, vector b, double* sums) {
    const vector sum = _mm256_add_pd(a, b);
    _mm256_storeu_pd(sums, _mm256_fmadd_pd(sum, sum, _mm256_loadu_pd(sums)));
  }
  static std::size_t differing(const double* p, vector v) {
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i same = _mm256_cmpeq_epi64(before, _mm256_castpd_si256(v));
    return static_cast<std::size_t>(std::popcount(~static_cast<std::uint32_t>(_mm256_movemask_epi8(same)))) / 8;
  }
};
/// Of 16 registers: 6 x 2 accumulators, 2 of the right operand, 1 broadcast.
inline constexpr int tile_rows = 6, paired_rows = 2, bytes_between_panels = 0;
inline constexpr std::ptrdiff_t few_tiles_chunk = std::ptrdiff_t{16} << 10, block_bytes = std::ptrdiff_t{5} << 19;
inline constexpr std::ptrdiff_t strip_bytes = std::ptrdiff_t{256} << 10;
inline constexpr int tiles_ahead = 16;

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
  static vector load(const T* p) { return from_bits(p); }
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
  static vector multiply(vector a, vector b) {
    return each([&](int k) { return a[k] * b[k]; });
  }
  static vector add(vector a, vector b) {
    return each([&](int k) { return a[k] + b[k]; });
  }
  static vector subtract(vector a, vector b) {
    return each([&](int k) { return a[k] - b[k]; });
  }
  static bool all_finite(vector v) {
    bool all = true;
    for (int k = 0; k < width; ++k) all = all && magnitude(v[k]) < std::bit_cast<bits>(std::numeric_limits<T>::infinity());
    return all;
  }
  /// The largest magnitude, as bits, of the lanes seen.
  struct magnitudes {
    bits most = 0;
    void see(vector v) {
      for (int k = 0; k < width; ++k) most = std::max(most, magnitude(v[k]));
    }
    bool exceed(bits limit) const { return most > limit; }
  };
  static vector load_even(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k]); });
  }
  static vector load_odd(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k + 1]); });
  }
  static vector join_pairs(vector even, vector odd) {
    bfloat16 pairs[2 * width];
    for (int k = 0; k < width; ++k) {
      pairs[2 * k] = bfloat16(even[k]);
      pairs[2 * k + 1] = bfloat16(odd[k]);
    }
    return from_bits(pairs);
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const auto at = [one = first, two = second](int k) { return k < width ? one[k] : two[k - width]; };
    first = each([&](int k) { return at(2 * k); });
    second = each([&](int k) { return at(2 * k + 1); });
  }
  static vector load_half(const float16* p) {
    return each([&](int k) { return static_cast<T>(p[k]); });
  }
  static vector join_halves(vector first, vector second) {
    float16 halves[2 * width];
    for (int k = 0; k < width; ++k) {
      halves[k] = float16(first[k]);
      halves[width + k] = float16(second[k]);
    }
    return from_bits(halves);
  }
  /// sums[k] += (a[k] + b[k])^2 in double, for all elements.
  static void add_squares(vector a, vector b, double* sums) {
    for (int k = 0; k < width; ++k) {
      const double sum = static_cast<double>(a[k]) + static_cast<double>(b[k]);
      sums[k] += sum * sum;
    }
  }
  /// Elements of S in memory whose bits are not those of v.
  template <class S>
  static std::size_t differing(const S* p, vector v) {
    S after[sizeof(vector) / sizeof(S)];
    std::memcpy(after, &v, sizeof v);
    std::size_t count = 0;
    for (std::size_t k = 0; k < sizeof(vector) / sizeof(S); ++k) count += std::memcmp(p + k, after + k, sizeof(S)) != 0;
    return count;
  }

 private:
  template <class F>
  static vector each(const F& f) {
    vector v{};  // gcc does not see that every element is set
    for (int k = 0; k < width; ++k) v[k] = f(k);
    return v;
  }
  static vector from_bits(const void* p) {
    vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static bits magnitude(T value) { return std::bit_cast<bits>(value) & (~bits(0) >> 1); }
};
/// Of 16 registers: 4 x 2 accumulators and room for the product that a machine without FMA needs.
inline constexpr int tile_rows = 4, paired_rows = 2, bytes_between_panels = 0;
inline constexpr std::ptrdiff_t few_tiles_chunk = std::ptrdiff_t{16} << 10, block_bytes = std::ptrdiff_t{5} << 19;
inline constexpr std::ptrdiff_t strip_bytes = std::ptrdiff_t{256} << 10;
inline constexpr int tiles_ahead = 16;

#endif

/// Whether W * x of elements T is computed by dot products of pairs, where the elements of x are T, too.
template <class Acc, class T>
#if defined(LORA_DETAIL_DOTS)
inline constexpr bool has_dots = std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16>;
#else
inline constexpr bool has_dots = false;
#endif

/// Hides how a value came about. Under -ffast-math a compiler would otherwise sum the terms of results in another order, and
/// never see that one of the results overflowed.
template <class Vector>
LORA_DETAIL_INLINE void as_it_came(Vector& v) {
#if !defined(__GNUC__) || defined(LORA_DETAIL_EMULATED)  // vectors wider than registers, in a test
  static_cast<void>(v);
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  static_cast<void>(v);
#endif
}

/// Writes the bits of a vector of 16-bit elements.
template <class Vector>
LORA_DETAIL_INLINE void store_bits(void* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

/// Whether all of the sums seen are finite in T after rounding.
template <class Acc, class T>
struct watch {
  using vectors = simd<Acc>;
  typename vectors::vector one = vectors::zero(), other = vectors::zero();

  /// Infinities and NaN stay in a sum; one that overflows although its terms are finite gives a false alarm. Two sums, because
  /// the additions of one wait for each other.
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
/// Of 16-bit elements, by what they were rounded to: the upper ends of the signed and of the unsigned order.
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
    const __m256i most = _mm256_set1_epi16(infinity - 1), least = _mm256_set1_epi16(static_cast<short>(infinity | 0x8000));
    const __m256i below = _mm256_cmpeq_epi16(_mm256_max_epu16(negative, least), negative);
    return _mm256_movemask_epi8(_mm256_or_si256(_mm256_cmpgt_epi16(positive, most), below)) == 0;
  }
};
#else
/// Of 16-bit elements, by the largest magnitudes that do not round to infinity: below halfway from the largest number to it.
template <class T>
  requires(sizeof(T) == 2)
struct watch<float, T> {
  using vectors = simd<float>;
  vectors::magnitudes seen{};

  LORA_DETAIL_INLINE void see(vectors::vector first, vectors::vector second, vectors::vector) {
    seen.see(first);
    seen.see(second);
  }
  bool all_finite() const { return !seen.exceed(std::is_same_v<T, bfloat16> ? 0x7f7f'7fffu : 0x477f'efffu); }
};
#endif

/// Columns of a register tile: two vectors.
template <class T>
inline constexpr int tile_cols = 2 * simd<T>::width;

/// Whether a merge looks at the elements of a tile of T before it is formed, instead of at its results, which wait for the last
/// multiply-add.
template <class Acc, class T>
#if defined(LORA_DETAIL_AVX512)
inline constexpr bool looks_first = std::is_same_v<Acc, float> && sizeof(T) == 2;
#else
inline constexpr bool looks_first = false;
#endif
/// A usual element w is smaller than 2 and, of bfloat16, not smaller than 2^-63 (so not zero). With less than usual_delta
/// subtracted the result is finite in T, with room for what the delta's sum rounds. Of bfloat16 it is no subnormal number:
/// if the delta lies within a factor of two of w the difference is exact (Sterbenz) and a multiple of 2^-87, so zero or not
/// smaller; else it is not smaller than |w| / 2.
template <class T>
inline constexpr float usual_delta = std::is_same_v<T, bfloat16> ? 0x1p125F : 0x1p14F;

#if defined(LORA_DETAIL_AVX512)
/// Whether all elements of a tile are usual. `stride` elements from row to row. A function of its own: gcc otherwise moves the
/// tile's operands into memory.
template <class T>
LORA_DETAIL_APART bool all_usual(const T* tile, std::ptrdiff_t stride) {
  // Of the exponent: of bfloat16 the upper bits are 01, of float16 the upper bit is 0. Of two elements in a lane.
  constexpr bool is_bfloat16 = std::is_same_v<T, bfloat16>;
  constexpr int upper_bits = is_bfloat16 ? 0x6000'6000 : 0x4000'4000, wanted_bits = is_bfloat16 ? 0x2000'2000 : 0;
  const __m512i upper = _mm512_set1_epi32(upper_bits), wanted = _mm512_set1_epi32(wanted_bits);
  __m512i differs = _mm512_setzero_si512(), other = _mm512_setzero_si512();
  constexpr int or_a_difference = 0xf6;  // a | (b ^ c)
  LORA_DETAIL_UNROLL
  for (int i = 0; i < tile_rows; i += 2) {
    differs = _mm512_ternarylogic_epi32(differs, _mm512_loadu_si512(tile + i * stride), wanted, or_a_difference);
    other = _mm512_ternarylogic_epi32(other, _mm512_loadu_si512(tile + (i + 1) * stride), wanted, or_a_difference);
  }
  return _mm512_test_epi32_mask(_mm512_or_si512(differs, other), upper) == 0;
}
#endif

/// Makes what this thread streamed past the caches visible to the others.
inline void finish_streaming() {
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  _mm_sfence();
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail

#if defined(LORA_DETAIL_AVX512) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic pop
#endif
