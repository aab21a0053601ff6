// SPDX-License-Identifier: Apache-2.0
//
// simd<T> by 16-byte vectors of the GNU extension (SSE2, NEON), or by scalars.
#pragma once

#include "lora/version.hpp"

#if !defined(LORA_DETAIL_AVX512) && !defined(LORA_DETAIL_AVX2)

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lora/float16.hpp"
#include "lora/kernel/compiler.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

#if defined(__GNUC__)
template <class T>
struct vector_of {
  typedef T type __attribute__((vector_size(16)));
  static constexpr int width = 16 / sizeof(T);
};
#else
template <class T>
struct vector_of {
  struct type {
    T value;
    T operator[](int) const { return value; }
    T& operator[](int) { return value; }
  };
  static constexpr int width = 1;
};
#endif

/// Counts the elements of T whose bits changed.
template <class T>
struct changed_lanes {
  std::size_t changed = 0;

  template <class Vector>
  void see(const T* before, Vector after) {
    T elements[sizeof(Vector) / sizeof(T)];
    std::memcpy(elements, &after, sizeof after);
    for (std::size_t k = 0; k < sizeof(Vector) / sizeof(T); ++k)
      changed += std::memcmp(before + k, elements + k, sizeof(T)) != 0;
  }
  template <class Vector>
  void see(Vector before, Vector after) {
    T elements[sizeof(Vector) / sizeof(T)];
    std::memcpy(elements, &before, sizeof before);
    see(elements, after);
  }
};
/// The sum of many.
template <class T>
struct changed_count {
  std::size_t changed = 0;

  void add(const changed_lanes<T>& some) { changed += some.changed; }
  std::size_t count() const { return changed; }
};

template <class T>
struct simd {
  using vector = typename vector_of<T>::type;
  using bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  static constexpr int width = vector_of<T>::width;
  static vector zero() { return broadcast(T(0)); }
  static vector load(const T* p) { return from_bits(p); }
  static void store(T* p, vector v) { std::memcpy(p, &v, sizeof v); }
  static void stream(T* p, vector v) { store(p, v); }
  static vector broadcast(T value) {
    return each([&](int) { return value; });
  }
  static vector multiply_add(vector a, vector b, vector c) {
#if defined(LORA_DETAIL_FMA)
    return each([&](int k) { return std::fma(a[k], b[k], c[k]); });
#elif defined(__GNUC__)
    return a * b + c;
#else
    return each([&](int k) { return a[k] * b[k] + c[k]; });
#endif
  }
  static vector multiply(vector a, vector b) {
    return each([&](int k) { return a[k] * b[k]; });
  }
  static vector add(vector a, vector b) {
    return each([&](int k) { return a[k] + b[k]; });
  }
  static vector subtract(vector a, vector b) {
    return each([&](int k) { return a[k] - b[k]; });
  }
  static bool all_finite(vector v) {
    bool all = true;
    for (int k = 0; k < width; ++k)
      all = all && magnitude(v[k]) < std::bit_cast<bits>(std::numeric_limits<T>::infinity());
    return all;
  }
  /// The largest magnitude, as bits, of the lanes seen.
  struct magnitudes {
    bits most = 0;
    void see(vector v) {
      for (int k = 0; k < width; ++k) most = std::max(most, magnitude(v[k]));
    }
    bool exceed(bits limit) const { return most > limit; }
  };
  static vector load_even(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k]); });
  }
  static vector load_odd(const bfloat16* p) {
    return each([&](int k) { return static_cast<T>(p[2 * k + 1]); });
  }
  static vector join_pairs(vector even, vector odd) {
    bfloat16 pairs[2 * width];
    for (int k = 0; k < width; ++k) {
      pairs[2 * k] = bfloat16(even[k]);
      pairs[2 * k + 1] = bfloat16(odd[k]);
    }
    return from_bits(pairs);
  }
  /// What join_pairs joined.
  static void split_pairs(vector pairs, vector& even, vector& odd) {
    bfloat16 both[2 * width];
    std::memcpy(both, &pairs, sizeof pairs);
    even = load_even(both);
    odd = load_odd(both);
  }
  /// What join_halves joined.
  static void split_halves(vector halves, vector& first, vector& second) {
    float16 both[2 * width];
    std::memcpy(both, &halves, sizeof halves);
    first = load_half(both);
    second = load_half(both + width);
  }
  /// Two vectors of neighbours become their even and their odd elements.
  static void unzip(vector& first, vector& second) {
    const auto at = [one = first, two = second](int k) {
      return k < width ? one[k] : two[k - width];
    };
    first = each([&](int k) { return at(2 * k); });
    second = each([&](int k) { return at(2 * k + 1); });
  }
  static vector load_half(const float16* p) {
    return each([&](int k) { return static_cast<T>(p[k]); });
  }
  static vector join_halves(vector first, vector second) {
    float16 halves[2 * width];
    for (int k = 0; k < width; ++k) {
      halves[k] = float16(first[k]);
      halves[width + k] = float16(second[k]);
    }
    return from_bits(halves);
  }
  /// Adds up (a[k] + b[k])^2 in double, lane by lane.
  struct squares {
    double sums[width] = {};
    void see(vector a, vector b) {
      for (int k = 0; k < width; ++k) {
        const double sum = static_cast<double>(a[k]) + static_cast<double>(b[k]);
        sums[k] += sum * sum;
      }
    }
    void add_to(double* to) const {
      for (int k = 0; k < width; ++k) to[k] += sums[k];
    }
  };

 private:
  template <class F>
  static vector each(const F& f) {
    vector v{};  // gcc does not see that every element is set
    for (int k = 0; k < width; ++k) v[k] = f(k);
    return v;
  }
  static vector from_bits(const void* p) {
    vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static bits magnitude(T value) { return std::bit_cast<bits>(value) & (~bits(0) >> 1); }
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail

#endif
