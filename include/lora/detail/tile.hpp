// SPDX-License-Identifier: Apache-2.0
//
// The register tile: the one loop that multiplies. Each of its elements is one chain of multiply-adds in the order of the
// depth; an accumulator that is stored and loaded again between two calls continues the same chain, so how the depth is
// cut changes no bit. Merging runs it along the ranks, a product along in_features and then along the ranks.
//
// The left operand (activations, or the factor that is broadcast) lies as left[k * left_stride + i]; the right one in
// panels (see panels.hpp): at each depth the elements of tile_cols outputs side by side, bfloat16 in pairs of depths.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/memory.hpp"
#include "lora/detail/simd.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// How many panels, tiles or pairs hold `count` things.
constexpr index_t pieces(index_t count, index_t size) { return (count + size - 1) / size; }

/// Depths that lie together in a panel of T: bfloat16 comes in pairs, so that widening crosses no lane.
template <class T>
inline constexpr int depth_group = std::is_same_v<T, bfloat16> ? 2 : 1;

/// Whether W * x of these elements is computed by dot products.
template <class Acc, class T, class X>
inline constexpr bool by_dots = has_dots<Acc, storage_t<T>> && std::is_same_v<storage_t<T>, storage_t<X>>;

/// What a tile fetches from memory while it multiplies: at each step of the depth a row's worth of lines where `next` points,
/// which then moves on by `step` bytes. Spread like this, memory and multipliers work at the same time; in one burst they
/// take turns.
struct fetching {
  std::uintptr_t next = 0;  ///< an address and no pointer: it may lie outside, where nothing is read
  index_t step = 0;

  /// Of two panels, `next_panel` bytes apart, the same of each.
  template <int Vectors>
  LORA_DETAIL_INLINE void once(index_t next_panel) {
    constexpr int row = tile_cols<float> * static_cast<int>(sizeof(float));
    prefetch_at<row>(reinterpret_cast<const void*>(next), 0);
    if constexpr (Vectors == 4) prefetch_at<row>(reinterpret_cast<const void*>(next), next_panel);
    next += static_cast<std::uintptr_t>(step);
  }
};
/// How far ahead of the multiply-adds a panel that goes through one tile is fetched, in bytes.
inline constexpr index_t fetch_ahead = 4096;

/// What several rows use, in a register: gcc otherwise makes it an operand in memory of each multiply-add, a load for every
/// row, where a processor has two in a cycle as it has multiply-adds. The full tile it leaves alone.
template <int Rows, class Vector>
LORA_DETAIL_INLINE Vector loaded_once(Vector v) {
  if constexpr (Rows > 1 && Rows < tile_rows) as_it_came(v);
  return v;
}

/// One depth: sum[i][j] += left[i] * right[j].
template <int Rows, int Vectors, class Acc>
LORA_DETAIL_INLINE void advance_once(typename simd<Acc>::vector (&sum)[Rows][Vectors], const Acc* left,
                                     const typename simd<Acc>::vector (&right)[Vectors]) {
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    const auto one = simd<Acc>::broadcast(left[i]);
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[i][j] = simd<Acc>::multiply_add(one, right[j], sum[i][j]);
  }
}

/// The vectors of one or two panels at one depth, for so many rows; of a pair of depths, the even or the odd one.
template <bool Odd, int Rows, int Vectors, class Acc, class T>
LORA_DETAIL_INLINE void read_panel(const T* right, index_t next_panel, typename simd<Acc>::vector (&values)[Vectors]) {
  using v = simd<Acc>;
  constexpr int in_panel = Vectors < 2 ? 1 : 2;
  LORA_DETAIL_UNROLL
  for (int j = 0; j < Vectors; ++j) {
    const T* const p = right + (j / in_panel) * next_panel + depth_group<T> * (j % in_panel) * v::width;
    if constexpr (std::is_same_v<T, bfloat16>)
      values[j] = loaded_once<Rows>(Odd ? v::load_odd(p) : v::load_even(p));
    else if constexpr (std::is_same_v<T, float16>)
      values[j] = loaded_once<Rows>(v::load_half(p));
    else
      values[j] = loaded_once<Rows>(v::load(p));
  }
}

/// sum[i][j] continued by `depth` steps. Vectors: 1 for a panel of half width, 2 for a panel, 4 for two neighbouring panels
/// that are `next_panel` elements apart, of which both are fetched. Keep: what was read, widened, is written to `kept`.
template <bool Fetch, int Rows, int Vectors, class Acc, bool Keep = false, class T>
LORA_DETAIL_INLINE void advance(typename simd<Acc>::vector (&sum)[Rows][Vectors], const Acc* left, index_t left_stride,
                                const T* right, index_t next_panel, index_t depth, fetching fetch = {},
                                [[maybe_unused]] Acc* kept = nullptr) {
  static_assert(!Keep || Vectors <= 2);
  using v = simd<Acc>;
  constexpr int group = depth_group<T>;
  constexpr int row = (Vectors < 2 ? 1 : 2) * v::width;  // elements of one panel at one depth
  typename v::vector values[Vectors];
  const auto keep = [&] {
    if constexpr (Keep) {
      LORA_DETAIL_UNROLL
      for (int j = 0; j < Vectors; ++j) v::store(kept + j * v::width, values[j]);
      kept += row;
    }
  };
  for (; depth >= group; depth -= group) {
    if constexpr (Fetch) fetch.template once<Vectors>(next_panel * static_cast<index_t>(sizeof(T)));
    read_panel<false, Rows, Vectors, Acc>(right, next_panel, values);
    keep();
    advance_once<Rows, Vectors, Acc>(sum, left, values);
    if constexpr (group == 2) {
      // Read again instead of held: with the accumulators the registers would not suffice.
      read_panel<true, Rows, Vectors, Acc>(right, next_panel, values);
      keep();
      advance_once<Rows, Vectors, Acc>(sum, left + left_stride, values);
    }
    left += group * left_stride;
    right += group * row;
  }
  if constexpr (group == 2)
    if (depth != 0) {
      read_panel<false, Rows, Vectors, Acc>(right, next_panel, values);
      keep();
      advance_once<Rows, Vectors, Acc>(sum, left, values);
    }
}

#if defined(LORA_DETAIL_DOTS)
/// The same by dot products: left holds pairs of depths in the bits of a float, as the panel does.
template <bool Fetch, int Rows, int Vectors>
LORA_DETAIL_INLINE void advance_by_dots(simd<float>::vector (&sum)[Rows][Vectors], const float* left, index_t left_stride,
                                        const bfloat16* right, index_t next_panel, index_t depth, fetching fetch) {
  using v = simd<float>;
  constexpr int row = (Vectors < 2 ? 1 : 2) * 2 * v::width;  // elements of one panel at a pair of depths
  typename v::vector values[Vectors];
  for (; depth > 0; depth -= 2) {  // a panel holds whole pairs
    if constexpr (Fetch) fetch.once<Vectors>(next_panel * static_cast<index_t>(sizeof(bfloat16)));
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j)
      values[j] =
          loaded_once<Rows>(v::load(reinterpret_cast<const float*>(right + j / 2 * next_panel + 2 * (j % 2) * v::width)));
    LORA_DETAIL_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto one = v::broadcast(left[i]);
      LORA_DETAIL_UNROLL
      for (int j = 0; j < Vectors; ++j) sum[i][j] = v::add_dots(one, values[j], sum[i][j]);
    }
    left += left_stride;
    right += row;
  }
}
#endif

/// A stride that is known when it is compiled.
template <index_t Stride>
using fixed = std::integral_constant<index_t, Stride>;

/// Accumulators in memory, row i at sums + i * sums_stride, continued by `depth` steps; Dots: left holds pairs. A stride is an
/// integer or a `fixed` one.
template <bool Fetch, bool Dots, int Rows, int Vectors, class Acc, class T, bool Keep = false, class S, class L>
void multiply_rows(Acc* sums, S sums_stride, const Acc* left, L left_stride, const T* right, index_t next_panel,
                   index_t depth, fetching fetch = {}, Acc* kept = nullptr) {
  static_assert(!Keep || !Dots);
  using v = simd<Acc>;
  typename v::vector sum[Rows][Vectors];
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[i][j] = v::load(sums + i * sums_stride + j * v::width);
  }
#if defined(LORA_DETAIL_DOTS)
  if constexpr (Dots)
    advance_by_dots<Fetch, Rows, Vectors>(sum, left, left_stride, right, next_panel, depth, fetch);
  else
#endif
    advance<Fetch, Rows, Vectors, Acc, Keep>(sum, left, left_stride, right, next_panel, depth, fetch, kept);
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) v::store(sums + i * sums_stride + j * v::width, sum[i][j]);
  }
}

/// The same with the number of rows chosen at run time, 1 ... Rows.
template <bool Fetch, int Vectors, class Acc, class T, int Rows = tile_rows, bool Dots = false>
void multiply(int rows, Acc* sums, index_t sums_stride, const Acc* left, index_t left_stride, const T* right,
              index_t next_panel, index_t depth, fetching fetch = {}) {
  if (rows == Rows)
    multiply_rows<Fetch, Dots, Rows, Vectors>(sums, sums_stride, left, left_stride, right, next_panel, depth, fetch);
  else if constexpr (Rows > 1)
    multiply<Fetch, Vectors, Acc, T, Rows - 1, Dots>(rows, sums, sums_stride, left, left_stride, right, next_panel, depth,
                                                     fetch);
}

/// Rows of a tile that meet a panel: row i's element k is left[k * left_stride + i], its sums begin i times the panel's width
/// behind `sums`. Where rows is tile_rows, left_stride is, too.
template <class Acc>
struct some_rows {
  int rows;
  Acc* sums;
  const Acc* left;
  index_t left_stride;
};

/// What tile n fetches of the next chunk at `next`, `share` bytes of it in so many steps.
template <class N>
fetching share_of(const N* next, index_t share, index_t n, index_t steps) {
  return {reinterpret_cast<std::uintptr_t>(next) + static_cast<std::uintptr_t>(n * share), pieces(share, steps)};
}

/// Rows of several tiles, at(first) ... at(count - 1), by one chunk of a panel. Each fetches its share of the next chunk,
/// which has as many elements; where that is not known, of this one, which is near anyhow.
template <class Acc, int Vectors, bool Dots, class R, class N, class At>
void multiply_all(index_t first, index_t count, const At& at, const R* right, index_t depth, const N* next) {
  constexpr index_t row = std::min(Vectors, 2) * simd<Acc>::width;
  const index_t share = pieces(depth * row * static_cast<index_t>(sizeof(N)), count);
  fetching fetch = share_of(next, share, first, pieces(depth, depth_group<R>));
  for (index_t n = first; n < count; ++n, fetch.next += static_cast<std::uintptr_t>(share)) {
    const some_rows<Acc> to = at(n);
    if (to.rows == tile_rows)
      multiply_rows<true, Dots, tile_rows, Vectors>(to.sums, fixed<row>(), to.left, fixed<tile_rows>(), right, 0, depth,
                                                    fetch);
    else
      multiply<true, Vectors, Acc, R, tile_rows - 1, Dots>(to.rows, to.sums, row, to.left, to.left_stride, right, 0, depth,
                                                           fetch);
  }
}

/// One row that meets a panel of its own. `ahead` is fetched meanwhile, as much of it as is read of the panel.
template <class Acc, class T>
struct single {
  const Acc* left;
  index_t left_stride;
  const T* right;
  Acc* sums;
  std::uintptr_t ahead;
};
/// So many at once have chains enough to keep the multipliers busy, where one would wait for itself.
inline constexpr int singles = 4;

/// The chains of some rows, each by its own panel of Vectors, continued by `depth` steps.
template <bool Dots, int Vectors, class Acc, class T>
void multiply_singles(const single<Acc, T> (&rows)[singles], index_t depth) {
  using v = simd<Acc>;
  typename v::vector sum[singles][1][Vectors];
  LORA_DETAIL_UNROLL
  for (int n = 0; n < singles; ++n) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[n][0][j] = v::load(rows[n].sums + j * v::width);
  }
  constexpr int group = depth_group<T>, row = Vectors * v::width;
  const auto step = [&](index_t k, index_t depths) {
    LORA_DETAIL_UNROLL
    for (int n = 0; n < singles; ++n) {
      const Acc* const left = rows[n].left + (Dots ? k / 2 : k) * rows[n].left_stride;
      const T* const right = rows[n].right + k * row;
      prefetch_at<group * row* static_cast<int>(sizeof(T))>(reinterpret_cast<const void*>(rows[n].ahead),
                                                            k * row * static_cast<index_t>(sizeof(T)));
#if defined(LORA_DETAIL_DOTS)
      if constexpr (Dots)
        advance_by_dots<false, 1, Vectors>(sum[n], left, 0, right, 0, depths, {});
      else
#endif
        advance<false, 1, Vectors, Acc>(sum[n], left, rows[n].left_stride, right, 0, depths);
    }
  };
  index_t k = 0;
  for (; k + group <= depth; k += group) step(k, group);
  if (k < depth) step(k, depth - k);
  LORA_DETAIL_UNROLL
  for (int n = 0; n < singles; ++n) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) v::store(rows[n].sums + j * v::width, sum[n][0][j]);
  }
}

/// The panel itself, so many bytes ahead.
template <int Vectors, class Acc, class T>
fetching ahead_of(const T* right, index_t bytes = fetch_ahead) {
  constexpr index_t step = depth_group<T> * std::min(Vectors, 2) * simd<Acc>::width * static_cast<index_t>(sizeof(T));
  return {reinterpret_cast<std::uintptr_t>(right) + static_cast<std::uintptr_t>(bytes), step};
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
