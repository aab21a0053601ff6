// SPDX-License-Identifier: Apache-2.0
//
// The tiled rank-R update: the one place where delta weights are formed. All adapters of a call are
// stacked to R = sum of ranks; each element of the delta is one chain of R multiply-adds in float
// (double if any operand is double), starting at zero, in registers; where a build has dot products
// of bfloat16, most adapters whose factors are bfloat16 have a chain of their own (uses_dots in
// stacked_factors.hpp), of which the element takes s times the sum. To merge, the update is packed, or
// scaled, negated; a sink (tile_sinks.hpp) subtracts it from the weight and rounds once. Nothing of the
// size of W is allocated and W is streamed once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lora/detail/operands.hpp"
#include "lora/kernel/merge/stacked_factors.hpp"
#include "lora/kernel/merge/tile_sink.hpp"
#include "lora/kernel/overflow_watch.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/threads.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Rows first_row ... end_row - 1 and columns first_col ... end_col - 1 of an update.
struct window {
  index_t first_row, end_row, first_col, end_col;

  index_t rows() const { return end_row - first_row; }
  index_t cols() const { return end_col - first_col; }
};

/// The sign of an update by what it is for: the sinks that round subtract it from the weight
/// (delta_weight packs +1 and keeps it). A sum of products that begins at +0 is never -0, unless a
/// product underflows, and W - (+0) is W for every W, where W + (+0) would turn -0 into +0.
inline constexpr double merging = -1.0, unmerging = 1.0;

/// The delta of a sum of adapters, to be told tile by tile to a weight of one storage order. A
/// column-major weight is handled as its row-major transpose, with the factors' parts exchanged;
/// products commute, so that the bits do not depend on it. Dots: whether an adapter may be
/// multiplied by dot products (may_use_dots).
template <class Acc, storage_order Order, columns Columns, bool Dots>
class rank_update {
 public:
  using vector = typename simd<Acc>::vector;
  using factors = stack<Acc, Columns>;
  static constexpr index_t width = factors::width;
  /// A tile of the sums in registers.
  using tile = vector[tile_rows][2];

  /// Checks and packs sign * (each adapter) in the workspace, which must outlive this. Everything
  /// that can throw happens here.
  template <class Each>
  rank_update(workspace& space, const char* operation, const Each& each, index_t out_features,
              index_t in_features, double sign)
      : rank_(checked_total_rank(operation, each, out_features, in_features)),
        rows_(is_row_major ? out_features : in_features),
        cols_(is_row_major ? in_features : out_features),
        factors_(space, rows_, cols_, extent_of(each)) {
    each([&](const auto& l) {
      if (!is_read(l)) return;
      const auto& lora_A = l.lora_A();
      const auto& lora_B = l.lora_B();
      const auto a = as_matrix(lora_A).transpose();
      const auto b = as_matrix(lora_B);
      const double s = sign * static_cast<double>(l.scaling());
      if constexpr (is_row_major)
        factors_.add(b, a, s, 1.0, uses_dots<Acc>(l));
      else
        factors_.add(a, b, 1.0, s, uses_dots<Acc>(l));
    });
  }

  index_t rank() const { return rank_; }
  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }

  /// Gives every tile of the sums to the sink (see tile_sink.hpp), on any thread. Rows and columns
  /// are those of the transpose if column-major. Returns the sum of the tallies.
  template <tile_sink<Acc, tile> Sink>
  tally run(const Sink& sink) const {
    return run(sink, {0, rows_, 0, cols_});
  }
  /// The same for a window of the update, whose first row and column are the sink's row and column
  /// 0.
  template <tile_sink<Acc, tile> Sink>
  tally run(const Sink& sink, const window& part) const {
    if (part.rows() == 0 || part.cols() == 0) return {};
    const int threads = threads_for(static_cast<double>(part.rows()) *
                                    static_cast<double>(part.cols()) * static_cast<double>(rank_));
    const grid cut = cut_for<Sink>(part);
    const bool small = is_small<Sink>();
    std::atomic<std::size_t> became_nonfinite{0}, nonfinite{0}, changed{0};
    parallel(threads, [&](const team& team) {
      tally mine;
      team.for_each(cut.tasks(),
                    [&](index_t task) { run_task(sink, part, cut, task, small, mine); });
      sink.finish();
      became_nonfinite += mine.became_nonfinite;
      nonfinite += mine.nonfinite;
      changed += mine.changed;
    });
    return {became_nonfinite, nonfinite, changed};
  }
  /// The same on the calling thread.
  template <tile_sink<Acc, tile> Sink>
  void run_here(const Sink& sink, const window& part, tally& seen) const {
    if (part.rows() == 0 || part.cols() == 0) return;
    const grid cut = cut_for<Sink>(part);
    const bool small = is_small<Sink>();
    for (index_t task = 0; task < cut.tasks(); ++task) run_task(sink, part, cut, task, small, seen);
    sink.finish();
  }

 private:
  static constexpr bool is_row_major = Order == storage_order::row_major;
  template <class Sink>
  static constexpr bool checks_first =
      Sink::takes_tiles && checks_weight_first<Acc, typename Sink::value_type>;

  /// f(true_type) or f(false_type): whether some of the sums are formed by dot products.
  template <class F>
  void by_way(const F& f) const {
    if constexpr (Dots) {
      if (factors_.multiplies_by_dots()) return f(std::true_type{});
    }
    f(std::false_type{});
  }
  /// The panels of a window: `across` bands, cut into strips of `strip` panels along them.
  struct grid {
    index_t first_row, first_col;  ///< panels
    index_t across, along, strip;
    index_t tasks() const { return across * pieces(along, strip); }
  };
  template <class Sink>
  grid cut_for(const window& part) const {
    const index_t p = part.first_row / tile_rows, q = part.first_col / width;
    const index_t rows = pieces(part.end_row, tile_rows) - p,
                  cols = pieces(part.end_col, width) - q;
    const index_t along = Sink::bands_down ? rows : cols;
    return {p, q, Sink::bands_down ? cols : rows, along,
            panels_in_strip(along, Sink::bands_down ? tile_rows : width)};
  }
  template <class Sink>
  bool is_small() const {
    if constexpr (checks_first<Sink>)
      return factors_.is_below(safe_delta<typename Sink::value_type>);
    else
      return false;
  }
  template <class Sink>
  void run_task(const Sink& sink, const window& part, const grid& cut, index_t task, bool small,
                tally& mine) const {
    const index_t fixed = task % cut.across, first = task / cut.across * cut.strip;
    const index_t p = cut.first_row + (Sink::bands_down ? first : fixed),
                  q = cut.first_col + (Sink::bands_down ? fixed : first);
    const index_t count = std::min(cut.strip, cut.along - first);
    by_way([&](auto dots) { band<dots()>(sink, part, p, q, count, small, mine); });
  }
  index_t panels_in_strip(index_t panels, index_t panel_width) const {
    const index_t panel_bytes =
        std::max<index_t>(1, factors_.steps()) * panel_width * static_cast<index_t>(sizeof(Acc));
    // Strips of one length: threads share their number.
    return pieces(panels, pieces(panels, std::max<index_t>(8, tuned.strip_bytes / panel_bytes)));
  }

  template <class Each>
  static stack_extent extent_of(const Each& each) {
    stack_extent all;
    each([&](const auto& l) {
      if (is_read(l)) all.add(static_cast<index_t>(l.rank()), uses_dots<Acc>(l));
    });
    return all;
  }

  /// `count` tiles from row panel p and column panel q on. All that the loop needs is in locals: a
  /// store of a vector may alias whatever lies in an object. A function of its own, where nothing
  /// else wants the registers.
  template <bool ByDots, class Sink>
  LORA_DETAIL_APART void band(const Sink& sink, const window& part, index_t p, index_t q,
                              index_t count, bool small, tally& mine) const {
    // A window may begin inside a tile: such tiles are at its edge, too.
    if (count > 0 &&
        (Sink::bands_down ? p * tile_rows < part.first_row : q * width < part.first_col)) {
      store_by_rows(sink, part, p, q, mine);
      ++(Sink::bands_down ? p : q);
      if (--count == 0) return;
    }
    const bool cut_across =
        Sink::bands_down ? q * width < part.first_col : p * tile_rows < part.first_row;
    const index_t whole_rows = cut_across ? 0 : part.end_row / tile_rows,
                  whole_cols = part.end_col / width;
    const factors all = factors_;
    const Acc *left = all.left(p), *right = all.right(q);
    auto place = sink.at(std::max<index_t>(0, p * tile_rows - part.first_row),
                         std::max<index_t>(0, q * width - part.first_col));
    lookahead_in_shares next(
        Sink::bands_down ? all.right(q + 1) : all.left(p + 1),
        all.steps() * (Sink::bands_down ? width : tile_rows) * static_cast<index_t>(sizeof(Acc)),
        count);
    typename Sink::counter changed;
    for (; count > 0; --count) {
      next.advance();
      bool written = false;
      if constexpr (Sink::takes_tiles) {
        if (p < whole_rows && q < whole_cols) {
          place.fetch();
          if constexpr (checks_first<Sink>) written = small && place.is_safe();
          if (Sink::writes ||
              !written) {  // what only counts has nothing more to see in a safe tile
            tile sum;
            form<ByDots>(all, left, right, sum);
            if constexpr (checks_first<Sink>) {
              if (written) place.store_safe(sum, changed);
            }
            if (!written) written = place.store_checked(sum, changed);
          }
          place.next();
        }
      }
      if (!written) store_by_rows(sink, part, p, q, mine);
      if constexpr (Sink::bands_down) {
        ++p;
        left += all.steps() * tile_rows;
      } else {
        ++q;
        right += all.steps() * width;
      }
    }
    mine.changed += changed.count();
  }

  /// A tile of the sums, from zero.
  template <bool ByDots>
  LORA_DETAIL_INLINE static void form(const factors& all, const Acc* left, const Acc* right,
                                      tile& sum) {
    if constexpr (ByDots) {
      if (!all.mixes()) return form_by_dots(all, left, right, sum);
      Acc chain[tile_rows * width] = {};
      form_mixed(all, left, right, chain);
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        sum[i][0] = simd<Acc>::load(chain + i * width);
        sum[i][1] = simd<Acc>::load(chain + i * width + width / 2);
      }
    } else {
      clear(sum);
      advance<mul_add<Acc>, false, false>(sum, left, tile_rows, right, 0, all.steps());
    }
  }
  LORA_DETAIL_INLINE static void clear(tile& sum) {
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) sum[i][0] = sum[i][1] = simd<Acc>::zero();
  }
  LORA_DETAIL_INLINE static void form_by_dots(const factors& all, const Acc* left, const Acc* right,
                                              tile& sum) {
    clear(sum);
    advance<dot2<Acc>, false, false>(sum, left, tile_rows, reinterpret_cast<const bfloat16*>(right),
                                     0, 2 * all.steps());
    const vector scale = simd<Acc>::broadcast(all.begin()->scale);
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) {
      // Plus zero, so that no sum is -0 unless it underflows.
      sum[i][0] = simd<Acc>::multiply_add(scale, sum[i][0], simd<Acc>::zero());
      sum[i][1] = simd<Acc>::multiply_add(scale, sum[i][1], simd<Acc>::zero());
    }
  }
  /// The chain stays in memory while a segment has one of its own. (Of floats and not of a tile:
  /// clang keeps in memory what it once handed on.)
  LORA_DETAIL_APART static void form_mixed(const factors& all, const Acc* left, const Acc* right,
                                           Acc* chain) {
    for (const segment& s : all) {
      if (s.dots) {
        Acc own[tile_rows * width] = {};
        multiply_rows<dot2<Acc>, false, tile_rows, 2, true>(tile_job<Acc, bfloat16>{
            own, width, left, tile_rows, reinterpret_cast<const bfloat16*>(right), 0, 2 * s.steps});
        const vector scale = simd<Acc>::broadcast(s.scale);
        for (index_t k = 0; k < tile_rows * width; k += width / 2)
          simd<Acc>::store(chain + k, simd<Acc>::multiply_add(scale, simd<Acc>::load(own + k),
                                                              simd<Acc>::load(chain + k)));
      } else {
        multiply_rows<mul_add<Acc>, false, tile_rows, 2, true>(
            tile_job<Acc, Acc>{chain, width, left, tile_rows, right, 0, s.steps});
      }
      left += s.steps * tile_rows;
      right += s.steps * width;
    }
  }

  /// A tile at the edge, or one that the sink did not take: formed again, and told row by row.
  template <class Sink>
  LORA_DETAIL_APART void store_by_rows(const Sink& sink, const window& part, index_t p, index_t q,
                                       tally& mine) const {
    tile sum;
    by_way([&](auto dots) { form<dots()>(factors_, factors_.left(p), factors_.right(q), sum); });
    const index_t first_row = std::max(p * tile_rows, part.first_row),
                  end_row = std::min(p * tile_rows + tile_rows, part.end_row);
    const index_t first_col = std::max(q * width, part.first_col),
                  end_col = std::min(q * width + width, part.end_col);
    LORA_DETAIL_UNROLL
    for (int i = 0; i < tile_rows; ++i) {
      const index_t row = p * tile_rows + i;
      if (row < first_row || row >= end_row) continue;
      Acc values[width];
      spill(sum[i][0], sum[i][1], values);
      sink.store_sums(mine, row - part.first_row, first_col - part.first_col, end_col - first_col,
                      values + (first_col - q * width));
    }
  }

 public:
  /// A row of a tile in the order of its columns. By value: a reference would keep the whole tile
  /// in memory.
  static void spill(vector first, vector second, Acc* row) {
    Acc values[width];
    simd<Acc>::store(values, first);
    simd<Acc>::store(values + width / 2, second);
    for (index_t j = 0; j < width; ++j)
      row[j] = values[Columns == columns::even_then_odd ? j % 2 * (width / 2) + j / 2 : j];
  }

 private:
  index_t rank_, rows_, cols_;
  factors factors_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
