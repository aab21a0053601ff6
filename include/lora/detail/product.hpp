// SPDX-License-Identifier: Apache-2.0
//
// The one product: Y = W * X + (sum of s * B) * U with U = (stacked A) * X. The ranks are R more steps of the same chains
// that run over in_features, so mixing adapters in costs what their bytes and FLOPs cost and no second pass over Y. Each
// output is one chain of multiply-adds from zero, in the order of in_features and then of the ranks; threads, tiles and
// the other tokens of a batch change no bit.
//
// It is instantiated over the accumulator alone: what reads X and W and what writes Y comes as a function.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "lora/detail/operands.hpp"
#include "lora/detail/panels.hpp"
#include "lora/detail/parallel.hpp"
#include "lora/detail/tile.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// A callable by reference: two words, no allocation. The callable must outlive it.
template <class... Arguments>
class function_ref {
 public:
  template <class F>
    requires(!std::is_same_v<bare<F>, function_ref>)
  function_ref(const F& f)  // NOLINT(google-explicit-constructor)
      : object_(std::addressof(f)),
        call_([](const void* object, Arguments... arguments) { (*static_cast<const F*>(object))(arguments...); }) {}
  void operator()(Arguments... arguments) const { call_(object_, arguments...); }

 private:
  const void* object_;
  void (*call_)(const void*, Arguments...);
};

/// pack(first row, rows, first depth, depths, destination): rows of X' (tokens) or of W (outputs) into one panel.
template <class Acc>
using pack_function = function_ref<index_t, index_t, index_t, index_t, Acc*>;
/// finish(output, first token, tokens, sums, step): sums[i * step] is the result for the i-th token.
template <class Acc>
using finish_function = function_ref<index_t, index_t, index_t, const Acc*, index_t>;

/// Tokens handled together: their packed activations (in_features x 32 tiles) stay near the core.
inline constexpr index_t tiles_per_block = 32;
/// Steps of depth for which a panel of W is packed at a time: 256 x 32 floats are 32 KiB.
inline constexpr index_t depth_chunk = 256;

/// The stacked factors of a sum of adapters, packed for products.
template <class Acc>
struct stacked_factors {
  index_t rank = 0;
  panels<Acc> A;  ///< R x in_features
  panels<Acc> B;  ///< out_features x R, holding s * B

  template <class Each>
  stacked_factors(const char* operation, const Each& each, index_t out_features, index_t in_features)
      : rank(checked_total_rank(operation, each, out_features, in_features)) {
    if (rank == 0) return;
    A = panels<Acc>(rank, in_features, tile_cols<Acc>);
    B = panels<Acc>(out_features, rank, tile_cols<Acc>);
    index_t first = 0;
    each([&](const auto& l) {
      if (!is_read(l)) return;
      const auto& lora_A = l.lora_A();
      const auto& lora_B = l.lora_B();
      A.put(first, 0, as_matrix(lora_A), 1.0);
      B.put(0, first, as_matrix(lora_B), static_cast<double>(l.scaling()));
      first += static_cast<index_t>(l.rank());
    });
  }
};

/// Sizes, sources and scratch of one product.
template <class Acc>
class product {
 public:
  /// pack_W may be null: then only the adapters' part is computed. Everything that can throw happens here.
  product(index_t out_features, index_t in_features, index_t tokens, const pack_function<Acc>& pack_X,
          const pack_function<Acc>* pack_W, const stacked_factors<Acc>& factors)
      : out_(out_features),
        in_(in_features),
        tokens_(tokens),
        pack_X_(pack_X),
        pack_W_(pack_W),
        factors_(factors),
        tiles_(std::min(tiles_per_block, panels_of(tokens, tile_rows))),
        threads_(threads_for((static_cast<double>(out_features) * static_cast<double>(pack_W ? in_features : 0) +
                              static_cast<double>(out_features + in_features) * static_cast<double>(factors.rank)) *
                             static_cast<double>(tokens))),
        X_(tiles_ * in_ * tile_rows),
        U_(tiles_ * factors.rank * tile_rows),
        per_thread_(tiles_ * tile_size + depth_chunk * width),
        thread_memory_(threads_ * per_thread_) {}

  void run(const finish_function<Acc>& finish) const {
    parallel(threads_, [&](const team& team) {
      Acc* const sums = thread_memory_.data() + team.thread() * per_thread_;
      Acc* const panel_W = sums + tiles_ * tile_size;
      for (index_t first = 0; first < tokens_; first += tiles_ * tile_rows) {
        const block tokens{first, std::min(tiles_ * tile_rows, tokens_ - first)};
        team.for_each(tokens.tiles(), [&](index_t t) { pack_tokens(tokens, t); });
        team.for_each(tokens.tiles() * panels_of(factors_.rank, width),
                      [&](index_t task) { shrink(tokens, task % tokens.tiles(), task / tokens.tiles(), sums); });
        team.for_each(panels_of(out_, width), [&](index_t p) { outputs(tokens, p, sums, panel_W, finish); });
      }
    });
  }

 private:
  static constexpr index_t width = tile_cols<Acc>;
  static constexpr index_t tile_size = tile_rows * width;

  struct block {
    index_t first, count;
    index_t tiles() const { return panels_of(count, tile_rows); }
    index_t in_tile(index_t t) const { return std::min<index_t>(tile_rows, count - t * tile_rows); }
  };

  void pack_tokens(const block& tokens, index_t t) const {
    Acc* const panel = X_.data() + t * in_ * tile_rows;
    if (tokens.in_tile(t) < tile_rows) std::fill_n(panel, in_ * tile_rows, Acc(0));
    pack_X_(tokens.first + t * tile_rows, tokens.in_tile(t), 0, in_, panel);
  }

  /// One tile of U = A * X, for some ranks and tokens.
  void shrink(const block& tokens, index_t t, index_t p, Acc* sums) const {
    std::fill_n(sums, tile_size, Acc(0));
    multiply(static_cast<int>(tokens.in_tile(t)), sums, X_.data() + t * in_ * tile_rows, factors_.A.panel(p), in_);
    Acc* const U = U_.data() + t * factors_.rank * tile_rows;
    for (index_t j = 0; j < std::min(width, factors_.rank - p * width); ++j)
      for (index_t i = 0; i < tile_rows; ++i) U[(p * width + j) * tile_rows + i] = sums[i * width + j];
  }

  /// One panel of outputs for a block of tokens.
  void outputs(const block& tokens, index_t p, Acc* sums, Acc* panel_W, const finish_function<Acc>& finish) const {
    std::fill_n(sums, tokens.tiles() * tile_size, Acc(0));
    const index_t rows = std::min(width, out_ - p * width);
    if (pack_W_ != nullptr) {
      if (rows < width) std::fill_n(panel_W, std::min(depth_chunk, in_) * width, Acc(0));
      for (index_t k = 0; k < in_; k += depth_chunk) {
        const index_t depth = std::min(depth_chunk, in_ - k);
        (*pack_W_)(p* width, rows, k, depth, panel_W);
        advance(tokens, sums, X_.data() + k * tile_rows, in_, panel_W, depth);
      }
    }
    if (factors_.rank != 0) advance(tokens, sums, U_.data(), factors_.rank, factors_.B.panel(p), factors_.rank);
    for (index_t t = 0; t < tokens.tiles(); ++t)
      for (index_t j = 0; j < rows; ++j)
        finish(p * width + j, tokens.first + t * tile_rows, tokens.in_tile(t), sums + t * tile_size + j, width);
  }

  /// All tiles of the block by `depth` more steps of their chains.
  void advance(const block& tokens, Acc* sums, const Acc* left, index_t left_depth, const Acc* right, index_t depth) const {
    for (index_t t = 0; t < tokens.tiles(); ++t)
      multiply(static_cast<int>(tokens.in_tile(t)), sums + t * tile_size, left + t * left_depth * tile_rows, right, depth);
  }

  index_t out_, in_, tokens_;
  const pack_function<Acc>& pack_X_;
  const pack_function<Acc>* pack_W_;
  const stacked_factors<Acc>& factors_;
  index_t tiles_;
  int threads_;
  scratch<Acc> X_, U_;
  index_t per_thread_;
  scratch<Acc> thread_memory_;
};

/// Packs rows of a matrix into a panel of a given width.
template <class Acc, class T, storage_order Order>
auto packer(const matrix_view<T, Order>& m, index_t width) {
  return [m, width](index_t row, index_t rows, index_t depth, index_t depths, Acc* destination) {
    pack(destination, width, 0, m.block(row, depth, rows, depths), 1.0);
  };
}

/// The adapters' part of `y` added to what y holds, or with pack_W the whole product written over it; finish is called as
/// finish(y element, sum, output).
template <class Acc, class X, class Y, class Finish>
void run_product(const X& x, const Y& y, const pack_function<Acc>* pack_W, const stacked_factors<Acc>& factors,
                 const Finish& finish) {
  const auto pack_tokens = packer<Acc>(x.transpose(), tile_rows);
  const pack_function<Acc> pack_X(pack_tokens);
  const product<Acc> task(y.rows(), x.rows(), x.cols(), pack_X, pack_W, factors);
  const auto store = [&](index_t output, index_t first, index_t count, const Acc* sums, index_t step) {
    for (index_t i = 0; i < count; ++i) finish(y(output, first + i), sums[i * step], output);
  };
  task.run(finish_function<Acc>(store));
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
