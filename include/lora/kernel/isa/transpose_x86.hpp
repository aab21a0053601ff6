// SPDX-License-Identifier: Apache-2.0
//
// Transposes blocks of eight by eight 32-bit elements by AVX2, for the packing of panels.
#pragma once

#include "lora/version.hpp"

#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)

#include <immintrin.h>

#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/float16.hpp"
#include "lora/kernel/compiler.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Eight rows of eight 32-bit elements become eight columns.
inline void transpose_8x8(__m256 (&r)[8]) {
  __m256 t[8], s[8];
  LORA_DETAIL_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  LORA_DETAIL_UNROLL
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  LORA_DETAIL_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}

/// Eight elements widened to float, or eight words as they are.
template <class T>
__m256 eight_from(const T* p) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    float values[8];
    for (int k = 0; k < 8; ++k) values[k] = static_cast<float>(p[k]);
    return _mm256_loadu_ps(values);
#endif
  } else {
    return _mm256_loadu_ps(p);
  }
}

/// destination[k * width + i] = row(i)[k] for i, k < 8.
template <class Row>
void transpose_block(const Row& row, float* destination, index_t width) {
  __m256 r[8];
  LORA_DETAIL_UNROLL
  for (int i = 0; i < 8; ++i) r[i] = eight_from(row(i));
  transpose_8x8(r);
  LORA_DETAIL_UNROLL
  for (int k = 0; k < 8; ++k) _mm256_storeu_ps(destination + k * width, r[k]);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail

#endif
