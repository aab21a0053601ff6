// SPDX-License-Identifier: Apache-2.0
//
// Where the update goes: sinks that subtract its tiles from a weight in rows, columns or panels,
// round once and write, or only count what would become of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lora/detail/convert.hpp"
#include "lora/kernel/merge/delta_tiles.hpp"
#include "lora/kernel/merge/tile_change.hpp"
#include "lora/kernel/overflow_watch.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/tile.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// destination = round(change(source, sums, j)), element by element, once, or nothing but the
/// tally; `step` is the distance of the elements. Where a merge has the sum +0 the source keeps its
/// bits: by the arithmetic (unless the process flushes subnormals), but for a signaling NaN, whose
/// bits are kept by hand.
template <bool Store, class Acc, class T, class Change>
void change_and_round(tally& seen, const T* source, T* destination, const Acc* sums, index_t count,
                      index_t step, const Change& change) {
  tally mine;
  for (index_t j = 0; j < count; ++j) {
    const T before = source[j * step];
    const Acc result = change(widen<Acc>(before), sums[j], j);
    T after = narrow<T>(result);
    if (is_nan(before) && change.keeps_nan(sums[j], result))
      std::memcpy(&after, source + j * step, sizeof(T));
    const bool bad = !is_finite(after);
    mine.nonfinite += bad;
    mine.became_nonfinite += bad && is_finite(before);
    mine.changed += std::memcmp(&after, source + j * step, sizeof(T)) != 0;
    if constexpr (Store) destination[j * step] = after;
  }
  seen += mine;
}

/// Whether a tile's sums are taken from a weight of T and rounded in registers.
template <class Acc, class T>
inline constexpr bool rounds_in_registers =
    std::is_same_v<Acc, T> || (std::is_same_v<Acc, float> && sizeof(T) == 2);

/// Two vectors of a row of a weight, widened; of bfloat16 the even and the odd elements.
template <class Acc, class T>
LORA_DETAIL_INLINE void load_row(const T* source, typename simd<Acc>::vector (&row)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    row[0] = simd<Acc>::load_even(source);
    row[1] = simd<Acc>::load_odd(source);
  } else {
    read_panel<mul_add<Acc>, false, 1, 2, Acc>(source, 0, row);
  }
}
/// The reverse: rounds them in place, once, and sees whether all stayed finite. Two vectors of
/// 16-bit elements become one.
template <class T, class Watch, class Vector>
LORA_DETAIL_INLINE void round_row(Vector& first, Vector& second, Watch& watch) {
  using v = typename Watch::vectors;
  if constexpr (sizeof(T) == 2) {
    const Vector rounded =
        std::is_same_v<T, bfloat16> ? v::join_pairs(first, second) : v::join_halves(first, second);
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
LORA_DETAIL_INLINE void store_row(T* destination, typename simd<Acc>::vector first,
                                  typename simd<Acc>::vector second, bool past_caches) {
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

/// Counts the elements of a row that round_row made (or join_safe), against those in memory.
template <class Acc, class T>
LORA_DETAIL_INLINE void see_row(changed_lanes<T>& changed, const T* before,
                                typename simd<Acc>::vector first,
                                typename simd<Acc>::vector second) {
  changed.see(before, first);
  if constexpr (sizeof(T) != 2) changed.see(before + simd<Acc>::width, second);
}

/// The order of columns in which a weight of T that is row by row in memory is rounded.
template <class Acc, class T>
inline constexpr columns columns_of =
    std::is_same_v<Acc, float> && std::is_same_v<T, bfloat16> ? columns::even_then_odd
                                                              : columns::in_order;

/// Where the rounded weight goes: over its source, into another matrix, or nowhere, for the tally
/// alone.
enum class writing { in_place, elsewhere, nowhere };

/// Sink: destination := round(change(source, sums)), of one shape (see tile_change.hpp).
template <class Update, class Acc, class S, storage_order Order, writing Where,
          class Change = subtracted_sum<Acc>>
class rounding_sink {
 public:
  using T = storage_t<S>;
  using value_type = T;
  using counter = changed_count<T>;
  static constexpr bool bands_down = false, takes_tiles = rounds_in_registers<Acc, T>,
                        writes = Where != writing::nowhere;

  explicit rounding_sink(const matrix_view<S, Order>& weight, const Change& change = {})
    requires(Where != writing::elsewhere)
      : rounding_sink(weight, weight, false, change) {}
  rounding_sink(const matrix_view<const S, Order>& source, const matrix_view<S, Order>& destination)
    requires(Where == writing::elsewhere)
      : rounding_sink(source, destination,
                      std::is_same_v<T, Acc> && is_aligned(destination.data()) &&
                          destination.outer_stride() * static_cast<index_t>(sizeof(T)) %
                                  static_cast<index_t>(memory_alignment) ==
                              0) {}

  /// A tile of the two weights; in place there is one, which takes half of the addresses.
  struct place {
    const T* from;
    T* to;
    index_t from_stride, to_stride;
    bool past_caches;
    Change change;

    const T* source(int i) const {
      return (Where == writing::in_place ? to : from) + i * from_stride;
    }
    T* destination(int i) const {
      return to + i * (Where == writing::in_place ? from_stride : to_stride);
    }
    void next() {
      from += Update::width;
      to += Update::width;
      change.move(0, Update::width);
    }
    void fetch() const {
      constexpr index_t ahead = tuned.tiles_ahead * Update::width;
      for (int i = 0; i < tile_rows; ++i)
        prefetch_at<Update::width* static_cast<int>(sizeof(T))>(
            source(0), (i * from_stride + ahead) * static_cast<index_t>(sizeof(T)));
    }
    bool is_safe() const { return Change::safe && all_safe(source(0), from_stride); }
    /// Row i of the sums becomes that of the result.
    LORA_DETAIL_INLINE void change_row(typename Update::tile& sum, int i) const {
      typename simd<Acc>::vector w[2];
      load_row<Acc>(source(i), w);
      change(w, sum[i], i);
    }
    /// A row at once, which keeps fewer operations waiting for the last multiply-adds.
    LORA_DETAIL_INLINE void store_safe(typename Update::tile& sum, counter& counts) const {
      changed_lanes<T> changed;
      LORA_DETAIL_UNROLL
      for (int i = 0; writes && i < tile_rows; ++i) {
        change_row(sum, i);
        const auto joined = simd<Acc>::template join_safe<T>(sum[i][0], sum[i][1]);
        changed.see(source(i), joined);
        store_bits(destination(i), joined);
      }
      counts.add(changed);
    }
    /// In registers until all of it is known to be finite. All rows are read before the first is
    /// written: where rows lie a multiple of 4 KiB apart a read would wait for the write.
    LORA_DETAIL_INLINE bool store_checked(typename Update::tile& sum, counter& counts) const {
      watch<Acc, T> seen;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        change_row(sum, i);
        round_row<T>(sum[i][0], sum[i][1], seen);
      }
      if (!seen.all_finite()) return false;
      changed_lanes<T> changed;
      LORA_DETAIL_UNROLL
      for (int i = 0; writes && i < tile_rows; ++i) {
        see_row<Acc>(changed, source(i), sum[i][0], sum[i][1]);
        store_row<Acc>(destination(i), sum[i][0], sum[i][1],
                       Where == writing::elsewhere && past_caches);
      }
      counts.add(changed);
      return true;
    }
  };
  place at(index_t row, index_t col) const {
    place there = origin_;
    there.from += row * origin_.from_stride + col;
    there.to += row * origin_.to_stride + col;
    there.change.move(row, col);
    return there;
  }
  void store_sums(tally& seen, index_t row, index_t col, index_t count, const Acc* less) const {
    const place there = at(row, col);
    change_and_round<writes>(seen, there.from, there.to, less, count, 1, there.change);
  }
  void finish() const {
    if (origin_.past_caches) finish_streaming();
  }

 private:
  rounding_sink(const matrix_view<const S, Order>& source, const matrix_view<S, Order>& destination,
                bool past_caches, const Change& change = {})
      : origin_{reinterpret_cast<const T*>(source.data()),
                reinterpret_cast<T*>(destination.data()),
                source.outer_stride(),
                destination.outer_stride(),
                past_caches,
                change} {}
  static bool is_aligned(const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % memory_alignment == 0;
  }

  place origin_;
};

/// Sink: the same for a weight in panels (see packed_weight.hpp); rows are in_features, columns
/// out_features.
template <class Update, class Acc, class T, bool Store = true>
class panel_sink {
 public:
  using value_type = T;
  using counter = changed_count<T>;
  static constexpr index_t width = tile_cols<accumulator_t<T>>;
  static constexpr bool bands_down = true,
                        takes_tiles = rounds_in_registers<Acc, T> && tile_cols<Acc> == width,
                        writes = Store;

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
      prefetch_at<size* static_cast<index_t>(sizeof(T))>(from, panel_bytes_ahead);
    }
    bool is_safe() const { return all_safe(from, width); }
    /// Row i of the sums becomes that of the result. Of bfloat16 two rows lie together, a pair in
    /// each lane.
    static constexpr int group = depth_group<T>;
    LORA_DETAIL_INLINE void subtract_row(typename Update::tile& sum, int i) const {
      typename simd<Acc>::vector w[2];
      if (i % group == 0)
        read_panel<mul_add<Acc>, false, 1, 2, Acc>(from + i * width, 0, w);
      else
        read_panel<mul_add<Acc>, true, 1, 2, Acc>(from + (i - 1) * width, 0, w);
      sum[i][0] = simd<Acc>::subtract(w[0], sum[i][0]);
      sum[i][1] = simd<Acc>::subtract(w[1], sum[i][1]);
    }
    LORA_DETAIL_INLINE void store_safe(typename Update::tile& sum, counter& counts) const {
      changed_lanes<T> changed;
      const auto put = [&](int i, const auto& first, const auto& second) {
        const auto joined = simd<Acc>::template join_safe<T>(first, second);
        changed.see(from + i * width, joined);
        store_bits(to + i * width, joined);
      };
      LORA_DETAIL_UNROLL
      for (int i = 0; writes && i < tile_rows; ++i) {
        subtract_row(sum, i);
        if constexpr (group == 1) {
          put(i, sum[i][0], sum[i][1]);
        } else if (i % group != 0) {
          put(i - 1, sum[i - 1][0], sum[i][0]);
          put(i, sum[i - 1][1], sum[i][1]);
        }
      }
      counts.add(changed);
    }
    LORA_DETAIL_INLINE bool store_checked(typename Update::tile& sum, counter& counts) const {
      watch<Acc, T> seen;
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        subtract_row(sum, i);
        if constexpr (group == 1) {
          round_row<T>(sum[i][0], sum[i][1], seen);
        } else if (i % group != 0) {
          round_row<T>(sum[i - 1][0], sum[i][0], seen);
          round_row<T>(sum[i - 1][1], sum[i][1], seen);
        }
      }
      if (!seen.all_finite()) return false;
      changed_lanes<T> changed;
      LORA_DETAIL_UNROLL
      for (int i = 0; writes && i < tile_rows; i += group) {
        see_row<Acc>(changed, from + i * width, sum[i][0], sum[i][1]);
        store_row<Acc>(to + i * width, sum[i][0], sum[i][1], past_caches);
        if constexpr (group == 2) {
          changed.see(from + (i + 1) * width, sum[i][1]);
          store_bits(to + (i + 1) * width, sum[i][1]);
        }
      }
      counts.add(changed);
      return true;
    }
  };
  /// The accumulator's tile may be narrower than a panel; it never straddles two.
  place at(index_t row, index_t col) const {
    const index_t first = col / width * panel_ + panel_offset<T>(col % width, row, width);
    return {origin_.from + first, origin_.to + first, origin_.past_caches};
  }
  void store_sums(tally& seen, index_t row, index_t col, index_t count, const Acc* less) const {
    const place there = at(row, col);
    change_and_round<writes>(seen, there.from, there.to, less, count, depth_group<T>,
                             subtracted_sum<Acc>());
  }
  void finish() const {
    if (origin_.past_caches) finish_streaming();
  }

 private:
  place origin_;
  index_t panel_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
