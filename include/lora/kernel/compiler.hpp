// SPDX-License-Identifier: Apache-2.0
//
// What the kernels ask of a compiler: inlining, unrolling, and values that it may not reorder.
#pragma once

#include "lora/version.hpp"

/// Before a loop with a constant number of turns over registers. gcc 12 otherwise unrolls too late,
/// and an array of vectors stays in memory.
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

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Hides from the compiler how v was computed. Under -ffast-math it would otherwise reorder the
/// sums behind v, and a sum that overflowed would be lost; and it may fuse a product with the sum
/// that it goes into, which then rounds once.
template <class Value>
LORA_DETAIL_INLINE void as_it_came(Value& v) {
#if !defined(__GNUC__)
  static_cast<void>(v);
#elif defined(LORA_DETAIL_EMULATED)  // vectors wider than registers, in a test
  asm("" : "+m"(v));
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
