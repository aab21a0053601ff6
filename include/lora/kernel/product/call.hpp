// SPDX-License-Identifier: Apache-2.0
//
// From a call of forward or apply to the product: the adapters become parts (packed ones as they
// are, others packed into the workspace), the tokens a plan, all scratch one block of the
// workspace.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lora/kernel/product/base_product.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The activations of a view, widened.
template <class Acc, class X>
auto token_packer(const X& x) {
  return [x](const activation_block& some, Acc* destination) {
    using from = storage_t<typename X::value_type>;
    index_t done = 0;
    if constexpr (!X::is_row_major && std::is_same_v<Acc, float> && !std::is_same_v<from, double>)
      done = transpose_rows(
          [&](index_t i) {
            return reinterpret_cast<const from*>(x.outer(some.tokens[i])) + some.first;
          },
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
        done = transpose_rows(
            [&](index_t i) {
              return reinterpret_cast<const float*>(x.outer(some.tokens[i]) + some.first);
            },
            some.rows, some.depth / 2, destination);
      for (index_t i = 0; i < some.rows; ++i)
        for (index_t k = 2 * done; k < some.depth; k += 2) {
          std::uint16_t pair[2] = {std::bit_cast<std::uint16_t>(x(some.first + k, some.tokens[i])),
                                   0};
          if (k + 1 < some.depth)
            pair[1] = std::bit_cast<std::uint16_t>(x(some.first + k + 1, some.tokens[i]));
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
    pack_padded(destination, width,
                W.block(panel * width, first, std::min(width, W.rows() - panel * width), depth));
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
        destination[k * width + j] =
            output < W.out_features() ? widen<Acc>(W(output, first + k)) : Acc(0);
      }
  };
}

/// The whole product: parts makes the parts, who says which of them a token gets, rank_of_token is
/// the most that one token has. Everything was checked. May throw std::bad_alloc, with nothing
/// written.
template <class Acc, class T, class Parts>
void mix(workspace& space, index_t out_features, index_t in_features, index_t tokens,
         const weight_source<Acc, T>& W, Parts& parts, const token_parts& who,
         index_t rank_of_token, const activation_source<Acc>& X,
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

}  // namespace lora::inline LORA_DETAIL_ABI::detail
