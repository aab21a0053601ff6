// SPDX-License-Identifier: Apache-2.0
//
// Layers to measure: weights and factors of fixed random values, as many of them as fill twice the last-level cache, so
// that a weight that comes round again comes from memory, as in a model.
#pragma once

#include <cmath>
#include <cstdint>
#include <lora/lora.hpp>
#include <string>
#include <vector>

#include "limits.hpp"

namespace lora_bench {

using lora::index_t;

/// A layer of in -> out features; W is out x in.
struct shape {
  index_t in, out;

  double size() const { return static_cast<double>(in) * static_cast<double>(out); }
  /// Size of a rank's factors over W's: the share of the FLOPs, too.
  double rho(double rank) const { return rank * static_cast<double>(in + out) / size(); }
  std::string text() const { return std::to_string(in) + "x" + std::to_string(out); }
};

inline const std::vector<shape> shapes = {{768, 768}, {4096, 4096}, {4096, 11008}};
inline const std::vector<index_t> ranks = {8, 16, 64, 256};

/// Even in (-1, 1), the same on every machine: a linear congruence.
class noise {
 public:
  explicit noise(std::uint32_t seed) : state_(seed) {}
  float operator()() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<std::int32_t>(state_)) * 0x1p-31F;
  }

 private:
  std::uint32_t state_;
};

template <class T>
std::vector<T> random_values(index_t count, double scale, std::uint32_t seed) {
  std::vector<T> values(static_cast<std::size_t>(count));
  noise next(seed);
  const auto factor = static_cast<float>(scale);
  for (T& value : values) value = static_cast<T>(factor * next());
  return values;
}

/// A weight whose product with activations of size 1 is of size 1.
template <class T>
std::vector<T> random_weight(const shape& layer, std::uint32_t seed) {
  return random_values<T>(layer.in * layer.out, 1 / std::sqrt(static_cast<double>(layer.in)), seed);
}

/// An adapter whose delta is about half as large as the weight, so that a lost one shows. Its scaling is not 1.
template <class F>
lora::adapter<F> random_adapter(const shape& layer, index_t rank, std::uint32_t seed) {
  const auto A = random_values<F>(rank * layer.in, 1 / std::sqrt(static_cast<double>(layer.in)), seed);
  const auto B = random_values<F>(layer.out * rank, 0.5 / std::sqrt(static_cast<double>(rank)), seed + 1);
  return {lora::row_major(A, rank, layer.in), lora::row_major(B, layer.out, rank), {.alpha = 2 * static_cast<double>(rank)}};
}

/// How many layers of this many bytes are more than twice the cache; at least two, so that each call gets another one.
inline std::size_t pool_size(double bytes_of_layer) {
  return std::max<std::size_t>(2,
                               1 + static_cast<std::size_t>(2.0 * static_cast<double>(last_level_cache()) / bytes_of_layer));
}

}  // namespace lora_bench
