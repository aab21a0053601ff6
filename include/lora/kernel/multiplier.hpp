// SPDX-License-Identifier: Apache-2.0
//
// How a register tile multiplies. `mul_add` multiplies elements of the accumulator's type, one
// depth at a time. `dot2` multiplies pairs of bfloat16 by the dot products of AVX512-BF16, two
// depths at a time. A kernel takes the multiplier as a type and is written once.
#pragma once

#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/kernel/simd.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// sum += left * right, fused where the machine can (see simd.hpp).
template <class Acc>
struct mul_add {
  using vector = typename simd<Acc>::vector;
  /// Depths that one element of the left operand holds.
  static constexpr int depths = 1;
  LORA_DETAIL_INLINE static vector step(vector left, vector right, vector sum) {
    return simd<Acc>::multiply_add(left, right, sum);
  }
};

/// sum += the two products of each lane's pair, one addition after the other. Operands and results
/// that are subnormal count as zero. The left operand holds pairs in the bits of a float.
template <class Acc>
struct dot2 {
  using vector = typename simd<Acc>::vector;
  static constexpr int depths = 2;
  LORA_DETAIL_INLINE static vector step(vector left, vector right, vector sum) {
    return simd<Acc>::add_dots(left, right, sum);
  }
};

template <class M>
inline constexpr bool is_dot2 = M::depths == 2;

/// Whether this build multiplies T by T with dot2 where the sums are Acc.
template <class Acc, class T>
#if defined(LORA_DETAIL_DOTS)
inline constexpr bool has_dots = std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16>;
#else
inline constexpr bool has_dots = false;
#endif
/// Whether W * x of these elements is computed by dot products.
template <class Acc, class T, class X>
inline constexpr bool by_dots =
    has_dots<Acc, storage_t<T>> && std::is_same_v<storage_t<T>, storage_t<X>>;

/// call(multiplier): dot2 where `dots` holds and Possible, else mul_add. A call that cannot be is not
/// compiled.
template <class Acc, bool Possible, class Call>
LORA_DETAIL_INLINE void with_multiplier(bool dots, const Call& call) {
  if constexpr (Possible)
    if (dots) return call(dot2<Acc>());
  call(mul_add<Acc>());
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
