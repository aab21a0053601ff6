// SPDX-License-Identifier: Apache-2.0
//
// What this machine can do at best, measured in about 50 ms: float multiply-adds, streaming reads, and reading and writing
// in place, with the threads that the library uses. A row's `share` is the time that these limits allow over the time it
// took. Each row measures them again before and after its series and takes the better: on a shared host the memory
// bandwidth doubles and halves within minutes.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <lora/detail/parallel.hpp>
#include <lora/detail/simd.hpp>
#include <utility>
#include <vector>

namespace lora_bench {

using seconds = std::chrono::duration<double>;

/// How long f() takes.
template <class F>
double time_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return seconds(std::chrono::steady_clock::now() - start).count();
}

/// The threads of a product or merge that is worth sharing.
inline int threads_in_use() { return lora::detail::threads_for(1e9); }

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

struct machine_limits {
  double flops = 0;       ///< float FLOP/s; a multiply-add is two
  double read = 0;        ///< bytes/s read from memory
  double read_write = 0;  ///< bytes/s read and written in place: both directions count

  /// Seconds that these FLOPs and bytes must take when they overlap perfectly.
  double reading(double work, double bytes) const { return std::max(work / flops, bytes / read); }
  double updating(double work, double bytes) const { return std::max(work / flops, bytes / read_write); }
};

inline machine_limits better(const machine_limits& a, const machine_limits& b) {
  return {std::max(a.flops, b.flops), std::max(a.read, b.read), std::max(a.read_write, b.read_write)};
}

/// Owns the memory that is streamed, so that it is touched once and measured often.
class limits_probe {
 public:
  limits_probe() : threads_(threads_in_use()) {
    // Four times the cache: what a pass leaves in it serves at most a quarter of the next.
    const std::size_t share = 4 * last_level_cache() / (sizeof(float) * static_cast<std::size_t>(threads_));
    share_ = std::max<std::size_t>(1, share / step) * step;
    memory_.assign(share_ * static_cast<std::size_t>(threads_), 1.0F);
  }

  int threads() const { return threads_; }

  machine_limits measure() {
    const auto threads = static_cast<double>(threads_);
    const auto bytes = static_cast<double>(memory_.size() * sizeof(float));
    return {.flops = threads * fma_chunk * fma_flops / best(0.015, [&](int) { return multiply_adds(); }),
            .read = bytes / best(0.015, [&](int thread) { return read(thread); }),
            .read_write = 2 * bytes / best(0.020, [&](int thread) { return update(thread); })};
  }

 private:
  using simd = lora::detail::simd<float>;
  /// Chains that run at the same time: two units with a latency of 4 or 5 need ten, and 12 leave room in 16 registers.
  static constexpr std::size_t chains = 12;
  static constexpr std::size_t width = simd::width;
  static constexpr std::size_t step = 8 * width;
  static constexpr double fma_chunk = 20'000;
  static constexpr double fma_flops = 2.0 * static_cast<double>(chains * width);

  /// The shortest of the runs that fit into the time, of work(thread) on every thread at once. What work returns is made
  /// opaque, or the compiler would delete it.
  template <class Work>
  double best(double budget, const Work& work) {
    double shortest = 1e9;
    for (double spent = 0; spent < budget;) {
      const double once = time_of([&] {
        lora::detail::parallel(threads_, [&](const lora::detail::team& team) {
          float result[width];
          simd::store(result, work(team.thread()));
          float* opaque = result;
          benchmark::DoNotOptimize(opaque);
          benchmark::ClobberMemory();
        });
      });
      shortest = std::min(shortest, once);
      spent += once;
    }
    return shortest;
  }

  /// A constant that the compiler cannot fold.
  static typename simd::vector constant(float value) {
    benchmark::DoNotOptimize(value);
    return simd::broadcast(value);
  }

  static typename simd::vector multiply_adds() { return multiply_adds(std::make_index_sequence<chains>()); }
  /// The chains as a pack: their indices are constants, so that all of them live in registers.
  template <std::size_t... I>
  static typename simd::vector multiply_adds(std::index_sequence<I...>) {
    const auto factor = constant(0.999F), addend = constant(1e-3F);
    typename simd::vector sum[chains] = {constant(static_cast<float>(I))...};
    for (int k = 0; k < static_cast<int>(fma_chunk); ++k) ((sum[I] = simd::multiply_add(sum[I], factor, addend)), ...);
    ((sum[0] = simd::multiply_add(sum[I], factor, sum[0])), ...);
    return sum[0];
  }

  float* part(int thread) { return memory_.data() + static_cast<std::size_t>(thread) * share_; }

  typename simd::vector read(int thread) { return read(part(thread), std::make_index_sequence<8>()); }
  template <std::size_t... I>
  typename simd::vector read(const float* p, std::index_sequence<I...>) const {
    const auto one = constant(1.0F);
    typename simd::vector sum[] = {constant(static_cast<float>(I))...};
    for (const float* const end = p + share_; p != end; p += step)
      ((sum[I] = simd::multiply_add(simd::load(p + I * width), one, sum[I])), ...);
    ((sum[0] = simd::multiply_add(sum[I], one, sum[0])), ...);
    return sum[0];
  }

  typename simd::vector update(int thread) { return update(part(thread), std::make_index_sequence<8>()); }
  template <std::size_t... I>
  typename simd::vector update(float* p, std::index_sequence<I...>) const {
    const auto factor = constant(0.5F), addend = constant(0.5F);
    for (float* const end = p + share_; p != end; p += step)
      (simd::store(p + I * width, simd::multiply_add(simd::load(p + I * width), factor, addend)), ...);
    return factor;
  }

  int threads_;
  std::size_t share_ = 0;  ///< floats for each thread
  std::vector<float> memory_;
};

}  // namespace lora_bench
