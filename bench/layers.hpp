// SPDX-License-Identifier: Apache-2.0
//
// Layers to measure: weights and factors of fixed random values, as many of them as fill twice the
// last-level cache, so that a weight that comes round again comes from memory, as in a model.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <lora/lora.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "limits.hpp"

namespace lora_bench {

using lora::index_t;

/// A layer of in -> out features; W is out x in.
struct shape {
  index_t in, out;

  friend bool operator==(const shape&, const shape&) = default;
  double size() const { return static_cast<double>(in) * static_cast<double>(out); }
  /// Elements of an adapter's factors.
  double factors(double rank) const { return rank * static_cast<double>(in + out); }
  std::string text() const { return std::to_string(in) + "x" + std::to_string(out); }
};

template <class T>
constexpr const char* name_of() {
  using stored = lora::detail::storage_t<T>;
  if constexpr (std::is_same_v<stored, float>)
    return "float";
  else if constexpr (std::is_same_v<stored, lora::float16>)
    return "float16";
  else
    return "bfloat16";
}

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

/// Memory as the library's own: large buffers of all rivals alike lie in huge pages.
template <class T>
using buffer = lora::detail::array<T>;

template <class T>
buffer<T> random_values(index_t count, double scale, std::uint32_t seed) {
  buffer<T> values(count);
  noise next(seed);
  const auto factor = static_cast<float>(scale);
  // Large ones repeat after a prime, which divides no row.
  constexpr index_t period = 1048573;
  T* const v = values.data();
  for (index_t k = 0; k < std::min(count, period); ++k) v[k] = static_cast<T>(factor * next());
  for (index_t k = period; k < count; ++k) v[k] = v[k - period];
  return values;
}

/// A weight in rows, whose product with activations of size 1 is of size 1.
template <class T>
buffer<T> random_weight(const shape& layer, std::uint32_t seed) {
  return random_values<T>(layer.in * layer.out, 1 / std::sqrt(static_cast<double>(layer.in)), seed);
}

/// An adapter whose delta is about half as large as the weight, so that a lost one shows. Its
/// scaling is not 1.
template <class F>
lora::adapter<F> random_adapter(const shape& layer, index_t rank, std::uint32_t seed) {
  const auto A =
      random_values<F>(rank * layer.in, 1 / std::sqrt(static_cast<double>(layer.in)), seed);
  const auto B =
      random_values<F>(layer.out * rank, 0.5 / std::sqrt(static_cast<double>(rank)), seed + 1);
  return {lora::row_major(A.data(), rank, layer.in),
          lora::row_major(B.data(), layer.out, rank),
          {.alpha = 2 * static_cast<double>(rank)}};
}

/// A matrix of any scalar in double.
template <class M>
Eigen::MatrixXd widened(const M& m) {
  return m.unaryExpr([](const auto& v) { return static_cast<double>(v); });
}

/// How many layers of this many bytes are more than twice the cache; at least two, so that each
/// call gets another one.
inline std::size_t pool_size(double bytes_of_layer) {
  return std::max<std::size_t>(
      2,
      1 + static_cast<std::size_t>(2.0 * static_cast<double>(last_level_cache()) / bytes_of_layer));
}

/// Takes turns through a pool: every call of a way gets the next element.
template <class Pool>
class rotation {
 public:
  explicit rotation(Pool& pool) : pool_(&pool) {}
  auto& next() { return (*pool_)[turn_++ % pool_->size()]; }
  std::size_t turn() const { return turn_; }

 private:
  Pool* pool_;
  std::size_t turn_ = 0;
};

/// A weight in the caller's rows.
template <class T>
struct weight_rows {
  using value_type = T;
  static constexpr const char* name = "rows";

  buffer<T> values;
  shape layer;

  weight_rows(buffer<T> rows, const shape& s) : values(std::move(rows)), layer(s) {}
  auto view() const { return lora::row_major(values.data(), layer.out, layer.in); }
  auto view() { return lora::row_major(values.data(), layer.out, layer.in); }
};

/// A weight in the library's panels.
template <class T>
struct weight_panels {
  using value_type = T;
  static constexpr const char* name = "panels";

  lora::packed_weight<T> panels;

  weight_panels(const buffer<T>& rows, const shape& s)
      : panels(lora::row_major(rows.data(), s.out, s.in)) {}
  const lora::packed_weight<T>& view() const { return panels; }
  lora::packed_weight<T>& view() { return panels; }
};

/// ||a - b|| / ||b||.
template <class T>
double distance(const std::vector<T>& a, const std::vector<T>& b) {
  double difference = 0, size = 0;
  for (std::size_t k = 0; k < a.size(); ++k) {
    const auto [x, y] = std::pair(static_cast<double>(static_cast<float>(a[k])),
                                  static_cast<double>(static_cast<float>(b[k])));
    difference += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(difference / size);
}
/// Whether two ways agree: the outputs of 16-bit weights that were merged differ by the rounding of
/// the weights.
template <class T, class V>
bool agree(const std::vector<V>& a, const std::vector<V>& b) {
  return distance(a, b) < (sizeof(T) == 2 || sizeof(V) == 2 ? 2e-2 : 1e-4);
}

}  // namespace lora_bench
