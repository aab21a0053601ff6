// SPDX-License-Identifier: Apache-2.0
//
// Memory for panels and scratch: aligned for the widest vector, not initialized, and backed by huge pages where the system has
// them: scratch of half of one or more, and of what lives long all but the smallest.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/huge_pages.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// How long an array is meant to live: for a call, or as long as a model.
enum class lifetime { call, model };

/// A fixed number of elements, not initialized. Copies copy the elements, and live as long.
template <class T>
  requires std::is_trivially_copyable_v<T>
class array {
 public:
  array() = default;
  explicit array(index_t size, lifetime lives = lifetime::call) : size_(size) {
    if (size == 0) return;
    constexpr index_t most =
        (std::numeric_limits<index_t>::max() - static_cast<index_t>(huge_page)) / static_cast<index_t>(sizeof(T));
    if (size < 0 || size > most) no_such_size();
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    if (shares_huge_pages && lives == lifetime::model && bytes >= shared_huge_pages::smallest && bytes < huge_page) {
      shared_huge_pages& from = shared_huge_pages::all();
      data_ = owner(reinterpret_cast<T*>(from.take(bytes)), free_memory{.from = &from, .bytes = bytes});
    } else if (bytes >= huge_page / 2) {  // whole huge pages, at most one more than needed
      const std::size_t whole = rounded_up(bytes, huge_page);
      data_ = allocated(whole, std::align_val_t{huge_page});
      advise_huge_pages(data_.get(), whole);
    } else {
      data_ = allocated(bytes, std::align_val_t{memory_alignment});
    }
  }
  array(const array& other)
      : array(other.size_, other.data_.get_deleter().from != nullptr ? lifetime::model : lifetime::call) {
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
  /// Of the memory itself, or of a block of the shared pages that it was taken from (each shared library may have some).
  struct free_memory {
    std::align_val_t alignment{memory_alignment};
    shared_huge_pages* from = nullptr;
    std::size_t bytes = 0;
    void operator()(T* p) const {
      if (from != nullptr)
        from->give_back(reinterpret_cast<std::byte*>(p), bytes);
      else
        ::operator delete(p, alignment);
    }
  };
  using owner = std::unique_ptr<T, free_memory>;
  static owner allocated(std::size_t bytes, std::align_val_t alignment) {
    return owner(static_cast<T*>(::operator new(bytes, alignment)), free_memory{.alignment = alignment});
  }

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
    size_ += rounded_up(bytes, memory_alignment);
    return place<T>(offset);
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
