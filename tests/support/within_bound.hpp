// SPDX-License-Identifier: Apache-2.0
//
// Results against a bound of the library: a weight_bound, or a matrix of double or long double.
#pragma once

#include "support/bits.hpp"

namespace test {

/// The elements of a bound, in long double.
template <class B>
exact_matrix elements(const B& bound) {
  exact_matrix result(bound.rows(), bound.cols());
  for (lora::index_t i = 0; i < bound.rows(); ++i)
    for (lora::index_t j = 0; j < bound.cols(); ++j)
      result(i, j) = static_cast<long double>(bound(i, j));
  return result;
}

/// Whether no element differs from the exact one by more than its bound. False for NaN.
template <class M, class B>
bool within(const M& got, const exact_matrix& want, const B& bound) {
  return ((exact(got) - want).cwiseAbs().array() <= elements(bound).array()).all();
}

}  // namespace test
