// SPDX-License-Identifier: Apache-2.0
//
// LoKr in a PEFT file (peft_type LOKR): config keys, tensors, and lora::lokr_adapter.
//
//   C1  .lokr_w1 [o1, i1], or .lokr_w1_a [o1, r] and .lokr_w1_b [r, i1] (decompose_both)
//   C2  .lokr_w2 [o2, i2], or [o2, channels, kernel, kernel]; or .lokr_w2_a [o2, r] and
//       .lokr_w2_b [r, i2]; or .lokr_w2_a [r, o2], .lokr_w2_b [r, channels] and .lokr_t2 of four
//       dimensions
//
// A .lokr_w2 of three dimensions (Conv1d) is refused: PEFT's product is then another one, see
// lora/kinds/lokr.hpp. PEFT 0.21, tuners/lokr/layer.py.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <type_traits>

#include "lora/io/peft/loha.hpp"
#include "lora/kinds/lokr.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array lokr_fixed_keys = std::to_array<fixed_key>({
    {"rank_dropout"},
    {"module_dropout"},
    {"rank_dropout_scale"},
    {"init_weights"},
    {"use_effective_conv2d"},  // the tensors say this and the next two
    {"decompose_both"},
    {"decompose_factor"},
});

inline constexpr std::array lokr_suffixes = std::to_array<std::string_view>(
    {".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"});

/// Throws for a dense matrix with parts of a factored one beside it.
inline void check_alone(const kind_module& m, std::string_view dense,
                        std::initializer_list<std::string_view> parts) {
  for (const auto part : parts)
    if (m.has(dense) && m.has(part))
      m.refuse(m.at(part), sentence({m.name(), dense, " or its factors"}), "both");
}

inline any_kind decode_lokr(const kind_module& m) {
  check_alone(m, ".lokr_w1", {".lokr_w1_a", ".lokr_w1_b"});
  check_alone(m, ".lokr_w2", {".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"});
  if (m.has(".lokr_w2") && m.at(".lokr_w2").shape.size() == 3)
    m.refuse(m.at(".lokr_w2"), "two dimensions, or four of a Conv2d", m.at(".lokr_w2").text(),
             "for a Conv1d PEFT's Kronecker product orders rows and columns in another way, which "
             "is no LoKr of the flattened weight");
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    const auto C1 = m.has(".lokr_w1") ? factored_matrix<T>(m.matrix<T>(m.matrix_at(".lokr_w1")))
                                      : lycoris_factors<T>(m, ".lokr_w1_a", ".lokr_w1_b", "");
    const auto C2 = m.has(".lokr_w2")
                        ? factored_matrix<T>(m.matrix<T>(m.matrix_at(".lokr_w2", 4)))
                        : lycoris_factors<T>(m, ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2");
    const auto fits = [](index_t a, index_t b) { return a <= detail::most_extent / b; };
    if (!fits(C1.rows(), C2.rows()) || !fits(C1.cols(), C2.cols()))
      m.refuse(m.any(), "a product that a memory can hold", "a larger one");
    return lokr_adapter<T>(C1, C2, m.rank(), {.alpha = m.alpha()});
  });
}

inline std::optional<kind_parts> encode_lokr(const any_kind& any) {
  kind_parts parts;
  const bool is = any_format([&]<scalar T>(std::type_identity<T>) {
    const auto* kind = any.get_if<lokr_adapter<T>>();
    if (kind == nullptr) return false;
    const auto add = [&](const factored_matrix<T>& f, const std::string& name) {
      if (f.is_dense())
        parts.tensors.push_back(kind_parts::of_matrix(name, f.dense()));
      else
        add_lycoris_factors(parts, f, name + "_a", name + "_b", ".lokr_t2");
    };
    add(kind->C1(), ".lokr_w1");
    add(kind->C2(), ".lokr_w2");
    if (!kind->C1().is_dense()) parts.settings["decompose_both"] = "true";
    add_rank_and_alpha(parts, *kind);
    return true;
  });
  return is ? std::optional(std::move(parts)) : std::nullopt;
}

inline constexpr peft_kind lokr_kind{
    {"LOKR", read_loha_keys, lokr_fixed_keys}, lokr_suffixes, {}, decode_lokr, encode_lokr};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
