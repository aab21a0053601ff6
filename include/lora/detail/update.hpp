// SPDX-License-Identifier: Apache-2.0
//
// The tiled rank-R update: the one place where delta weights are formed. All adapters of a call are stacked to
// R = sum of ranks; each element of the delta is one chain of R multiply-adds in float (double if any operand is double),
// starting at zero, and whoever called adds the weight last and rounds once. Nothing of the size of W is allocated.
#pragma once

#include <algorithm>
#include <vector>

#include "lora/detail/operands.hpp"
#include "lora/detail/panels.hpp"
#include "lora/detail/parallel.hpp"
#include "lora/detail/tile.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// What a pass over the weight saw.
struct tally {
  std::size_t became_nonfinite = 0;  ///< finite before, infinite or NaN after
  std::size_t nonfinite = 0;         ///< infinite or NaN after
};

/// The stacked factors of a sum of adapters, packed for a weight of one storage order. A column-major weight is handled as
/// its row-major transpose, with the factors' parts exchanged; products commute, so that the bits do not depend on it.
template <class Acc, storage_order Order>
class rank_update {
 public:
  /// Checks and packs sign * (each adapter). Everything that can throw happens here.
  template <class Each>
  rank_update(const char* operation, const Each& each, index_t out_features, index_t in_features, double sign)
      : rank_(checked_total_rank(operation, each, out_features, in_features)) {
    constexpr bool row_major = Order == storage_order::row_major;
    if (rank_ == 0) return;
    rows_ = panels<Acc>(row_major ? out_features : in_features, rank_, tile_rows);
    cols_ = panels<Acc>(row_major ? in_features : out_features, rank_, tile_cols<Acc>);
    const panels<Acc>& from_B = row_major ? rows_ : cols_;
    const panels<Acc>& from_A = row_major ? cols_ : rows_;
    index_t first = 0;
    each([&](const auto& l) {
      if (!is_read(l)) return;
      const auto& lora_A = l.lora_A();
      const auto& lora_B = l.lora_B();
      from_B.put(0, first, as_matrix(lora_B), sign * static_cast<double>(l.scaling()));
      from_A.put(0, first, as_matrix(lora_A).transpose(), 1.0);
      first += static_cast<index_t>(l.rank());
    });
  }

  index_t rank() const { return rank_; }

  /// finish(tally, row, first column, count, delta) for every tile row of the weight (its transpose if column-major), on
  /// any thread; returns the sum of the tallies. finish must not throw.
  template <class Finish>
  tally run(const Finish& finish) const {
    const int threads =
        threads_for(static_cast<double>(rows_.outer()) * static_cast<double>(cols_.outer()) * static_cast<double>(rank_));
    std::vector<tally> seen(static_cast<std::size_t>(threads));
    // One task is a strip of tiles one tile high: a panel of rows against some panels of columns.
    constexpr index_t strip = 16;
    const index_t strips = panels_of(cols_.count(), strip);
    parallel(threads, [&](const team& team) {
      tally mine;
      team.for_each(rows_.count() * strips, [&](index_t task) {
        const index_t first = task % strips * strip;
        for (index_t q = first; q < std::min(first + strip, cols_.count()); ++q) tile(task / strips, q, mine, finish);
      });
      seen[static_cast<std::size_t>(team.thread())] = mine;
    });
    tally sum;
    for (const tally& t : seen) {
      sum.became_nonfinite += t.became_nonfinite;
      sum.nonfinite += t.nonfinite;
    }
    return sum;
  }

 private:
  template <class Finish>
  void tile(index_t p, index_t q, tally& mine, const Finish& finish) const {
    constexpr index_t width = tile_cols<Acc>;
    alignas(64) Acc delta[tile_rows * width] = {};
    const auto rows = static_cast<int>(std::min<index_t>(tile_rows, rows_.outer() - p * tile_rows));
    multiply(rows, delta, rows_.panel(p), cols_.panel(q), rank_);
    const index_t columns = std::min(width, cols_.outer() - q * width);
    for (int i = 0; i < rows; ++i) finish(mine, p * tile_rows + i, q * width, columns, delta + i * width);
  }

  index_t rank_;
  panels<Acc> rows_, cols_;
};

/// destination = round(source + delta), element by element, once. An element whose delta is zero keeps its bits.
template <class Acc, class T>
void add_and_round(tally& seen, const T* source, T* destination, const Acc* delta, index_t count) {
  std::size_t became = 0, nonfinite = 0;
  for (index_t j = 0; j < count; ++j) {
    const T before = source[j];
    const T after = delta[j] == Acc(0) ? before : narrow<T>(widen<Acc>(before) + delta[j]);
    destination[j] = after;
    const bool bad = !is_finite(after);
    nonfinite += bad;
    became += bad && is_finite(before);
  }
  seen.nonfinite += nonfinite;
  seen.became_nonfinite += became;
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
