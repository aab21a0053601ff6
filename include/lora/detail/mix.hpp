// SPDX-License-Identifier: Apache-2.0
//
// From a call of forward or apply to the product: the adapters become parts (packed ones as they are, others packed into
// the workspace), the tokens a plan, all scratch one block of the workspace.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lora/detail/product.hpp"
#include "lora/packed_adapter.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Whether the panels of a packed adapter are what tiles of Acc read.
template <class Acc, class L>
inline constexpr bool reads_panels_of = false;
template <class Acc, packed_factors L>
inline constexpr bool reads_panels_of<Acc, L> = std::is_same_v<accumulator_t<packed_scalar<L>>, Acc>;

/// What the elements of an adapter's panels are when it is packed for a call. Of bfloat16 they stay so where A x may be
/// computed by dot products, which are those of a packed adapter.
template <class Acc, class L>
struct panels_in_call {
  using type = Acc;
};
template <class Acc, low_rank L>
struct panels_in_call<Acc, L> {
  static constexpr bool both =
      std::is_same_v<storage_t<factor_scalar_A<L>>, bfloat16> && std::is_same_v<storage_t<factor_scalar_B<L>>, bfloat16>;
  using type = std::conditional_t<both && has_dots<Acc, bfloat16>, bfloat16, Acc>;
};
template <class Acc, packed_factors L>
struct panels_in_call<Acc, L> {
  using type = std::conditional_t<reads_panels_of<Acc, L>, packed_scalar<L>, Acc>;
};

/// A packed adapter's factors in panels of a wider accumulator.
template <class Acc, class F>
void repack_factors(const factor_layout<Acc, Acc>& where, const packed_adapter<F>& l, Acc* A, Acc* B) {
  using own = accumulator_t<F>;
  const auto from = l.where();
  constexpr index_t width = tile_cols<Acc>, own_width = tile_cols<own>;
  if (where.rank == 0) return;  // whatever the sizes of the weight
  std::fill_n(A, where.A_size(), Acc(0));
  std::fill_n(B, where.B_size(), Acc(0));
  for (index_t r = 0; r < where.rank; ++r)
    for (index_t k = 0; k < where.in_features; ++k)
      A[r / width * where.A_panel() + panel_offset<Acc>(r % width, k, where.A_width(r / width))] = widen<Acc>(
          l.A_panels()[r / own_width * from.A_panel() + panel_offset<F>(r % own_width, k, from.A_width(r / own_width))]);
  for (index_t o = 0; o < where.out_features; ++o)
    for (index_t r = 0; r < where.rank; ++r)
      B[o / width * where.B_panel() + panel_offset<Acc>(o % width, r, width)] =
          widen<Acc>(l.B_panels()[o / own_width * from.B_panel() + panel_offset<F>(o % own_width, r, own_width)]);
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
      if constexpr (packed_factors<L>) made.rounded_U = adapter_of(l).U_format() == U_format::factors;
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
    return pieces(size * static_cast<index_t>(sizeof(F)), 64) * (64 / static_cast<index_t>(sizeof(Acc)));
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

/// The activations of a view, widened.
template <class Acc, class X>
auto token_packer(const X& x) {
  return [x](const activation_block& some, Acc* destination) {
    using from = storage_t<typename X::value_type>;
    index_t done = 0;
    if constexpr (!X::is_row_major && std::is_same_v<Acc, float> && !std::is_same_v<from, double>)
      done = transpose_rows([&](index_t i) { return reinterpret_cast<const from*>(x.outer(some.tokens[i])) + some.first; },
                            some.rows, some.depth, destination);
    for (index_t i = 0; i < some.rows; ++i)
      for (index_t k = done; k < some.depth; ++k)
        destination[k * some.rows + i] = widen<Acc>(x(some.first + k, some.tokens[i]));
  };
}

/// Activations of bfloat16 as pairs, where dot products may read them; some.first is even.
template <class Acc, class X>
auto pair_packer(const X& x) {
  return [x](const activation_block& some, Acc* destination) {
    if constexpr (has_dots<Acc, storage_t<typename X::value_type>>) {
      index_t done = 0;  // pairs
      if constexpr (!X::is_row_major)
        done =
            transpose_rows([&](index_t i) { return reinterpret_cast<const float*>(x.outer(some.tokens[i]) + some.first); },
                           some.rows, some.depth / 2, destination);
      for (index_t i = 0; i < some.rows; ++i)
        for (index_t k = 2 * done; k < some.depth; k += 2) {
          std::uint16_t pair[2] = {std::bit_cast<std::uint16_t>(x(some.first + k, some.tokens[i])), 0};
          if (k + 1 < some.depth) pair[1] = std::bit_cast<std::uint16_t>(x(some.first + k + 1, some.tokens[i]));
          std::memcpy(destination + k / 2 * some.rows + i, pair, sizeof pair);
        }
    } else {
      static_cast<void>(x), static_cast<void>(some), static_cast<void>(destination);
    }
  };
}

/// Writes outputs of one token: store(y element, sum, output).
template <class Acc, class Y, class Store>
auto token_writer(const Y& y, const Store& store) {
  return [y, store](index_t first, index_t count, index_t token, const Acc* sums) {
    if constexpr (Y::is_row_major) {
      auto* const to = y.data() + first * y.outer_stride() + token;
      for (index_t j = 0; j < count; ++j) store(to[j * y.outer_stride()], sums[j], first + j);
    } else {
      auto* const to = y.outer(token) + first;
      for (index_t j = 0; j < count; ++j) store(to[j], sums[j], first + j);
    }
  };
}

/// A chunk of a panel of an unpacked weight, as T.
template <class Acc, class T, class V>
auto weight_packer(const V& W) {
  return [W](index_t panel, index_t first, index_t depth, T* destination) {
    constexpr index_t width = tile_cols<Acc>;
    pack_padded(destination, width, W.block(panel * width, first, std::min(width, W.rows() - panel * width), depth));
  };
}
/// The same of a packed weight whose panels are those of another accumulator.
template <class Acc, class P>
auto panel_converter(const P& W) {
  return [&W](index_t panel, index_t first, index_t depth, Acc* destination) {
    constexpr index_t width = tile_cols<Acc>;
    for (index_t k = 0; k < depth; ++k)
      for (index_t j = 0; j < width; ++j) {
        const index_t output = panel * width + j;
        destination[k * width + j] = output < W.out_features() ? widen<Acc>(W(output, first + k)) : Acc(0);
      }
  };
}

/// The whole product: parts makes the parts, who says which of them a token gets, rank_of_token is the most that one token
/// has. Everything was checked. May throw std::bad_alloc, with nothing written.
template <class Acc, class T, class Parts>
void mix(workspace& space, index_t out_features, index_t in_features, index_t tokens, const weight_source<Acc, T>& W,
         Parts& parts, const token_parts& who, index_t rank_of_token, const activation_source<Acc>& X,
         const finish_function<Acc>& finish) {
  if (tokens == 0 || out_features == 0) return;
  plan<Acc> plan_of_tokens(tokens, in_features, who, rank_of_token);
  product<Acc, T> task(out_features, in_features, W, plan_of_tokens, parts.all_pairs());
  layout places;
  parts.claim(places);
  plan_of_tokens.claim(places);
  task.claim(places);
  std::byte* const memory = space.require(places.size());
  plan_of_tokens.make(memory, parts.make(memory));
  task.run(memory, X, finish);
}
/// The same with every part for every token.
template <class Acc, class T, class Each>
void mix(workspace& space, index_t out_features, index_t in_features, index_t tokens, const weight_source<Acc, T>& W,
         const Each& each, const activation_source<Acc>& X, const finish_function<Acc>& finish) {
  part_list<Acc, Each> list(each, out_features, in_features);
  mix<Acc>(space, out_features, in_features, tokens, W, list, token_parts{.parts = list.count()}, list.rank(), X, finish);
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
