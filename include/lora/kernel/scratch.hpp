// SPDX-License-Identifier: Apache-2.0
//
// How a call divides its scratch memory. Its objects first claim what they need of one layout; then
// the memory is allocated once; then each object binds its places to that memory.
#pragma once

#include <concepts>
#include <cstddef>

#include "lora/concepts.hpp"
#include "lora/kernel/memory.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Places in a block of memory that is not allocated yet.
class layout {
 public:
  template <class T>
  class place {
   public:
    place() = default;
    T* in(std::byte* memory) const { return reinterpret_cast<T*>(memory + offset_); }

   private:
    friend layout;
    explicit place(std::size_t offset) : offset_(offset) {}
    std::size_t offset_ = 0;
  };

  template <class T>
  place<T> take(index_t count) {
    const std::size_t offset = size_;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    size_ += rounded_up(bytes, memory_alignment);
    return place<T>(offset);
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

/// An object that needs scratch: it claims places, and finds them once the memory is there.
template <class U>
concept scratch_user = requires(U& user, layout& l, std::byte* memory) {
  user.claim(l);
  user.bind(memory);
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
