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
/// pack(token, step, destination): destination[k * step] becomes element k of a token's activations.
template <class Acc>
using pack_token_function = function_ref<index_t, index_t, Acc*>;
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

/// Depths of a panel that are handled at a time: with one tile, the steps between two fetches of the adapters' panels; with
/// several, what stays in the first-level cache with a tile's activations (256 x 16 floats are 16 KiB).
inline constexpr index_t depth_of_one_tile = 512;
inline constexpr index_t depth_chunk = 256;

template <class Acc, class T>
class product {
 public:
  product(index_t out_features, index_t in_features, const weight_source<Acc, T>& W, const plan<Acc>& tokens)
      : out_(out_features),
        in_(in_features),
        W_(W),
        tokens_(tokens),
        group_(tokens.tiles() == 1 && tokens.rows(0) <= 2 && W.panels != nullptr ? 2 : 1),
        threads_(threads_for(work())) {}

  void claim(layout& l) {
    const index_t rows = tokens_.most_rows_in_block();
    X_place_ = l.take<Acc>(rows * in_);
    U_place_ = l.take<Acc>(tokens_.most_U_in_block());
    // A thread's sums and its chunk of W.
    per_thread_ = std::max(rows * group_, runs_together * tile_rows) * width + depth_chunk * width;
    thread_place_ = l.take<Acc>(threads_ * per_thread_);
  }

  void run(std::byte* memory, const pack_token_function<Acc>& pack_X, const finish_function<Acc>& finish) {
    X_ = X_place_.in(memory);
    U_ = U_place_.in(memory);
    Acc* const thread_memory = thread_place_.in(memory);
    parallel(threads_, [&](const team& team) {
      Acc* const sums = thread_memory + team.thread() * per_thread_;
      for (index_t first = 0; first < tokens_.tiles(); first += tokens_.tiles_in_block()) {
        const block tiles{first, std::min(first + tokens_.tiles_in_block(), tokens_.tiles())};
        team.for_each(tiles.end - tiles.begin, [&](index_t t) { pack_tile(tiles, tiles.begin + t, pack_X); });
        shrink_all(tiles, team, sums);
        if (by_dots()) team.for_each(tiles.end - tiles.begin, [&](index_t t) { pair_tile(tiles, tiles.begin + t); });
        team.for_each(pieces(panels(), group_), [&](index_t g) { outputs(tiles, g * group_, sums, finish); });
      }
    });
  }

 private:
  static constexpr index_t width = tile_cols<Acc>;
  /// Below so many tiles a panel of 16 bits is widened anew for each.
  static constexpr index_t few_tiles = 4;
  /// Runs that pass one chunk of lora_A together.
  static constexpr index_t runs_together = 4;
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

  index_t first_place(const block& tiles) const { return tokens_.first(tiles.begin); }
  Acc* X_of(const block& tiles, index_t tile) const { return X_ + (tokens_.first(tile) - first_place(tiles)) * in_; }
  Acc* sums_of(const block& tiles, index_t tile, index_t panels, Acc* sums) const {
    return sums + (tokens_.first(tile) - first_place(tiles)) * width * panels;
  }

  void pack_tile(const block& tiles, index_t tile, const pack_token_function<Acc>& pack_X) const {
    const index_t rows = tokens_.rows(tile);
    for (index_t i = 0; i < rows; ++i) pack_X(tokens_.token(tokens_.first(tile) + i), rows, X_of(tiles, tile) + i);
  }

  bool by_dots() const {
    if constexpr (has_dots<Acc, T>)
      return W_.dots;
    else
      return false;
  }
  /// A tile's activations, which were widened, as pairs of depths in the bits of one accumulator each, in the same memory:
  /// a pair is written where both of its elements, or earlier ones, were read.
  void pair_tile(const block& tiles, index_t tile) const {
    if constexpr (has_dots<Acc, T>) {
      const index_t rows = tokens_.rows(tile);
      Acc* const X = X_of(tiles, tile);
      for (index_t k = 0; k < in_; k += 2)
        for (index_t i = 0; i < rows; ++i) {
          const std::uint32_t even = std::bit_cast<std::uint32_t>(X[k * rows + i]) >> 16;
          const std::uint32_t odd = k + 1 < in_ ? std::bit_cast<std::uint32_t>(X[(k + 1) * rows + i]) >> 16 : 0;
          const std::uint32_t pair = even | odd << 16;
          std::memcpy(X + k / 2 * rows + i, &pair, sizeof pair);
        }
    }
  }
  /// Where a tile's activations at a depth begin; with dots a depth is even.
  const Acc* left_at(const block& tiles, index_t tile, index_t k) const {
    return X_of(tiles, tile) + (by_dots() ? k / 2 : k) * tokens_.rows(tile);
  }

  /// U = s * (A * X) of all runs of the block. A task is a panel of ranks for a few runs.
  void shrink_all(const block& tiles, const team& team, Acc* sums) const {
    const index_t first = tokens_.first_run(tiles.begin), runs = tokens_.first_run(tiles.end) - first;
    if (runs == 0) return;
    index_t most_panels = 0;
    for (index_t p = 0; p < tokens_.parts_count(); ++p)
      most_panels = std::max(most_panels, pieces(tokens_.parts()[p].rank, width));
    team.for_each(pieces(runs, runs_together) * most_panels, [&](index_t task) {
      const index_t begin = first + task / most_panels * runs_together, end = std::min(begin + runs_together, first + runs);
      for (index_t r = begin; r < end;) {
        index_t next = r + 1;
        while (next < end && tokens_.run_by_part(next).part == tokens_.run_by_part(r).part) ++next;
        shrink(tiles, r, next, task % most_panels, sums);
        r = next;
      }
    });
  }

  /// Runs begin ... end - 1 (by part) of one part, one panel of its ranks. A single run of one or two rows takes two panels
  /// at once: one has too few chains to keep the multipliers busy.
  void shrink(const block& tiles, index_t begin, index_t end, index_t panel, Acc* sums) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_by_part(begin));
    if (panel * width >= l.rank) return;
    with_elements<Acc>(l.A, l.format, [&]<class F>(const F* panels) {
      const factor_layout<Acc, F> where{out_, in_, l.rank};
      const bool few = end - begin == 1 && tokens_.run_by_part(begin).rows <= 2;
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
    const index_t step = end - begin == 1 ? in_ : depth_chunk;
    for (index_t k = 0; k < in_; k += step)
      for (index_t r = begin; r < end; ++r) {
        const detail::run& rows = tokens_.run_by_part(r);
        const index_t stride = tokens_.rows(rows.tile);
        const Acc* const left = X_of(tiles, rows.tile) + k * stride + rows.first_row;
        const F* const right = A + panel_offset<F>(0, k, panel_width);
        const index_t depth = std::min(step, in_ - k);
        if constexpr (Vectors == 4)
          multiply<true, 4, Acc, F, 2>(static_cast<int>(rows.rows), sums, 2 * width, left, stride, right, next_panel, depth,
                                       ahead_of<4, Acc>(right));
        else
          multiply<true, Vectors>(static_cast<int>(rows.rows), sums + (r - begin) * tile_rows * width, panel_width, left,
                                  stride, right, 0, depth, ahead_of<Vectors, Acc>(right));
      }
  }

  /// U as the left operand of the next product: U[rank * rows + row], times the row's factor, in double and rounded once: a
  /// factor need not fit the accumulator.
  void keep_U(const detail::run& rows, index_t first_rank, index_t ranks, index_t sums_stride, const Acc* sums) const {
    Acc* const U = U_ + rows.U + first_rank * rows.rows;
    const double* const scales = tokens_.scales(rows);
    for (index_t j = 0; j < ranks; ++j)
      for (index_t i = 0; i < rows.rows; ++i)
        U[j * rows.rows + i] = static_cast<Acc>(scales[i] * static_cast<double>(sums[i * sums_stride + j]));
  }

  /// One or two neighbouring panels of outputs, for all tiles of the block.
  void outputs(const block& tiles, index_t p, Acc* sums, const finish_function<Acc>& finish) const {
    const index_t count = std::min(group_, panels() - p);
    const index_t stride = count * width;
    const index_t rows = tokens_.first(tiles.end - 1) + tokens_.rows(tiles.end - 1) - first_place(tiles);
    std::fill_n(sums, rows * stride, Acc(0));
    if (W_.present()) multiply_weight(tiles, p, count, sums);
    multiply_parts(tiles, p, count, sums);
    for (index_t t = tiles.begin; t < tiles.end; ++t)
      for (index_t i = 0; i < tokens_.rows(t); ++i) {
        const index_t token = tokens_.token(tokens_.first(t) + i);
        finish(p * width, std::min(stride, out_ - p * width), token, sums_of(tiles, t, count, sums) + i * stride);
      }
  }

  void multiply_weight(const block& tiles, index_t p, index_t count, Acc* sums) const {
    const bool one = tiles.end - tiles.begin == 1 && W_.panels != nullptr;
    Acc* const chunk = sums + per_thread_ - depth_chunk * width;
    const index_t step = one ? depth_of_one_tile : depth_chunk;
    const index_t steps = pieces(in_, step);
    for (index_t n = 0; n < steps; ++n) {
      const index_t k = n * step, depth = std::min(step, in_ - k);
      fetch_parts(p, n, steps);
      if (one) {
        multiply_one_tile(tiles, p, count, k, depth, sums);
      } else if (W_.panels == nullptr) {
        T* const packed = reinterpret_cast<T*>(chunk);
        W_.pack(p, k, depth, packed);
        multiply_tiles(tiles, k, depth, packed, static_cast<const T*>(nullptr), sums);
      } else if (std::is_same_v<T, Acc> || by_dots() || tiles.end - tiles.begin < few_tiles) {
        multiply_tiles(tiles, k, depth, weight_at(p, k), weight_at(p, k) + panel_size<T>(depth, width), sums);
      } else {
        widen_chunk(weight_at(p, k), depth, chunk);
        multiply_tiles(tiles, k, depth, chunk, weight_at(p, k) + panel_size<T>(depth, width), sums);
      }
    }
  }

  const T* weight_at(index_t p, index_t k) const {
    return W_.panels + p * panel_size<T>(in_, width) + panel_offset<T>(0, k, width);
  }

  /// The tile of a call that has one: W goes from memory straight through the tile.
  void multiply_one_tile(const block& tiles, index_t p, index_t count, index_t k, index_t depth, Acc* sums) const {
    const auto rows = static_cast<int>(tokens_.rows(tiles.begin));
    const T* const right = weight_at(p, k);
    with_dots<T>([&](auto dots) {
      const Acc* const left = left_at(tiles, tiles.begin, k);
      if (count == 1)
        multiply<true, 2, Acc, T, tile_rows, dots()>(rows, sums, width, left, rows, right, 0, depth,
                                                     ahead_of<2, Acc>(right));
      else
        multiply<true, 4, Acc, T, 2, dots()>(rows, sums, 2 * width, left, rows, right, panel_size<T>(in_, width), depth,
                                             ahead_of<4, Acc>(right));
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
  /// that is not known; every tile fetches its share of it: while it multiplies, or before, where the shares are small.
  template <class R, class N>
  void multiply_tiles(const block& tiles, index_t k, index_t depth, const R* right, const N* next, Acc* sums) const {
    const index_t count = tiles.end - tiles.begin, line = static_cast<index_t>(memory_alignment);
    const index_t bytes = next == nullptr ? 0 : depth * width * static_cast<index_t>(sizeof(N));
    const bool few = count < few_tiles;
    with_dots<R>([&](auto dots) {
      for (index_t t = tiles.begin; t < tiles.end; ++t) {
        const index_t n = t - tiles.begin;
        const auto rows = static_cast<int>(tokens_.rows(t));
        Acc* const tile_sums = sums_of(tiles, t, 1, sums);
        const Acc* const left = left_at(tiles, t, k);
        const auto* const share = reinterpret_cast<const char*>(next) + bytes * n / count / line * line;
        if (few && bytes != 0) {
          multiply<true, 2, Acc, R, tile_rows, dots()>(
              rows, tile_sums, width, left, rows, right, 0, depth,
              fetching{reinterpret_cast<std::uintptr_t>(share), pieces(bytes, count * pieces(depth, depth_group<R>))});
        } else {
          for (index_t b = 0; b < bytes / count; b += line) prefetch(share + b);
          multiply<false, 2, Acc, R, tile_rows, dots()>(rows, tile_sums, width, left, rows, right, 0, depth);
        }
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
    const index_t stride = count * width;
    for (index_t t = tiles.begin; t < tiles.end; ++t)
      for (index_t r = tokens_.first_run(t); r < tokens_.first_run(t + 1); ++r) {
        const detail::run& rows = tokens_.run_at(r);
        const part<Acc>& l = tokens_.part_of(rows);
        with_elements<Acc>(l.B, l.format, [&]<class F>(const F* panels) {
          const factor_layout<Acc, F> where{out_, in_, l.rank};
          for (index_t c = 0; c < count; ++c)
            multiply<true, 2>(static_cast<int>(rows.rows),
                              sums_of(tiles, t, count, sums) + rows.first_row * stride + c * width, stride, U_ + rows.U,
                              rows.rows, panels + (p + c) * where.B_panel(), 0, l.rank,
                              ahead_of<2, Acc>(panels + (p + c) * where.B_panel()));
        });
      }
  }

  /// Step n of so many over a panel of W fetches its share of the adapters' panels: in one burst they would stall it.
  void fetch_parts(index_t p, index_t n, index_t steps) const {
    constexpr index_t most = 4096;  // what follows is a stream, which the hardware fetches
    const index_t parts = tokens_.parts_count(), line = static_cast<index_t>(memory_alignment);
    for (index_t q = parts * n / steps; q < pieces(parts * (n + 1), steps); ++q) {
      const part<Acc>& l = tokens_.parts()[q];
      with_elements<Acc>(l.B, l.format, [&]<class F>(const F* panels) {
        const factor_layout<Acc, F> where{out_, in_, l.rank};
        const index_t bytes = where.B_panel() * static_cast<index_t>(sizeof(F));
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
  index_t group_;
  int threads_;
  index_t per_thread_ = 0;
  layout::place<Acc> X_place_, U_place_, thread_place_;
  Acc *X_ = nullptr, *U_ = nullptr;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
