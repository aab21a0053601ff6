// SPDX-License-Identifier: Apache-2.0
//
// machine_limits(): what this machine can do at best, measured in about 50 ms with the threads and
// the vectors that the library uses: float multiply-adds, dot products of bfloat16, streaming
// reads, and reading and writing in place. Keep the
// result; a service that runs for days measures again, because on a shared host the memory
// bandwidth doubles and halves within minutes. Where other programs keep the cores busy, threads
// wait for each other and all rates come out far too low.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>

#include "lora/kernel/memory.hpp"
#include "lora/kernel/multiplier.hpp"
#include "lora/kernel/simd.hpp"
#include "lora/kernel/threads.hpp"
#include "lora/kernel/tuning.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Rates of this machine with `threads` threads.
struct machine_rates {
  double flops = 0;       ///< float FLOP/s; a multiply-add is two
  double read = 0;        ///< bytes/s read from memory
  double read_write = 0;  ///< bytes/s read and written in place: both directions count
  int threads = 1;
  /// FLOP/s by dot products of bfloat16 (see flush_threshold_of_product, flush_threshold_of_delta);
  /// flops, or 0, where there are none.
  double dot_flops = 0;

  /// Seconds that these FLOPs and bytes must take when they overlap perfectly.
  double reading(double work, double bytes) const { return reading(work, 0, bytes); }
  /// The same with further FLOPs by dot products.
  double reading(double work, double dots, double bytes) const {
    return std::max(computing(work, dots), bytes / read);
  }
  /// The same where the bytes are read and written in place.
  double updating(double work, double bytes) const { return updating(work, 0, bytes); }
  double updating(double work, double dots, double bytes) const {
    return std::max(computing(work, dots), bytes / read_write);
  }

 private:
  double computing(double work, double dots) const {
    return work / flops + dots / (dot_flops > 0 ? dot_flops : flops);
  }
};

namespace detail {

/// A value that the compiler must take as it comes, and one that it must produce.
template <class T>
T opaque(T value) {
  volatile T hidden = value;
  return hidden;
}

/// Owns the memory that is streamed, so that it is touched once and measured often.
class limits_probe {
 public:
  /// Memory of this many bytes, several times the last-level cache: what a pass leaves in the cache
  /// must not serve the next.
  explicit limits_probe(std::size_t bytes = std::size_t{128} << 20) : threads_(threads_for(1e9)) {
    share_ =
        std::max<index_t>(1, static_cast<index_t>(bytes / sizeof(float)) / threads_ / step) * step;
    memory_ = array<float>(share_ * threads_);
    parallel(threads_, [&](const team& team) { std::fill_n(part(team.thread()), share_, 1.0F); });
  }

  int threads() const { return threads_; }

  /// budget: seconds in all; each rate is the best of the passes that fit, at_least so many.
  /// Reading comes after writing: it drives the written lines out of the caches, so that none is
  /// left for whoever is measured next.
  machine_rates measure(double budget = 0.05, int at_least = 3) {
    const auto threads = static_cast<double>(threads_);
    const double bytes = static_cast<double>(share_) * threads * sizeof(float);
    const double update_time =
        best(0.4 * budget, at_least, [&](int thread) { return update(part(thread)); });
    const double read_time =
        best(0.3 * budget, at_least, [&](int thread) { return read(part(thread)); });
    const auto rate = [&](double flops_of_step, const auto& work) {
      return threads * chunk * flops_of_step / best((dots ? 0.15 : 0.3) * budget, at_least, work);
    };
    const double flops = rate(fma_flops, [](int) { return multiply_adds(); });
    double dot_flops = flops;
    with_multiplier<float, dots>(true, [&]<class M>(M) {
      if constexpr (is_dot2<M>) dot_flops = rate(2 * fma_flops, [](int) { return add_dots<M>(); });
    });
    return {.flops = flops,
            .read = bytes / read_time,
            .read_write = 2 * bytes / update_time,
            .threads = threads_,
            .dot_flops = dot_flops};
  }

 private:
  using v = simd<float>;
  static constexpr bool dots = has_dots<float, bfloat16>;
  /// Chains that run at the same time: two units with a latency of 4 to 6 need 12, or a few more
  /// where there are registers for them, as a tile has with AVX-512.
  static constexpr int chains = std::max(12, 2 * tile_rows);
  static constexpr index_t step = index_t{8} * v::width;
  static constexpr int chunk = 20'000;
  static constexpr double fma_flops = 2.0 * chains * v::width;

  /// The shortest of the runs that fit into the time, at_least so many, of work(thread) on every
  /// thread at once.
  template <class Work>
  double best(double budget, int at_least, const Work& work) {
    double shortest = 1e9, spent = 0;
    for (int runs = 0; runs < at_least || spent < budget; ++runs) {
      const auto start = std::chrono::steady_clock::now();
      parallel(threads_, [&](const team& team) { opaque(work(team.thread())); });
      const double once =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      shortest = std::min(shortest, once);
      spent += once;
    }
    return shortest;
  }

  static float first(v::vector sum) {
    float values[v::width];
    v::store(values, sum);
    return values[0];
  }
  static float multiply_adds() {
    const auto factor = v::broadcast(opaque(0.999F)), addend = v::broadcast(opaque(1e-3F));
    return in_chains([&](v::vector sum) { return v::multiply_add(sum, factor, addend); });
  }
  template <class M>
  static float add_dots() {
    const auto pair = v::broadcast(opaque(1e-3F));
    return in_chains([&](v::vector sum) { return M::step(pair, pair, sum); });
  }
  template <class Step>
  static float in_chains(const Step& step_of) {
    v::vector sum[chains];
    LORA_DETAIL_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = v::broadcast(opaque(static_cast<float>(i)));
    for (int k = 0; k < chunk; ++k) {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < chains; ++i) sum[i] = step_of(sum[i]);
    }
    LORA_DETAIL_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] = v::add(sum[0], sum[i]);
    return first(sum[0]);
  }
  float read(const float* p) const {
    const auto one = v::broadcast(opaque(1.0F));
    v::vector sum[8];
    LORA_DETAIL_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = v::zero();
    for (const float* const end = p + share_; p != end; p += step) {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < 8; ++i) sum[i] = v::multiply_add(v::load(p + i * v::width), one, sum[i]);
    }
    LORA_DETAIL_UNROLL
    for (int i = 1; i < 8; ++i) sum[0] = v::add(sum[0], sum[i]);
    return first(sum[0]);
  }
  float update(float* p) const {
    const auto factor = v::broadcast(opaque(0.5F)), addend = v::broadcast(opaque(0.5F));
    for (float* const end = p + share_; p != end; p += step) {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < 8; ++i)
        v::store(p + i * v::width, v::multiply_add(v::load(p + i * v::width), factor, addend));
    }
    return 0;
  }

  float* part(int thread) { return memory_.data() + thread * share_; }

  int threads_;
  index_t share_ = 0;  ///< floats for each thread
  array<float> memory_;
};

}  // namespace detail

/// Measures. Allocates 128 MiB for the length of the call; throws std::bad_alloc.
inline machine_rates machine_limits() { return detail::limits_probe().measure(); }

}  // namespace lora::inline LORA_DETAIL_ABI
