// SPDX-License-Identifier: Apache-2.0
//
// tensor_view looks at a dense tensor of fixed rank as files hold them: row-major, packed, somebody
// else's memory. It exists to say a shape and to be cut down to the matrix_view that the verbs
// take.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/error.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A packed row-major tensor of Rank dimensions. Invariant: no extent is negative, and the product
/// of those that are not 0 is no larger than a memory. T is const for a read-only view. Not an
/// owner, and without strides: a slice along the first dimension is again packed, one along any
/// other is not offered.
template <class T, std::size_t Rank>
  requires(Rank >= 1)
class tensor_view {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());

 public:
  using value_type = std::remove_const_t<T>;
  using shape_type = std::array<index_t, Rank>;

  /// Throws shape_error when an extent is negative, the product is larger than a memory, or the
  /// span holds fewer elements.
  tensor_view(std::span<T> values, const shape_type& shape) : data_(values.data()), shape_(shape) {
    const index_t needed = checked_size(shape);
    if (needed > static_cast<index_t>(values.size()))
      detail::raise_shape("tensor_view", text(shape) + " needs more elements than the " +
                                             std::to_string(values.size()) +
                                             " that the span holds");
  }

  static constexpr std::size_t rank() { return Rank; }
  const shape_type& shape() const { return shape_; }
  index_t extent(std::size_t dimension) const { return shape_[dimension]; }
  index_t size() const { return checked_size(shape_); }
  T* data() const { return data_; }

  /// The tensor at an index of the first dimension (an expert of a stack, a layer of an array).
  /// Throws shape_error when the index is out of range.
  auto slice(index_t index) const
    requires(Rank >= 2)
  {
    if (index < 0 || index >= shape_[0])
      detail::raise_shape("tensor_view::slice",
                          std::to_string(index) + " is not an index of " + text(shape_));
    std::array<index_t, Rank - 1> rest{};
    for (std::size_t k = 1; k < Rank; ++k) rest[k - 1] = shape_[k];
    const index_t step = shape_[0] == 0 ? 0 : size() / shape_[0];
    return tensor_view<T, Rank - 1>(
        std::span<T>(data_ + index * step, static_cast<std::size_t>(step)), rest);
  }

  /// The matrix first dimension x product of the others: all of a rank-2 tensor, a convolution as
  /// PEFT flattens it.
  matrix_view<T, storage_order::row_major> matrix() const {
    index_t cols = 1;
    for (std::size_t k = 1; k < Rank; ++k) cols *= shape_[k];
    return {data_, shape_[0], cols};
  }

 private:
  static index_t checked_size(const shape_type& shape) {
    constexpr index_t largest = detail::most_extent;  // of one dimension of matrix()
    index_t product = 1;
    bool empty = false;
    for (const index_t extent : shape) {
      if (extent < 0) detail::raise_shape("tensor_view", text(shape) + " has a negative extent");
      empty = empty || extent == 0;
    }
    for (const index_t extent : shape) {
      if (extent == 0)
        continue;  // [0, huge, huge] has no element, but matrix() multiplies the others
      if (extent > largest / product)
        detail::raise_shape("tensor_view", text(shape) + " has too many elements");
      product *= extent;
    }
    return empty ? 0 : product;
  }
  static std::string text(const shape_type& shape) {
    std::string result;
    for (const index_t extent : shape)
      result += (result.empty() ? "[" : ", ") + std::to_string(extent);
    return result + "]";
  }

  T* data_;
  shape_type shape_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
