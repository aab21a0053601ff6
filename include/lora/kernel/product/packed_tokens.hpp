// SPDX-License-Identifier: Apache-2.0
//
// The activations of a block of tokens as tiles read them: chunk by chunk of in_features, in each
// chunk tile by tile, at each depth the tile's tokens side by side. Widened, and as pairs of
// bfloat16 where dot products read them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <type_traits>

#include "lora/kernel/product/token_plan.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// A callable by reference: two words, no allocation. The callable must outlive it.
template <class... Arguments>
class function_ref {
 public:
  function_ref() = default;
  template <class F>
    requires(!std::is_same_v<bare<F>, function_ref>)
  function_ref(const F& f)  // NOLINT(google-explicit-constructor)
      : object_(std::addressof(f)), call_([](const void* object, Arguments... arguments) {
          (*static_cast<const F*>(object))(arguments...);
        }) {}
  explicit operator bool() const { return object_ != nullptr; }
  void operator()(Arguments... arguments) const { call_(object_, arguments...); }

 private:
  const void* object_ = nullptr;
  void (*call_)(const void*, Arguments...) = nullptr;
};

/// A tile's tokens and a range of in_features.
struct activation_block {
  const index_t* tokens;
  index_t rows, first, depth;
};
/// pack(block, destination): destination[k * rows + i] becomes element first + k of token i; by dot
/// products, element destination[k * rows + i] the bits of the pair of elements first + 2 k and
/// first + 2 k + 1.
template <class Acc>
using pack_tokens_function = function_ref<const activation_block&, Acc*>;
/// What reads X: widened, and as pairs of bfloat16 where W * x is computed by dot products.
template <class Acc>
struct activation_source {
  pack_tokens_function<Acc> widened, pairs = {};
};

/// Tiles of tokens whose activations are held at once.
struct tile_block {
  index_t begin, end;

  index_t count() const { return end - begin; }
};

/// The activations of a block of tokens, as the tiles read them. May_dot: whether the panels of W
/// may be multiplied by dot products, which read pairs (what can never be is not compiled).
template <class Acc, bool May_dot>
class activations {
 public:
  static constexpr index_t width = tile_cols<Acc>;
  /// Depths of a chunk that many tiles share, and of one that few share.
  static constexpr index_t depth_of_many =
      many_tiles_chunk / (width * static_cast<index_t>(sizeof(Acc)));
  static constexpr index_t depth_of_few =
      tuned.few_tiles_chunk / (width * static_cast<index_t>(sizeof(Acc)));
  static constexpr index_t most_depth = std::max(2 * depth_of_many, depth_of_few);

  /// dots: panels of bfloat16 are multiplied by dot products, and read pairs; widened: others are
  /// there, too.
  activations(index_t in_features, const plan<Acc>& tokens, bool dots, bool widened)
      : in_(in_features), tokens_(tokens), dots_(dots), widened_(widened) {}

  void claim(layout& l) {
    const index_t rows = tokens_.most_rows_in_block();
    if (widened_) X_place_ = l.take<Acc>(rows * in_);
    if (dots_) pairs_place_ = l.take<Acc>(rows * pieces(in_, 2));
  }
  void bind(std::byte* memory) {
    if (widened_) X_ = X_place_.in(memory);
    if (dots_) pairs_ = pairs_place_.in(memory);
  }

  void pack(const tile_block& tiles, index_t tile, const activation_source<Acc>& X) const {
    index_t tokens[tile_rows];
    activation_block some{tokens, tokens_.rows(tile), 0, 0};
    for (index_t i = 0; i < some.rows; ++i) tokens[i] = tokens_.token(tokens_.first(tile) + i);
    for (; some.first < in_; some.first += some.depth) {
      some.depth = std::min(chunk_of(tiles), in_ - some.first);
      if (widened_) X.widened(some, in_chunk(X_, tiles, tile, some.first, 1));
      if (dots_) X.pairs(some, in_chunk(pairs_, tiles, tile, some.first, 2));
    }
  }

  bool dots() const { return dots_; }
  /// call(multiplier): how a panel of R is multiplied.
  template <class R, class Call>
  void with_multiplier_of(const Call& call) const {
    with_multiplier<Acc, May_dot && has_dots<Acc, R>>(dots_, call);
  }

  index_t chunk_of(const tile_block& tiles) const {
    if (tiles.count() < few_tiles) return depth_of_few;
    return dots_ ? 2 * depth_of_many : depth_of_many;
  }
  index_t rows_of(const tile_block& tiles) const {
    return tokens_.first(tiles.end - 1) + tokens_.rows(tiles.end - 1) - tokens_.first(tiles.begin);
  }
  /// Where a tile's activations from depth k on begin, k a multiple of their chunk (with one tile:
  /// any, with pairs even).
  template <class M>
  const Acc* at(const tile_block& tiles, index_t tile, index_t k, M) const {
    return in_chunk(is_dot2<M> ? pairs_ : X_, tiles, tile, k, M::depths);
  }
  /// The same for sums of so many panels of outputs, which lie tile by tile.
  Acc* sums_of(const tile_block& tiles, index_t tile, index_t panels, Acc* sums) const {
    return sums + (tokens_.first(tile) - tokens_.first(tiles.begin)) * width * panels;
  }
  /// at(n): tile n of the block, its activations from depth k on, where their chunk begins, and its
  /// sums of one panel. Asked for every tile of every chunk, where in_chunk and its divisions would
  /// cost time.
  template <class M>
  auto rows_by_tile(const tile_block& tiles, index_t k, M multiplier, Acc* sums) const {
    return [this, first_tile = tiles.begin, first = tokens_.first(tiles.begin),
            left = at(tiles, tiles.begin, k, multiplier),
            steps = pieces(std::min(chunk_of(tiles), in_ - k), M::depths), sums](index_t n) {
      const index_t rows = tokens_.rows(first_tile + n),
                    before = tokens_.first(first_tile + n) - first;
      return some_rows<Acc>{static_cast<int>(rows), sums + before * width, left + before * steps,
                            rows};
    };
  }

 private:
  Acc* in_chunk(Acc* from, const tile_block& tiles, index_t tile, index_t k, index_t group) const {
    const index_t depth = std::min(chunk_of(tiles), in_ - k);
    return from + k / group * rows_of(tiles) +
           (tokens_.first(tile) - tokens_.first(tiles.begin)) * pieces(depth, group);
  }

  index_t in_;
  const plan<Acc>& tokens_;
  bool dots_, widened_;
  layout::place<Acc> X_place_, pairs_place_;
  Acc *X_ = nullptr, *pairs_ = nullptr;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
