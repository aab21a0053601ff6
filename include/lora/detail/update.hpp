// SPDX-License-Identifier: Apache-2.0
//
// The tiled rank-R update: the one place where delta weights are formed. All adapters of a call are stacked to
// R = sum of ranks; each element of the delta is one chain of R multiply-adds in float (double if any operand is double),
// starting at zero, in registers. To merge, the update is packed negated; a sink subtracts it from the weight and rounds
// once. Nothing of the size of W is allocated and W is streamed once.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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

/// The sign of an update by what it is for: the sinks that round subtract it from the weight (delta_weight packs +1 and
/// keeps it). A sum of products that begins at +0 is never -0, unless a product underflows, and W - (+0) is W for every W,
/// where W + (+0) would turn -0 into +0.
inline constexpr double merging = -1.0, unmerging = 1.0;

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
  /// A tile of the sums in registers.
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
    unify_nans(left_);
    unify_nans(right_);
  }

  index_t rank() const { return rank_; }

  /// Gives every tile of the sums to the sink, on any thread. Tiles come in bands, along the rows or, where Sink::down,
  /// along the columns: place = sink.at(first row, first column) is where a band begins, and place.next() goes on by a
  /// tile. Where all of the tile lies inside and Sink::takes_tiles, place.fetch() may fetch what comes later and
  /// place.plain(tile), which may overwrite the sums, writes; if it says false, having written nothing, or at the edges,
  /// the sums are formed again for sink.part(tally, row, first column, columns, sums) of each row. sink.done() ends it, on
  /// every thread. None of these throws or allocates. Rows and columns are those of the transpose if column-major. Returns
  /// the sum of the tallies.
  template <class Sink>
  tally run(const Sink& sink) const {
    if (rows_ == 0 || cols_ == 0) return {};
    const int threads = threads_for(static_cast<double>(rows_) * static_cast<double>(cols_) * static_cast<double>(rank_));
    std::atomic<std::size_t> became_nonfinite{0}, nonfinite{0};
    const index_t across = Sink::down ? col_panels() : row_panels(), along = Sink::down ? row_panels() : col_panels();
    const index_t strip = panels_in_strip(along, Sink::down ? tile_rows : width);
    parallel(threads, [&](const team& team) {
      tally mine;
      team.for_each(across * pieces(along, strip), [&](index_t task) {
        const index_t fixed = task % across, first = task / across * strip;
        band(sink, Sink::down ? first : fixed, Sink::down ? fixed : first, std::min(strip, along - first), mine);
      });
      sink.done();
      became_nonfinite += mine.became_nonfinite;
      nonfinite += mine.nonfinite;
    });
    return {became_nonfinite, nonfinite};
  }

 private:
  static constexpr bool is_row_major = Order == storage_order::row_major;
  /// A band is so long that the panels along it stay in the second-level cache while all bands beside it pass.
  static constexpr index_t strip_bytes = index_t{256} << 10;

  index_t row_panels() const { return pieces(rows_, tile_rows); }
  index_t col_panels() const { return pieces(cols_, width); }
  index_t panels_in_strip(index_t panels, index_t panel_width) const {
    const index_t panel_bytes = std::max<index_t>(1, rank_) * panel_width * static_cast<index_t>(sizeof(Acc));
    // Strips of one length: threads share their number.
    return pieces(panels, pieces(panels, std::max<index_t>(8, strip_bytes / panel_bytes)));
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
            panel[k * PanelWidth + lane_of<PanelWidth>(i)] = value(source(p * PanelWidth + i, k));
      } else {
        for (index_t k = 0; k < source.cols(); ++k) {
          const auto* const from = source.outer(k) + p * PanelWidth;
          for (index_t i = 0; i < used; ++i) panel[k * PanelWidth + lane_of<PanelWidth>(i)] = value(from[i]);
        }
      }
    }
  }
  /// One NaN for all, whose lower bits are zero: rounding to 16 bits in registers would carry others out of the exponent.
  /// Accumulators of double are never rounded there.
  static void unify_nans(array<Acc>& values) {
    if constexpr (std::is_same_v<Acc, float>) {
      float* const begin = values.data();
      std::uint32_t most = 0;
      for (index_t k = 0; k < values.size(); ++k)
        most = std::max(most, std::bit_cast<std::uint32_t>(begin[k]) & 0x7fff'ffffu);
      if (most <= 0x7f80'0000u) return;
      for (index_t k = 0; k < values.size(); ++k)
        if ((std::bit_cast<std::uint32_t>(begin[k]) & 0x7fff'ffffu) > 0x7f80'0000u)
          begin[k] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  template <int PanelWidth>
  static constexpr index_t lane_of(index_t i) {
    if constexpr (Columns == columns::even_then_odd && PanelWidth == width)
      return i % 2 * (width / 2) + i / 2;
    else
      return i;
  }

  /// `count` tiles from row panel p and column panel q on. All that the loop needs is in locals: a store of a vector may
  /// alias whatever lies in an object. A function of its own, where nothing else wants the registers.
  template <class Sink>
  LORA_DETAIL_APART void band(const Sink& sink, index_t p, index_t q, index_t count, tally& mine) const {
    const index_t rank = rank_, whole_rows = rows_ / tile_rows, whole_cols = cols_ / width;
    const Acc* left = left_.data() + p * rank * tile_rows;
    const Acc* right = right_.data() + q * rank * width;
    auto place = sink.at(p * tile_rows, q * width);
    for (; count > 0; --count) {
      bool written = false;
      if constexpr (Sink::takes_tiles) {
        if (p < whole_rows && q < whole_cols) {
          place.fetch();
          tile sum;
          form(left, right, rank, sum);
          written = place.plain(sum);
          place.next();
        }
      }
      if (!written) careful(sink, p, q, mine);
      if constexpr (Sink::down) {
        ++p;
        left += rank * tile_rows;
      } else {
        ++q;
        right += rank * width;
      }
    }
  }

  /// A tile of the sums, from zero.
  LORA_DETAIL_INLINE static void form(const Acc* left, const Acc* right, index_t rank, tile& sum) {
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) sum[i][0] = sum[i][1] = simd<Acc>::zero();
    advance<false, tile_rows, 2, Acc>(sum, left, tile_rows, right, 0, rank);
  }

  /// A tile at the edge, or one that the sink did not take: formed again, and told row by row.
  template <class Sink>
  LORA_DETAIL_APART void careful(const Sink& sink, index_t p, index_t q, tally& mine) const {
    tile sum;
    form(left_.data() + p * rank_ * tile_rows, right_.data() + q * rank_ * width, rank_, sum);
    const index_t rows = std::min<index_t>(tile_rows, rows_ - p * tile_rows);
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) {
      if (i >= rows) break;
      Acc values[width];
      spill(sum[i][0], sum[i][1], values);
      sink.part(mine, p * tile_rows + i, q * width, std::min(width, cols_ - q * width), values);
    }
  }

 public:
  /// A row of a tile in the order of its columns. By value: a reference would keep the whole tile in memory.
  static void spill(vector first, vector second, Acc* delta) {
    Acc values[width];
    simd<Acc>::store(values, first);
    simd<Acc>::store(values + width / 2, second);
    for (index_t j = 0; j < width; ++j) delta[j] = values[lane_of<static_cast<int>(width)>(j)];
  }

 private:
  index_t rank_, rows_, cols_;
  array<Acc> left_, right_;
};

/// destination = round(source - less), element by element, once, or nothing but the tally; `step` is the distance of the
/// elements. Where less is +0 the source keeps its bits: by the arithmetic (unless the process flushes subnormals), but for
/// a signaling NaN, whose bits are kept by hand.
template <bool Store, class Acc, class T>
void subtract_and_round(tally& seen, const T* source, T* destination, const Acc* less, index_t count, index_t step = 1) {
  std::size_t became = 0, nonfinite = 0;
  for (index_t j = 0; j < count; ++j) {
    const T before = source[j * step];
    T after = narrow<T>(widen<Acc>(before) - less[j]);
    if (less[j] == Acc(0) && !is_finite(before)) std::memcpy(&after, source + j * step, sizeof(T));
    if constexpr (Store) destination[j * step] = after;
    const bool bad = !is_finite(after);
    nonfinite += bad;
    became += bad && is_finite(before);
  }
  seen.nonfinite += nonfinite;
  seen.became_nonfinite += became;
}

/// Whether a tile's sums are taken from a weight of T and rounded in registers.
template <class Acc, class T>
inline constexpr bool rounds_in_registers = std::is_same_v<Acc, T> || (std::is_same_v<Acc, float> && sizeof(T) == 2);

/// Two vectors of a row of a weight, widened; of bfloat16 the even and the odd elements.
template <class Acc, class T>
LORA_DETAIL_INLINE void load_row(const T* source, typename simd<Acc>::vector (&row)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    row[0] = simd<Acc>::load_even(source);
    row[1] = simd<Acc>::load_odd(source);
  } else {
    read_panel<false, 1, 2, Acc>(source, 0, row);
  }
}
/// The reverse: rounds them in place, once, and sees whether all stayed finite. Two vectors of 16-bit elements become one.
template <class T, class Watch, class Vector>
LORA_DETAIL_INLINE void round_row(Vector& first, Vector& second, Watch& watch) {
  using v = typename Watch::vectors;
  if constexpr (sizeof(T) == 2) {
    const Vector rounded = std::is_same_v<T, bfloat16> ? v::join_pairs(first, second) : v::join_halves(first, second);
    watch.see(first, second, rounded);
    first = rounded;
  } else {
    as_it_came(first);
    as_it_came(second);
    watch.see(first, second);
  }
}
/// What round_row made.
template <class Acc, class T>
LORA_DETAIL_INLINE void store_row(T* destination, typename simd<Acc>::vector first, typename simd<Acc>::vector second,
                                  bool past_caches) {
  using v = simd<Acc>;
  if constexpr (sizeof(T) == 2) {
    store_bits(destination, first);
  } else if (past_caches) {
    v::stream(destination, first);
    v::stream(destination + v::width, second);
  } else {
    v::store(destination, first);
    v::store(destination + v::width, second);
  }
}

/// The order of columns in which a weight of T that is row by row in memory is rounded.
template <class Acc, class T>
inline constexpr columns columns_of =
    std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16> ? columns::even_then_odd : columns::in_order;

/// Where the rounded weight goes: over its source, into another matrix, or nowhere, for the tally alone.
enum class writing { in_place, elsewhere, nowhere };

/// Sink: destination := round(source - sums), of one shape.
template <class Update, class Acc, class S, storage_order Order, writing Where>
class rounding_sink {
 public:
  using T = storage_t<S>;
  static constexpr bool down = false, takes_tiles = rounds_in_registers<Acc, T>;

  explicit rounding_sink(const matrix_view<S, Order>& weight)
    requires(Where != writing::elsewhere)
      : rounding_sink(weight, weight, false) {}
  rounding_sink(const matrix_view<const S, Order>& source, const matrix_view<S, Order>& destination)
    requires(Where == writing::elsewhere)
      : rounding_sink(
            source, destination,
            std::is_same_v<T, Acc> && is_aligned(destination.data()) &&
                destination.outer_stride() * static_cast<index_t>(sizeof(T)) % static_cast<index_t>(memory_alignment) == 0) {
  }

  /// A tile of the two weights; in place there is one, which takes half of the addresses.
  struct place {
    const T* from;
    T* to;
    index_t from_stride, to_stride;
    bool past_caches;

    const T* source(int i) const { return (Where == writing::in_place ? to : from) + i * from_stride; }
    T* destination(int i) const { return to + i * (Where == writing::in_place ? from_stride : to_stride); }
    void next() {
      from += Update::width;
      to += Update::width;
    }
    void fetch() const {
      constexpr index_t ahead = 4 * Update::width;
      for (int i = 0; i < tile_rows; ++i)
        prefetch_at<Update::width* static_cast<int>(sizeof(T))>(source(0),
                                                                (i * from_stride + ahead) * static_cast<index_t>(sizeof(T)));
    }
    /// In registers until all of it is known to be finite. All rows are read before the first is written: where rows lie a
    /// multiple of 4 KiB apart a read would wait for the write.
    LORA_DETAIL_INLINE bool plain(typename Update::tile& sum) const {
      watch<Acc, T> seen;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        typename simd<Acc>::vector w[2];
        load_row<Acc>(source(i), w);
        sum[i][0] = simd<Acc>::subtract(w[0], sum[i][0]);
        sum[i][1] = simd<Acc>::subtract(w[1], sum[i][1]);
        round_row<T>(sum[i][0], sum[i][1], seen);
      }
      if (!seen.all_finite()) return false;
      LORA_DETAIL_UNROLL
      for (int i = 0; Where != writing::nowhere && i < tile_rows; ++i)
        store_row<Acc>(destination(i), sum[i][0], sum[i][1], Where == writing::elsewhere && past_caches);
      return true;
    }
  };
  place at(index_t row, index_t col) const {
    place there = origin_;
    there.from += row * origin_.from_stride + col;
    there.to += row * origin_.to_stride + col;
    return there;
  }
  void part(tally& seen, index_t row, index_t col, index_t count, const Acc* less) const {
    const place there = at(row, col);
    subtract_and_round<Where != writing::nowhere>(seen, there.from, there.to, less, count);
  }
  void done() const {
    if (origin_.past_caches) finish_streaming();
  }

 private:
  rounding_sink(const matrix_view<const S, Order>& source, const matrix_view<S, Order>& destination, bool past_caches)
      : origin_{reinterpret_cast<const T*>(source.data()), reinterpret_cast<T*>(destination.data()), source.outer_stride(),
                destination.outer_stride(), past_caches} {}
  static bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % memory_alignment == 0; }

  place origin_;
};

/// Sink: the same for a weight in panels (see packed_weight.hpp); rows are in_features, columns out_features.
template <class Update, class Acc, class T, bool Store = true>
class panel_sink {
 public:
  static constexpr index_t width = tile_cols<accumulator_t<T>>;
  static constexpr bool down = true, takes_tiles = rounds_in_registers<Acc, T> && tile_cols<Acc> == width;

  panel_sink(const T* source, T* destination, index_t in_features)
      : origin_{source, destination, Store && source != destination && std::is_same_v<T, Acc>},
        panel_(panel_size<T>(in_features, width)) {}

  /// A tile of the two weights, one behind the other in memory.
  struct place {
    const T* from;
    T* to;
    bool past_caches;

    static constexpr index_t size = tile_rows * width;
    void next() {
      from += size;
      to += size;
    }
    void fetch() const {
      constexpr index_t ahead = 2048;
      prefetch_at<size* static_cast<index_t>(sizeof(T))>(from, ahead);
    }
    LORA_DETAIL_INLINE bool plain(typename Update::tile& sum) const {
      constexpr int group = depth_group<T>;  // of bfloat16 two rows of the tile lie together, a pair in each lane
      watch<Acc, T> seen;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        typename simd<Acc>::vector w[2];
        if (i % group == 0)
          read_panel<false, 1, 2, Acc>(from + i * width, 0, w);
        else
          read_panel<true, 1, 2, Acc>(from + (i - 1) * width, 0, w);
        sum[i][0] = simd<Acc>::subtract(w[0], sum[i][0]);
        sum[i][1] = simd<Acc>::subtract(w[1], sum[i][1]);
        if constexpr (group == 1) {
          round_row<T>(sum[i][0], sum[i][1], seen);
        } else if (i % group != 0) {
          round_row<T>(sum[i - 1][0], sum[i][0], seen);
          round_row<T>(sum[i - 1][1], sum[i][1], seen);
        }
      }
      if (!seen.all_finite()) return false;
      LORA_DETAIL_UNROLL
      for (int i = 0; Store && i < tile_rows; i += group) {
        store_row<Acc>(to + i * width, sum[i][0], sum[i][1], past_caches);
        if constexpr (group == 2) store_bits(to + (i + 1) * width, sum[i][1]);
      }
      return true;
    }
  };
  /// The accumulator's tile may be narrower than a panel; it never straddles two.
  place at(index_t row, index_t col) const {
    const index_t first = col / width * panel_ + panel_offset<T>(col % width, row, width);
    return {origin_.from + first, origin_.to + first, origin_.past_caches};
  }
  void part(tally& seen, index_t row, index_t col, index_t count, const Acc* less) const {
    const place there = at(row, col);
    subtract_and_round<Store>(seen, there.from, there.to, less, count, depth_group<T>);
  }
  void done() const {
    if (origin_.past_caches) finish_streaming();
  }

 private:
  place origin_;
  index_t panel_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
