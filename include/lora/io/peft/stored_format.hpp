// SPDX-License-Identifier: Apache-2.0
//
// The one format in which the tensors of an adapter are kept: the one in which they are stored.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "lora/concepts.hpp"
#include "lora/io/dtype.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// BF16 or F16 where all are that, F64 where one is, else F32: it holds every value. Nothing where
/// one is none of these four.
inline std::optional<safetensors::dtype> common_format(const std::vector<safetensors::dtype>& all) {
  using safetensors::dtype;
  const auto every = [&](dtype type) {
    return std::all_of(all.begin(), all.end(), [&](dtype each) { return each == type; });
  };
  if (!std::all_of(all.begin(), all.end(), safetensors::holds_exactly<double>)) return std::nullopt;
  if (!all.empty() && every(dtype::bf16)) return dtype::bf16;
  if (!all.empty() && every(dtype::f16)) return dtype::f16;
  return std::find(all.begin(), all.end(), dtype::f64) != all.end() ? dtype::f64 : dtype::f32;
}

/// visit(std::type_identity<T>) for the type of a format that common_format gives.
template <class Visit>
decltype(auto) visit_format(safetensors::dtype format, const Visit& visit) {
  using safetensors::dtype;
  if (format == dtype::bf16) return visit(std::type_identity<bfloat16>());
  if (format == dtype::f16) return visit(std::type_identity<float16>());
  if (format == dtype::f64) return visit(std::type_identity<double>());
  return visit(std::type_identity<float>());
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
