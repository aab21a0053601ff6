// SPDX-License-Identifier: Apache-2.0
//
// delta_weight(l...) = sum of s * lora_B * lora_A          (out_features x in_features)
//
// What merging adds to a weight, as a matrix of its own: for looking at, comparing, or a caller's
// own use; merge and forward never form it.
//   result   Eigen::Matrix in accumulator_t of the factors (float, or double if any factor is
//            double), column-major
//   exact    no. Each element is one chain of R = sum of ranks multiply-adds from zero, with s
//            folded into lora_B (one rounding): |result - exact| <= gamma_{R+2} * sum |s| |lora_B|
//            |lora_A|, u of the accumulator, and what underflows in it (docs/numerics.md); factors
//            of bfloat16 may go another way within that bound, but for subnormals: see
//            flush_threshold_of_delta and docs/numerics.md. merge(W, l...) rounds these values
//            added to W, unless W is double and the factors are not.
//   cost     2 * R * out * in FLOPs; writes the result once.
//   throws   shape_error when the adapters' shapes differ, value_error for a scaling that is not
//            finite or no adapter.
// As PEFT's get_delta_weight (huggingface/peft, tuners/lora/layer.py), which multiplies by s after
// the product.
#pragma once

#include <algorithm>
#include <limits>

#include "lora/detail/delta_rows.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/kernel/merge/delta_tiles.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI {
/// Magnitudes below this count as zero inside lora_B * lora_A, where Acc accumulates the delta
/// weight of an L: the smallest normal float where both factors are bfloat16, Acc is float and the
/// build has the processor's dot products (AVX512-BF16); 0 everywhere else. It goes for merge,
/// delta_weight and linear, for adapters of rank 4 or more with 2^-8 <= |s| <= 2^16, and for PEFT's
/// roundings, of any s there. docs/numerics.md has the bound.
template <class Acc, low_rank L>
constexpr double flush_threshold_of_delta() {
  return detail::may_use_dots<Acc, L> ? static_cast<double>(std::numeric_limits<float>::min())
                                      : 0.0;
}

template <class... L>
  requires(detail::adapters<L> && ...) && (sizeof...(L) > 0)
[[nodiscard]] auto delta_weight(const L&... l) {
  using acc = accumulator_t<L...>;
  const auto each = detail::each_of(l...);
  index_t out_features = -1, in_features = -1;
  each([&](const auto& one) {
    if (out_features >= 0) return;
    const auto& lora_A = one.lora_A();
    const auto& lora_B = one.lora_B();
    out_features = as_matrix(lora_B).rows();
    in_features = as_matrix(lora_A).cols();
  });
  const detail::default_environment environment;
  if (out_features < 0)
    detail::raise_value("delta_weight", "no adapter is given, so the shape is not known");
  if (!detail::fits_memory<acc>(in_features, out_features, out_features))
    detail::raise_shape("delta_weight",
                        detail::shape_text(out_features, in_features) + " is larger than a memory");
  workspace space;
  const detail::rank_update<acc, storage_order::col_major, detail::columns::in_order,
                            detail::may_use_dots<acc, L...>>
      update(space, "delta_weight", each, out_features, in_features, 1.0);
  Eigen::Matrix<acc, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor> result(out_features,
                                                                             in_features);
  if (update.rank() == 0) {
    result.setZero();
    return result;
  }
  // Column-major: the update runs on the transpose, whose rows are the columns of the result.
  update.run(detail::row_sink<decltype(update), acc, false>(result.data(), out_features));
  return result;
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires(!(detail::adapters<A> && ...) && detail::mistaken_on_adapters<A...>)
auto delta_weight(const A&...) {
  static_assert(detail::refuse_on_adapters<detail::verb::delta_weight, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
