// SPDX-License-Identifier: Apache-2.0
//
// advise: merge or mix? Merging costs one pass over the weight each time the adapters change;
// mixing costs a little on every token. From the machine's limits, the layer and how long a set of
// adapters stays, this says which is faster and by how much.
//
//   const lora::machine_rates machine = lora::machine_limits();              // once
//   const lora::layer_shape layer{.out_features = 4096, .in_features = 4096};
//   const auto what = lora::advise<lora::bfloat16>(machine, layer, {16}, {.tokens_per_switch = 500});
//   if (what.merge) ...
//
// The times are those that the limits allow, perfectly overlapped; bench/break_even compares them
// with measured ones. Merging pays after merge time / (mixed - merged time of a token) tokens.
#pragma once

#include <initializer_list>
#include <limits>
#include <span>

#include "lora/concepts.hpp"
#include "lora/error.hpp"
#include "lora/kernel/merge/stacked_factors.hpp"
#include "lora/kernel/tile.hpp"
#include "lora/machine.hpp"

namespace lora::inline LORA_DETAIL_ABI {

struct layer_shape {
  index_t out_features, in_features;
};

/// How a layer is used between two changes of its adapters.
struct usage {
  double tokens_per_switch;  ///< tokens until the adapters change
  double tokens_per_call = 1;
};

/// Seconds, as the machine's limits allow.
struct advice {
  bool merge;          ///< merging is faster over one stay of the adapters
  double merged_call;  ///< a call with the adapters in the weight
  double mixed_call;   ///< a call with the adapters beside it
  /// Rounding all of them into the weight; unmerging costs nothing (linear drops the merged copy).
  double merge_once;
  /// From this stay on merging pays; infinity where mixing costs nothing.
  double break_even_tokens;
};

namespace detail {

/// FLOPs by multiply-adds and by dot products.
struct work_of_call {
  double multiply_adds = 0, dots = 0;
  void add(double flops, bool by_dots) { (by_dots ? dots : multiply_adds) += flops; }
};

}  // namespace detail

/// T the weight's scalar, F the factors', X the activations'. Float arithmetic takes the limits'
/// time, double twice that; in a build with dot products of bfloat16 W x, lora_A x and deltas take
/// theirs, where both operands are bfloat16 (deltas: of rank 4 or more; flush_threshold_of_delta).
/// Ranks: of the adapters that every token has. Throws value_error when a size, a rank or a count
/// is negative, tokens_per_call is 0, or the limits were not measured.
template <scalar T, scalar F = T, scalar X = T>
advice advise(const machine_rates& machine, const layer_shape& layer,
              std::span<const index_t> ranks, const usage& use) {
  double rank = 0;
  bool negative = layer.out_features < 0 || layer.in_features < 0;
  for (const index_t r : ranks) {
    negative = negative || r < 0;
    rank += static_cast<double>(r);
  }
  if (negative || !(use.tokens_per_call > 0) || !(use.tokens_per_switch >= 0))
    detail::raise_value(
        "advise",
        "sizes and ranks must not be negative, tokens_per_call must be positive and "
        "tokens_per_switch not negative");
  if (!(machine.flops > 0 && machine.read > 0 && machine.read_write > 0))
    detail::raise_value("advise", "the limits are not those of a machine: use machine_limits()");
  const double slower = std::is_same_v<accumulator_t<T, F>, double> ? 2 : 1;
  const auto out = static_cast<double>(layer.out_features),
             in = static_cast<double>(layer.in_features);
  const double flops = slower * 2 * use.tokens_per_call;
  constexpr bool dots = detail::by_dots<accumulator_t<T, F, X>, T, X>;
  constexpr bool bfloat16_factors = std::is_same_v<detail::storage_t<F>, bfloat16>;
  detail::work_of_call merged, mixed, merging;
  merged.add(flops * out * in, dots);
  mixed = merged;
  mixed.add(flops * rank * in, dots && bfloat16_factors);
  mixed.add(flops * rank * out, false);
  for (const index_t r : ranks)
    merging.add(slower * 2 * static_cast<double>(r) * out * in,
                detail::has_dots<accumulator_t<T, F>, detail::storage_t<F>> &&
                    r >= detail::least_rank_of_dots);
  advice a{};
  const double bytes = out * in * sizeof(T);
  a.merged_call = machine.reading(merged.multiply_adds, merged.dots, bytes);
  a.mixed_call =
      machine.reading(mixed.multiply_adds, mixed.dots, bytes + rank * (out + in) * sizeof(F));
  a.merge_once = machine.updating(merging.multiply_adds, merging.dots, 2 * bytes);
  const double saved = (a.mixed_call - a.merged_call) / use.tokens_per_call;
  a.break_even_tokens = saved > 0 ? a.merge_once / saved : std::numeric_limits<double>::infinity();
  a.merge = use.tokens_per_switch > a.break_even_tokens;
  return a;
}
template <scalar T, scalar F = T, scalar X = T>
advice advise(const machine_rates& machine, const layer_shape& layer,
              std::initializer_list<index_t> ranks, const usage& use) {
  return advise<T, F, X>(machine, layer, std::span(ranks.begin(), ranks.size()), use);
}

}  // namespace lora::inline LORA_DETAIL_ABI
