// SPDX-License-Identifier: Apache-2.0
//
// The one product: Y = W * X + sum of B * (s * (A * X)). The ranks are R more steps of the same
// chains that run over in_features, so mixing adapters in costs what their bytes and FLOPs cost and
// no second pass over Y. Each output is one chain of multiply-adds from zero, in the order of
// in_features (by dot products: of pairs of them) and then of the ranks; threads, tiles and the
// other tokens of a batch change no bit.
//
// Order of the loops: a block of tokens; panels of outputs, shared among the threads; chunks of
// in_features; tiles of tokens. A chunk of a panel stays in the first-level cache while all tiles
// pass, and the next one is fetched meanwhile. The ranks of a panel follow its W; where a batch has
// many adapters, between the chunks of the next panel.
//
// It is instantiated over the accumulator and the stored format of packed panels alone: what reads
// X and an unpacked W and what writes Y comes as a function.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "lora/kernel/product/adapter_product.hpp"
#include "lora/kernel/threads.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// pack(panel, first depth, depths, destination): a chunk of a panel of W.
template <class T>
using pack_weight_function = function_ref<index_t, index_t, index_t, T*>;
/// finish(first output, outputs, token, sums): sums[j] is the result for output first + j.
template <class Acc>
using finish_function = function_ref<index_t, index_t, index_t, const Acc*>;

/// Where a product finds W: packed panels, a function that packs chunks, or nowhere (then only the
/// parts are computed).
template <class Acc, class T>
struct weight_source {
  const T* panels = nullptr;
  pack_weight_function<T> pack = {};
  bool dots = false;  ///< W * x by dot products: the elements of x are T, too (see has_dots)

  bool present() const { return panels != nullptr || bool(pack); }
};

template <class Acc, class T>
class product {
 public:
  /// all_pairs: the panels of all parts are bfloat16.
  product(index_t out_features, index_t in_features, const weight_source<Acc, T>& W,
          const plan<Acc>& tokens, bool all_pairs)
      : out_(out_features),
        in_(in_features),
        W_(W),
        tokens_(tokens),
        threads_(threads_for(work())),
        group_(panels_together()),
        X_(in_features, tokens, by_dots(), !by_dots() || !all_pairs),
        ranks_(out_features, in_features, tokens, X_, threads_) {}
  product(const product&) = delete;
  product& operator=(const product&) = delete;

  void claim(layout& l) {
    X_.claim(l);
    ranks_.claim(l);
    // Sums of two panels and a chunk of W for each thread; a page apart, because a processor
    // fetches on from what one thread reads into the next one's, and takes the lines from where
    // they are written.
    per_thread_ = std::max(2 * tokens_.most_rows_in_block() * width,
                           rank_product<Acc, may_dot>::sums_of_shrink) +
                  most_depth * width + apart;
    thread_place_ = l.take<Acc>(threads_ * per_thread_);
  }

  void run(std::byte* memory, const activation_source<Acc>& X, const finish_function<Acc>& finish) {
    X_.bind(memory);
    ranks_.bind(memory);
    Acc* const thread_memory = thread_place_.in(memory);
    parallel(threads_, [&](const team& team) {
      Acc* const sums = thread_memory + team.thread() * per_thread_;
      for (index_t first = 0; first < tokens_.tiles(); first += tokens_.tiles_in_block()) {
        const tile_block tiles{first, std::min(first + tokens_.tiles_in_block(), tokens_.tiles())};
        team.for_each(tiles.count(), [&](index_t t) { X_.pack(tiles, tiles.begin + t, X); });
        ranks_.shrink(tiles, team, sums);
        outputs(tiles, team, sums, finish);
      }
    });
  }

 private:
  static constexpr bool may_dot = has_dots<Acc, T>;
  static constexpr index_t width = tile_cols<Acc>,
                           most_depth = activations<Acc, may_dot>::most_depth;
  static constexpr index_t apart = 4096 / static_cast<index_t>(sizeof(Acc));
  static_assert(depth_of_one_tile <= most_depth &&
                sizeof(T) <= sizeof(Acc));  // what is packed lies in place of a chunk

  index_t panels() const { return pieces(out_, width); }
  double work() const {
    const double base = W_.present() ? static_cast<double>(out_) * static_cast<double>(in_) : 0;
    const double ranks = static_cast<double>(tokens_.most_U_in_block()) /
                         static_cast<double>(std::max<index_t>(1, tokens_.most_rows_in_block()));
    return (base + static_cast<double>(out_ + in_) * ranks) * static_cast<double>(tokens_.tokens());
  }

  bool by_dots() const { return may_dot && W_.dots; }
  /// Whether T must be widened before it is multiplied.
  bool widens() const { return !std::is_same_v<T, Acc> && !by_dots(); }
  /// Whether W goes from memory straight through so many tiles, each element once or twice.
  bool passes(index_t tiles) const {
    return W_.panels != nullptr &&
           (tiles == 1 || (tiles == 2 && tuned.bytes_between_panels != 0 && !widens()));
  }
  /// Where W passes, two panels of outputs together: few rows have too few chains in one, and
  /// memory reads two streams faster.
  index_t panels_together() const {
    const bool paired = tokens_.tiles() == 1 && tokens_.rows(0) <= paired_rows;
    return passes(tokens_.tiles()) && (paired || tuned.bytes_between_panels != 0) ? 2 : 1;
  }

  /// How the panels of a block pass W, and when lora_B is fetched for them.
  struct schedule {
    index_t step, steps;  ///< depths of W between two fetches
    bool passes;          ///< whether W passes all tiles straight from memory
    bool waits;  ///< whether a panel's ranks wait, and are multiplied while the next panel of W is
    index_t most;          ///< bytes of one adapter that are fetched
    index_t lines, every;  ///< so many lines before every so many tiles of a step
  };
  schedule schedule_of(const tile_block& tiles) const {
    const index_t step = tiles.count() == 1 ? depth_of_one_tile : X_.chunk_of(tiles);
    schedule s{.step = step,
               .steps = pieces(in_, step),
               .passes = passes(tiles.count()),
               .waits = false,
               .most = passes(tiles.count()) ? fetch_ahead : 4 * fetch_ahead,
               .lines = 0,
               .every = tiles.count()};
    if (!W_.present() || in_ == 0) return s;
    index_t lines = ranks_.lines(tiles, group_, s.most);
    // Different adapters for many tokens are much to read, more than the first-level cache holds
    // until it is multiplied, and many tiles leave time for it; widening W in that cache leaves no
    // room.
    s.waits = lines > most_lines_at_once && !tokens_.same_for_all() && !s.passes && !widens();
    if (s.waits) {
      s.most = std::numeric_limits<index_t>::max();
      lines = ranks_.lines(tiles, group_, s.most);
      constexpr index_t fewest = 8;  // to be worth a look
      s.every =
          pieces(tiles.count(), std::clamp<index_t>(lines / s.steps / fewest, 1, tiles.count()));
    }
    s.lines = pieces(lines, s.steps * pieces(tiles.count(), s.every));
    return s;
  }

  /// This thread's panels of outputs, for all tiles of the block.
  void outputs(const tile_block& tiles, const team& team, Acc* sums,
               const finish_function<Acc>& finish) const {
    const schedule s = schedule_of(tiles);
    const auto [begin, end] = team.share(pieces(panels(), group_));
    const index_t size = X_.rows_of(tiles) * width, first_run = tokens_.first_run(tiles.begin);
    Acc* const chunk = sums + per_thread_ - apart - most_depth * width;
    output_panel<Acc> last;
    for (index_t g = begin; g < end; ++g) {
      output_panel<Acc> now{g * group_, std::min(group_, panels() - g * group_),
                            s.waits ? sums + g % 2 * size : sums, first_run, first_run};
      std::fill_n(now.sums, size * now.count, Acc(0));
      if (W_.present()) multiply_weight(tiles, s, now, last, chunk);
      if (s.waits && g != begin) complete(tiles, last, finish);
      last = now;
      if (!s.waits || g + 1 == end) complete(tiles, last, finish);
    }
    team.wait();
  }

  /// The ranks that are left, and the outputs.
  void complete(const tile_block& tiles, output_panel<Acc>& panel,
                const finish_function<Acc>& finish) const {
    ranks_.expand_rest(tiles, panel);
    const index_t stride = panel.count * width, first = panel.p * width;
    for (index_t t = tiles.begin; t < tiles.end; ++t)
      for (index_t i = 0; i < tokens_.rows(t); ++i)
        finish(first, std::min(stride, out_ - first), tokens_.token(tokens_.first(t) + i),
               X_.sums_of(tiles, t, panel.count, panel.sums) + i * stride);
  }

  /// All of W for a panel; where the last one waits, its ranks between the chunks, those that were
  /// fetched during a chunk.
  void multiply_weight(const tile_block& tiles, const schedule& s, output_panel<Acc>& now,
                       output_panel<Acc>& last, Acc* chunk) const {
    const bool has_last = s.waits && last.sums != nullptr;
    for (index_t n = 0; n < s.steps; ++n) {
      const index_t k = n * s.step, depth = std::min(s.step, in_ - k);
      if (!s.waits) ranks_.fetch(tiles, now, s.lines, s.most);
      if (s.passes) {
        multiply_passing(tiles, now.p, now.count, k, depth, now.sums);
      } else if (!has_last) {
        multiply_chunk(tiles, now.p, k, depth, chunk, now.sums, [](index_t) {});
      } else {
        const index_t ready = last.fetched;
        index_t at = 0;
        multiply_chunk(tiles, now.p, k, depth, chunk, now.sums, [&](index_t t) {
          if (t != at) return;
          at += s.every;
          ranks_.fetch(tiles, last, s.lines, s.most);
        });
        ranks_.expand(tiles, last, ready);
      }
    }
  }

  /// Depths k ... k + depth - 1 of a panel, for all tiles.
  template <class Between>
  void multiply_chunk(const tile_block& tiles, index_t p, index_t k, index_t depth, Acc* chunk,
                      Acc* sums, const Between& between) const {
    if (W_.panels == nullptr) {
      T* const packed = reinterpret_cast<T*>(chunk);
      W_.pack(p, k, depth, packed);
      return multiply_tiles(tiles, k, depth, packed, packed, sums, between);
    }
    const T* const W = weight_at(p, k);
    const T* const next = W + panel_size<T>(depth, width);
    if (!widens() || tiles.count() < few_tiles)
      return multiply_tiles(tiles, k, depth, W, next, sums, between);
    // No panel waits here (see schedule_of), so there is nothing to do between the tiles.
    if constexpr (!std::is_same_v<T, Acc>)
      widen_and_multiply(tiles, k, depth, W, next, chunk, sums);
  }

  const T* weight_at(index_t p, index_t k) const {
    return W_.panels + p * panel_size<T>(in_, width) + panel_offset<T>(0, k, width);
  }

  /// Depths k ... k + depth - 1 of one or two panels, straight from memory through one or two
  /// tiles.
  void multiply_passing(const tile_block& tiles, index_t p, index_t count, index_t k, index_t depth,
                        Acc* sums) const {
    const T* const right = weight_at(p, k);
    const index_t next_panel = panel_size<T>(in_, width);
    X_.template with_multiplier_of<T>([&]<class M>(M multiplier) {
      const auto left_of = [&](index_t t) { return X_.at(tiles, t, k, multiplier); };
      if (count == 2 && tiles.count() == 1 && tokens_.rows(tiles.begin) <= paired_rows) {
        const auto rows = static_cast<int>(tokens_.rows(tiles.begin));
        const Acc* const left = left_of(tiles.begin);
        if (rows <= 2)  // nothing but two streams, which the hardware fetches
          multiply<M, false, 4, 2>(
              rows, tile_job<Acc, T>{sums, 2 * width, left, rows, right, next_panel, depth});
        else
          multiply<M, true, 4, paired_rows>(
              rows, tile_job<Acc, T>{sums, 2 * width, left, rows, right, next_panel, depth,
                                     ahead_of<4, Acc>(right)});
        return;
      }
      constexpr index_t bytes_of_depth = width * static_cast<index_t>(sizeof(T));
      static_assert(tuned.bytes_between_panels % (bytes_of_depth * depth_group<T>) == 0);
      const index_t step =
          tuned.bytes_between_panels != 0 ? tuned.bytes_between_panels / bytes_of_depth : depth;
      constexpr index_t ahead = tuned.bytes_between_panels == 0 ? fetch_ahead : fetch_ahead_of_two;
      for (index_t d = 0; d < depth; d += step)
        for (index_t c = 0; c < count; ++c)
          for (index_t t = tiles.begin; t < tiles.end; ++t) {
            const index_t rows = tokens_.rows(t);
            const T* const from = right + c * next_panel + d * width;
            const Acc* const left = left_of(t) + d / M::depths * rows;
            Acc* const to = X_.sums_of(tiles, t, count, sums) + c * width;
            multiply<M, true, 2>(
                static_cast<int>(rows),
                tile_job<Acc, T>{to, count * width, left, rows, from, 0, std::min(step, depth - d),
                                 ahead_of<2, Acc>(from, ahead)});
          }
    });
  }

  /// All tiles by one chunk, a part of a panel. `next` is what the next chunk is made of.
  /// between(n) is called before tile n of them.
  template <class Between>
  void multiply_tiles(const tile_block& tiles, index_t k, index_t depth, const T* right,
                      const T* next, Acc* sums, const Between& between) const {
    X_.template with_multiplier_of<T>([&]<class M>(M multiplier) {
      const auto at = [&, rows_of_tile = X_.rows_by_tile(tiles, k, multiplier, sums)](index_t n) {
        between(n);
        return rows_of_tile(n);
      };
      multiply_all<M, 2, Acc>(0, tiles.count(), at, right, depth, next);
    });
  }

  /// The same where W is widened first: by the first tile on its way, if that is a full one.
  void widen_and_multiply(const tile_block& tiles, index_t k, index_t depth, const T* W,
                          const T* next, Acc* chunk, Acc* sums) const {
    const auto rows_of_tile = X_.rows_by_tile(tiles, k, mul_add<Acc>(), sums);
    const some_rows<Acc> first = rows_of_tile(0);
    const bool full = first.rows == tile_rows;
    if (full)
      multiply_rows<mul_add<Acc>, true, tile_rows, 2, true, true>(tile_job<Acc, T>{
          first.sums, width, first.left, tile_rows, W, 0, depth,
          lookahead::share(
              next,
              pieces(panel_size<T>(depth, width) * static_cast<index_t>(sizeof(T)), tiles.count()),
              0, pieces(depth, depth_group<T>)),
          chunk});
    else
      widen_chunk(W, depth, chunk);
    multiply_all<mul_add<Acc>, 2, Acc>(full ? 1 : 0, tiles.count(), rows_of_tile, chunk, depth,
                                       next);
  }

  static void widen_chunk(const T* from, index_t depth, Acc* to) {
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Acc, float>) {
      for (index_t k = 0; k < depth; k += 2)
        for (int j = 0; j < 2; ++j) {
          const T* const pairs = from + k * width + 2 * j * simd<Acc>::width;
          simd<Acc>::store(to + k * width + j * simd<Acc>::width, simd<Acc>::load_even(pairs));
          if (k + 1 < depth)
            simd<Acc>::store(to + (k + 1) * width + j * simd<Acc>::width,
                             simd<Acc>::load_odd(pairs));
        }
    } else {
      static_assert(std::is_same_v<T, float16> && std::is_same_v<Acc, float>);
      for (index_t e = 0; e < depth * width; e += simd<Acc>::width)
        simd<Acc>::store(to + e, simd<Acc>::load_half(from + e));
    }
  }

  index_t out_, in_;
  weight_source<Acc, T> W_;
  const plan<Acc>& tokens_;
  int threads_;
  index_t group_;  ///< panels of outputs that pass together (see panels_together)
  activations<Acc, may_dot> X_;
  rank_product<Acc, may_dot> ranks_;
  index_t per_thread_ = 0;
  layout::place<Acc> thread_place_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
