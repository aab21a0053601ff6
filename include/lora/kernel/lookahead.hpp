// SPDX-License-Identifier: Apache-2.0
//
// Prefetching: what a tile fetches from memory while it multiplies. Distances are in tuning.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lora/concepts.hpp"
#include "lora/kernel/compiler.hpp"
#include "lora/kernel/tuning.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

inline constexpr index_t cache_line = 64;

/// How many pieces of `size` hold `count` things.
constexpr index_t pieces(index_t count, index_t size) { return (count + size - 1) / size; }

/// An instruction and no builtin: gcc 12 takes a function that only prefetches for one without
/// effect, and drops calls of it that it has not inlined yet.
LORA_DETAIL_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  asm volatile("prefetcht0 %a0" : : "p"(p));
#elif defined(__GNUC__)
  __builtin_prefetch(p);
#else
  static_cast<void>(p);
#endif
}

/// Prefetches the lines of `Size` bytes, `bytes` from p. The address may lie outside every object.
template <int Size>
LORA_DETAIL_INLINE void prefetch_at(const void* p, std::ptrdiff_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes);
  for (std::uintptr_t b = 0; b < Size; b += cache_line)
    prefetch(reinterpret_cast<const void*>(first + b));
}

/// The next address to prefetch, and how far each step moves it. One step a depth: memory and
/// multipliers then work at the same time, where a burst would stop one of them.
struct lookahead {
  std::uintptr_t next =
      0;             ///< an address and no pointer: it may lie outside, where nothing is read
  index_t step = 0;  ///< bytes

  /// `bytes` after `from`.
  static lookahead after(const void* from, index_t bytes, index_t step) {
    return {reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(bytes), step};
  }
  /// Share n of the `share` bytes at `from`, in so many steps.
  static lookahead share(const void* from, index_t share, index_t n, index_t steps) {
    return after(from, n * share, pieces(share, steps));
  }
  /// One step: `Row` bytes; of two panels, `next_panel` bytes apart, the same of each.
  template <int Row, bool TwoPanels>
  LORA_DETAIL_INLINE void advance(index_t next_panel) {
    prefetch_at<Row>(reinterpret_cast<const void*>(next), 0);
    if constexpr (TwoPanels) prefetch_at<Row>(reinterpret_cast<const void*>(next), next_panel);
    next += static_cast<std::uintptr_t>(step);
  }
};

/// A block of memory, prefetched in shares of whole lines.
class lookahead_in_shares {
 public:
  lookahead_in_shares(const void* from, index_t bytes, index_t shares)
      : next_(reinterpret_cast<std::uintptr_t>(from)),
        end_(next_ + static_cast<std::uintptr_t>(bytes)),
        lines_(pieces(bytes, shares * cache_line)) {}

  /// The next share. Nothing at the end.
  LORA_DETAIL_INLINE void advance() {
    for (index_t k = 0; k < lines_ && next_ < end_; ++k, next_ += cache_line)
      prefetch(reinterpret_cast<const void*>(next_));
  }

 private:
  std::uintptr_t next_, end_;
  index_t lines_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
