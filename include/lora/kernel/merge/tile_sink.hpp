// SPDX-License-Identifier: Apache-2.0
//
// tile_sink: what a merge does with the tiles of its delta. delta_tiles.hpp forms each tile in
// registers and gives it to a sink; tile_sinks.hpp has the sinks that round a weight.
//
// Tiles come in bands: along the rows of the weight, or down its columns. `place` walks along a
// band:
//
//   typename sink::counter counter;
//   auto place = sink.at(first row, first column);
//   for each tile of the band, if it lies inside the weight:
//     place.fetch();
//     if the sink checks the weight first, and place.is_safe():  form it; store_safe(tile, counter)
//     else:                                                      form it; store_checked(tile, counter)
//     place.next();
//   at the edges, and where store_checked says false:  sink.store_sums(tally, row, column, count,
//                                                      sums), row by row
//   tally.changed += counter.count(), at the end of the band
//   sink.finish(), on every thread
//
// None of these throws or allocates.
#pragma once

#include <concepts>
#include <cstddef>

#include "lora/concepts.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// What a pass over the weight saw.
struct tally {
  std::size_t became_nonfinite = 0;  ///< finite before, infinite or NaN after
  std::size_t nonfinite = 0;         ///< infinite or NaN after
  std::size_t changed = 0;           ///< other bits after than before

  tally& operator+=(const tally& other) {
    became_nonfinite += other.became_nonfinite;
    nonfinite += other.nonfinite;
    changed += other.changed;
    return *this;
  }
};

/// The counter of a sink that counts nothing.
struct no_changes {
  static std::size_t count() { return 0; }
};

/// Where a tile goes.
/// - next(): the next tile of the band.
/// - fetch(): may prefetch what a later tile reads.
/// - store_checked(sums, counter): stores the tile, and may overwrite the sums. False: nothing was
///   stored, because a result is not finite.
template <class P, class Tile, class Counter>
concept tile_place = requires(P place, const P& fixed, Tile& sums, Counter& seen) {
  place.next();
  fixed.fetch();
  { fixed.store_checked(sums, seen) } -> std::same_as<bool>;
};
/// A place that can decide from the weight alone that every result will be finite.
/// - is_safe(): asked before the tile is formed.
/// - store_safe(sums, counter): stores a tile that is.
template <class P, class Tile, class Counter>
concept checking_place =
    tile_place<P, Tile, Counter> && requires(const P& place, Tile& sums, Counter& seen) {
      { place.is_safe() } -> std::same_as<bool>;
      place.store_safe(sums, seen);
    };

/// - value_type: elements of the weight, or of what takes the place of one.
/// - counter: counts the elements that changed while a band is stored; no_changes where nobody
///   asks.
/// - bands_down: bands run down the columns.
/// - takes_tiles: whole tiles are stored from registers; else everything comes row by row.
/// - writes: false for a sink that only counts.
/// - store_sums(tally, row, first column, count, sums): stores `count` sums of one row.
template <class S, class Acc, class Tile>
concept tile_sink = requires(const S& sink, index_t k, tally& seen, const Acc* sums) {
  typename S::value_type;
  typename S::counter;
  { S::bands_down } -> std::convertible_to<bool>;
  { S::takes_tiles } -> std::convertible_to<bool>;
  { S::writes } -> std::convertible_to<bool>;
  { sink.at(k, k) } -> tile_place<Tile, typename S::counter>;
  sink.store_sums(seen, k, k, k, sums);
  sink.finish();
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
