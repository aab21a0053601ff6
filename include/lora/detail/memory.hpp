// SPDX-License-Identifier: Apache-2.0
//
// Memory for panels and scratch: aligned for the widest vector, not initialized, and backed by huge pages where it has
// half of one or more and the system has them (a weight of 64 MiB is 16,000 small pages and 32 huge ones, and the table that
// translates them holds a few thousand).
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

/// A fixed number of elements, not initialized. Copies copy the elements.
template <class T>
  requires std::is_trivially_copyable_v<T>
class array {
 public:
  array() = default;
  explicit array(index_t size) : size_(size) {
    if (size == 0) return;
    constexpr index_t most =
        (std::numeric_limits<index_t>::max() - static_cast<index_t>(huge_page)) / static_cast<index_t>(sizeof(T));
    if (size < 0 || size > most) no_such_size();
    std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    std::align_val_t alignment{memory_alignment};
    if (bytes >= huge_page / 2) {  // whole huge pages, at most one more than needed
      alignment = std::align_val_t{huge_page};
      bytes = (bytes + huge_page - 1) / huge_page * huge_page;
    }
    data_ = owner(static_cast<T*>(::operator new(bytes, alignment)), free_memory{alignment});
    if (bytes >= huge_page) advise_huge_pages(data_.get(), bytes);
  }
  array(const array& other) : array(other.size_) {
    if (size_ != 0) std::memcpy(data(), other.data(), static_cast<std::size_t>(size_) * sizeof(T));
  }
  array& operator=(const array& other) {
    if (this != &other) *this = array(other);
    return *this;
  }
  array(array&& other) noexcept : size_(std::exchange(other.size_, 0)), data_(std::move(other.data_)) {}
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

  index_t size_ = 0;
  owner data_;
};

/// How a call divides its scratch: it first counts what it needs, then gets memory, and a place becomes a pointer.
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
    size_ += (bytes + memory_alignment - 1) / memory_alignment * memory_alignment;
    return place<T>(offset);
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
