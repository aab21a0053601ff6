// SPDX-License-Identifier: Apache-2.0
//
// The factors of a sum of adapters, stacked to R = sum of ranks and packed for the register tile:
// what an update of a weight multiplies. All of it lies in a workspace.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include "lora/detail/operands.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/scratch.hpp"
#include "lora/kernel/threads.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The order of a tile's columns in its two vectors: as they are, or the even ones and then the odd
/// ones, which is how pairs of bfloat16 come apart.
enum class columns { in_order, even_then_odd };

/// Steps of the tile that are done in one way: multiply-adds continue the chain, with s in lora_B;
/// dot products of bfloat16 begin one of their own, of whose sum the chain takes `scale` times.
struct segment {
  index_t steps = 0;
  bool dots = false;
  float scale = 1;
};

template <class L>
inline constexpr bool has_bfloat16_factors = false;
template <low_rank L>
inline constexpr bool has_bfloat16_factors<L> =
    std::is_same_v<storage_t<factor_scalar_A<L>>, bfloat16> &&
    std::is_same_v<storage_t<factor_scalar_B<L>>, bfloat16>;
template <low_rank_range R>
inline constexpr bool has_bfloat16_factors<R> =
    has_bfloat16_factors<bare<decltype(*std::begin(std::declval<const R&>()))>>;

/// Whether the delta of one of some adapters may be formed by dot products.
template <class Acc, class... L>
inline constexpr bool may_use_dots =
    has_dots<Acc, bfloat16> && (has_bfloat16_factors<bare<L>> || ...);

/// Whether this adapter's is: both factors are bfloat16; there are ranks enough; and s is of a
/// usual size. Only where the sum of |s| |B| |A| is 2^120 or more could a partial sum overflow that
/// s would bring back, and the products and sums that dot products take for zero stay below 2^-110
/// after it (a subnormal factor counts as zero whatever it meets).
template <class Acc, class L>
bool uses_dots(const L& l) {
  if constexpr (may_use_dots<Acc, L>) {
    const double s = std::abs(static_cast<double>(l.scaling()));
    return static_cast<index_t>(l.rank()) >= least_rank_of_dots && s >= 0x1p-8 && s <= 0x1p16;
  } else {
    return false;
  }
}

/// The size of a stack.
struct stack_extent {
  index_t steps = 0, segments = 0;

  void add(index_t rank, bool dots) {
    steps += dots ? pieces(rank, 2) : rank;
    ++segments;
  }
};

/// rows x R times R x cols in panels: `left` of tile_rows rows, broadcast one by one, and `right`
/// of two vectors of columns.
template <class Acc, columns Columns>
class stack {
 public:
  static constexpr index_t width = tile_cols<Acc>;

  stack(workspace& space, index_t rows, index_t cols, const stack_extent& size)
      : rows_(rows), cols_(cols), steps_(size.steps) {
    layout l;
    const auto left = l.take<Acc>(row_panels() * steps_ * tile_rows),
               right = l.take<Acc>(col_panels() * steps_ * width);
    const auto list = l.take<segment>(size.segments);
    std::byte* const memory = space.require(l.size());
    left_ = left.in(memory);
    right_ = right.in(memory);
    segments_ = list.in(memory);
  }

  index_t row_panels() const { return pieces(rows_, tile_rows); }
  index_t col_panels() const { return pieces(cols_, width); }
  index_t steps() const { return steps_; }
  const Acc* left(index_t panel) const { return left_ + panel * steps_ * tile_rows; }
  const Acc* right(index_t panel) const { return right_ + panel * steps_ * width; }
  /// Several segments, of both ways or with chains of their own.
  bool mixes() const { return count_ > 1; }
  bool multiplies_by_dots() const { return mixes() || (count_ == 1 && segments_[0].dots); }
  /// Whether all sums, and the sums before they are multiplied by a scale, are smaller than the
  /// limit, or larger by what they round alone. By the bits: under -ffast-math a comparison with
  /// NaN may be true.
  bool is_below(float limit) const {
    if (std::max(most_left_, most_right_) >= infinity) return false;
    double all = 0;
    for (const segment& s : *this)
      all += static_cast<double>(s.steps) *
             (s.dots ? 2 * std::max(1.0, std::abs(static_cast<double>(s.scale))) : 1.0);
    const auto largest = [](std::uint32_t bits) {
      return static_cast<double>(std::bit_cast<float>(bits));
    };
    return all * largest(most_left_) * largest(most_right_) < static_cast<double>(limit);
  }
  const segment* begin() const { return segments_; }
  const segment* end() const { return segments_ + count_; }

  /// One more adapter: scale_left * scale_right * left * right, of rows x rank and cols x rank.
  /// Does not throw.
  template <class L, class R>
  void add(const L& left, const R& right, double scale_left, double scale_right, bool dots) {
    const index_t rank = left.cols();
    if (rank == 0) return;
    if constexpr (has_dots<Acc, storage_t<typename L::value_type>> &&
                  has_dots<Acc, storage_t<typename R::value_type>>) {
      if (dots) {
        put_all<bfloat16>(left, right, 1.0, 1.0);
        return append({pieces(rank, 2), true, static_cast<float>(scale_left * scale_right)});
      }
    }
    put_all<Acc>(left, right, scale_left, scale_right);
    append({rank, false, 1});
  }

 private:
  void append(const segment& next) {
    filled_ += next.steps;
    if (!next.dots && count_ > 0 && !segments_[count_ - 1].dots)
      segments_[count_ - 1].steps += next.steps;
    else
      segments_[count_++] = next;
  }

  /// On all threads where packing takes longer than to wake them: an element as long as some
  /// multiply-adds.
  template <class T, class L, class R>
  void put_all(const L& left, const R& right, double scale_left, double scale_right) {
    constexpr double multiply_adds_of_one = 8;
    const auto elements =
        static_cast<double>(left.rows() + right.rows()) * static_cast<double>(left.cols());
    std::atomic<std::uint32_t> most_left{most_left_}, most_right{most_right_};
    parallel(threads_for(multiply_adds_of_one * elements), [&](const team& team) {
      std::uint32_t mine_left = 0, mine_right = 0;
      team.for_each(row_panels(), [&](index_t p) {
        mine_left = std::max(mine_left, put<tile_rows, T>(left_, p, left, scale_left));
      });
      team.for_each(col_panels(), [&](index_t p) {
        mine_right = std::max(mine_right, put<width, T>(right_, p, right, scale_right));
      });
      raise_to(most_left, mine_left);
      raise_to(most_right, mine_right);
    });
    most_left_ = most_left;
    most_right_ = most_right;
  }
  static void raise_to(std::atomic<std::uint32_t>& most, std::uint32_t value) {
    std::uint32_t seen = most;
    while (seen < value && !most.compare_exchange_weak(seen, value)) {
    }
  }

  /// Packs a panel of scale * source (outer x rank) as T, behind what is there. The product is
  /// formed in double and rounded once. Returns the largest magnitude, as the bits of a float; 0
  /// where Acc is double, which nobody asks.
  template <int PanelWidth, class T, class V>
  std::uint32_t put(Acc* panels, index_t p, const V& source, double scale) const {
    Acc* const part = panels + (p * steps_ + filled_) * PanelWidth;
    const index_t first = p * PanelWidth, rank = source.cols();
    pack_padded(reinterpret_cast<T*>(part), PanelWidth,
                source.block(first, 0, std::min<index_t>(PanelWidth, source.rows() - first), rank));
    const index_t steps = pieces(rank, depth_group<T>), size = steps * PanelWidth;
    if constexpr (std::is_same_v<T, Acc>)
      if (scale != 1.0) multiply_by(scale, part, size);
    const std::uint32_t most = most_of<T>(part, size);
    if constexpr (Columns == columns::even_then_odd && PanelWidth == width)
      for (index_t k = 0; k < steps; ++k) even_then_odd(part + k * width);
    return most;
  }
  static void multiply_by(double scale, Acc* values, index_t count) {
    if (static_cast<double>(static_cast<Acc>(scale)) ==
        scale) {  // then its product in Acc rounds like that in double
      const Acc s = static_cast<Acc>(scale);
      for (index_t k = 0; k < count; ++k) values[k] *= s;
    } else {
      for (index_t k = 0; k < count; ++k)
        values[k] = static_cast<Acc>(scale * static_cast<double>(values[k]));
    }
  }
  /// The largest magnitude of floats, or of pairs of bfloat16, which become floats here; nothing of
  /// doubles. All NaN become one: the payload that a product keeps depends on which of its operands
  /// comes first, and the lower bits of others would be carried out of the exponent when floats are
  /// rounded to 16 bits in registers.
  template <class T>
  static std::uint32_t most_of(Acc* values, index_t count) {
    std::uint32_t most = 0;
    if constexpr (std::is_same_v<Acc, float>) {
      constexpr bool pairs = std::is_same_v<T, bfloat16>;
      each_word(values, count, [&](std::uint32_t word) {
        most = std::max(most, word & magnitude);
        if constexpr (pairs) most = std::max(most, word << 16 & magnitude);
        return word;
      });
      if (most > infinity)
        each_word(values, count, [](std::uint32_t word) {
          if constexpr (!pairs) return (word & magnitude) > infinity ? nan : word;
          if ((word & magnitude) >= infinity + 0x1'0000) word = nan | (word & 0xffff);
          if ((word << 16 & magnitude) > infinity) word = (word & 0xffff'0000) | nan >> 16;
          return word;
        });
    } else {
      for (index_t k = 0; k < count; ++k)
        if ((std::bit_cast<std::uint64_t>(values[k]) & ~std::uint64_t{0} >> 1) >
            0x7ff0'0000'0000'0000u)
          values[k] = std::numeric_limits<double>::quiet_NaN();
    }
    return most;
  }
  static constexpr std::uint32_t magnitude = 0x7fff'ffffu, infinity = 0x7f80'0000u,
                                 nan = 0x7fc0'0000u;
  /// By memcpy: pairs were written as bfloat16.
  template <class Change>
  static void each_word(Acc* values, index_t count, const Change& change) {
    for (index_t k = 0; k < count; ++k) {
      std::uint32_t word;
      std::memcpy(&word, values + k, sizeof word);
      word = change(word);
      std::memcpy(values + k, &word, sizeof word);
    }
  }
  static void even_then_odd(Acc* row) {
    Acc values[width];
    std::copy_n(row, width, values);
    for (index_t j = 0; j < width / 2; ++j) {
      row[j] = values[2 * j];
      row[width / 2 + j] = values[2 * j + 1];
    }
  }

  index_t rows_, cols_, steps_, filled_ = 0, count_ = 0;
  Acc *left_, *right_;
  segment* segments_;
  std::uint32_t most_left_ = 0, most_right_ = 0;  ///< largest magnitudes, as the bits of floats
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
