// SPDX-License-Identifier: Apache-2.0
//
// Rows of a stored weight, widened to accumulators, as they are or transposed.
#pragma once

#include <type_traits>

#include "lora/detail/convert.hpp"
#include "lora/kernel/panels.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// to[k] := from[k], widened.
template <class Acc, class T>
void widen_all(const T* from, index_t count, Acc* to) {
  index_t k = 0;
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  if constexpr (std::is_same_v<Acc, float> && sizeof(T) == 2)
    for (; k + 8 <= count; k += 8)
      _mm256_storeu_ps(to + k, eight_from(reinterpret_cast<const storage_t<T>*>(from) + k));
#endif
  for (; k < count; ++k) to[k] = widen<Acc>(from[k]);
}

/// to[i * to_stride + k] = from[k * from_stride + i], widened, for i < rows, k < cols.
template <class Acc, class T>
void transpose_widened(const T* from, index_t from_stride, index_t rows, index_t cols, Acc* to,
                       index_t to_stride) {
  index_t whole_rows = 0, whole_cols = 0;
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  if constexpr (std::is_same_v<Acc, float> && !std::is_same_v<T, double>) {
    whole_rows = rows / 8 * 8;
    whole_cols = cols / 8 * 8;
    for (index_t k = 0; k < whole_cols; k += 8)
      for (index_t i = 0; i < whole_rows; i += 8)
        transpose_block([&](int n) { return from + (k + n) * from_stride + i; },
                        to + i * to_stride + k, to_stride);
  }
#endif
  for (index_t k = 0; k < cols; ++k)
    for (index_t i = k < whole_cols ? whole_rows : 0; i < rows; ++i)
      to[i * to_stride + k] = widen<Acc>(from[k * from_stride + i]);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
