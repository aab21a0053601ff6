// SPDX-License-Identifier: Apache-2.0
//
// The adapters of a call as parts of a product: packed ones as they are, others packed into the
// workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "lora/kernel/product/call.hpp"
#include "lora/packed_adapter.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Whether the panels of a packed adapter are what tiles of Acc read.
template <class Acc, class L>
inline constexpr bool reads_panels_of = false;
template <class Acc, packed_factors L>
inline constexpr bool reads_panels_of<Acc, L> =
    std::is_same_v<accumulator_t<packed_scalar<L>>, Acc>;

/// What the elements of an adapter's panels are when it is packed for a call. Of bfloat16 they stay
/// so where A x may be computed by dot products, which are those of a packed adapter.
template <class Acc, class L>
struct panels_in_call {
  using type = Acc;
};
template <class Acc, low_rank L>
struct panels_in_call<Acc, L> {
  static constexpr bool both = std::is_same_v<storage_t<factor_scalar_A<L>>, bfloat16> &&
                               std::is_same_v<storage_t<factor_scalar_B<L>>, bfloat16>;
  using type = std::conditional_t<both && has_dots<Acc, bfloat16>, bfloat16, Acc>;
};
template <class Acc, packed_factors L>
struct panels_in_call<Acc, L> {
  using type = std::conditional_t<reads_panels_of<Acc, L>, packed_scalar<L>, Acc>;
};

/// A packed adapter's factors in panels of a wider accumulator.
template <class Acc, class F>
void repack_factors(const factor_layout<Acc, Acc>& where, const packed_adapter<F>& l, Acc* A,
                    Acc* B) {
  using own = accumulator_t<F>;
  const auto from = l.where();
  constexpr index_t width = tile_cols<Acc>, own_width = tile_cols<own>;
  if (where.rank == 0) return;  // whatever the sizes of the weight
  std::fill_n(A, where.A_size(), Acc(0));
  std::fill_n(B, where.B_size(), Acc(0));
  for (index_t r = 0; r < where.rank; ++r)
    for (index_t k = 0; k < where.in_features; ++k)
      A[r / width * where.A_panel() + panel_offset<Acc>(r % width, k, where.A_width(r / width))] =
          widen<Acc>(l.A_panels()[r / own_width * from.A_panel() +
                                  panel_offset<F>(r % own_width, k, from.A_width(r / own_width))]);
  for (index_t o = 0; o < where.out_features; ++o)
    for (index_t r = 0; r < where.rank; ++r)
      B[o / width * where.B_panel() + panel_offset<Acc>(o % width, r, width)] =
          widen<Acc>(l.B_panels()[o / own_width * from.B_panel() +
                                  panel_offset<F>(o % own_width, r, own_width)]);
}

/// The parts of a call. Counted and placed first, made when the memory is there.
template <class Acc, class Each>
class part_list {
 public:
  part_list(const Each& each, index_t out_features, index_t in_features)
      : each_(each), out_(out_features), in_(in_features) {
    each_([&]<class L>(const L& l) {
      if (!is_read(l)) return;
      all_pairs_ = all_pairs_ && std::is_same_v<typename panels_in_call<Acc, L>::type, bfloat16>;
      ++count_;
      rank_ += static_cast<index_t>(l.rank());
    });
  }

  index_t count() const { return count_; }
  index_t rank() const { return rank_; }

  /// Whether A x of all of them may be computed by dot products: their panels are bfloat16.
  bool all_pairs() const { return all_pairs_; }

  void claim(layout& l) {
    place_ = l.take<part<Acc>>(count_);
    index_t size = 0;
    each_([&]<class L>(const L& one) {
      if constexpr (!reads_panels_of<Acc, L>)
        if (is_read(one)) size += sizes(where(one));
    });
    panels_ = l.take<Acc>(size);
  }

  part<Acc>* make(std::byte* memory) const {
    part<Acc>* const parts = place_.in(memory);
    Acc* free = panels_.in(memory);
    index_t n = 0;
    each_([&]<class L>(const L& l) {
      if (!is_read(l)) return;
      using F = typename panels_in_call<Acc, L>::type;
      part<Acc> made{.rows = out_,
                     .rank = static_cast<index_t>(l.rank()),
                     .scale = static_cast<double>(l.scaling()),
                     .format = format_of_panels<Acc, F>()};
      if constexpr (packed_factors<L>)
        made.rounded_U = adapter_of(l).intermediate_format() == intermediate_format::factors;
      if constexpr (reads_panels_of<Acc, L>) {
        made.A = adapter_of(l).A_panels();
        made.B = adapter_of(l).B_panels();
      } else {
        F* const A = reinterpret_cast<F*>(free);
        F* const B = reinterpret_cast<F*>(free + rounded<F>(where(l).A_size()));
        if constexpr (low_rank<L>)
          pack_factors<Acc>(where(l), l, A, B);
        else
          repack_factors<Acc>(where(l), adapter_of(l), A, B);
        free += sizes(where(l));
        made.A = A;
        made.B = B;
      }
      parts[n++] = made;
    });
    return parts;
  }

 private:
  template <class L>
  factor_layout<Acc, typename panels_in_call<Acc, L>::type> where(const L& l) const {
    return {out_, in_, static_cast<index_t>(l.rank())};
  }
  /// Elements of Acc that hold `size` of F, in whole lines.
  template <class F>
  static index_t rounded(index_t size) {
    return pieces(size * static_cast<index_t>(sizeof(F)), 64) *
           (64 / static_cast<index_t>(sizeof(Acc)));
  }
  template <class F>
  static index_t sizes(const factor_layout<Acc, F>& where) {
    return rounded<F>(where.A_size()) + rounded<F>(where.B_size());
  }

  const Each& each_;
  index_t out_, in_, count_ = 0, rank_ = 0;
  bool all_pairs_ = true;
  layout::place<part<Acc>> place_;
  layout::place<Acc> panels_;
};

/// The same with every part for every token.
template <class Acc, class T, class Each>
void mix(workspace& space, index_t out_features, index_t in_features, index_t tokens,
         const weight_source<Acc, T>& W, const Each& each, const activation_source<Acc>& X,
         const finish_function<Acc>& finish) {
  part_list<Acc, Each> list(each, out_features, in_features);
  mix<Acc>(space, out_features, in_features, tokens, W, list, token_parts{.parts = list.count()},
           list.rank(), X, finish);
}

/// y = (W + sum of the adapters' deltas) x, for columns of accumulators: x is in_features x tokens,
/// y is out_features x tokens. W may be absent.
template <class Acc, class T, class Each>
void multiply_columns(workspace& space, const weight_source<Acc, T>& W, const Each& each,
                      index_t out_features, index_t in_features, const Acc* x, index_t tokens,
                      Acc* y) {
  const auto packer =
      token_packer<Acc>(matrix_view<const Acc, storage_order::col_major>(x, in_features, tokens));
  const auto writer =
      token_writer<Acc>(matrix_view<Acc, storage_order::col_major>(y, out_features, tokens),
                        [](Acc& to, Acc sum, index_t) { to = sum; });
  mix<Acc>(space, out_features, in_features, tokens, W, each,
           activation_source<Acc>{.widened = packer}, finish_function<Acc>(writer));
}
inline constexpr auto no_adapters = [](const auto&) {};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
