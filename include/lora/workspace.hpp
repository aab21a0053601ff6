// SPDX-License-Identifier: Apache-2.0
//
// workspace: scratch memory that a caller keeps between calls, so that a steady state allocates
// nothing:
//   lora::workspace space;
//   for (...) lora::forward(space, packed, X, Y, style);
// Every verb that takes one also comes without, and then allocates for the length of the call.
#pragma once

#include <cstddef>

#include "lora/kernel/memory.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Grows to what the largest call so far needed and keeps that; its content means nothing between
/// calls. One call at a time may use it: threads that call at the same time need one each.
class workspace {
 public:
  /// Bytes held.
  std::size_t size() const {
    return static_cast<std::size_t>(memory_.size()) + static_cast<std::size_t>(beside_.size());
  }
  /// Gives the memory back.
  void clear() {
    memory_ = {};
    beside_ = {};
  }

  /// Memory of at least this many bytes, aligned for vectors; what it held before is lost. May
  /// throw std::bad_alloc, with the old memory gone.
  std::byte* require(std::size_t bytes) { return grown(memory_, bytes); }
  /// The same of a second block, which require() leaves as it is: what a call needs while others
  /// run inside it.
  std::byte* require_beside(std::size_t bytes) { return grown(beside_, bytes); }

 private:
  static std::byte* grown(detail::array<std::byte>& memory, std::size_t bytes) {
    if (static_cast<std::size_t>(memory.size()) < bytes) {
      memory = {};  // first, so that both are never held
      memory = detail::array<std::byte>(static_cast<index_t>(bytes));
    }
    return memory.data();
  }

  detail::array<std::byte> memory_, beside_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
