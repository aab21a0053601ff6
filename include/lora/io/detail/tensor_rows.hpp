// SPDX-License-Identifier: Apache-2.0
//
// Rows of a tensor of a file, as a matrix.
#pragma once

#include <cstddef>
#include <span>

#include "lora/adapter.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Rows first to first + count - 1 of a tensor as a matrix, first dimension x product of the
/// others: read straight into the matrix, and widened exactly. The first dimension is not 0.
template <scalar T>
detail::row_major_matrix<T> read_rows(const safetensors::index& tensors,
                                      const safetensors::tensor_info& t, index_t first,
                                      index_t count) {
  const std::size_t columns = t.elements() / static_cast<std::size_t>(t.shape[0]);
  detail::row_major_matrix<T> result(count, static_cast<index_t>(columns));
  tensors.read(t, std::span(result.data(), static_cast<std::size_t>(result.size())),
               static_cast<std::size_t>(first) * columns);
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
