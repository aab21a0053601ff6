// SPDX-License-Identifier: Apache-2.0
//
// Rows of a stored weight as accumulators, and back: widened exactly, rounded once to nearest,
// counted.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "lora/detail/convert.hpp"
#include "lora/detail/delta_rows.hpp"
#include "lora/kernel/merge/tile_sinks.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/widen.hpp"
#include "lora/matrix_view.hpp"
#include "lora/packed_weight.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Counts what a store of `after` over `before` changes.
template <class T>
void count_stored(const T* before, const T* after, index_t count, tally& seen) {
  tally mine;
  for (index_t k = 0; k < count; ++k) {
    const bool was = is_finite(before[k]), is = is_finite(after[k]);
    mine.nonfinite += !is;
    mine.became_nonfinite += was && !is;
    mine.changed += std::memcmp(before + k, after + k, sizeof(T)) != 0;
  }
  seen += mine;
}

/// values[k] := round(values[k]) to T, nearest even, kept as accumulators.
template <class T, class Acc>
void round_all(Acc* values, index_t count) {
  if constexpr (!std::is_same_v<T, Acc>) {
    index_t k = 0;
    if constexpr (std::is_same_v<T, float16> && std::is_same_v<Acc, float>) {
      using v = simd<float>;
      for (; k + 2 * v::width <= count; k += 2 * v::width) {
        const auto halves = v::join_halves(v::load(values + k), v::load(values + k + v::width));
        float16 rounded[2 * v::width];
        std::memcpy(rounded, &halves, sizeof halves);
        v::store(values + k, v::load_half(rounded));
        v::store(values + k + v::width, v::load_half(rounded + v::width));
      }
    }
    for (; k < count; ++k) values[k] = widen<Acc>(narrow<T>(values[k]));
  }
}

/// to[k] := round(from[k]) for a row of a weight in memory; a NaN keeps its bits. What stays finite
/// is rounded and counted in registers, chunk by chunk.
template <class Acc, class T>
class nearest_row {
 public:
  static void store(const Acc* from, index_t count, T* to, tally& seen) {
    index_t k = 0;
    if constexpr (rounds_in_registers<Acc, T>) {
      changed_count<T> changed;
      k = store_chunks<4>(from, k, count, to, seen, changed);
      k = store_chunks<1>(from, k, count, to, seen, changed);
      seen.changed += changed.count();
    }
    store_each(from + k, count - k, to + k, seen);
  }

 private:
  static constexpr index_t width = tile_cols<Acc>;
  using v = simd<Acc>;

  template <int Pairs>
  static index_t store_chunks(const Acc* from, index_t k, index_t count, T* to, tally& seen,
                              changed_count<T>& changed) {
    constexpr index_t chunk = Pairs * width;
    for (; k + chunk <= count; k += chunk)
      if (!store_chunk<Pairs>(from + k, to + k, changed)) store_each(from + k, chunk, to + k, seen);
    return k;
  }
  /// In registers, unless something is not finite.
  template <int Pairs>
  static bool store_chunk(const Acc* from, T* to, changed_count<T>& counts) {
    watch<Acc, T> finite;
    typename v::vector row[Pairs][2];
    LORA_DETAIL_UNROLL
    for (int i = 0; i < Pairs; ++i) {
      row[i][0] = v::load(from + i * width);
      row[i][1] = v::load(from + i * width + v::width);
      if constexpr (std::is_same_v<T, bfloat16>) v::unzip(row[i][0], row[i][1]);
      round_row<T>(row[i][0], row[i][1], finite);
    }
    if (!finite.all_finite()) return false;
    changed_lanes<T> changed;
    LORA_DETAIL_UNROLL
    for (int i = 0; i < Pairs; ++i) {
      see_row<Acc>(changed, to + i * width, row[i][0], row[i][1]);
      store_row<Acc>(to + i * width, row[i][0], row[i][1], false);
    }
    counts.add(changed);
    return true;
  }
  static void store_each(const Acc* from, index_t count, T* to, tally& seen) {
    for (index_t k = 0; k < count; ++k) {
      const T before = to[k];
      T after = narrow<T>(from[k]);
      if (is_nan(before) && is_nan(from[k])) std::memcpy(&after, to + k, sizeof(T));
      count_stored(&before, &after, 1, seen);
      to[k] = after;
    }
  }
};

/// A part of a weight in accumulators: count rows from `first` on, cols columns from first_col on.
template <class Acc>
struct row_block {
  index_t first, count, first_col, cols;
  Acc* rows;     ///< count x cols, `stride` apart
  Acc* scratch;  ///< of the same shape, where a change wants it; else null
  index_t stride;
  index_t next_first = -1, next_col = -1;  ///< where the thread's next block begins; -1: nowhere
  memory_of_rows ahead = {};               ///< the stored weight there
};

/// The part of a block that lies in some rows; its count is 0 or less where none does.
template <class Acc>
row_block<Acc> within(const row_block<Acc>& block, const row_range& rows) {
  if (rows.all()) return block;
  row_block<Acc> part = block;
  part.first = std::max(block.first, rows.first);
  part.count = std::min(block.first + block.count, rows.end()) - part.first;
  if (part.count <= 0) return part;
  const index_t skipped = part.first - block.first;
  part.rows += skipped * block.stride;
  if (block.scratch != nullptr) part.scratch += skipped * block.stride;
  part.ahead = moved(block.ahead, skipped, 0);
  return part;
}

/// A weight in memory, read and written as blocks of accumulators. Different rows may be handled by
/// different threads. Without Writes a store only counts.
template <class Acc, class S, storage_order Order, bool Writes = true>
class matrix_rows {
 public:
  using value_type = storage_t<std::remove_const_t<S>>;
  explicit matrix_rows(const matrix_view<S, Order>& W) : W_(W) {}

  index_t out_features() const { return W_.rows(); }
  index_t in_features() const { return W_.cols(); }
  /// Rows that are handled together: whole lines of a column-major weight.
  static constexpr index_t granule() { return is_row_major ? 1 : most_rows; }
  /// Whether rows that do not change need no pass.
  static constexpr bool may_skip() { return Writes; }

  /// Where an element lies, if a tile of rows from there on may be fetched.
  memory_of_rows memory(index_t row, index_t col) const {
    if (!is_row_major || row < 0 || row + tile_rows > W_.rows()) return {};
    constexpr auto size = static_cast<index_t>(sizeof(S));
    return {reinterpret_cast<const std::byte*>(at(row, col)), W_.outer_stride() * size, size};
  }
  void load(const row_block<Acc>& b) const {
    if constexpr (is_row_major) {
      for (index_t i = 0; i < b.count; ++i)
        widen_all<Acc>(at(b.first + i, b.first_col), b.cols, b.rows + i * b.stride);
    } else if (b.cols != 0) {
      transpose_widened(static_cast<const value_type*>(at(b.first, b.first_col)), W_.outer_stride(),
                        b.count, b.cols, b.rows, b.stride);
    }
  }
  void store(const row_block<Acc>& b, tally& seen) const {
    if constexpr (is_row_major) {
      for (index_t i = 0; i < b.count; ++i)
        put(b.rows + i * b.stride, b.cols, at(b.first + i, b.first_col), seen);
    } else {
      constexpr index_t together = 8;
      Acc columns[together * most_rows];
      for (index_t k = 0; k < b.cols; k += together)
        for (index_t i = 0; i < b.count; i += most_rows) {
          const index_t cols = std::min(together, b.cols - k),
                        rows = std::min(most_rows, b.count - i);
          transpose_widened<Acc, Acc>(b.rows + i * b.stride + k, b.stride, cols, rows, columns,
                                      most_rows);
          for (index_t n = 0; n < cols; ++n)
            put(columns + n * most_rows, rows, at(b.first + i, b.first_col + k + n), seen);
        }
    }
  }

 private:
  static constexpr bool is_row_major = Order == storage_order::row_major;
  static constexpr index_t most_rows = 32;

  /// Writes, or counts what that would change.
  static void put(const Acc* from, index_t count, auto* to, tally& seen) {
    if constexpr (Writes) {
      nearest_row<Acc, value_type>::store(from, count, to, seen);
    } else {
      constexpr index_t most = 256;
      value_type copy[most];
      for (index_t k = 0; k < count; k += most) {
        const index_t some = std::min(most, count - k);
        std::copy_n(to + k, some, copy);
        nearest_row<Acc, value_type>::store(from + k, some, copy, seen);
      }
    }
  }
  auto* at(index_t i, index_t k) const {
    auto* const data =
        W_.data() + (is_row_major ? i * W_.outer_stride() + k : k * W_.outer_stride() + i);
    using element = std::conditional_t<std::is_const_v<S>, const value_type, value_type>;
    return reinterpret_cast<element*>(data);
  }

  matrix_view<S, Order> W_;
};

/// The same of a weight in panels.
template <class Acc, class T>
class panel_rows {
 public:
  using value_type = T;
  /// Reads `source` and writes `destination`, of one shape; possibly the same weight.
  panel_rows(const packed_weight<T>& source, packed_weight<T>* destination)
      : source_(source), destination_(destination) {}

  index_t out_features() const { return source_.out_features(); }
  index_t in_features() const { return source_.in_features(); }
  static constexpr index_t granule() { return width; }
  bool may_skip() const { return destination_ == &source_; }
  memory_of_rows memory(index_t, index_t) const { return {}; }

  void load(const row_block<Acc>& b) const {
    for (index_t i = 0; i < b.count; ++i) {
      const T* const panel = source_.panels() + (b.first + i) / width * size();
      for (index_t k = 0; k < b.cols; ++k)
        b.rows[i * b.stride + k] =
            widen<Acc>(panel[panel_offset<T>((b.first + i) % width, b.first_col + k, width)]);
    }
  }
  void store(const row_block<Acc>& b, tally& seen) const {
    for (index_t i = 0; i < b.count; ++i) {
      const index_t panel = (b.first + i) / width * size(), row = (b.first + i) % width;
      for (index_t k = 0; k < b.cols; ++k) {
        const index_t at = panel + panel_offset<T>(row, b.first_col + k, width);
        T value = source_.panels()[at];
        nearest_row<Acc, T>::store(b.rows + i * b.stride + k, 1, &value, seen);
        destination_->panels()[at] = value;
      }
    }
  }

 private:
  static constexpr index_t width = tile_cols<accumulator_t<T>>;
  index_t size() const { return panel_size<T>(in_features(), width); }

  const packed_weight<T>& source_;
  packed_weight<T>* destination_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
