// SPDX-License-Identifier: Apache-2.0
//
// The machine's limits as the benches use them: the library's own probe, with memory enough for
// this machine's caches. A row's `share` is the time that these limits allow over the time it took.
// They are measured again between its rounds, because on a shared host the clock and the memory's
// bandwidth change within seconds.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <lora/lora.hpp>

namespace lora_bench {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// How long f() takes, in seconds.
template <class F>
double time_of(const F& f) {
  const double start = now();
  f();
  return now() - start;
}

/// All last-level caches of the machine together; 32 MiB where it does not tell.
inline std::size_t last_level_cache() {
  const auto& cpu = benchmark::CPUInfo::Get();
  int level = 0;
  std::size_t bytes = std::size_t{32} << 20;
  for (const auto& cache : cpu.caches) {
    if (cache.type == "Instruction" || cache.size <= 0 || cache.level < level) continue;
    level = cache.level;
    const int instances = cache.num_sharing > 0 ? std::max(1, cpu.num_cpus / cache.num_sharing) : 1;
    bytes = static_cast<std::size_t>(cache.size) * static_cast<std::size_t>(instances);
  }
  return bytes;
}

/// FLOPs of a product, by the unit that the library does them with.
struct flops {
  double multiply_adds = 0, dots = 0;

  flops operator+(const flops& more) const {
    return {multiply_adds + more.multiply_adds, dots + more.dots};
  }
};
/// Of elements T and X.
template <class T, class X>
flops flops_of(double work) {
  if (lora::flush_threshold_of_product<lora::accumulator_t<T, X>, T, X>() > 0)
    return {.dots = work};
  return {.multiply_adds = work};
}
/// Of a delta weight of factors F, accumulated in float.
template <class F>
flops flops_of_delta(double work) {
  if (lora::flush_threshold_of_delta<float, lora::adapter<F>>() > 0) return {.dots = work};
  return {.multiply_adds = work};
}

/// The seconds that a way must take which reads `bytes`, or reads and writes them in place, as a
/// function of the limits.
inline auto reading(const flops& work, double bytes) {
  return
      [=](const lora::machine_rates& l) { return l.reading(work.multiply_adds, work.dots, bytes); };
}
inline auto updating(const flops& work, double bytes) {
  return [=](const lora::machine_rates& l) {
    return l.updating(work.multiply_adds, work.dots, bytes);
  };
}

/// Four times the cache: what a pass leaves in it serves at most a quarter of the next.
inline lora::detail::limits_probe make_probe() {
  return lora::detail::limits_probe(std::max(std::size_t{32} << 20, 4 * last_level_cache()));
}

}  // namespace lora_bench
