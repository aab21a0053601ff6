// SPDX-License-Identifier: Apache-2.0
//
// The one product: Y = W * X + sum of B * (s * (A * X)). The ranks are R more steps of the same chains that run over
// in_features, so mixing adapters in costs what their bytes and FLOPs cost and no second pass over Y. Each output is one
// chain of multiply-adds from zero, in the order of in_features (by dot products: of pairs of them) and then of the ranks;
// threads, tiles and the other tokens of a batch change no bit.
//
// Order of the loops: a block of tokens; panels of outputs, shared among the threads; chunks of in_features; tiles of
// tokens. A chunk of a panel stays in the first-level cache while all tiles pass, and the next one is fetched meanwhile.
//
// It is instantiated over the accumulator and the stored format of packed panels alone: what reads X and an unpacked W and
// what writes Y comes as a function.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "lora/detail/parallel.hpp"
#include "lora/detail/plan.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// A callable by reference: two words, no allocation. The callable must outlive it.
template <class... Arguments>
class function_ref {
 public:
  function_ref() = default;
  template <class F>
    requires(!std::is_same_v<bare<F>, function_ref>)
  function_ref(const F& f)  // NOLINT(google-explicit-constructor)
      : object_(std::addressof(f)),
        call_([](const void* object, Arguments... arguments) { (*static_cast<const F*>(object))(arguments...); }) {}
  explicit operator bool() const { return object_ != nullptr; }
  void operator()(Arguments... arguments) const { call_(object_, arguments...); }

 private:
  const void* object_ = nullptr;
  void (*call_)(const void*, Arguments...) = nullptr;
};

/// pack(panel, first depth, depths, destination): a chunk of a panel of W.
template <class T>
using pack_weight_function = function_ref<index_t, index_t, index_t, T*>;
/// A tile's tokens and a range of in_features.
struct activation_block {
  const index_t* tokens;
  index_t rows, first, depth;
};
/// pack(block, destination): destination[k * rows + i] becomes element first + k of token i; by dot products, element
/// destination[k * rows + i] the bits of the pair of elements first + 2 k and first + 2 k + 1.
template <class Acc>
using pack_tokens_function = function_ref<const activation_block&, Acc*>;
/// What reads X: widened, and as pairs of bfloat16 where W * x is computed by dot products.
template <class Acc>
struct activation_source {
  pack_tokens_function<Acc> widened, pairs = {};
};
/// finish(first output, outputs, token, sums): sums[j] is the result for output first + j.
template <class Acc>
using finish_function = function_ref<index_t, index_t, index_t, const Acc*>;

/// Where a product finds W: packed panels, a function that packs chunks, or nowhere (then only the parts are computed).
template <class Acc, class T>
struct weight_source {
  const T* panels = nullptr;
  pack_weight_function<T> pack = {};
  bool dots = false;  ///< W * x by dot products: the elements of x are T, too (see has_dots)

  bool present() const { return panels != nullptr || bool(pack); }
};

/// Depths of a panel that one tile passes between two fetches of the adapters' panels.
inline constexpr index_t depth_of_one_tile = 512;

template <class Acc, class T>
class product {
 public:
  /// all_pairs: the panels of all parts are bfloat16.
  product(index_t out_features, index_t in_features, const weight_source<Acc, T>& W, const plan<Acc>& tokens, bool all_pairs)
      : out_(out_features),
        in_(in_features),
        W_(W),
        tokens_(tokens),
        widened_(!by_dots() || !all_pairs),
        threads_(threads_for(work())),
        group_(panels_together()) {}

  void claim(layout& l) {
    const index_t rows = tokens_.most_rows_in_block();
    if (widened_) X_place_ = l.take<Acc>(rows * in_);
    if (by_dots()) pairs_place_ = l.take<Acc>(rows * pieces(in_, 2));
    U_place_ = l.take<Acc>(tokens_.most_U_in_block());
    // A thread's sums and its chunk of W.
    per_thread_ = std::max(rows * group_, most_runs * tile_rows) * width + most_depth * width;
    thread_place_ = l.take<Acc>(threads_ * per_thread_);
  }

  void run(std::byte* memory, const activation_source<Acc>& X, const finish_function<Acc>& finish) {
    if (widened_) X_ = X_place_.in(memory);
    if (by_dots()) pairs_ = pairs_place_.in(memory);
    U_ = U_place_.in(memory);
    Acc* const thread_memory = thread_place_.in(memory);
    parallel(threads_, [&](const team& team) {
      Acc* const sums = thread_memory + team.thread() * per_thread_;
      for (index_t first = 0; first < tokens_.tiles(); first += tokens_.tiles_in_block()) {
        const block tiles{first, std::min(first + tokens_.tiles_in_block(), tokens_.tiles())};
        team.for_each(tiles.end - tiles.begin, [&](index_t t) { pack_tile(tiles, tiles.begin + t, X); });
        shrink_all(tiles, team, sums);
        team.for_each(pieces(panels(), group_), [&](index_t g) { outputs(tiles, g * group_, sums, finish); });
      }
    });
  }

 private:
  static constexpr index_t width = tile_cols<Acc>;
  /// Below so many tiles a panel of 16 bits is widened anew for each.
  static constexpr index_t few_tiles = 4;
  /// Depths of a chunk of W: for many tiles 16 KiB, which stay in the first-level cache with a tile's activations and what is
  /// fetched of the next chunk; for few ones more, where they pass by anyhow.
  static constexpr index_t depth_of_many = (index_t{16} << 10) / (width * static_cast<index_t>(sizeof(Acc)));
  static constexpr index_t depth_of_few = few_tiles_chunk / (width * static_cast<index_t>(sizeof(Acc)));
  static constexpr index_t most_depth = std::max(2 * depth_of_many, depth_of_few);
  /// Runs that pass one chunk of lora_A together, at most.
  static constexpr index_t most_runs = 16;
  struct block {
    index_t begin, end;
  };

  index_t panels() const { return pieces(out_, width); }
  double work() const {
    const double base = W_.present() ? static_cast<double>(out_) * static_cast<double>(in_) : 0;
    const double ranks = static_cast<double>(tokens_.most_U_in_block()) /
                         static_cast<double>(std::max<index_t>(1, tokens_.most_rows_in_block()));
    return (base + static_cast<double>(out_ + in_) * ranks) * static_cast<double>(tokens_.tokens());
  }

  /// Whether T must be widened before it is multiplied.
  bool widens() const { return !std::is_same_v<T, Acc> && !by_dots(); }
  /// Whether W goes from memory straight through so many tiles, each element once or twice.
  bool passes(index_t tiles) const {
    return W_.panels != nullptr && (tiles == 1 || (tiles == 2 && depth_between_panels != 0 && !widens()));
  }
  /// Where W passes, two panels of outputs together: few rows have too few chains in one, and memory reads two streams faster.
  index_t panels_together() const {
    const bool paired = tokens_.tiles() == 1 && tokens_.rows(0) <= paired_rows;
    return passes(tokens_.tiles()) && (paired || depth_between_panels != 0) ? 2 : 1;
  }

  index_t chunk_of(const block& tiles) const {
    if (tiles.end - tiles.begin < few_tiles) return depth_of_few;
    return by_dots() ? 2 * depth_of_many : depth_of_many;
  }

  index_t first_place(const block& tiles) const { return tokens_.first(tiles.begin); }
  index_t rows_of(const block& tiles) const {
    return tokens_.first(tiles.end - 1) + tokens_.rows(tiles.end - 1) - first_place(tiles);
  }
  /// Where a tile's activations from depth k on begin, k a multiple of their chunk (with one tile: any, with pairs even).
  /// Chunks of depth lie one behind the other, in each the tiles.
  const Acc* left_at(const block& tiles, index_t tile, index_t k) const { return in_chunk(X_, tiles, tile, k, 1); }
  const Acc* pairs_at(const block& tiles, index_t tile, index_t k) const { return in_chunk(pairs_, tiles, tile, k, 2); }
  Acc* in_chunk(Acc* from, const block& tiles, index_t tile, index_t k, index_t group) const {
    const index_t depth = std::min(chunk_of(tiles), in_ - k);
    return from + k / group * rows_of(tiles) + (tokens_.first(tile) - first_place(tiles)) * pieces(depth, group);
  }
  Acc* sums_of(const block& tiles, index_t tile, index_t panels, Acc* sums) const {
    return sums + (tokens_.first(tile) - first_place(tiles)) * width * panels;
  }

  void pack_tile(const block& tiles, index_t tile, const activation_source<Acc>& X) const {
    index_t tokens[tile_rows];
    activation_block some{tokens, tokens_.rows(tile), 0, 0};
    for (index_t i = 0; i < some.rows; ++i) tokens[i] = tokens_.token(tokens_.first(tile) + i);
    for (; some.first < in_; some.first += some.depth) {
      some.depth = std::min(chunk_of(tiles), in_ - some.first);
      if (widened_) X.widened(some, in_chunk(X_, tiles, tile, some.first, 1));
      if (by_dots()) X.pairs(some, in_chunk(pairs_, tiles, tile, some.first, 2));
    }
  }

  bool by_dots() const {
    if constexpr (has_dots<Acc, T>)
      return W_.dots;
    else
      return false;
  }

  /// U = s * (A * X) of all runs of the block. A task is a panel of ranks for a few runs.
  void shrink_all(const block& tiles, const team& team, Acc* sums) const {
    const index_t first = tokens_.first_run(tiles.begin), runs = tokens_.first_run(tiles.end) - first;
    if (runs == 0) return;
    index_t most_panels = 0;
    for (index_t p = 0; p < tokens_.parts_count(); ++p)
      most_panels = std::max(most_panels, pieces(tokens_.parts()[p].rank, width));
    // As many as leave two tasks for each thread.
    const index_t together = std::clamp<index_t>(runs * most_panels / (2 * threads_), 1, most_runs);
    team.for_each(pieces(runs, together) * most_panels, [&](index_t task) {
      const index_t begin = first + task / most_panels * together, end = std::min(begin + together, first + runs);
      for (index_t r = begin; r < end;) {
        if (task % most_panels == 0 && shrink_together(r, end)) {
          shrink_singles(tiles, r, sums);
          r += singles;
          continue;
        }
        index_t next = r + 1;
        while (next < end && tokens_.run_by_part(next).part == tokens_.run_by_part(r).part) ++next;
        shrink(tiles, r, next, task % most_panels, sums);
        r = next;
      }
    });
  }

  /// Whether runs r ... of run_at(r) may be multiplied together: there are enough before `end`, of one row each, and
  /// alike(n) holds for each n of them.
  template <class RunAt, class Alike>
  static bool are_singles(const RunAt& run_at, index_t r, index_t end, const Alike& alike) {
    if (r + singles > end) return false;
    for (index_t n = 0; n < singles; ++n)
      if (run_at(r + n).rows != 1 || !alike(n)) return false;
    return true;
  }
  /// The next runs by part: ranks of one panel, of one format and width. More ranks are left to pairs of panels.
  bool shrink_together(index_t r, index_t end) const {
    const auto run_at = [&](index_t k) -> const detail::run& { return tokens_.run_by_part(k); };
    return are_singles(run_at, r, end, [&](index_t n) {
      const part<Acc>&l = tokens_.part_of(run_at(r + n)), &first = tokens_.part_of(run_at(r));
      return l.rank <= width && l.format == first.format && only_panel(l) == only_panel(first);
    });
  }
  /// The width of the only panel of ranks.
  index_t only_panel(const part<Acc>& l) const { return factor_layout<Acc, Acc>{out_, in_, l.rank}.A_width(0); }

  void shrink_singles(const block& tiles, index_t begin, Acc* sums) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_by_part(begin));
    const index_t panel_width = only_panel(l), step = chunk_of(tiles);
    std::fill_n(sums, singles * width, Acc(0));
    with_elements<Acc>(l.A, l.format, [&]<class F>(const F*) {
      with_dots<F>([&](auto dots) {
        for (index_t k = 0; k < in_; k += step) {
          single<Acc, F> rows[singles];
          for (index_t n = 0; n < singles; ++n) {
            const detail::run& r = tokens_.run_by_part(begin + n);
            rows[n] = {(dots() ? pairs_at(tiles, r.tile, k) : left_at(tiles, r.tile, k)) + r.first_row, tokens_.rows(r.tile),
                       static_cast<const F*>(tokens_.part_of(r).A) + panel_offset<F>(0, k, panel_width), sums + n * width};
          }
          if (panel_width == width)
            multiply_singles<dots(), 2>(rows, std::min(step, in_ - k));
          else
            multiply_singles<dots(), 1>(rows, std::min(step, in_ - k));
        }
      });
    });
    for (index_t n = 0; n < singles; ++n) {
      const detail::run& r = tokens_.run_by_part(begin + n);
      keep_U(r, 0, tokens_.part_of(r).rank, panel_width, sums + n * width);
    }
  }

  /// Runs begin ... end - 1 (by part) of one part, one panel of its ranks. A single run of few rows takes two panels at once:
  /// one has too few chains to keep the multipliers busy.
  void shrink(const block& tiles, index_t begin, index_t end, index_t panel, Acc* sums) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_by_part(begin));
    if (panel * width >= l.rank) return;
    with_elements<Acc>(l.A, l.format, [&]<class F>(const F* panels) {
      const factor_layout<Acc, F> where{out_, in_, l.rank};
      const bool few = end - begin == 1 && tokens_.run_by_part(begin).rows <= paired_rows;
      const index_t first = few ? panel / 2 * 2 : panel;
      const bool paired = few && first * width + width < l.rank && where.A_width(first + 1) == width;
      if (paired && panel != first) return;
      const F* const from = panels + panel * where.A_panel();
      std::fill_n(sums, (end - begin) * tile_rows * width, Acc(0));
      if (paired)
        multiply_runs<4>(tiles, begin, end, from, where.A_panel(), sums);
      else if (where.A_width(panel) == width)
        multiply_runs<2>(tiles, begin, end, from, 0, sums);
      else
        multiply_runs<1>(tiles, begin, end, from, 0, sums);
      const index_t ranks = std::min(width * (paired ? 2 : 1), l.rank - panel * width);
      for (index_t r = begin; r < end; ++r)
        keep_U(tokens_.run_by_part(r), panel * width, ranks, paired ? 2 * width : where.A_width(panel),
               sums + (r - begin) * tile_rows * width);
    });
  }

  template <int Vectors, class F>
  void multiply_runs(const block& tiles, index_t begin, index_t end, const F* A, index_t next_panel, Acc* sums) const {
    constexpr index_t panel_width = std::min(Vectors, 2) * simd<Acc>::width;
    constexpr int most_rows = Vectors == 4 ? paired_rows : tile_rows;
    const index_t step = chunk_of(tiles);
    with_dots<F>([&](auto dots) {
      for (index_t k = 0; k < in_; k += step)
        for (index_t r = begin; r < end; ++r) {
          const detail::run& rows = tokens_.run_by_part(r);
          const index_t stride = tokens_.rows(rows.tile);
          const Acc* const left = (dots() ? pairs_at(tiles, rows.tile, k) : left_at(tiles, rows.tile, k)) + rows.first_row;
          const F* const right = A + panel_offset<F>(0, k, panel_width);
          multiply<true, Vectors, Acc, F, most_rows, dots()>(
              static_cast<int>(rows.rows), sums + (r - begin) * tile_rows * width, std::max(Vectors / 2, 1) * panel_width,
              left, stride, right, next_panel, std::min(step, in_ - k), ahead_of<Vectors, Acc>(right));
        }
    });
  }

  /// U as the left operand of the next product: U[rank * rows + row], times the row's factor, in double and rounded once: a
  /// factor need not fit the accumulator.
  void keep_U(const detail::run& rows, index_t first_rank, index_t ranks, index_t sums_stride, const Acc* sums) const {
    const double* const scales = tokens_.scales(rows);
    const auto value = [&](index_t j, index_t i) { return scales[i] * static_cast<double>(sums[i * sums_stride + j]); };
    if (tokens_.part_of(rows).rounded_U) return keep_rounded_U(rows, first_rank, ranks, value);
    Acc* const U = U_ + rows.U + first_rank * rows.rows;
    for (index_t j = 0; j < ranks; ++j)
      for (index_t i = 0; i < rows.rows; ++i) U[j * rows.rows + i] = static_cast<Acc>(value(j, i));
  }
  /// The same in bfloat16; by dot products pairs of ranks, as activations lie.
  template <class Value>
  void keep_rounded_U(const detail::run& rows, index_t first_rank, index_t ranks, const Value& value) const {
    for (index_t j = 0; j < ranks; ++j)
      for (index_t i = 0; i < rows.rows; ++i) {
        const bfloat16 rounded(value(j, i));
        if (!by_dots()) {
          U_[rows.U + (first_rank + j) * rows.rows + i] = static_cast<Acc>(rounded);
          continue;
        }
        Acc* const pair = U_ + rows.U + (first_rank + j) / 2 * rows.rows + i;
        if (j % 2 == 0) std::fill_n(pair, 1, Acc(0));
        std::memcpy(reinterpret_cast<bfloat16*>(pair) + j % 2, &rounded, sizeof rounded);
      }
  }

  /// One or two neighbouring panels of outputs, for all tiles of the block.
  void outputs(const block& tiles, index_t p, Acc* sums, const finish_function<Acc>& finish) const {
    const index_t count = std::min(group_, panels() - p);
    const index_t stride = count * width;
    std::fill_n(sums, rows_of(tiles) * stride, Acc(0));
    if (W_.present()) multiply_weight(tiles, p, count, sums);
    multiply_parts(tiles, p, count, sums);
    for (index_t t = tiles.begin; t < tiles.end; ++t)
      for (index_t i = 0; i < tokens_.rows(t); ++i) {
        const index_t token = tokens_.token(tokens_.first(t) + i);
        finish(p * width, std::min(stride, out_ - p * width), token, sums_of(tiles, t, count, sums) + i * stride);
      }
  }

  void multiply_weight(const block& tiles, index_t p, index_t count, Acc* sums) const {
    const bool passing = passes(tiles.end - tiles.begin);
    const index_t step = tiles.end - tiles.begin == 1 ? depth_of_one_tile : chunk_of(tiles);
    const index_t steps = pieces(in_, step);
    for (index_t n = 0; n < steps; ++n) {
      const index_t k = n * step, depth = std::min(step, in_ - k);
      fetch_parts(p, count, n, steps);
      if (passing)
        multiply_passing(tiles, p, count, k, depth, sums);
      else
        multiply_chunk(tiles, p, k, depth, sums);
    }
  }

  /// Depths k ... k + depth - 1 of a panel, for all tiles.
  void multiply_chunk(const block& tiles, index_t p, index_t k, index_t depth, Acc* sums) const {
    Acc* const chunk = sums + per_thread_ - most_depth * width;
    if (W_.panels == nullptr) {
      T* const packed = reinterpret_cast<T*>(chunk);
      W_.pack(p, k, depth, packed);
      return multiply_tiles(tiles, k, depth, packed, static_cast<const T*>(nullptr), sums);
    }
    const T* const W = weight_at(p, k);
    const T* const next = W + panel_size<T>(depth, width);
    if (!widens() || tiles.end - tiles.begin < few_tiles) return multiply_tiles(tiles, k, depth, W, next, sums);
    widen_chunk(W, depth, chunk);
    multiply_tiles(tiles, k, depth, chunk, next, sums);
  }

  const T* weight_at(index_t p, index_t k) const {
    return W_.panels + p * panel_size<T>(in_, width) + panel_offset<T>(0, k, width);
  }

  /// Depths k ... k + depth - 1 of one or two panels, straight from memory through one or two tiles.
  void multiply_passing(const block& tiles, index_t p, index_t count, index_t k, index_t depth, Acc* sums) const {
    const T* const right = weight_at(p, k);
    const index_t next_panel = panel_size<T>(in_, width);
    with_dots<T>([&](auto dots) {
      const auto left_of = [&](index_t t) { return dots() ? pairs_at(tiles, t, k) : left_at(tiles, t, k); };
      if (count == 2 && tiles.end - tiles.begin == 1 && tokens_.rows(tiles.begin) <= paired_rows) {
        const auto rows = static_cast<int>(tokens_.rows(tiles.begin));
        const Acc* const left = left_of(tiles.begin);
        if (rows <= 2)  // nothing but two streams, which the hardware fetches
          multiply<false, 4, Acc, T, 2, dots()>(rows, sums, 2 * width, left, rows, right, next_panel, depth);
        else
          multiply<true, 4, Acc, T, paired_rows, dots()>(rows, sums, 2 * width, left, rows, right, next_panel, depth,
                                                         ahead_of<4, Acc>(right));
        return;
      }
      const index_t step = depth_between_panels != 0 ? depth_between_panels : depth;
      for (index_t d = 0; d < depth; d += step)
        for (index_t c = 0; c < count; ++c)
          for (index_t t = tiles.begin; t < tiles.end; ++t) {
            const index_t rows = tokens_.rows(t);
            const T* const from = right + c * next_panel + d * width;
            multiply<true, 2, Acc, T, tile_rows, dots()>(static_cast<int>(rows), sums_of(tiles, t, count, sums) + c * width,
                                                         count * width, left_of(t) + (dots() ? d / 2 : d) * rows, rows, from,
                                                         0, std::min(step, depth - d), ahead_of<2, Acc>(from));
          }
    });
  }

  /// call(whether a panel of R is multiplied by dot products), known when it is compiled.
  template <class R, class Call>
  void with_dots(const Call& call) const {
    if constexpr (has_dots<Acc, R>)
      if (by_dots()) return call(std::true_type());
    call(std::false_type());
  }

  /// All tiles by one chunk, a part of a panel or one that was widened. `next` is what the next chunk is made of, null where
  /// that is not known; every tile fetches its share of it.
  template <class R, class N>
  void multiply_tiles(const block& tiles, index_t k, index_t depth, const R* right, const N* next, Acc* sums) const {
    const index_t count = tiles.end - tiles.begin, line = static_cast<index_t>(memory_alignment);
    const index_t bytes = next == nullptr ? 0 : depth * width * static_cast<index_t>(sizeof(N));
    with_dots<R>([&](auto dots) {
      for (index_t t = tiles.begin; t < tiles.end; ++t) {
        const index_t n = t - tiles.begin;
        const auto rows = static_cast<int>(tokens_.rows(t));
        Acc* const tile_sums = sums_of(tiles, t, 1, sums);
        const Acc* const left = dots() ? pairs_at(tiles, t, k) : left_at(tiles, t, k);
        const index_t share = bytes * n / count / line * line;
        const fetching fetch{reinterpret_cast<std::uintptr_t>(next) + static_cast<std::uintptr_t>(share),
                             pieces(bytes, count * pieces(depth, depth_group<R>))};
        if (bytes != 0)
          multiply<true, 2, Acc, R, tile_rows, dots()>(rows, tile_sums, width, left, rows, right, 0, depth, fetch);
        else
          multiply<false, 2, Acc, R, tile_rows, dots()>(rows, tile_sums, width, left, rows, right, 0, depth);
      }
    });
  }

  static void widen_chunk(const T* from, index_t depth, Acc* to) {
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Acc, float>) {
      for (index_t k = 0; k < depth; k += 2)
        for (int j = 0; j < 2; ++j) {
          const T* const pairs = from + k * width + 2 * j * simd<Acc>::width;
          simd<Acc>::store(to + k * width + j * simd<Acc>::width, simd<Acc>::load_even(pairs));
          if (k + 1 < depth) simd<Acc>::store(to + (k + 1) * width + j * simd<Acc>::width, simd<Acc>::load_odd(pairs));
        }
    } else if constexpr (std::is_same_v<T, float16> && std::is_same_v<Acc, float>) {
      for (index_t e = 0; e < depth * width; e += simd<Acc>::width) simd<Acc>::store(to + e, simd<Acc>::load_half(from + e));
    }
  }

  /// The ranks: the chains of the base go on.
  void multiply_parts(const block& tiles, index_t p, index_t count, Acc* sums) const {
    for (index_t t = tiles.begin; t < tiles.end; ++t)
      for (index_t r = tokens_.first_run(t); r < tokens_.first_run(t + 1);) {
        const bool together = expand_together(r, tokens_.first_run(t + 1));
        for (index_t c = 0; c < count; ++c) {
          Acc* const of_panel = sums_of(tiles, t, count, sums) + c * width;
          if (together)
            expand_singles(r, p + c, of_panel, count * width);
          else
            expand(tokens_.run_at(r), p + c, of_panel, count * width);
        }
        r += together ? singles : 1;
      }
  }
  void expand(const detail::run& rows, index_t p, Acc* sums, index_t stride) const {
    const part<Acc>& l = tokens_.part_of(rows);
    with_B(l, [&]<class F>(const F* panels, auto dots) {
      const F* const right = panels + p * factor_layout<Acc, F>{out_, in_, l.rank}.B_panel();
      multiply<true, 2, Acc, F, tile_rows, dots()>(static_cast<int>(rows.rows), sums + rows.first_row * stride, stride,
                                                   U_ + rows.U, rows.rows, right, 0, l.rank, ahead_of<2, Acc>(right));
    });
  }
  /// The next runs of a tile: different rows, adapters of one rank and kind.
  bool expand_together(index_t r, index_t end) const {
    const auto run_at = [&](index_t k) -> const detail::run& { return tokens_.run_at(k); };
    return are_singles(run_at, r, end, [&](index_t n) {
      const part<Acc>&l = tokens_.part_of(run_at(r + n)), &first = tokens_.part_of(run_at(r));
      const bool apart = n == 0 || run_at(r + n).first_row != run_at(r + n - 1).first_row;
      return apart && l.rank == first.rank && l.format == first.format && l.rounded_U == first.rounded_U;
    });
  }
  void expand_singles(index_t begin, index_t p, Acc* sums, index_t stride) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_at(begin));
    with_B(l, [&]<class F>(const F*, auto dots) {
      const index_t panel = factor_layout<Acc, F>{out_, in_, l.rank}.B_panel();
      single<Acc, F> rows[singles];
      for (index_t n = 0; n < singles; ++n) {
        const detail::run& r = tokens_.run_at(begin + n);
        rows[n] = {U_ + r.U, 1, static_cast<const F*>(tokens_.part_of(r).B) + p * panel, sums + r.first_row * stride};
      }
      multiply_singles<dots(), 2>(rows, l.rank);
    });
  }
  /// call(panels of lora_B, whether they are multiplied by dot products).
  template <class Call>
  void with_B(const part<Acc>& l, const Call& call) const {
    with_elements<Acc>(l.B, l.format, [&]<class F>(const F* panels) {
      if (l.rounded_U)
        with_dots<F>([&](auto dots) { call(panels, dots); });
      else
        call(panels, std::false_type());
    });
  }

  /// Step n of so many over the panels of W fetches its share of the adapters' panels: in one burst they would stall it.
  void fetch_parts(index_t p, index_t count, index_t n, index_t steps) const {
    constexpr index_t most = 4096;  // what follows is a stream, which the hardware fetches
    const index_t parts = tokens_.parts_count(), line = static_cast<index_t>(memory_alignment);
    for (index_t q = parts * n / steps; q < pieces(parts * (n + 1), steps); ++q) {
      const part<Acc>& l = tokens_.parts()[q];
      with_elements<Acc>(l.B, l.format, [&]<class F>(const F* panels) {
        const factor_layout<Acc, F> where{out_, in_, l.rank};
        const index_t bytes = count * where.B_panel() * static_cast<index_t>(sizeof(F));
        // A part that several steps share is cut among them.
        const index_t shares = std::max<index_t>(1, steps / std::max<index_t>(1, parts));
        const index_t share = n % shares, limit = std::min(bytes, most);
        for (index_t b = limit * share / shares / line * line; b < limit * (share + 1) / shares; b += line)
          prefetch(reinterpret_cast<const char*>(panels + p * where.B_panel()) + b);
      });
    }
  }

  index_t out_, in_;
  weight_source<Acc, T> W_;
  const plan<Acc>& tokens_;
  bool widened_;  ///< whether the activations are needed widened
  int threads_;
  index_t group_;  ///< panels of outputs that pass together (see panels_together)
  index_t per_thread_ = 0;
  layout::place<Acc> X_place_, pairs_place_, U_place_, thread_place_;
  Acc *X_ = nullptr, *pairs_ = nullptr, *U_ = nullptr;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
