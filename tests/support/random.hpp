// SPDX-License-Identifier: Apache-2.0
//
// Seeded random data. The same numbers with every compiler and library: the generator is fixed by
// the standard and the distributions are written here. Print the seed where a test may fail:
// CAPTURE(g.seed()).
#pragma once

#include <cmath>
#include <cstdint>
#include <random>

#include "support/bits.hpp"

namespace test {

class random {
 public:
  explicit random(std::uint64_t seed) : seed_(seed), engine_(seed) {}
  std::uint64_t seed() const { return seed_; }

  std::uint64_t bits() { return engine_(); }
  /// Both ends included.
  lora::index_t integer(lora::index_t low, lora::index_t high) {
    return low + static_cast<lora::index_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(int n) { return integer(1, n) == 1; }
  double uniform(double low, double high) {
    return low + (high - low) * (static_cast<double>(engine_() >> 11) * 0x1p-53);
  }

  /// Whole numbers of at most `largest` either way, in T: small ones make sums of products exact.
  template <class T>
  matrix<T> integers(lora::index_t rows, lora::index_t cols, int largest) {
    matrix<T> m(rows, cols);
    for (lora::index_t k = 0; k < m.size(); ++k)
      m.data()[k] = stored<T>(static_cast<double>(integer(-largest, largest)));
    return m;
  }
  /// Numbers that use all bits of T.
  template <class T>
  matrix<T> reals(lora::index_t rows, lora::index_t cols, double spread) {
    matrix<T> m(rows, cols);
    for (lora::index_t k = 0; k < m.size(); ++k) m.data()[k] = stored<T>(uniform(-spread, spread));
    return m;
  }

 private:
  std::uint64_t seed_;
  std::mt19937_64 engine_;
};

}  // namespace test
