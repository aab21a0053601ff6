// SPDX-License-Identifier: Apache-2.0
//
// Rows of sum of s * lora_B * lora_A, for adapters whose formats are known at run time. The factors
// are packed once; then any thread may ask for any block of rows, and gets the bits of the whole.
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "lora/kernel/merge/delta_tiles.hpp"
#include "lora/kernel/merge/tile_sinks.hpp"
#include "lora/steps.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// visit(adapter) for each low-rank step of a list, at its strength.
inline auto each_low_rank(std::span<const low_rank_step> list) {
  return [list](const auto& visit) {
    for (const low_rank_step& one : list)
      one.factors.visit([&]<class L>(const L& l) { visit(scaled_adapter<L>(one.strength, l)); });
  };
}

/// Low-rank steps of the same rows: what they add to one of these is one chain of multiply-adds.
struct rows_of_chain {
  row_range rows;
  std::vector<low_rank_step> steps;  ///< each cut to the rows
};
/// All rows of a weight in order, cut where a step begins or ends. The steps of a row keep their
/// order.
inline std::vector<rows_of_chain> cut_at_rows(std::span<const low_rank_step> list,
                                              index_t out_features) {
  const std::vector<index_t> cuts = ends_of(
      list, out_features, [&](const low_rank_step& one) { return one.rows.of(out_features); });
  std::vector<rows_of_chain> result;
  for (std::size_t k = 0; k + 1 < cuts.size(); ++k) {
    rows_of_chain chain{{cuts[k], cuts[k + 1] - cuts[k]}, {}};
    for (const low_rank_step& one : list) {
      const row_range rows = one.rows.of(out_features);
      if (rows.first <= cuts[k] && cuts[k] < rows.end())
        chain.steps.push_back(
            {one.factors.rows(cuts[k] - rows.first, chain.rows.count), one.strength});
    }
    result.push_back(std::move(chain));
  }
  return result;
}

inline memory_of_rows moved(const memory_of_rows& from, index_t row, index_t col) {
  return from.at == nullptr ? from
                            : memory_of_rows{from.at + row * from.row_bytes + col * from.col_bytes,
                                             from.row_bytes, from.col_bytes};
}
/// Fetches the rows of a tile of `cols` columns.
LORA_DETAIL_INLINE void fetch_tile(const memory_of_rows& from, index_t cols) {
  if (from.at == nullptr) return;
  for (index_t i = 0; i < tile_rows; ++i)
    for (index_t b = 0; b < cols * from.col_bytes; b += 64)
      prefetch_at<1>(from.at, i * from.row_bytes + b);
}

/// Sink: rows of accumulators, which become the sums, or from which the sums are subtracted. `next`
/// is what the pass will read soon, in the places of these rows: it is fetched tile by tile.
template <class Update, class Acc, bool Subtracts>
class row_sink {
 public:
  using value_type = Acc;
  using counter = no_changes;
  static constexpr bool bands_down = false, takes_tiles = true, writes = true;

  row_sink(Acc* rows, index_t stride, const memory_of_rows& next = {})
      : origin_{rows, stride, next} {}

  struct place {
    Acc* to;
    index_t stride;
    memory_of_rows ahead;

    void next() {
      to += Update::width;
      ahead = moved(ahead, 0, Update::width);
    }
    void fetch() const { fetch_tile(ahead, Update::width); }
    LORA_DETAIL_INLINE bool store_checked(const typename Update::tile& sum, no_changes&) const {
      using v = simd<Acc>;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        Acc* const row = to + i * stride;
        if constexpr (Subtracts) {
          v::store(row, v::subtract(v::load(row), sum[i][0]));
          v::store(row + v::width, v::subtract(v::load(row + v::width), sum[i][1]));
        } else {
          Update::spill(sum[i][0], sum[i][1], row);
        }
      }
      return true;
    }
  };
  place at(index_t row, index_t col) const {
    return {origin_.to + row * origin_.stride + col, origin_.stride,
            moved(origin_.ahead, row, col)};
  }
  void store_sums(tally&, index_t row, index_t col, index_t count, const Acc* sums) const {
    Acc* const to = origin_.to + row * origin_.stride + col;
    for (index_t j = 0; j < count; ++j) to[j] = Subtracts ? to[j] - sums[j] : sums[j];
  }
  void finish() const {}

 private:
  place origin_;
};

/// sign * (sum of the deltas), out_features x in_features, by rows. Owns the packed factors.
template <class Acc>
class delta_rows {
  using update =
      rank_update<Acc, storage_order::row_major, columns::in_order, has_dots<Acc, bfloat16>>;

 public:
  /// Throws shape_error, value_error, std::bad_alloc as every verb.
  delta_rows(const char* operation, std::span<const low_rank_step> list, index_t out_features,
             index_t in_features, double sign)
      : update_(space_, operation, each_low_rank(list), out_features, in_features, sign) {}
  template <class Each>
  delta_rows(const char* operation, const Each& each, index_t out_features, index_t in_features,
             double sign)
      : update_(space_, operation, each, out_features, in_features, sign) {}
  delta_rows(const delta_rows&) = delete;
  delta_rows& operator=(const delta_rows&) = delete;

  index_t rank() const { return update_.rank(); }

  /// Rows first ... first + count - 1 and columns first_col ... first_col + cols - 1 to `to`, rows
  /// `stride` elements apart. On the calling thread.
  void write(index_t first, index_t count, index_t first_col, index_t cols, Acc* to, index_t stride,
             const memory_of_rows& next = {}) const {
    tally none;
    update_.run_here(row_sink<update, Acc, false>(to, stride, next),
                     {first, first + count, first_col, first_col + cols}, none);
  }
  /// Whole rows.
  void write(index_t first, index_t count, Acc* to, index_t stride) const {
    write(first, count, 0, update_.cols(), to, stride);
  }
  /// The same part subtracted from `from`.
  void subtract(index_t first, index_t count, index_t first_col, index_t cols, Acc* from,
                index_t stride, const memory_of_rows& next = {}) const {
    tally none;
    update_.run_here(row_sink<update, Acc, true>(from, stride, next),
                     {first, first + count, first_col, first_col + cols}, none);
  }
  /// Whole rows.
  void subtract(index_t first, index_t count, Acc* from, index_t stride) const {
    subtract(first, count, 0, update_.cols(), from, stride);
  }

 private:
  workspace space_;
  update update_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
