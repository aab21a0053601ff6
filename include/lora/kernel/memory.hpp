// SPDX-License-Identifier: Apache-2.0
//
// array<T>: memory for panels and scratch. Aligned for the widest vector, and not initialized. From
// 1 MiB on it lies in huge pages of its own: the processor's table of addresses holds a few
// thousand pages, and a weight of 64 MiB is 16,000 small ones or 32 huge ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

inline constexpr std::size_t memory_alignment = 64;
inline constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t rounded_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

/// A hint: it changes nothing but speed.
inline void advise_huge_pages(void* p, std::size_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<std::uintptr_t>(p) + huge_page - 1) / huge_page * huge_page;
  const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / huge_page * huge_page;
  if (begin < end)
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(p), static_cast<void>(bytes);
#endif
}

/// A fixed number of elements, not initialized. Copies copy the elements.
template <class T>
  requires std::is_trivially_copyable_v<T>
class array {
 public:
  array() = default;
  explicit array(index_t size) : size_(size) {
    if (size == 0) return;
    constexpr index_t most =
        (std::numeric_limits<index_t>::max() - static_cast<index_t>(huge_page)) /
        static_cast<index_t>(sizeof(T));
    if (size < 0 || size > most) no_such_size();
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    if (bytes >= huge_page / 2) {  // whole huge pages, at most one more than needed
      const std::size_t whole = rounded_up(bytes, huge_page);
      data_ = allocated(whole, std::align_val_t{huge_page});
      advise_huge_pages(data_.get(), whole);
    } else {
      data_ = allocated(bytes, std::align_val_t{memory_alignment});
    }
  }
  array(const array& other) : array(other.size_) {
    if (size_ != 0) std::memcpy(data(), other.data(), static_cast<std::size_t>(size_) * sizeof(T));
  }
  array& operator=(const array& other) {
    if (this != &other) *this = array(other);
    return *this;
  }
  array(array&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::move(other.data_)) {}
  array& operator=(array&& other) noexcept {
    size_ = std::exchange(other.size_, 0);
    data_ = std::move(other.data_);
    return *this;
  }
  ~array() = default;

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  index_t size() const { return size_; }

 private:
  [[noreturn]] static void no_such_size() {
#if defined(__cpp_exceptions)
    throw std::bad_array_new_length();
#else
    std::terminate();
#endif
  }
  struct free_memory {
    std::align_val_t alignment{memory_alignment};
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  using owner = std::unique_ptr<T, free_memory>;
  static owner allocated(std::size_t bytes, std::align_val_t alignment) {
    return owner(static_cast<T*>(::operator new(bytes, alignment)),
                 free_memory{.alignment = alignment});
  }

  index_t size_ = 0;
  owner data_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
