// SPDX-License-Identifier: Apache-2.0
//
// Huge pages, for what lives long: the table that translates addresses holds a few thousand pages, and a weight of 64 MiB is
// 16,000 small ones and 32 huge ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "lora/version.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

inline constexpr std::size_t memory_alignment = 64;
inline constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t rounded_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

/// Whether small blocks share huge pages. Not under AddressSanitizer, which then would not see where a block ends.
#if !defined(__linux__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool shares_huge_pages = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
inline constexpr bool shares_huge_pages = false;
#else
inline constexpr bool shares_huge_pages = true;
#endif
#else
inline constexpr bool shares_huge_pages = true;
#endif

/// A hint: whether it is taken changes nothing but speed.
inline void advise_huge_pages(void* p, std::size_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<std::uintptr_t>(p) + huge_page - 1) / huge_page * huge_page;
  const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / huge_page * huge_page;
  if (begin < end) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(p), static_cast<void>(bytes);
#endif
}

/// Blocks that are smaller than a huge page, as most adapters are, side by side in chunks of huge pages. What is given back is
/// used again, and chunks without blocks are freed but for one. (malloc gives no huge pages: glibc maps blocks from 128 KiB on
/// one by one, or grows its heap bit by bit.)
class shared_huge_pages {
 public:
  static constexpr std::size_t chunk_bytes = 8 * huge_page;
  /// Smaller blocks are no gain: they are few pages.
  static constexpr std::size_t smallest = std::size_t{16} << 10;

  /// Those of the process. Never destroyed, so that blocks may outlive everything.
  static shared_huge_pages& all() {
    static auto* const pages = new shared_huge_pages;
    return *pages;
  }

  /// bytes <= chunk_bytes. May throw std::bad_alloc, with nothing changed.
  std::byte* take(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto& [begin, c] : chunks_)
      if (std::byte* const block = c.take(rounded_up(bytes, memory_alignment))) return block;
    chunk added;
    added.memory.reset(static_cast<std::byte*>(::operator new(chunk_bytes, std::align_val_t{huge_page})));
    advise_huge_pages(added.memory.get(), chunk_bytes);
    added.free.push_back({0, chunk_bytes});
    std::byte* const block = added.take(rounded_up(bytes, memory_alignment));
    std::byte* const begin = added.memory.get();
    chunks_.emplace(begin, std::move(added));
    return block;
  }
  /// A block of `bytes` that was taken.
  void give_back(std::byte* block, std::size_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    const auto place = std::prev(chunks_.upper_bound(block));
    place->second.give_back({static_cast<std::size_t>(block - place->first), rounded_up(bytes, memory_alignment)});
    if (place->second.blocks != 0) return;
    const auto empty = [](const auto& c) { return c.second.blocks == 0; };
    if (std::count_if(chunks_.begin(), chunks_.end(), empty) > 1) chunks_.erase(place);
  }

 private:
  struct extent {
    std::size_t begin, bytes;
    std::size_t end() const { return begin + bytes; }
  };
  struct free_chunk {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{huge_page}); }
  };
  struct chunk {
    std::unique_ptr<std::byte, free_chunk> memory;
    std::vector<extent> free;  ///< in their order, no two touch: at most one more than there are blocks
    std::size_t blocks = 0;

    /// From the smallest extent that is large enough; null if none is.
    std::byte* take(std::size_t bytes) {
      auto best = free.end();
      for (auto e = free.begin(); e != free.end(); ++e)
        if (e->bytes >= bytes && (best == free.end() || e->bytes < best->bytes)) best = e;
      if (best == free.end()) return nullptr;
      const auto at = best - free.begin();
      if (free.capacity() < blocks + 2) free.reserve(2 * blocks + 2);  // giving back must not allocate
      extent& from = free[static_cast<std::size_t>(at)];
      std::byte* const block = memory.get() + from.begin;
      from = {from.begin + bytes, from.bytes - bytes};
      if (from.bytes == 0) free.erase(free.begin() + at);
      ++blocks;
      return block;
    }
    void give_back(extent e) {
      const auto next = std::find_if(free.begin(), free.end(), [&](const extent& f) { return f.begin > e.begin; });
      const bool after = next != free.begin() && std::prev(next)->end() == e.begin;
      const bool before = next != free.end() && e.end() == next->begin;
      if (after && before) {
        std::prev(next)->bytes += e.bytes + next->bytes;
        free.erase(next);
      } else if (after) {
        std::prev(next)->bytes += e.bytes;
      } else if (before) {
        *next = {e.begin, e.bytes + next->bytes};
      } else {
        free.insert(next, e);
      }
      --blocks;
    }
  };
  std::mutex mutex_;
  std::map<std::byte*, chunk, std::less<>> chunks_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
