// SPDX-License-Identifier: Apache-2.0
//
// Parallel regions: OpenMP when the caller compiles with it, serial otherwise. A product is one; a
// merge has one more for each adapter whose packing is worth it. Work is split by outputs only, so
// the number of threads changes no bit.
#pragma once

#include <cstddef>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/kernel/environment.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Multiply-adds below which waking a second thread costs more than it saves (a fork and join takes
/// about 0.5 us, an idle thread's wake-up more).
inline constexpr double parallel_threshold = 2e5;

/// The threads inside a region. Every thread runs the same code and meets the same for_each calls
/// in the same order.
class team {
 public:
  team(int thread, int threads) : thread_(thread), threads_(threads) {}
  int thread() const { return thread_; }

  /// first ... second - 1 of `count` things are this thread's. Call wait() when they are done.
  std::pair<index_t, index_t> share(index_t count) const {
    return {count * thread_ / threads_, count * (thread_ + 1) / threads_};
  }
  /// Returns when all threads are here.
  void wait() const {
#if defined(_OPENMP)
    if (threads_ > 1) {
#pragma omp barrier
    }
#endif
  }

  /// body(k) for every k in [0, count), shared among the threads; returns when all are done.
  template <class Body>
  void for_each(index_t count, const Body& body) const {
#if defined(_OPENMP)
    if (threads_ > 1) {
#pragma omp for schedule(static)
      for (index_t k = 0; k < count; ++k) body(k);
      return;
    }
#endif
    for (index_t k = 0; k < count; ++k) body(k);
  }

 private:
  int thread_;
  int threads_;
};

/// How many threads a region for this many multiply-adds may have: scratch is allocated for each
/// before it starts, because nothing may throw inside.
inline int threads_for(double multiply_adds) {
#if defined(_OPENMP)
  return multiply_adds < parallel_threshold || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  static_cast<void>(multiply_adds);
  return 1;
#endif
}

/// region(team) on every thread, each in the default floating-point mode. region must not throw.
/// One thread needs no region of OpenMP, which would allocate (and end the program where it
/// cannot), and whose loops would bind to a region of the caller.
template <class Region>
void parallel(int threads, const Region& region) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const default_environment environment;
      region(team(omp_get_thread_num(), omp_get_num_threads()));
    }
    return;
  }
#endif
  static_cast<void>(threads);
  const default_environment environment;
  region(team(0, 1));
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
