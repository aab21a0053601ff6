// SPDX-License-Identifier: Apache-2.0
//
// workspace: scratch memory that a caller keeps between calls, so that a steady state allocates nothing:
//   lora::workspace space;
//   for (...) lora::forward(space, packed, X, Y, style);
// Every verb that takes one also comes without, and then allocates for the length of the call.
#pragma once

#include <cstddef>

#include "lora/detail/memory.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Grows to what the largest call so far needed and keeps that; its content means nothing between calls. One call at a
/// time may use it: threads that call at the same time need one each.
class workspace {
 public:
  /// Bytes held.
  std::size_t size() const { return static_cast<std::size_t>(memory_.size()); }
  /// Gives the memory back.
  void clear() { memory_ = {}; }

  /// Memory of at least this many bytes, aligned for vectors; what it held before is lost. May throw std::bad_alloc, with
  /// the old memory gone.
  std::byte* require(std::size_t bytes) {
    if (size() < bytes) {
      memory_ = {};  // first, so that both are never held
      memory_ = detail::array<std::byte>(static_cast<index_t>(bytes));
    }
    return memory_.data();
  }

 private:
  detail::array<std::byte> memory_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
