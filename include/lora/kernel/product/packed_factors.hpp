// SPDX-License-Identifier: Apache-2.0
//
// An adapter as a product reads it: lora_A in panels of ranks, lora_B in panels of outputs, and the
// factor that multiplies U = lora_A * x. Neither the scaling nor a strength is folded into the
// panels, so they serve every strength and every batch. Adapters of other kinds have parts that are
// no factors: gains of the outputs, and sums computed beforehand.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lora/detail/operands.hpp"
#include "lora/kernel/memory.hpp"
#include "lora/kernel/panels.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// What the elements of a part's panels are: those of the accumulator, or a 16-bit format that is
/// widened on the way.
enum class panel_format { accumulator, bfloat16, float16 };

/// What a part does to the sums of a token: adds lora_B * U; multiplies them by gains; adds a
/// column; nothing (it marks the tokens of a form whose input map is all that it has).
enum class part_sort { factors, gain, addend, mark };

/// lora_A (rank x in_features) lies in panels of tile_cols ranks, the last one of half that width
/// if that holds its ranks; lora_B (out_features x rank) in panels of tile_cols outputs. Looks at
/// memory of others. Gains and addends have rank 0. A part of a block of rows has the panels alone
/// in which these lie.
template <class Acc>
struct part {
  index_t first_row = 0, rows = 0;  ///< the outputs that it changes
  index_t rank = 0;
  double scale = 1;
  const void* A = nullptr;
  const void* B = nullptr;
  panel_format format = panel_format::accumulator;
  bool rounded_U = false;  ///< U is rounded to bfloat16 before lora_B multiplies it
  part_sort sort = part_sort::factors;
  /// gain: one number for each output, padded to whole panels. addend: columns of `rows` outputs.
  const Acc* values = nullptr;
  /// Addend: the column of each token; null: column t for token t.
  const index_t* columns = nullptr;

  /// Whether it changes outputs of panel p of W, and whether all out_features of them.
  bool meets(index_t p) const {
    return first_row < (p + 1) * tile_cols<Acc> && p * tile_cols<Acc> < first_row + rows;
  }
  bool fills(index_t p, index_t out_features) const {
    return first_row <= p * tile_cols<Acc> &&
           std::min((p + 1) * tile_cols<Acc>, out_features) <= first_row + rows;
  }
  /// The number of panel p of W among the part's own panels.
  index_t own_panel(index_t p) const { return p - first_row / tile_cols<Acc>; }
  bool same_rows(const part& other) const {
    return first_row == other.first_row && rows == other.rows;
  }
};

/// Ranks in the last, narrower panel of lora_A; 0 where all are whole.
template <class Acc>
constexpr index_t narrow_ranks(index_t rank) {
  const index_t rest = rank % tile_cols<Acc>;
  return rest <= simd<Acc>::width ? rest : 0;
}

/// Where panels of factors of F lie, with tiles of Acc.
template <class Acc, class F>
struct factor_layout {
  index_t out_features, in_features, rank;

  static constexpr index_t width = tile_cols<Acc>;
  index_t A_panel() const { return panel_size<F>(in_features, width); }
  index_t B_panel() const { return panel_size<F>(rank, width); }
  index_t A_size() const {
    const bool narrow = narrow_ranks<Acc>(rank) != 0;
    return pieces(rank, width) * A_panel() - (narrow ? panel_size<F>(in_features, width / 2) : 0);
  }
  index_t B_size() const { return pieces(out_features, width) * B_panel(); }
  /// Both in one block, lora_B on a line of its own: together they fill huge pages sooner.
  index_t B_begin() const {
    constexpr index_t line = static_cast<index_t>(memory_alignment / sizeof(F));
    return pieces(A_size(), line) * line;
  }
  index_t size() const { return B_begin() + B_size(); }
  index_t A_width(index_t panel) const {
    return narrow_ranks<Acc>(rank) != 0 && panel == rank / width ? width / 2 : width;
  }
};

/// Packs both factors. F may be narrower than the factors' scalars: then each element rounds once.
/// lora_B begins with row `skipped` of the first panel of outputs: where.out_features counts these
/// rows, too.
template <class Acc, class F, low_rank L>
void pack_factors(const factor_layout<Acc, F>& where, const L& l, F* A, F* B, index_t skipped = 0) {
  if (where.rank == 0) return;  // whatever the sizes of the weight
  const auto& lora_A = l.lora_A();
  const auto& lora_B = l.lora_B();
  const auto a = as_matrix(lora_A);
  const auto b = as_matrix(lora_B);
  constexpr index_t width = tile_cols<Acc>;
  for (index_t p = 0; p < pieces(where.rank, width); ++p)
    pack_padded(A + p * where.A_panel(), where.A_width(p),
                a.middle_rows(p * width, std::min(width, where.rank - p * width)));
  for (index_t p = 0; p < pieces(where.out_features, width); ++p) {
    const index_t begin = std::max(p * width, skipped),
                  end = std::min((p + 1) * width, where.out_features);
    pack_padded(B + p * where.B_panel(), width, b.middle_rows(begin - skipped, end - begin),
                begin - p * width);
  }
}

template <class Acc, class F>
constexpr panel_format format_of_panels() {
  static_assert(std::is_same_v<F, Acc> || std::is_same_v<Acc, float>);
  if constexpr (std::is_same_v<F, Acc>)
    return panel_format::accumulator;
  else
    return std::is_same_v<F, bfloat16> ? panel_format::bfloat16 : panel_format::float16;
}

/// call(pointer to the elements of a panel) with the type that the format says.
template <class Acc, class Call>
void with_elements(const void* panels, panel_format format, const Call& call) {
  if constexpr (std::is_same_v<Acc, float>) {
    if (format == panel_format::bfloat16) return call(static_cast<const bfloat16*>(panels));
    if (format == panel_format::float16) return call(static_cast<const float16*>(panels));
  }
  call(static_cast<const Acc*>(panels));
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
