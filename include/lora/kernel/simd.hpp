// SPDX-License-Identifier: Apache-2.0
//
// simd<T>: the vector operations that the kernels are written over. The compiler's -march picks the
// widest of AVX-512, AVX2 with FMA, 16-byte vectors of the GNU extension (SSE2, NEON), or scalars.
//
// multiply_add is fused where the hardware has it; elsewhere it is a product followed by a sum.
// Within one build it is always the same of the two, so a result does not depend on the tile or
// edge that computed it.
//
// 16-bit elements: load_even, load_odd and join_pairs see bfloat16 as pairs in 32-bit lanes. There
// widening is a shift or a mask and crosses no lane. load_half and join_halves convert float16.
// join_pairs and join_halves round exactly as float16.hpp for finite lanes. Callers detect lanes
// that are not finite with `watch` and take the scalar path.
#pragma once

#include <cstring>
#include <type_traits>

#include "lora/kernel/isa/avx2.hpp"
#include "lora/kernel/isa/avx512.hpp"
#include "lora/kernel/isa/portable.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Columns of a register tile: two vectors.
template <class T>
inline constexpr int tile_cols = 2 * simd<T>::width;

/// Writes the bits of a vector of 16-bit elements.
template <class Vector>
LORA_DETAIL_INLINE void store_bits(void* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

/// Makes what this thread streamed past the caches visible to the others.
inline void finish_streaming() {
#if defined(LORA_DETAIL_AVX512) || defined(LORA_DETAIL_AVX2)
  _mm_sfence();
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
