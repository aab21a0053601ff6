// SPDX-License-Identifier: Apache-2.0
//
// Sees every allocation of a program, Eigen's too, which call std::malloc and not operator new; and
// lets the n-th one fail. It defines the allocation functions, so include it in one source file of
// a program.
//
// With glibc it replaces malloc and its family, on which operator new and Eigen both stand. Under
// AddressSanitizer, which has replaced them already, it listens at the sanitizer's hooks, and only
// operator new can be made to fail.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "support/sanitized.hpp"

namespace test::allocations {

/// All since the last start(); a block is large from the threshold on.
struct state {
  std::atomic<bool> watching{false};
  std::atomic<std::size_t> threshold{0}, count{0}, largest{0}, large_count{0};
  std::atomic<std::ptrdiff_t> live_large{0}, most_live_large{0};
  std::atomic<long> until_failure{-1};  ///< how many succeed before one fails; negative: none fails
};
inline constinit state now;

/// Large blocks, so that freeing one is seen. Slots of a fixed table: to count must not allocate.
inline constexpr std::size_t slots = 64;
inline constinit std::atomic<void*> large_blocks[slots] = {};

inline void seen(void* p, std::size_t size) {
  if (!now.watching || p == nullptr) return;
  ++now.count;
  for (std::size_t most = now.largest;
       size > most && !now.largest.compare_exchange_weak(most, size);)
    continue;
  if (size < now.threshold) return;
  ++now.large_count;
  for (auto& slot : large_blocks)
    if (void* free = nullptr; slot.compare_exchange_strong(free, p)) break;
  const std::ptrdiff_t live = ++now.live_large;
  for (std::ptrdiff_t most = now.most_live_large;
       live > most && !now.most_live_large.compare_exchange_weak(most, live);)
    continue;
}
inline void freed(void* p) {
  if (!now.watching || p == nullptr) return;
  for (auto& slot : large_blocks)
    if (void* same = p; slot.compare_exchange_strong(same, nullptr)) {
      --now.live_large;
      return;
    }
}
/// Whether the allocation that asks is the one to fail.
inline bool fails() { return now.until_failure >= 0 && now.until_failure-- == 0; }

inline void start(std::size_t large_from) {
  for (auto& slot : large_blocks) slot = nullptr;
  now.threshold = large_from;
  now.count = now.largest = now.large_count = 0;
  now.live_large = now.most_live_large = 0;
  now.watching = true;
}
inline void stop() { now.watching = false; }

/// Runs call with its n-th allocation (from 0) failing. True: an allocation failed and came back as
/// std::bad_alloc.
template <class Call>
bool fails_at(long n, const Call& call) {
  now.until_failure = n;
  bool failed = false;
  try {
    call();
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  now.until_failure = -1;
  return failed;
}

}  // namespace test::allocations

#if LORA_TEST_ASAN

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*,
                                                                  std::size_t),
                                                         void (*)(const volatile void*));
namespace test::allocations {
inline const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void* p, std::size_t size) { seen(const_cast<void*>(p), size); },
    [](const volatile void* p) { freed(const_cast<void*>(p)); });

inline void* or_bad_alloc(std::size_t size, std::size_t alignment) {
  void* p = fails() ? nullptr
                    : std::aligned_alloc(
                          alignment, (size + alignment - 1) / alignment * alignment + (size == 0));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace test::allocations

void* operator new(std::size_t size) {
  return test::allocations::or_bad_alloc(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
void* operator new(std::size_t size, std::align_val_t a) {
  return test::allocations::or_bad_alloc(size, static_cast<std::size_t>(a));
}
// std::stable_sort's buffer; what it frees goes to the operator delete below.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return test::allocations::fails() ? nullptr : std::malloc(size + (size == 0));
}
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

#elif defined(__GLIBC__)

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t size) noexcept {
  void* p = test::allocations::fails() ? nullptr : __libc_malloc(size);
  test::allocations::seen(p, size);
  return p;
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  void* p = test::allocations::fails() ? nullptr : __libc_calloc(count, size);
  test::allocations::seen(p, count * size);
  return p;
}
void* realloc(void* old, std::size_t size) noexcept {
  if (test::allocations::fails()) return nullptr;
  test::allocations::freed(old);
  void* p = __libc_realloc(old, size);
  test::allocations::seen(p, size);
  return p;
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  void* p = test::allocations::fails() ? nullptr : __libc_memalign(alignment, size);
  test::allocations::seen(p, size);
  return p;
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  return memalign(alignment, size);
}
int posix_memalign(void** result, std::size_t alignment, std::size_t size) noexcept {
  *result = memalign(alignment, size);
  return *result == nullptr ? ENOMEM : 0;
}
void free(void* p) noexcept {
  test::allocations::freed(p);
  __libc_free(p);
}
}

#else
#error "support/allocations.hpp knows glibc and AddressSanitizer"
#endif
