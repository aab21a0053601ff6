// SPDX-License-Identifier: Apache-2.0
//
// The thin wrapper around the machine's vectors: load, store, broadcast and one multiply-add. The compiler's -march picks
// the widest of AVX-512, AVX2 with FMA, 16-byte vectors of the GNU extension (SSE2, NEON), or plain scalars.
//
// multiply_add is fused where the hardware has it and a product followed by a sum where it has not; within one build it is
// always the same of the two, so that a result does not depend on which tile or edge computed it.
#pragma once

#include <cmath>

#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
#include <immintrin.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

#if defined(LORA_DETAIL_AVX512)

template <class T>
struct simd;

template <>
struct simd<float> {
  using vector = __m512;
  static constexpr int width = 16;
  static vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, vector v) { _mm512_storeu_ps(p, v); }
  static vector broadcast(float v) { return _mm512_set1_ps(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
};
template <>
struct simd<double> {
  using vector = __m512d;
  static constexpr int width = 8;
  static vector load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, vector v) { _mm512_storeu_pd(p, v); }
  static vector broadcast(double v) { return _mm512_set1_pd(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_pd(a, b, c); }
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
  static vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, vector v) { _mm256_storeu_ps(p, v); }
  static vector broadcast(float v) { return _mm256_set1_ps(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
};
template <>
struct simd<double> {
  using vector = __m256d;
  static constexpr int width = 4;
  static vector load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, vector v) { _mm256_storeu_pd(p, v); }
  static vector broadcast(double v) { return _mm256_set1_pd(v); }
  static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_pd(a, b, c); }
};
/// Of 16 registers: 6 x 2 accumulators, 2 of the right operand, 1 broadcast.
inline constexpr int tile_rows = 6;

#elif defined(__GNUC__)

template <class T>
struct simd {
  typedef T vector __attribute__((vector_size(16)));
  static constexpr int width = 16 / sizeof(T);
  static vector load(const T* p) {
    vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, vector v) { __builtin_memcpy(p, &v, sizeof v); }
  static vector broadcast(T value) { return value - vector{}; }  // -, not +: -0 keeps its sign
  static vector multiply_add(vector a, vector b, vector c) {
#if defined(LORA_DETAIL_FMA)
    vector v;
    for (int k = 0; k < width; ++k) v[k] = std::fma(a[k], b[k], c[k]);
    return v;
#else
    return a * b + c;
#endif
  }
};
/// Of 16 registers: 4 x 2 accumulators and room for the product that a machine without FMA needs.
inline constexpr int tile_rows = 4;

#else

template <class T>
struct simd {
  using vector = T;
  static constexpr int width = 1;
  static vector load(const T* p) { return *p; }
  static void store(T* p, vector v) { *p = v; }
  static vector broadcast(T value) { return value; }
  static vector multiply_add(vector a, vector b, vector c) { return a * b + c; }
};
inline constexpr int tile_rows = 4;

#endif

/// Columns of a register tile: two vectors.
template <class T>
inline constexpr int tile_cols = 2 * simd<T>::width;

}  // namespace lora::inline LORA_DETAIL_ABI::detail
