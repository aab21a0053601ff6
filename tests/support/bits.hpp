// SPDX-License-Identifier: Apache-2.0
//
// Matrices compared by their bits, and what the verbs compute, by plain loops. The loops run in
// long double: on the whole numbers that the tests draw no step of them rounds, so that a result
// can be asked for bit for bit.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lora/lora.hpp"

namespace test {

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using col_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
using exact_matrix = Eigen::Matrix<long double, Eigen::Dynamic, Eigen::Dynamic>;

/// A double in T, rounded once. float16.test.cpp checks the conversions themselves.
template <class T>
T stored(double value) {
  if constexpr (std::is_same_v<T, Eigen::half>)
    return std::bit_cast<T>(lora::float16(value).bits);
  else if constexpr (std::is_same_v<T, Eigen::bfloat16>)
    return std::bit_cast<T>(lora::bfloat16(value).bits);
  else
    return static_cast<T>(value);
}

template <class T>
double value(const T& v) {
  if constexpr (std::is_same_v<T, Eigen::half>)
    return static_cast<double>(lora::float16::from_bits(std::bit_cast<std::uint16_t>(v)));
  else if constexpr (std::is_same_v<T, Eigen::bfloat16>)
    return static_cast<double>(lora::bfloat16::from_bits(std::bit_cast<std::uint16_t>(v)));
  else
    return static_cast<double>(v);
}

/// The bytes of the elements, row by row, whatever the layout.
template <class M>
std::vector<unsigned char> bytes(const M& m) {
  const auto view = lora::as_matrix(m);
  constexpr std::size_t size = sizeof(typename decltype(view)::value_type);
  std::vector<unsigned char> result;
  for (lora::index_t i = 0; i < view.rows(); ++i)
    for (lora::index_t j = 0; j < view.cols(); ++j) {
      const auto* first = reinterpret_cast<const unsigned char*>(&view(i, j));
      result.insert(result.end(), first, first + size);
    }
  return result;
}

template <class M, class N>
bool same_bits(const M& a, const N& b) {
  const auto left = lora::as_matrix(a);
  const auto right = lora::as_matrix(b);
  static_assert(
      std::is_same_v<typename decltype(left)::value_type, typename decltype(right)::value_type>);
  return left.rows() == right.rows() && left.cols() == right.cols() && bytes(a) == bytes(b);
}

template <class M>
exact_matrix exact(const M& m) {
  const auto view = lora::as_matrix(m);
  exact_matrix result(view.rows(), view.cols());
  for (lora::index_t i = 0; i < view.rows(); ++i)
    for (lora::index_t j = 0; j < view.cols(); ++j)
      result(i, j) = static_cast<long double>(value(view(i, j)));
  return result;
}

/// a * b by the triple loop of the definition.
inline exact_matrix times(const exact_matrix& a, const exact_matrix& b) {
  exact_matrix result(a.rows(), b.cols());
  for (lora::index_t i = 0; i < a.rows(); ++i)
    for (lora::index_t j = 0; j < b.cols(); ++j) {
      long double sum = 0;
      for (lora::index_t k = 0; k < a.cols(); ++k) sum += a(i, k) * b(k, j);
      result(i, j) = sum;
    }
  return result;
}

template <class L>
exact_matrix exact_delta(const L& l) {
  return static_cast<long double>(l.scaling()) * times(exact(l.lora_B()), exact(l.lora_A()));
}

/// An exact result, stored: one rounding. It must fit a double, which whole numbers do.
template <class T>
matrix<T> rounded(const exact_matrix& m) {
  matrix<T> result(m.rows(), m.cols());
  for (lora::index_t i = 0; i < m.rows(); ++i)
    for (lora::index_t j = 0; j < m.cols(); ++j)
      result(i, j) = stored<T>(static_cast<double>(m(i, j)));
  return result;
}

}  // namespace test
