// SPDX-License-Identifier: Apache-2.0
//
// Rows of sum of s * lora_B * lora_A, for adapters whose formats are known at run time. The factors
// are packed once; then any thread may ask for any block of rows, and gets the bits of the whole.
#pragma once

#include <span>
#include <vector>

#include "lora/detail/sinks.hpp"
#include "lora/detail/update.hpp"
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

/// Sink: the delta itself, row by row of the update.
template <class Update, class Acc>
class delta_sink {
 public:
  using value_type = Acc;
  static constexpr bool down = false, takes_tiles = true, writes = true;

  delta_sink(Acc* destination, index_t stride) : origin_{destination, stride} {}

  struct place {
    Acc* to;
    index_t stride;

    void next() { to += Update::width; }
    void fetch() const {}
    LORA_DETAIL_INLINE bool plain(const typename Update::tile& delta, tally&) const {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) Update::spill(delta[i][0], delta[i][1], to + i * stride);
      return true;
    }
  };
  place at(index_t row, index_t col) const { return {origin_.to + row * origin_.stride + col, origin_.stride}; }
  void part(tally&, index_t row, index_t col, index_t count, const Acc* delta) const {
    std::copy_n(delta, count, at(row, col).to);
  }
  void done() const {}

 private:
  place origin_;
};

/// Sink: rows of accumulators, from which the sums are subtracted.
template <class Update, class Acc>
class subtracting_sink {
 public:
  using value_type = Acc;
  static constexpr bool down = false, takes_tiles = true, writes = true;

  subtracting_sink(Acc* rows, index_t stride) : origin_{rows, stride} {}

  struct place {
    Acc* to;
    index_t stride;

    void next() { to += Update::width; }
    void fetch() const {}
    LORA_DETAIL_INLINE bool plain(const typename Update::tile& sum, tally&) const {
      using v = simd<Acc>;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        Acc* const row = to + i * stride;
        v::store(row, v::subtract(v::load(row), sum[i][0]));
        v::store(row + v::width, v::subtract(v::load(row + v::width), sum[i][1]));
      }
      return true;
    }
  };
  place at(index_t row, index_t col) const { return {origin_.to + row * origin_.stride + col, origin_.stride}; }
  void part(tally&, index_t row, index_t col, index_t count, const Acc* less) const {
    Acc* const to = at(row, col).to;
    for (index_t j = 0; j < count; ++j) to[j] -= less[j];
  }
  void done() const {}

 private:
  place origin_;
};

/// sign * (sum of the deltas), out_features x in_features, by rows. Owns the packed factors.
template <class Acc>
class delta_rows {
  using update = rank_update<Acc, storage_order::row_major, columns::in_order, has_dots<Acc, bfloat16>>;

 public:
  /// Throws shape_error, value_error, std::bad_alloc as every verb.
  delta_rows(const char* operation, std::span<const low_rank_step> list, index_t out_features, index_t in_features, double sign)
      : update_(space_, operation, each_low_rank(list), out_features, in_features, sign) {}
  template <class Each>
  delta_rows(const char* operation, const Each& each, index_t out_features, index_t in_features, double sign)
      : update_(space_, operation, each, out_features, in_features, sign) {}
  delta_rows(const delta_rows&) = delete;
  delta_rows& operator=(const delta_rows&) = delete;

  index_t rank() const { return update_.rank(); }

  /// Rows first ... first + count - 1 to `to`, `stride` elements apart. On the calling thread.
  void write(index_t first, index_t count, Acc* to, index_t stride) const {
    tally none;
    update_.run_here(delta_sink<update, Acc>(to, stride), rows(first, count), none);
  }
  /// The same rows subtracted from `from`.
  void subtract(index_t first, index_t count, Acc* from, index_t stride) const {
    tally none;
    update_.run_here(subtracting_sink<update, Acc>(from, stride), rows(first, count), none);
  }

 private:
  window rows(index_t first, index_t count) const { return {first, first + count, 0, update_.cols()}; }

  workspace space_;
  update update_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
