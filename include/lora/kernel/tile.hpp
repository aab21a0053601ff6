// SPDX-License-Identifier: Apache-2.0
//
// The register tile: the one loop that multiplies. Each of its sums is one chain of multiply-adds
// in the order of the depth. A sum that is stored and loaded again between two calls continues the
// same chain, so the cut of the depth into chunks changes no bit. A merge runs the loop over the
// ranks; a product runs it over in_features and then over the ranks.
//
// The left operand (activations, or the factor that is broadcast) is left[k * left_stride + i]. The
// right operand is in panels (see panels.hpp): the elements of tile_cols outputs at one depth side
// by side, bfloat16 in pairs of depths. The multiplier (multiplier.hpp) says what a step
// multiplies.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/kernel/lookahead.hpp"
#include "lora/kernel/multiplier.hpp"
#include "lora/kernel/simd.hpp"
#include "lora/kernel/tuning.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Depths that are stored together in a panel of T. bfloat16 comes in pairs, so that widening
/// crosses no lane.
template <class T>
inline constexpr int depth_group = std::is_same_v<T, bfloat16> ? 2 : 1;

/// Columns of one panel of which a tile of so many vectors reads a depth: 1 vector is a panel of
/// half width, 4 are two panels.
template <int Vectors, class Acc>
inline constexpr index_t panel_cols = std::min(Vectors, 2) * simd<Acc>::width;

/// What one call of a tile multiplies. With M::depths = 2 the left operand holds pairs of depths.
template <class Acc, class T>
struct tile_job {
  Acc* sums;  ///< row i at sums + i * sums_stride
  index_t sums_stride;
  const Acc* left;
  index_t left_stride;
  const T* right;
  index_t next_panel = 0;  ///< elements from one panel to the second; 0: there is one
  index_t depth = 0;       ///< depths to multiply
  lookahead ahead = {};
  Acc* widened = nullptr;  ///< where a tile that keeps the panel's elements writes them
};

/// Keeps a vector that several rows use in a register. gcc otherwise makes it an operand in memory
/// of each multiply-add: one load a row, where a processor has two a cycle. It leaves full tiles
/// alone.
template <int Rows, class Vector>
LORA_DETAIL_INLINE Vector loaded_once(Vector v) {
  if constexpr (Rows > 1 && Rows < tile_rows) as_it_came(v);
  return v;
}

/// The vectors of one or two panels at one depth, as M multiplies them. Odd: of a pair of depths
/// that is multiplied one by one, the second.
template <class M, bool Odd, int Rows, int Vectors, class Acc, class T>
LORA_DETAIL_INLINE void read_panel(const T* right, index_t next_panel,
                                   typename simd<Acc>::vector (&values)[Vectors]) {
  using v = simd<Acc>;
  constexpr int in_panel = Vectors < 2 ? 1 : 2;
  LORA_DETAIL_UNROLL
  for (int j = 0; j < Vectors; ++j) {
    const T* const p =
        right + (j / in_panel) * next_panel + depth_group<T> * (j % in_panel) * v::width;
    if constexpr (is_dot2<M>)
      values[j] = loaded_once<Rows>(v::load(reinterpret_cast<const float*>(p)));
    else if constexpr (std::is_same_v<T, bfloat16>)
      values[j] = loaded_once<Rows>(Odd ? v::load_odd(p) : v::load_even(p));
    else if constexpr (std::is_same_v<T, float16>)
      values[j] = loaded_once<Rows>(v::load_half(p));
    else
      values[j] = loaded_once<Rows>(v::load(p));
  }
}

/// sum[i][j] += left[i] * right[j].
template <class M, int Rows, int Vectors, class Acc>
LORA_DETAIL_INLINE void multiply_step(typename simd<Acc>::vector (&sum)[Rows][Vectors],
                                      const Acc* left,
                                      const typename simd<Acc>::vector (&right)[Vectors]) {
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    const auto one = simd<Acc>::broadcast(left[i]);
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[i][j] = M::step(one, right[j], sum[i][j]);
  }
}
/// One step: sum[i][j] += left[i] * (vector j of the panel). Keep: the panel's elements, widened,
/// are written to `widened`.
template <class M, bool Odd, bool Keep, int Rows, int Vectors, class Acc, class T>
LORA_DETAIL_INLINE void advance_once(typename simd<Acc>::vector (&sum)[Rows][Vectors],
                                     const Acc* left, const T* right, index_t next_panel,
                                     [[maybe_unused]] Acc* widened) {
  using v = simd<Acc>;
  typename v::vector values[Vectors];
  read_panel<M, Odd, Rows, Vectors, Acc>(right, next_panel, values);
  if constexpr (Keep) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j) v::store(widened + j * v::width, values[j]);
  }
  multiply_step<M, Rows, Vectors, Acc>(sum, left, values);
}

/// sum[i][j] continued by `depth` depths. Vectors: 1 for a panel of half width, 2 for a panel, 4
/// for two panels. Other arguments as in tile_job.
template <class M, bool Fetch, bool Keep, int Rows, int Vectors, class Acc, class T>
LORA_DETAIL_INLINE void advance(typename simd<Acc>::vector (&sum)[Rows][Vectors], const Acc* left,
                                index_t left_stride, const T* right, index_t next_panel,
                                index_t depth, lookahead ahead = {}, Acc* widened = nullptr) {
  static_assert(!Keep || (Vectors <= 2 && !is_dot2<M>));
  constexpr int group = depth_group<T>, steps = group / M::depths;
  constexpr index_t row = panel_cols<Vectors, Acc>;
  constexpr index_t least = is_dot2<M> ? 1 : group;  // dot2: a panel holds whole pairs
  for (; depth >= least; depth -= group) {
    if constexpr (Fetch)
      ahead.template advance<tile_cols<float> * 4, Vectors == 4>(next_panel *
                                                                 static_cast<index_t>(sizeof(T)));
    advance_once<M, false, Keep>(sum, left, right, next_panel, widened);
    // The pair is read again for its second depth: with the sums, registers do not suffice to hold
    // it.
    if constexpr (steps == 2)
      advance_once<M, true, Keep>(sum, left + left_stride, right, next_panel,
                                  widened + (Keep ? row : 0));
    left += steps * left_stride;
    right += group * row;
    if constexpr (Keep) widened += group * row;
  }
  if constexpr (steps == 2)
    if (depth != 0) advance_once<M, false, Keep>(sum, left, right, next_panel, widened);
}

/// The sums of a job, loaded, continued and stored, for Rows rows. Fixed: its strides are those of
/// a full tile (sums panel_cols, left tile_rows), known when it is compiled.
template <class M, bool Fetch, int Rows, int Vectors, bool Fixed = false, bool Keep = false,
          class Acc, class T>
void multiply_rows(const tile_job<Acc, T>& job) {
  using v = simd<Acc>;
  const index_t sums_stride = Fixed ? panel_cols<Vectors, Acc> : job.sums_stride;
  const index_t left_stride = Fixed ? index_t{tile_rows} : job.left_stride;
  typename v::vector sum[Rows][Vectors];
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j)
      sum[i][j] = v::load(job.sums + i * sums_stride + j * v::width);
  }
  advance<M, Fetch, Keep>(sum, job.left, left_stride, job.right, job.next_panel, job.depth,
                          job.ahead, job.widened);
  LORA_DETAIL_UNROLL
  for (int i = 0; i < Rows; ++i) {
    LORA_DETAIL_UNROLL
    for (int j = 0; j < Vectors; ++j)
      v::store(job.sums + i * sums_stride + j * v::width, sum[i][j]);
  }
}

/// The same with the number of rows known at run time, 1 ... Rows.
template <class M, bool Fetch, int Vectors, int Rows = tile_rows, class Acc, class T>
void multiply(int rows, const tile_job<Acc, T>& job) {
  if (rows == Rows)
    multiply_rows<M, Fetch, Rows, Vectors>(job);
  else if constexpr (Rows > 1)
    multiply<M, Fetch, Vectors, Rows - 1>(rows, job);
}

/// Rows of one tile that meet a panel: element k of row i is left[k * left_stride + i]; its sums
/// are at sums + i * panel_cols. Where rows is tile_rows, left_stride is, too.
template <class Acc>
struct some_rows {
  int rows;
  Acc* sums;
  const Acc* left;
  index_t left_stride;
};

/// Rows of several tiles, at(first) ... at(count - 1), by one chunk of a panel. Each tile
/// prefetches its share of the next chunk, which has as many elements. (Pass this chunk where the
/// next one is not known.)
template <class M, int Vectors, class Acc, class R, class N, class At>
void multiply_all(index_t first, index_t count, const At& at, const R* right, index_t depth,
                  const N* next) {
  constexpr index_t row = panel_cols<Vectors, Acc>;
  const index_t share = pieces(depth * row * static_cast<index_t>(sizeof(N)), count);
  lookahead ahead = lookahead::share(next, share, first, pieces(depth, depth_group<R>));
  for (index_t n = first; n < count; ++n, ahead.next += static_cast<std::uintptr_t>(share)) {
    const some_rows<Acc> to = at(n);
    const tile_job<Acc, R> job{to.sums, row, to.left, to.left_stride, right, 0, depth, ahead};
    if (to.rows == tile_rows)
      multiply_rows<M, true, tile_rows, Vectors, true>(job);
    else
      multiply<M, true, Vectors, tile_rows - 1>(to.rows, job);
  }
}

/// One row with a panel of its own. As much of `ahead` is prefetched as is read of the panel.
template <class Acc, class T>
struct single {
  const Acc* left;
  index_t left_stride;
  const T* right;
  Acc* sums;
  std::uintptr_t ahead;
};

/// The chains of some rows, each by its own panel of Vectors, continued by `depth` depths.
template <class M, int Vectors, class Acc, class T>
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
      const Acc* const left = rows[n].left + k / M::depths * rows[n].left_stride;
      prefetch_at<group * row* static_cast<int>(sizeof(T))>(
          reinterpret_cast<const void*>(rows[n].ahead), k * row * static_cast<index_t>(sizeof(T)));
      advance<M, false, false>(sum[n], left, rows[n].left_stride, rows[n].right + k * row, 0,
                               depths);
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

/// The lookahead of a panel that one tile multiplies: the panel itself, so many bytes ahead.
template <int Vectors, class Acc, class T>
lookahead ahead_of(const T* right, index_t bytes = fetch_ahead) {
  return lookahead::after(
      right, bytes, depth_group<T> * panel_cols<Vectors, Acc> * static_cast<index_t>(sizeof(T)));
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
