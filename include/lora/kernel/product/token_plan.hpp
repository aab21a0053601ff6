// SPDX-License-Identifier: Apache-2.0
//
// Which tokens a product handles together: tiles of tokens, and in each tile the runs of
// neighbouring rows that one adapter corrects. Tokens are taken in an order that brings those with
// the same adapters together; activations are not moved, the order is one of indices.
#pragma once

#include <algorithm>
#include <cstddef>

#include "lora/kernel/product/packed_factors.hpp"
#include "lora/kernel/scratch.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Which of a call's parts each token gets, and how strongly. Three forms: all parts for every
/// token (begin is null), or token t gets parts index[begin[t]] ... index[begin[t + 1] - 1], in
/// this order, times weight[...] (1 where null).
struct token_parts {
  index_t parts = 0;
  const index_t* begin = nullptr;
  const index_t* index = nullptr;
  const double* weight = nullptr;

  bool same_for_all() const { return begin == nullptr; }
  index_t count(index_t token) const {
    return same_for_all() ? parts : begin[token + 1] - begin[token];
  }
  index_t part(index_t token, index_t n) const {
    return same_for_all() ? n : index[begin[token] + n];
  }
  double strength(index_t token, index_t n) const {
    return same_for_all() || weight == nullptr ? 1.0 : weight[begin[token] + n];
  }
  /// By the lists of parts, whatever their strengths.
  bool before(index_t a, index_t b) const {
    return std::lexicographical_compare(index + begin[a], index + begin[a + 1], index + begin[b],
                                        index + begin[b + 1]);
  }
  bool same(index_t a, index_t b) const { return !before(a, b) && !before(b, a); }
};

/// Rows first_row ... first_row + rows - 1 of a tile and the part that corrects them.
struct run_of_rows {
  index_t tile, first_row, rows, part;
  index_t U;       ///< where its block of U begins: rank x rows
  index_t scales;  ///< where the factors of its rows begin
};

/// Tokens and runs of one product. Lives in scratch that the caller provides.
template <class Acc>
class plan {
 public:
  /// rank_of_token: the largest sum of ranks that one token has.
  plan(index_t tokens, index_t in_features, const token_parts& who, index_t rank_of_token)
      : tokens_(tokens),
        tiles_in_block_(tiles_of(in_features)),
        who_(who),
        tiles_(pieces(tokens, tile_rows)),
        each_(tokens / std::max<index_t>(1, tiles_)),
        more_(tokens % std::max<index_t>(1, tiles_)),
        rank_of_token_(rank_of_token),
        assignments_(who.same_for_all() ? tokens * who.parts : who.begin[tokens]),
        run_capacity_(who.same_for_all() ? tiles_ * who.parts : assignments_) {}

  void claim(layout& l) {
    if (!who_.same_for_all()) order_place_ = l.take<index_t>(tokens_);
    runs_place_ = l.take<run_of_rows>(run_capacity_);
    by_part_place_ = l.take<index_t>(run_capacity_);
    first_run_place_ = l.take<index_t>(tiles_ + 1);
    first_by_part_place_ = l.take<index_t>(tiles_ + 1);
    scales_place_ = l.take<double>(assignments_);
  }

  void make(std::byte* memory, const part<Acc>* parts) {
    parts_ = parts;
    runs_ = runs_place_.in(memory);
    by_part_ = by_part_place_.in(memory);
    first_run_ = first_run_place_.in(memory);
    first_by_part_ = first_by_part_place_.in(memory);
    scales_ = scales_place_.in(memory);
    if (!who_.same_for_all()) {
      order_ = order_place_.in(memory);
      for (index_t t = 0; t < tokens_; ++t) order_[t] = t;
      std::sort(order_, order_ + tokens_, [this](index_t a, index_t b) {
        return who_.before(a, b) || (!who_.before(b, a) && a < b);
      });
    }
    index_t runs = 0, scales = 0, U = 0, by_part = 0;
    for (index_t t = 0; t < tiles_; ++t) {
      if (t % tiles_in_block_ == 0) U = 0;
      first_run_[t] = runs;
      first_by_part_[t] = by_part;
      add_tile(t, runs, scales, U);
      for (index_t r = first_run_[t]; r < runs; ++r)
        if (parts_[runs_[r].part].rank != 0) by_part_[by_part++] = r;
    }
    first_run_[tiles_] = runs;
    first_by_part_[tiles_] = by_part;
    for (index_t first = 0; first < tiles_; first += tiles_in_block_) {
      index_t* const begin = by_part_ + first_by_part_[first];
      index_t* const end = by_part_ + first_by_part_[std::min(first + tiles_in_block_, tiles_)];
      std::sort(begin, end, [this](index_t a, index_t b) {
        return runs_[a].part != runs_[b].part ? runs_[a].part < runs_[b].part : a < b;
      });
    }
  }

  index_t tokens() const { return tokens_; }
  bool same_for_all() const { return who_.same_for_all(); }
  index_t tiles() const { return tiles_; }
  /// Tiles whose activations are held at once: a block.
  index_t tiles_in_block() const { return tiles_in_block_; }
  /// Tokens are spread evenly: 8 are 4 + 4, not 6 + 2.
  index_t first(index_t tile) const { return tile * each_ + std::min(tile, more_); }
  index_t rows(index_t tile) const { return each_ + (tile < more_ ? 1 : 0); }
  index_t token(index_t place) const { return order_ == nullptr ? place : order_[place]; }
  index_t most_rows_in_block() const { return std::min(tokens_, tiles_in_block_ * tile_rows); }
  index_t most_U_in_block() const { return most_rows_in_block() * rank_of_token_; }

  const run_of_rows& run_at(index_t r) const { return runs_[r]; }
  const run_of_rows& run_by_part(index_t r) const { return runs_[by_part_[r]]; }
  index_t first_run(index_t tile) const { return first_run_[tile]; }
  /// The same for run_by_part, which leaves out runs without ranks.
  index_t first_by_part(index_t tile) const { return first_by_part_[tile]; }
  index_t runs() const { return first_run_[tiles_]; }
  const double* scales(const run_of_rows& r) const { return scales_ + r.scales; }
  const part<Acc>& part_of(const run_of_rows& r) const { return parts_[r.part]; }
  const part<Acc>* parts() const { return parts_; }
  index_t parts_count() const { return who_.parts; }

 private:
  /// A block's activations pass once for every panel of W: they must stay in the caches, so that
  /// long tokens make short blocks.
  static index_t tiles_of(index_t in_features) {
    constexpr index_t most = 16;
    return std::clamp<index_t>(tuned.block_bytes / (tile_rows * std::max<index_t>(1, in_features) *
                                                    static_cast<index_t>(sizeof(Acc))),
                               4, most);
  }

  /// The runs of a tile: first those of the first parts of all its rows, then of the second parts,
  /// and so on. A row's parts keep their order, and runs of single rows that are alike stand beside
  /// each other.
  void add_tile(index_t tile, index_t& runs, index_t& scales, index_t& U) {
    const index_t before = first(tile), end = before + rows(tile);
    index_t ends[tile_rows], groups = 0, most = 0;
    for (index_t begin = before; begin < end; begin = ends[groups++]) {
      index_t next = who_.same_for_all() ? end : begin + 1;
      while (next < end && who_.same(token(begin), token(next))) ++next;
      ends[groups] = next;
      most = std::max(most, who_.count(token(begin)));
    }
    for (index_t n = 0; n < most; ++n)
      for (index_t g = 0; g < groups; ++g) {
        const index_t begin = g == 0 ? before : ends[g - 1], next = ends[g];
        if (n >= who_.count(token(begin))) continue;
        const index_t p = who_.part(token(begin), n);
        runs_[runs++] = {tile, begin - before, next - begin, p, U, scales};
        U += parts_[p].rank * (next - begin);
        for (index_t place = begin; place < next; ++place)
          scales_[scales++] = parts_[p].scale * who_.strength(token(place), n);
      }
  }

  index_t tokens_, tiles_in_block_;
  token_parts who_;
  index_t tiles_;
  /// Tokens of a tile, and how many tiles have one more: kept, because a division takes long.
  index_t each_, more_;
  index_t rank_of_token_, assignments_, run_capacity_;
  const part<Acc>* parts_ = nullptr;
  layout::place<index_t> order_place_, by_part_place_, first_run_place_, first_by_part_place_;
  layout::place<run_of_rows> runs_place_;
  layout::place<double> scales_place_;
  index_t *order_ = nullptr, *by_part_ = nullptr, *first_run_ = nullptr, *first_by_part_ = nullptr;
  run_of_rows* runs_ = nullptr;
  double* scales_ = nullptr;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
