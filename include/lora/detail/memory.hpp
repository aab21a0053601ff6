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
#include <mutex>
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

/// Memory for what lives long and is smaller than a huge page, as most adapters are: neighbours share huge pages, a chunk of
/// them at a time. A chunk is given back with its last block (the newest, which has room, when the next one is begun); blocks
/// are not used again, so that what is packed together should be dropped together.
class shared_huge_pages {
 public:
  static constexpr std::size_t chunk_bytes = 8 * huge_page;

  /// Those of the process. Never destroyed, so that blocks may outlive everything.
  static shared_huge_pages& all() {
    static auto* const pages = new shared_huge_pages;
    return *pages;
  }

  /// bytes <= chunk_bytes. May throw std::bad_alloc.
  std::shared_ptr<std::byte> take(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (chunk_ == nullptr || bytes > chunk_bytes - used_) {
      constexpr std::align_val_t alignment{huge_page};
      auto* const begin = static_cast<std::byte*>(::operator new(chunk_bytes, alignment));
      chunk_.reset(begin, [](std::byte* p) { ::operator delete(p, std::align_val_t{huge_page}); });
      used_ = 0;
      advise_huge_pages(begin, chunk_bytes);
    }
    std::shared_ptr<std::byte> block(chunk_, chunk_.get() + used_);
    used_ += (bytes + memory_alignment - 1) / memory_alignment * memory_alignment;
    return block;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<std::byte> chunk_;
  std::size_t used_ = 0;
};

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
    if (shares_huge_pages && lives == lifetime::model && bytes < huge_page) {
      auto block = shared_huge_pages::all().take(bytes);
      auto* const begin = reinterpret_cast<T*>(block.get());
      data_ = owner(begin, free_memory{std::align_val_t{memory_alignment}, std::move(block)});
    } else if (bytes >= huge_page / 2) {  // whole huge pages, at most one more than needed
      const std::size_t whole = (bytes + huge_page - 1) / huge_page * huge_page;
      data_ = allocated(whole, std::align_val_t{huge_page});
      advise_huge_pages(data_.get(), whole);
    } else {
      data_ = allocated(bytes, std::align_val_t{memory_alignment});
    }
  }
  array(const array& other) : array(other.size_, other.data_.get_deleter().shared ? lifetime::model : lifetime::call) {
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
  /// Of the memory itself, or of a block of shared pages.
  struct free_memory {
    std::align_val_t alignment{memory_alignment};
    std::shared_ptr<std::byte> shared = {};
    void operator()(T* p) const {
      if (!shared) ::operator delete(p, alignment);
    }
  };
  using owner = std::unique_ptr<T, free_memory>;
  static owner allocated(std::size_t bytes, std::align_val_t alignment) {
    return owner(static_cast<T*>(::operator new(bytes, alignment)), free_memory{alignment, {}});
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
    size_ += (bytes + memory_alignment - 1) / memory_alignment * memory_alignment;
    return place<T>(offset);
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
