// SPDX-License-Identifier: Apache-2.0
//
// The tiled rank-R update: the one place where delta weights are formed. All adapters of a call are stacked to
// R = sum of ranks; each element of the delta is one chain of R multiply-adds in float (double if any operand is double),
// starting at zero, in registers. A sink then adds the weight and rounds once. Nothing of the size of W is allocated and W
// is streamed once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "lora/detail/memory.hpp"
#include "lora/detail/operands.hpp"
#include "lora/detail/panels.hpp"
#include "lora/detail/parallel.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// What a pass over the weight saw.
struct tally {
  std::size_t became_nonfinite = 0;  ///< finite before, infinite or NaN after
  std::size_t nonfinite = 0;         ///< infinite or NaN after
};

/// The order of a tile's columns in its two vectors: as they are, or the even ones and then the odd ones, which is how
/// pairs of bfloat16 come apart.
enum class columns { in_order, even_then_odd };

/// The stacked factors of a sum of adapters, packed for a weight of one storage order. A column-major weight is handled as
/// its row-major transpose, with the factors' parts exchanged; products commute, so that the bits do not depend on it.
template <class Acc, storage_order Order, columns Columns = columns::in_order>
class rank_update {
 public:
  using vector = typename simd<Acc>::vector;
  static constexpr index_t width = tile_cols<Acc>;
  /// A tile of the delta in registers.
  using tile = vector[tile_rows][2];

  /// Checks and packs sign * (each adapter). Everything that can throw happens here.
  template <class Each>
  rank_update(const char* operation, const Each& each, index_t out_features, index_t in_features, double sign)
      : rank_(checked_total_rank(operation, each, out_features, in_features)),
        rows_(is_row_major ? out_features : in_features),
        cols_(is_row_major ? in_features : out_features) {
    if (rank_ == 0 || rows_ == 0 || cols_ == 0) return;
    left_ = array<Acc>(row_panels() * rank_ * tile_rows);
    right_ = array<Acc>(col_panels() * rank_ * width);
    std::fill_n(left_.data() + (row_panels() - 1) * rank_ * tile_rows, rank_ * tile_rows, Acc(0));
    std::fill_n(right_.data() + (col_panels() - 1) * rank_ * width, rank_ * width, Acc(0));
    index_t first = 0;
    each([&](const auto& l) {
      if (!is_read(l)) return;
      const auto& lora_A = l.lora_A();
      const auto& lora_B = l.lora_B();
      const auto a = as_matrix(lora_A).transpose();
      const auto b = as_matrix(lora_B);
      const double s = sign * static_cast<double>(l.scaling());
      if constexpr (is_row_major) {
        put<tile_rows>(left_.data(), b, first, s);
        put<width>(right_.data(), a, first, 1.0);
      } else {
        put<tile_rows>(left_.data(), a, first, 1.0);
        put<width>(right_.data(), b, first, s);
      }
      first += static_cast<index_t>(l.rank());
    });
  }

  index_t rank() const { return rank_; }

  /// Gives every tile of the delta to the sink, on any thread: sink.plain(first row, first column, tile) where all of it
  /// lies inside; if that says false, having written nothing, sink.full(tally, first row, first column, tile); at the edges
  /// sink.part(tally, row, first column, columns, delta) for each row. Rows and columns are those of
  /// the transpose if column-major. Neither throws nor allocates. Returns the sum of the tallies.
  template <class Sink>
  tally run(const Sink& sink) const {
    const int threads = threads_for(static_cast<double>(rows_) * static_cast<double>(cols_) * static_cast<double>(rank_));
    std::atomic<std::size_t> became_nonfinite{0}, nonfinite{0};
    const index_t strip = sink.by_columns ? 1 : panels_in_strip();
    parallel(threads, [&](const team& team) {
      tally mine;
      team.for_each(row_panels() * pieces(col_panels(), strip), [&](index_t task) {
        const index_t first = task / row_panels() * strip;
        for (index_t q = first; q < std::min(first + strip, col_panels()); ++q) one(task % row_panels(), q, mine, sink);
      });
      sink.done();
      became_nonfinite += mine.became_nonfinite;
      nonfinite += mine.nonfinite;
    });
    return {became_nonfinite, nonfinite};
  }

 private:
  static constexpr bool is_row_major = Order == storage_order::row_major;
  /// Column panels are handled in strips whose packed factor stays in the second-level cache while all rows pass.
  static constexpr index_t strip_bytes = index_t{256} << 10;

  index_t row_panels() const { return pieces(rows_, tile_rows); }
  index_t col_panels() const { return pieces(cols_, width); }
  index_t panels_in_strip() const {
    return std::max<index_t>(8, strip_bytes / (std::max<index_t>(1, rank_) * width * static_cast<index_t>(sizeof(Acc))));
  }

  /// Packs scale * source (outer x rank) from rank `first` on. The product is formed in double and rounded once.
  template <int PanelWidth, class V>
  void put(Acc* panels, const V& source, index_t first, double scale) const {
    const auto value = [scale](const auto& v) {
      return scale == 1.0 ? widen<Acc>(v) : static_cast<Acc>(scale * widen<double>(v));
    };
    for (index_t p = 0; p < pieces(source.rows(), PanelWidth); ++p) {
      Acc* const panel = panels + (p * rank_ + first) * PanelWidth;
      const index_t used = std::min<index_t>(PanelWidth, source.rows() - p * PanelWidth);
      if constexpr (V::is_row_major) {
        for (index_t i = 0; i < used; ++i)
          for (index_t k = 0; k < source.cols(); ++k)
            panel[k * PanelWidth + place<PanelWidth>(i)] = value(source(p * PanelWidth + i, k));
      } else {
        for (index_t k = 0; k < source.cols(); ++k) {
          const auto* const from = source.outer(k) + p * PanelWidth;
          for (index_t i = 0; i < used; ++i) panel[k * PanelWidth + place<PanelWidth>(i)] = value(from[i]);
        }
      }
    }
  }
  template <int PanelWidth>
  static constexpr index_t place(index_t i) {
    if constexpr (Columns == columns::even_then_odd && PanelWidth == width)
      return i % 2 * (width / 2) + i / 2;
    else
      return i;
  }

  template <class Sink>
  void one(index_t p, index_t q, tally& mine, const Sink& sink) const {
    sink.fetch(p * tile_rows, q * width);
    const index_t rows = std::min<index_t>(tile_rows, rows_ - p * tile_rows);
    const index_t columns = std::min(width, cols_ - q * width);
    if (rows == tile_rows && columns == width) {
      tile sum;
      form(p, q, sum);
      if (!sink.plain(p * tile_rows, q * width, sum)) careful(p, q, mine, sink, rows, columns);
    } else {
      careful(p, q, mine, sink, rows, columns);
    }
  }

  /// The tile of the delta, from zero.
  LORA_DETAIL_INLINE void form(index_t p, index_t q, tile& sum) const {
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) sum[i][0] = sum[i][1] = simd<Acc>::zero();
    advance<false, tile_rows, 2, Acc>(sum, left_.data() + p * rank_ * tile_rows, tile_rows,
                                      right_.data() + q * rank_ * width, 0, rank_);
  }

  /// A tile at the edge, or one with a zero or a number that is not finite: formed again, and told row by row.
  template <class Sink>
#if defined(__GNUC__)
  __attribute__((noinline))
#endif
  void
  careful(index_t p, index_t q, tally& mine, const Sink& sink, index_t rows, index_t columns) const {
    tile sum;
    form(p, q, sum);
    if (rows == tile_rows && columns == width) {
      sink.full(mine, p * tile_rows, q * width, sum);
    } else {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        if (i >= rows) break;
        Acc delta[width];
        spill(sum[i][0], sum[i][1], delta);
        sink.part(mine, p * tile_rows + i, q * width, columns, delta);
      }
    }
  }

 public:
  /// A row of a tile in the order of its columns. By value: a reference would keep the whole tile in memory.
  static void spill(vector first, vector second, Acc* delta) {
    Acc values[width];
    simd<Acc>::store(values, first);
    simd<Acc>::store(values + width / 2, second);
    for (index_t j = 0; j < width; ++j) delta[j] = values[place<static_cast<int>(width)>(j)];
  }

 private:
  index_t rank_, rows_, cols_;
  array<Acc> left_, right_;
};

/// destination = round(source + delta), element by element, once. An element whose delta is zero keeps its bits. `step` is
/// the distance of the elements.
template <class Acc, class T>
void add_and_round(tally& seen, const T* source, T* destination, const Acc* delta, index_t count, index_t step = 1) {
  std::size_t became = 0, nonfinite = 0;
  for (index_t j = 0; j < count; ++j) {
    const T before = source[j * step];
    T after = delta[j] == Acc(0) ? before : narrow<T>(widen<Acc>(before) + delta[j]);
    // clang turns this choice into adding -0.0, which is the same but for a signaling NaN: its bits are kept by hand.
    if (delta[j] == Acc(0) && !is_finite(before)) std::memcpy(&after, source + j * step, sizeof(T));
    destination[j * step] = after;
    const bool bad = !is_finite(after);
    nonfinite += bad;
    became += bad && is_finite(before);
  }
  seen.nonfinite += nonfinite;
  seen.became_nonfinite += became;
}

/// The largest magnitude, as bits of the accumulator, that is finite in T after rounding.
template <class T, class Acc>
constexpr auto largest_finite() {
  if constexpr (std::is_same_v<T, double>)
    return std::uint64_t{0x7fef'ffff'ffff'ffff};
  else if constexpr (std::is_same_v<T, float>)
    return std::uint32_t{0x7f7f'ffff};
  else if constexpr (std::is_same_v<T, bfloat16>)
    return std::uint32_t{0x7f7f'7fff};  // from 0x7f7f'8000 on the tie goes up
  else
    return std::uint32_t{0x477f'efff};  // below 65520, the tie between 65504 and what would be 65536
}

/// Whether a row of a tile can be added and rounded in registers.
template <class Acc, class T>
inline constexpr bool rounds_in_registers = std::is_same_v<Acc, T> || (std::is_same_v<Acc, float> && sizeof(T) == 2);

/// Two vectors of a row of a weight, widened; of bfloat16 the even and the odd elements.
template <class Acc, class T>
LORA_DETAIL_INLINE void load_row(const T* source, typename simd<Acc>::vector& first, typename simd<Acc>::vector& second) {
  using v = simd<Acc>;
  if constexpr (std::is_same_v<T, bfloat16>) {
    first = v::load_even(source);
    second = v::load_odd(source);
  } else if constexpr (std::is_same_v<T, float16>) {
    first = v::load_half(source);
    second = v::load_half(source + v::width);
  } else {
    first = v::load(source);
    second = v::load(source + v::width);
  }
}
/// The reverse, rounding once; numbers that are not finite in T are not its business.
template <class Acc, class T>
LORA_DETAIL_INLINE void store_row(T* destination, typename simd<Acc>::vector first, typename simd<Acc>::vector second,
                                  bool past_caches) {
  using v = simd<Acc>;
  if constexpr (std::is_same_v<T, bfloat16>) {
    v::join_pairs(destination, first, second);
  } else if constexpr (std::is_same_v<T, float16>) {
    v::store_half(destination, first);
    v::store_half(destination + v::width, second);
  } else if (past_caches) {
    v::stream(destination, first);
    v::stream(destination + v::width, second);
  } else {
    v::store(destination, first);
    v::store(destination + v::width, second);
  }
}

/// Two vectors of a weight plus their deltas, rounded and written; false, with nothing written, if any element of the
/// result is not finite. bfloat16: the vectors are the even and the odd elements. `Store` false: only the answer.
template <bool Store, class Acc, class T>
LORA_DETAIL_INLINE bool add_and_round(const T* source, T* destination, typename simd<Acc>::vector first,
                                      typename simd<Acc>::vector second, bool past_caches) {
  using v = simd<Acc>;
  typename v::vector w0, w1;
  load_row<Acc>(source, w0, w1);
  const auto s0 = v::keep_where_zero(first, w0, v::add(w0, first));
  const auto s1 = v::keep_where_zero(second, w1, v::add(w1, second));
  if (v::exceeds(s0, s1, largest_finite<T, Acc>())) return false;
  if constexpr (Store) store_row<Acc>(destination, s0, s1, past_caches);
  return true;
}

/// The order of columns in which a weight of T that is row by row in memory is rounded.
template <class Acc, class T>
inline constexpr columns columns_of =
    std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16> ? columns::even_then_odd : columns::in_order;

/// Sink: destination := round(source + delta), of one shape and possibly the same memory; Store false: only the tally.
template <class Update, class Acc, class S, storage_order Order, bool Store = true>
class rounding_sink {
 public:
  using T = storage_t<S>;
  static constexpr bool by_columns = false;

  rounding_sink(const matrix_view<const S, Order>& source, const matrix_view<S, Order>& destination)
      : source_(reinterpret_cast<const T*>(source.data())),
        destination_(reinterpret_cast<T*>(destination.data())),
        source_stride_(source.outer_stride()),
        stride_(destination.outer_stride()),
        past_caches_(Store && source_ != destination_ && std::is_same_v<T, Acc> && is_aligned(destination_) &&
                     stride_ * static_cast<index_t>(sizeof(T)) % static_cast<index_t>(memory_alignment) == 0) {}

  void fetch(index_t row, index_t col) const {
    constexpr index_t ahead = 4;
    for (int i = 0; i < tile_rows; ++i)
      prefetch_at(source_, ((row + i) * source_stride_ + col + ahead * tile_cols<Acc>)*static_cast<index_t>(sizeof(T)));
  }
  /// In registers until all of it is known to be finite and without a zero, whose sign would have to be looked at.
  LORA_DETAIL_INLINE bool plain(index_t row, index_t col, typename Update::tile& sum) const {
    if constexpr (!rounds_in_registers<Acc, T>) {
      return false;
    } else {
      typename simd<Acc>::range range;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        typename simd<Acc>::vector w0, w1;
        load_row<Acc>(source_ + (row + i) * source_stride_ + col, w0, w1);
        range.see(sum[i][0] = simd<Acc>::add(w0, sum[i][0]));
        range.see(sum[i][1] = simd<Acc>::add(w1, sum[i][1]));
      }
      if (!range.is_inside(largest_finite<T, Acc>())) return false;
      LORA_DETAIL_UNROLL
      for (int i = 0; Store && i < tile_rows; ++i)
        store_row<Acc>(destination_ + (row + i) * stride_ + col, sum[i][0], sum[i][1], past_caches_);
      return true;
    }
  }
  LORA_DETAIL_INLINE void full(tally& seen, index_t row, index_t col, const typename Update::tile& delta) const {
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) {
      if constexpr (rounds_in_registers<Acc, T>)
        if (add_and_round<Store, Acc>(source_ + (row + i) * source_stride_ + col, destination_ + (row + i) * stride_ + col,
                                      delta[i][0], delta[i][1], past_caches_))
          continue;
      Acc values[tile_cols<Acc>];
      Update::spill(delta[i][0], delta[i][1], values);
      part(seen, row + i, col, tile_cols<Acc>, values);
    }
  }
  void part(tally& seen, index_t row, index_t col, index_t count, const Acc* delta) const {
    const T* const from = source_ + row * source_stride_ + col;
    if constexpr (Store) {
      add_and_round(seen, from, destination_ + row * stride_ + col, delta, count);
    } else {
      T rounded[tile_cols<Acc>];
      add_and_round(seen, from, rounded, delta, count);
    }
  }
  void done() const {
    if (past_caches_) finish_streaming();
  }

 private:
  static bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % memory_alignment == 0; }

  const T* source_;
  T* destination_;
  index_t source_stride_, stride_;
  bool past_caches_;
};

/// Sink: the same for a weight in panels (see packed_weight.hpp); rows are in_features, columns out_features.
template <class Update, class Acc, class T, bool Store = true>
class panel_sink {
 public:
  static constexpr bool by_columns = true;
  static constexpr index_t width = tile_cols<accumulator_t<T>>;

  panel_sink(const T* source, T* destination, index_t in_features)
      : source_(source),
        destination_(destination),
        panel_(panel_size<T>(in_features, width)),
        past_caches_(Store && source != destination && std::is_same_v<T, Acc>) {}

  void fetch(index_t row, index_t col) const {
    constexpr index_t ahead = 2048;
    const index_t at = offset(row, col) * static_cast<index_t>(sizeof(T)) + ahead;
    for (index_t b = 0; b < tile_rows * width * static_cast<index_t>(sizeof(T)); b += 64) prefetch_at(source_, at + b);
  }
  LORA_DETAIL_INLINE bool plain(index_t row, index_t col, typename Update::tile& sum) const {
    if constexpr (!in_registers) {
      return false;
    } else {
      typename simd<Acc>::range range;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        LORA_DETAIL_UNROLL
        for (int j = 0; j < 2; ++j) {
          const T* const p = source_ + group_offset(row, col, i, j);
          typename simd<Acc>::vector w;
          if constexpr (std::is_same_v<T, bfloat16>)
            w = i % 2 == 0 ? simd<Acc>::load_even(p) : simd<Acc>::load_odd(p);
          else if constexpr (std::is_same_v<T, float16>)
            w = simd<Acc>::load_half(p);
          else
            w = simd<Acc>::load(p);
          range.see(sum[i][j] = simd<Acc>::add(w, sum[i][j]));
        }
      }
      if (!range.is_inside(largest_finite<T, Acc>())) return false;
      LORA_DETAIL_UNROLL
      for (int i = 0; Store && i < tile_rows; i += depth_group<T>) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          store_row<Acc>(destination_ + group_offset(row, col, i, 0), sum[i][0], sum[i + 1][0], false);
          store_row<Acc>(destination_ + group_offset(row, col, i, 1), sum[i][1], sum[i + 1][1], false);
        } else {
          store_row<Acc>(destination_ + group_offset(row, col, i, 0), sum[i][0], sum[i][1], past_caches_);
        }
      }
      return true;
    }
  }
  LORA_DETAIL_INLINE void full(tally& seen, index_t row, index_t col, const typename Update::tile& delta) const {
    if constexpr (in_registers && std::is_same_v<T, bfloat16>) {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; i += 2) {
        LORA_DETAIL_UNROLL
        for (int j = 0; j < 2; ++j) {
          const index_t first = col + j * simd<Acc>::width, at = offset(row + i, first);
          if (add_and_round<Store, Acc>(source_ + at, destination_ + at, delta[i][j], delta[i + 1][j], false)) continue;
          for (int n = 0; n < 2; ++n) {
            Acc values[simd<Acc>::width];
            simd<Acc>::store(values, delta[i + n][j]);
            part(seen, row + i + n, first, simd<Acc>::width, values);
          }
        }
      }
    } else {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        const index_t at = offset(row + i, col);
        if constexpr (in_registers)
          if (add_and_round<Store, Acc>(source_ + at, destination_ + at, delta[i][0], delta[i][1], past_caches_)) continue;
        Acc values[tile_cols<Acc>];
        Update::spill(delta[i][0], delta[i][1], values);
        part(seen, row + i, col, tile_cols<Acc>, values);
      }
    }
  }
  void part(tally& seen, index_t row, index_t col, index_t count, const Acc* delta) const {
    // The accumulator's tile may be narrower than a panel; it never straddles two.
    const index_t at = offset(row, col);
    if constexpr (Store) {
      add_and_round(seen, source_ + at, destination_ + at, delta, count, depth_group<T>);
    } else {
      T rounded[depth_group<T> * tile_cols<Acc>];
      add_and_round(seen, source_ + at, rounded, delta, count, depth_group<T>);
    }
  }
  void done() const {
    if (past_caches_) finish_streaming();
  }

 private:
  static constexpr bool in_registers = rounds_in_registers<Acc, T> && tile_cols<Acc> == width;

  /// Where vector j of row i of a tile, or of the pair of rows that holds it, begins.
  index_t group_offset(index_t row, index_t col, int i, int j) const {
    constexpr int group = depth_group<T>;
    return offset(row, col) + (i / group * group) * width + j * group * simd<Acc>::width;
  }
  index_t offset(index_t row, index_t col) const { return col / width * panel_ + panel_offset<T>(col % width, row, width); }

  const T* source_;
  T* destination_;
  index_t panel_;
  bool past_caches_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
