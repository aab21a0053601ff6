// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::converted(W, entry)   an adapter that was trained beside a changed base, as a plain
//                                   adapter of W as published
//
// PiSSA, OLoRA and KaSA take a part P out of the base's weight when PEFT creates or loads the
// adapter, so that the stored factors are not the difference from the published W. P is a function
// of W and the rank (residual.hpp), so it can be had again:
//   W' = (W - P) + s B A = W + s [B B_P] [A; -A_P / s],    rank r + r    (KaSA: B diag(d) in place
//                                                          of B)
// This is what save_pretrained(path_initial_model_for_weight_conversion=...) stores. W itself is
// not changed.
//   W        as the base stores it, and as it was published: not merged, not converted before. Its
//            values decide P.
//   result   an entry with change() none and scaling() as before; the factors rounded to T once
//   error    |delta - exact| is of the order u_T (|B_P| |A_P| + |s| |B| |A|)
//   throws   value_error when the scaling is 0 or the rank too large, shape_error; an entry without
//            a change is returned as it is.
#pragma once

#include <string>
#include <utility>

#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_verbs.hpp"
#include "lora/residual.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {
namespace convert_detail {

template <class View>
low_rank_part part_of(base_change change, const View& W, index_t rank, double s) {
  if (change == base_change::pissa) return principal_part(W, rank);
  if (change == base_change::kasa) return smallest_part(W, rank);
  low_rank_part part = leading_part(W, rank);
  part.A *= s;  // PEFT subtracts s Q_r R_r
  return part;
}

}  // namespace convert_detail

template <class M, scalar T>
  requires matrix_like<M>
entry<T> converted(const M& W, const entry<T>& e) {
  if (e.change() == base_change::none) return e;
  const double s = e.scaling();
  if (s == 0)
    lora::detail::raise_value(
        "peft::converted", e.name() + " has the scaling 0, so its part of the base is not defined");
  const auto stored = as_matrix(W);
  entry_detail::check_shape("peft::converted", stored.rows(), stored.cols(), e);
  const index_t r = e.rank();
  const auto part = e.fan_in_fan_out()
                        ? convert_detail::part_of(e.change(), stored.transpose(), r, s)
                        : convert_detail::part_of(e.change(), stored, r, s);
  lora::detail::row_major_matrix<T> A(2 * r, e.in_features()), B(e.out_features(), 2 * r);
  const auto& l = e.factors();
  const auto diagonal = [&](index_t k) {
    return e.parts().diagonal.empty()
               ? 1.0
               : lora::detail::widen<double>(e.parts().diagonal[static_cast<std::size_t>(k)]);
  };
  for (index_t k = 0; k < r; ++k) {
    for (index_t j = 0; j < A.cols(); ++j) {
      A(k, j) = l.lora_A()(k, j);
      A(r + k, j) = lora::detail::narrow<T>(-part.A(k, j) / s);
    }
    for (index_t i = 0; i < B.rows(); ++i) {
      B(i, k) =
          lora::detail::narrow<T>(lora::detail::widen<double>(l.lora_B()(i, k)) * diagonal(k));
      B(i, r + k) = lora::detail::narrow<T>(part.B(i, k));
    }
  }
  entry_parts<T> parts = e.parts();
  parts.experts.clear();
  parts.experts.emplace_back(A, B, lora::scaling{.alpha = s, .rule = scaling_rule::fixed});
  parts.scale = {.alpha = s, .rule = scaling_rule::fixed};
  parts.diagonal.clear();
  parts.change = base_change::none;
  parts.dtype_A = parts.dtype_B = safetensors::dtype_of<T>();
  return entry<T>(std::move(parts));
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
