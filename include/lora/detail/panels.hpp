// SPDX-License-Identifier: Apache-2.0
//
// Panels: the layout that the register tile reads. A matrix of `outer` rows and `depth` columns is cut into panels of
// `width` rows; inside a panel the rows' elements at one depth lie side by side, so that one step of the tile is one load.
// Everything is widened to the accumulator type while it is packed, so the kernels know no storage format. Rows that pad
// the last panel are zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "lora/detail/convert.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Uninitialized memory for the length of a call, aligned for the widest vector.
template <class Acc>
class scratch {
 public:
  scratch() = default;
  explicit scratch(index_t size)
      : data_(static_cast<Acc*>(::operator new(static_cast<std::size_t>(size) * sizeof(Acc), alignment))) {}
  Acc* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct free_memory {
    void operator()(Acc* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<Acc, free_memory> data_;
};

/// Rounds up to a multiple.
constexpr index_t panels_of(index_t outer, index_t width) { return (outer + width - 1) / width; }

/// Writes scale * source (rows x depth) to one panel: destination[k * width + first_row + i]. The product with scale is
/// formed in double and rounded once; scale 1 is exact.
template <class Acc, class T, storage_order Order>
void pack(Acc* destination, index_t width, index_t first_row, const matrix_view<T, Order>& source, double scale) {
  const auto put = [&](index_t i, index_t k, const auto& value) {
    Acc& slot = destination[k * width + first_row + i];
    slot = scale == 1.0 ? widen<Acc>(value) : static_cast<Acc>(scale * widen<double>(value));
  };
  if constexpr (Order == storage_order::row_major) {
    for (index_t i = 0; i < source.rows(); ++i) {
      const T* row = source.outer(i);
      for (index_t k = 0; k < source.cols(); ++k) put(i, k, row[k]);
    }
  } else {
    for (index_t k = 0; k < source.cols(); ++k) {
      const T* col = source.outer(k);
      for (index_t i = 0; i < source.rows(); ++i) put(i, k, col[i]);
    }
  }
}

/// A whole matrix in panels, filled block by block.
template <class Acc>
class panels {
 public:
  panels() = default;
  /// All zero.
  panels(index_t outer, index_t depth, index_t width)
      : outer_(outer), depth_(depth), width_(width), memory_(panels_of(outer, width) * depth * width) {
    std::fill_n(memory_.data(), count() * depth * width, Acc(0));
  }

  index_t outer() const { return outer_; }
  index_t depth() const { return depth_; }
  index_t width() const { return width_; }
  index_t count() const { return panels_of(outer_, width_); }
  Acc* panel(index_t p) const { return memory_.data() + p * depth_ * width_; }

  /// Puts scale * block at (row, depth).
  template <class T, storage_order Order>
  void put(index_t row, index_t depth, const matrix_view<T, Order>& block, double scale) const {
    for (index_t done = 0; done < block.rows();) {
      const index_t inside = (row + done) % width_;
      const index_t rows = std::min(width_ - inside, block.rows() - done);
      pack(panel((row + done) / width_) + depth * width_, width_, inside, block.middle_rows(done, rows), scale);
      done += rows;
    }
  }

 private:
  index_t outer_ = 0, depth_ = 0, width_ = 1;
  scratch<Acc> memory_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
