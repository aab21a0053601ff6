// SPDX-License-Identifier: Apache-2.0
//
// What adapters add to a product, for a block of tokens: first U = s * (A * X) of every run of
// rows, then s * B * (A * X) as R more steps of the chains that have passed W.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lora/kernel/product/packed_tokens.hpp"
#include "lora/kernel/threads.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// A panel of outputs, or two neighbouring ones, for a block of tokens: their sums, and how far the
/// ranks have come.
template <class Acc>
struct output_panel {
  index_t p = 0, count = 0;
  Acc* sums = nullptr;
  index_t run = 0;      ///< the next to be multiplied
  index_t fetched = 0;  ///< the next whose panel of lora_B is fetched, after what is left of one
  std::uintptr_t line = 0, end = 0;  ///< what is left, and no pointers: they may lie outside
};

/// One panel of some rows of sums, times the gains of its outputs.
template <class Acc>
void multiply_by_gain(Acc* row, index_t rows, index_t stride, const Acc* gain) {
  for (; rows > 0; --rows, row += stride)
    for (index_t j = 0; j < tile_cols<Acc>; ++j) row[j] *= gain[j];
}
/// row += scale * more. One function for every caller: its multiply-adds are fused in all of them
/// or in none.
template <class Acc>
LORA_DETAIL_APART void add_scaled(Acc* row, index_t count, Acc scale, const Acc* more) {
  for (index_t j = 0; j < count; ++j) row[j] += scale * more[j];
}

template <class Acc, bool May_dot>
class rank_product {
 public:
  static constexpr index_t width = tile_cols<Acc>;
  /// Runs that pass one chunk of lora_A together, at most, and the sums that shrink needs.
  static constexpr index_t most_runs = most_runs_together,
                           sums_of_shrink = most_runs * tile_rows * width;

  rank_product(index_t out_features, index_t in_features, const plan<Acc>& tokens,
               const activations<Acc, May_dot>& inputs, int threads)
      : out_(out_features), in_(in_features), tokens_(tokens), X_(inputs), threads_(threads) {}

  void claim(layout& l) { U_place_ = l.take<Acc>(tokens_.most_U_in_block()); }
  void bind(std::byte* memory) { U_ = U_place_.in(memory); }

  /// U of all runs of the block. A task is a panel of ranks for a few runs.
  void shrink(const tile_block& tiles, const team& team, Acc* sums) const {
    const index_t first = tokens_.first_by_part(tiles.begin),
                  runs = tokens_.first_by_part(tiles.end) - first;
    if (runs == 0) return;
    index_t most_panels = 0;
    for (index_t p = 0; p < tokens_.parts_count(); ++p)
      most_panels = std::max(most_panels, pieces(tokens_.parts()[p].rank, width));
    const bool pairs = runs * most_panels >= 2 * threads_;  // else a thread would have none
    // As many as leave two tasks for each thread; single rows as many as are multiplied together,
    // if that leaves one.
    const index_t fewest =
        runs >= singles * threads_ && all_single(first, first + runs) ? singles : 1;
    const index_t together =
        std::clamp<index_t>(runs * most_panels / (2 * threads_), fewest, most_runs);
    team.for_each(pieces(runs, together) * most_panels, [&](index_t task) {
      const index_t begin = first + task / most_panels * together,
                    end = std::min(begin + together, first + runs);
      for (index_t r = begin; r < end;) {
        if (task % most_panels == 0 && shrink_together(r, end)) {
          shrink_singles(tiles, r, sums);
          r += singles;
          continue;
        }
        index_t next = r + 1;
        while (next < end && tokens_.run_by_part(next).part == tokens_.run_by_part(r).part) ++next;
        shrink_runs(tiles, r, next, task % most_panels, pairs, sums);
        r = next;
      }
    });
  }

  /// Lines of the panels of lora_B that one output panel (or `count`) of a block reads. What `most`
  /// bytes of one adapter do not hold is a stream, which the hardware fetches.
  index_t lines(const tile_block& tiles, index_t count, index_t most) const {
    index_t all = 0;
    for (index_t r = tokens_.first_run(tiles.begin); r < last_fetched(tiles); ++r)
      if (is_fetched(tiles, r)) all += pieces(std::min(count * bytes_of_B(r), most), cache_line);
    return all;
  }
  /// Fetches the next lines of what the panel will read.
  void fetch(const tile_block& tiles, output_panel<Acc>& panel, index_t lines, index_t most) const {
    for (; lines > 0; --lines) {
      while (panel.line >= panel.end) {
        if (panel.fetched == last_fetched(tiles)) return;
        const index_t run = panel.fetched++;
        if (!is_fetched(tiles, run)) continue;
        const part<Acc>& l = tokens_.part_of(tokens_.run_at(run));
        index_t begin = panel.p, end = panel.p + panel.count;
        while (begin < end && !l.meets(begin)) ++begin;
        while (begin < end && !l.meets(end - 1)) --end;
        if (begin == end) continue;
        panel.line = B_at(run, begin);
        panel.end = panel.line +
                    static_cast<std::uintptr_t>(std::min((end - begin) * bytes_of_B(run), most));
      }
      prefetch(reinterpret_cast<const void*>(panel.line));
      panel.line += static_cast<std::uintptr_t>(cache_line);
    }
  }

  /// The chains of the base go on through the ranks of the runs before `end`, or a few more.
  void expand(const tile_block& tiles, output_panel<Acc>& panel, index_t end) const {
    const index_t stride = panel.count * width;
    while (panel.run < end) {
      const index_t r = panel.run, tile = tokens_.run_at(r).tile;
      const bool together = expand_together(r, tokens_.first_run(tile + 1));
      for (index_t c = 0; c < panel.count; ++c) {
        Acc* const of_panel = X_.sums_of(tiles, tile, panel.count, panel.sums) + c * width;
        if (together && tokens_.part_of(tokens_.run_at(r)).fills(panel.p + c, out_))
          expand_singles(r, panel.p + c, of_panel, stride);
        else
          for (index_t n = 0; n < (together ? singles : 1); ++n)
            expand_run(tokens_.run_at(r + n), panel.p + c, of_panel, stride);
      }
      panel.run += together ? singles : 1;
    }
  }
  /// Through all that are left. What all tokens have passes several tiles chunk by chunk, as W
  /// does.
  void expand_rest(const tile_block& tiles, output_panel<Acc>& panel) const {
    if (!tokens_.same_for_all() || panel.count != 1 || tiles.count() < 3)
      return expand(tiles, panel, tokens_.first_run(tiles.end));
    for (index_t q = 0; q < tokens_.parts_count(); ++q)
      expand_chunks(tiles, q, panel.p, panel.sums);
  }

 private:
  /// Whether runs r ... of run_at(r) may be multiplied together: there are enough before `end`, of
  /// one row each, and alike(n) holds for each n of them.
  template <class RunAt, class Alike>
  static bool are_singles(const RunAt& run_at, index_t r, index_t end, const Alike& alike) {
    if (r + singles > end) return false;
    for (index_t n = 0; n < singles; ++n)
      if (run_at(r + n).rows != 1 || !alike(n)) return false;
    return true;
  }
  /// Of runs by part.
  bool all_single(index_t begin, index_t end) const {
    for (index_t r = begin; r < end; ++r)
      if (tokens_.run_by_part(r).rows != 1) return false;
    return true;
  }
  /// The next runs by part: ranks of one panel, of one format and width. More ranks are left to
  /// pairs of panels.
  bool shrink_together(index_t r, index_t end) const {
    const auto run_at = [&](index_t k) -> const run_of_rows& { return tokens_.run_by_part(k); };
    return are_singles(run_at, r, end, [&](index_t n) {
      const part<Acc>&l = tokens_.part_of(run_at(r + n)), &first = tokens_.part_of(run_at(r));
      return l.rank != 0 && l.rank <= width && l.format == first.format &&
             only_panel(l) == only_panel(first);
    });
  }
  /// The width of the only panel of ranks.
  index_t only_panel(const part<Acc>& l) const {
    return factor_layout<Acc, Acc>{out_, in_, l.rank}.A_width(0);
  }

  void shrink_singles(const tile_block& tiles, index_t begin, Acc* sums) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_by_part(begin));
    const index_t panel_width = only_panel(l), step = X_.chunk_of(tiles);
    std::fill_n(sums, singles * width, Acc(0));
    with_elements<Acc>(l.A, l.format, [&]<class F>(const F*) {
      X_.template with_multiplier_of<F>([&]<class M>(M multiplier) {
        for (index_t k = 0; k < in_; k += step) {
          single<Acc, F> rows[singles];
          for (index_t n = 0; n < singles; ++n) {
            const run_of_rows& r = tokens_.run_by_part(begin + n);
            const F* const right =
                static_cast<const F*>(tokens_.part_of(r).A) + panel_offset<F>(0, k, panel_width);
            rows[n] = {
                X_.at(tiles, r.tile, k, multiplier) + r.first_row, tokens_.rows(r.tile), right,
                sums + n * width,
                reinterpret_cast<std::uintptr_t>(right) + static_cast<std::uintptr_t>(fetch_ahead)};
          }
          if (panel_width == width)
            multiply_singles<M, 2>(rows, std::min(step, in_ - k));
          else
            multiply_singles<M, 1>(rows, std::min(step, in_ - k));
        }
      });
    });
    for (index_t n = 0; n < singles; ++n) {
      const run_of_rows& r = tokens_.run_by_part(begin + n);
      keep_U(r, 0, tokens_.part_of(r).rank, panel_width, sums + n * width);
    }
  }

  /// Runs begin ... end - 1 (by part) of one part, one panel of its ranks. A single run of few rows
  /// takes two panels at once where there are pairs for all threads: one has too few chains to keep
  /// the multipliers busy.
  void shrink_runs(const tile_block& tiles, index_t begin, index_t end, index_t panel, bool pairs,
                   Acc* sums) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_by_part(begin));
    if (panel * width >= l.rank) return;
    with_elements<Acc>(l.A, l.format, [&]<class F>(const F* panels) {
      const factor_layout<Acc, F> where{out_, in_, l.rank};
      const bool few = pairs && end - begin == 1 && tokens_.run_by_part(begin).rows <= paired_rows;
      const index_t first = few ? panel / 2 * 2 : panel;
      const bool paired =
          few && first * width + width < l.rank && where.A_width(first + 1) == width;
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
        keep_U(tokens_.run_by_part(r), panel * width, ranks,
               paired ? 2 * width : where.A_width(panel), sums + (r - begin) * tile_rows * width);
    });
  }

  template <int Vectors, class F>
  void multiply_runs(const tile_block& tiles, index_t begin, index_t end, const F* A,
                     index_t next_panel, Acc* sums) const {
    constexpr index_t panel_width = std::min(Vectors, 2) * simd<Acc>::width;
    constexpr int most_rows = Vectors == 4 ? paired_rows : tile_rows;
    const index_t step = X_.chunk_of(tiles);
    X_.template with_multiplier_of<F>([&]<class M>(M multiplier) {
      for (index_t k = 0; k < in_; k += step) {
        const index_t depth = std::min(step, in_ - k);
        const F* const right = A + panel_offset<F>(0, k, panel_width);
        const auto rows_of_run = [&](index_t n) {
          const run_of_rows& r = tokens_.run_by_part(begin + n);
          const Acc* const left = X_.at(tiles, r.tile, k, multiplier);
          return some_rows<Acc>{static_cast<int>(r.rows), sums + n * tile_rows * width,
                                left + r.first_row, tokens_.rows(r.tile)};
        };
        if constexpr (Vectors != 4)
          if (end - begin > 2) {
            multiply_all<M, Vectors, Acc>(0, end - begin, rows_of_run, right, depth,
                                          right + panel_size<F>(depth, panel_width));
            continue;
          }
        for (index_t n = 0; n < end - begin; ++n) {
          const auto to = rows_of_run(n);
          multiply<M, true, Vectors, most_rows>(
              to.rows, tile_job<Acc, F>{to.sums, std::max(Vectors / 2, 1) * panel_width, to.left,
                                        to.left_stride, right, next_panel, depth,
                                        ahead_of<Vectors, Acc>(right)});
        }
      }
    });
  }

  /// U as the left operand of the next product: U[rank * rows + row], times the row's factor, in
  /// double and rounded once: a factor need not fit the accumulator. Rounded to bfloat16 where the
  /// part says so; for dot products then pairs of ranks, as activations lie. The sums are used up.
  void keep_U(const run_of_rows& rows, index_t first_rank, index_t ranks, index_t sums_stride,
              Acc* sums) const {
    const double* const scales = tokens_.scales(rows);
    const bool rounded = tokens_.part_of(rows).rounded_U, pairs = rounded && X_.dots();
    for (index_t i = 0; i < rows.rows; ++i) {
      Acc* const row = sums + i * sums_stride;
      if (pairs)
        round_to_pairs(scales[i], ranks, row);
      else if (rounded)
        for (index_t j = 0; j < ranks; ++j)
          row[j] = static_cast<Acc>(bfloat16(scales[i] * static_cast<double>(row[j])));
      else
        for (index_t j = 0; j < ranks; ++j)
          row[j] = static_cast<Acc>(scales[i] * static_cast<double>(row[j]));
    }
    const index_t group = pairs ? 2 : 1, depth = pieces(ranks, group);
    Acc* const U = U_ + rows.U + first_rank / group * rows.rows;
    index_t done = 0;
    if constexpr (std::is_same_v<Acc, float>)
      done = transpose_rows([&](index_t i) { return sums + i * sums_stride; }, rows.rows, depth, U);
    for (index_t i = 0; i < rows.rows; ++i)
      for (index_t j = done; j < depth; ++j)
        std::memcpy(U + j * rows.rows + i, sums + i * sums_stride + j, sizeof(Acc));
  }
  /// Pairs of bfloat16 in the place of the first half of a row.
  static void round_to_pairs(double scale, index_t count, Acc* row) {
    const auto bits = [&](index_t j) -> std::uint32_t {
      return bfloat16(scale * static_cast<double>(row[j])).bits;
    };
    for (index_t j = 0; j < count; j += 2) {
      const std::uint32_t pair = bits(j) | (j + 1 < count ? bits(j + 1) << 16 : 0);
      std::memcpy(row + j / 2, &pair, sizeof pair);
    }
  }

  /// Adapters of all tokens are the same in every tile.
  index_t last_fetched(const tile_block& tiles) const {
    return tokens_.first_run(tokens_.same_for_all() ? tiles.begin + 1 : tiles.end);
  }
  /// Whether a run's factors are not those of the run before that has some.
  bool is_fetched(const tile_block& tiles, index_t r) const {
    const index_t first = tokens_.first_run(tiles.begin);
    index_t before = r - 1;
    while (before > first && tokens_.part_of(tokens_.run_at(before)).rank == 0) --before;
    return before < first || tokens_.run_at(r).part != tokens_.run_at(before).part;
  }
  /// One panel of the lora_B of a run's adapter: its bytes, and where it is.
  index_t bytes_of_B(index_t run) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_at(run));
    index_t bytes = 0;
    with_elements<Acc>(l.B, l.format, [&]<class F>(const F*) {
      bytes = factor_layout<Acc, F>{out_, in_, l.rank}.B_panel() * static_cast<index_t>(sizeof(F));
    });
    return bytes;
  }
  std::uintptr_t B_at(index_t run, index_t p) const {
    return reinterpret_cast<std::uintptr_t>(tokens_.part_of(tokens_.run_at(run)).B) +
           static_cast<std::uintptr_t>(tokens_.part_of(tokens_.run_at(run)).own_panel(p) *
                                       bytes_of_B(run));
  }

  /// A part of all tokens, chunk by chunk as W.
  void expand_chunks(const tile_block& tiles, index_t q, index_t p, Acc* sums) const {
    const part<Acc>& l = tokens_.parts()[q];
    if (!l.meets(p)) return;
    if (l.sort != part_sort::factors || !l.fills(p, out_)) {
      for (index_t t = tiles.begin; t < tiles.end; ++t)
        expand_run(tokens_.run_at(tokens_.first_run(t) + q), p, X_.sums_of(tiles, t, 1, sums),
                   width);
      return;
    }
    const index_t step = X_.chunk_of(tiles);
    with_B(l, [&]<class F, class M>(const F* panels, M) {
      const F* const panel =
          panels + l.own_panel(p) * factor_layout<Acc, F>{out_, in_, l.rank}.B_panel();
      for (index_t k = 0; k < l.rank; k += step) {
        const F* const right = panel + panel_offset<F>(0, k, width);
        const index_t depth = std::min(step, l.rank - k);
        const auto rows_of_run = [&](index_t n) {
          const index_t t = tiles.begin + n;
          const run_of_rows& r = tokens_.run_at(tokens_.first_run(t) + q);
          return some_rows<Acc>{static_cast<int>(r.rows), X_.sums_of(tiles, t, 1, sums),
                                U_ + r.U + k / M::depths * r.rows, r.rows};
        };
        const F* const next = k + step < l.rank ? right + panel_size<F>(depth, width) : right;
        multiply_all<M, 2, Acc>(0, tiles.count(), rows_of_run, right, depth, next);
      }
    });
  }
  void expand_run(const run_of_rows& rows, index_t p, Acc* sums, index_t stride) const {
    const part<Acc>& l = tokens_.part_of(rows);
    if (!l.meets(p)) return;
    if (l.sort != part_sort::factors) return change_sums(rows, l, p, sums, stride);
    Acc* const to = sums + rows.first_row * stride;
    const auto work = [&] {
      with_B(l, [&]<class F, class M>(const F* panels, M) {
        const F* const right =
            panels + l.own_panel(p) * factor_layout<Acc, F>{out_, in_, l.rank}.B_panel();
        multiply<M, true, 2>(static_cast<int>(rows.rows),
                             tile_job<Acc, F>{to, stride, U_ + rows.U, rows.rows, right, 0, l.rank,
                                              ahead_of<2, Acc>(right)});
      });
    };
    if (l.fills(p, out_)) return work();
    keep_others(l, p, rows.rows, to, stride, work);
  }
  /// work() on some rows of sums of panel p, which lies in the part's rows partly: the other
  /// outputs keep their bits, whatever U is.
  template <class Work>
  LORA_DETAIL_APART void keep_others(const part<Acc>& l, index_t p, index_t rows, Acc* sums,
                                     index_t stride, const Work& work) const {
    Acc before[tile_rows * width];
    for (index_t i = 0; i < rows; ++i) std::copy_n(sums + i * stride, width, before + i * width);
    work();
    const index_t begin = std::max<index_t>(0, l.first_row - p * width);
    const index_t end = std::min(width, l.first_row + l.rows - p * width);
    for (index_t i = 0; i < rows; ++i) {
      std::copy_n(before + i * width, begin, sums + i * stride);
      std::copy_n(before + i * width + end, width - end, sums + i * stride + end);
    }
  }
  /// A gain or an addend of some rows of a tile.
  void change_sums(const run_of_rows& rows, const part<Acc>& l, index_t p, Acc* sums,
                   index_t stride) const {
    Acc* row = sums + rows.first_row * stride;
    if (l.sort == part_sort::mark) return;
    if (l.sort == part_sort::gain)
      return multiply_by_gain(row, rows.rows, stride, l.values + l.own_panel(p) * width);
    const index_t first = tokens_.first(rows.tile) + rows.first_row;
    const index_t begin = std::max(p * width, l.first_row),
                  end = std::min((p + 1) * width, l.first_row + l.rows);
    for (index_t i = 0; i < rows.rows; ++i, row += stride) {
      const index_t token = tokens_.token(first + i),
                    column = l.columns == nullptr ? token : l.columns[token];
      add_scaled(row + (begin - p * width), end - begin, static_cast<Acc>(tokens_.scales(rows)[i]),
                 l.values + column * l.rows + (begin - l.first_row));
    }
  }
  /// The next runs of a tile: different rows, adapters of one rank and kind for the same outputs.
  bool expand_together(index_t r, index_t end) const {
    const auto run_at = [&](index_t k) -> const run_of_rows& { return tokens_.run_at(k); };
    return are_singles(run_at, r, end, [&](index_t n) {
      const part<Acc>&l = tokens_.part_of(run_at(r + n)), &first = tokens_.part_of(run_at(r));
      const bool apart =
          n == 0 || run_at(r + n).first_row > run_at(r + n - 1).first_row;  // no row twice
      return apart && l.rank != 0 && l.rank == first.rank && l.format == first.format &&
             l.rounded_U == first.rounded_U && l.same_rows(first);
    });
  }
  /// The next runs' panels are fetched meanwhile, if they are alike; else these, which are near.
  void expand_singles(index_t begin, index_t p, Acc* sums, index_t stride) const {
    const part<Acc>& l = tokens_.part_of(tokens_.run_at(begin));
    with_B(l, [&]<class F, class M>(const F*, M) {
      const index_t panel = factor_layout<Acc, F>{out_, in_, l.rank}.B_panel(),
                    at = l.own_panel(p) * panel;
      const index_t bytes = at * static_cast<index_t>(sizeof(F));
      single<Acc, F> rows[singles];
      for (index_t n = 0; n < singles; ++n) {
        const run_of_rows& r = tokens_.run_at(begin + n);
        const part<Acc>& one = tokens_.part_of(r);
        const part<Acc>& next =
            tokens_.part_of(tokens_.run_at(std::min(begin + n + singles, tokens_.runs() - 1)));
        const bool alike = next.rank == l.rank && next.format == l.format && next.same_rows(l);
        rows[n] = {U_ + r.U, 1, static_cast<const F*>(one.B) + at, sums + r.first_row * stride,
                   reinterpret_cast<std::uintptr_t>(alike ? next.B : one.B) +
                       static_cast<std::uintptr_t>(bytes)};
      }
      multiply_singles<M, 2>(rows, l.rank);
    });
  }
  /// call(panels of lora_B, how they are multiplied).
  template <class Call>
  void with_B(const part<Acc>& l, const Call& call) const {
    with_elements<Acc>(l.B, l.format, [&]<class F>(const F* panels) {
      if (l.rounded_U)
        X_.template with_multiplier_of<F>([&](auto multiplier) { call(panels, multiplier); });
      else
        call(panels, mul_add<Acc>());
    });
  }

  index_t out_, in_;
  const plan<Acc>& tokens_;
  const activations<Acc, May_dot>& X_;
  int threads_;
  layout::place<Acc> U_place_;
  Acc* U_ = nullptr;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
