// SPDX-License-Identifier: Apache-2.0
//
// AdaLoRA in a PEFT file (peft_type ADALORA): config keys, tensors, and lora::adalora_adapter.
//
//   .lora_A [rank, in], .lora_B [out, rank], .lora_E [rank, 1]
//
// rank is init_r, or where rank_pattern has the module's mask under <module>.lora_E, the number of
// true values in it, which may be 0. The scaling is divided by init_r in any case. target_r, r,
// alpha_pattern and use_rslora change nothing. Convolutions are refused. PEFT 0.21,
// tuners/adalora/layer.py and model.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/lora_keys.hpp"
#include "lora/io/peft/open_kind.hpp"
#include "lora/kinds/adalora.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array adalora_fixed_keys = std::to_array<fixed_key>({
    {"r"},  // PEFT ignores it, and the next two
    {"alpha_pattern"},
    {"use_rslora"},
    {"target_r"},  // the course of training
    {"tinit"},
    {"tfinal"},
    {"deltaT"},
    {"beta1"},
    {"beta2"},
    {"orth_reg_weight"},
    {"total_step"},
    {"init_lora_weights"},
    {"ensure_weight_tying"},
    {"lora_dropout"},
    {"megatron_config"},
    {"megatron_core"},
    {"loftq_config", fixed_key::rule::refused, "PEFT refuses it for AdaLoRA"},
    {"eva_config"},
    {"corda_config"},
    {"lora_ga_config"},
    {"velora_config"},
    {"monteclora_config"},
    {"qalora_group_size"},
    {"use_qalora", fixed_key::rule::refused, "AdaLoRA has no such variant"},
    {"use_dora", fixed_key::rule::refused, "PEFT refuses it for AdaLoRA"},
    {"lora_bias", fixed_key::rule::refused, "AdaLoRA has no such bias"},
    {"kasa_config", fixed_key::rule::refused, "AdaLoRA has no such variant"},
    {"use_bdlora", fixed_key::rule::refused, "AdaLoRA has no such variant"},
    {"layer_replication", fixed_key::rule::refused,
     "an adapter of a replicated layer is no change of a weight of the base"},
    {"target_parameters", fixed_key::rule::refused, "AdaLoRA adapts modules alone"},
    {"trainable_token_indices", fixed_key::rule::refused, "it is not supported for AdaLoRA"},
    {"alora_invocation_tokens", fixed_key::rule::refused,
     "the adapter applies only from its invocation tokens on, so it is no change of a weight"},
    {"arrow_config", fixed_key::rule::refused_also_empty,
     "each token is routed over several adapters, so it is no change of a weight"},
});

/// The masks of rank_pattern; null for none.
inline const json_node* read_masks(config_object& keys) {
  const auto* masks = keys.take_value("rank_pattern");
  if (masks != nullptr && masks->kind != json_kind::object)
    keys.refuse(*masks, "rank_pattern", "an object of masks", json_kind_name(masks->kind));
  return masks;
}
inline void read_adalora_keys(config_object& keys, peft::config& c) {
  c.r = 12;
  if (const auto* r = keys.take("init_r")) c.r = keys.positive_in(*r, "init_r");
  if (const auto* alpha = keys.take("lora_alpha"))
    c.lora_alpha = keys.finite_in(*alpha, "lora_alpha");
  c.fan_in_fan_out = keys.options().fan_in_fan_out.value_or(keys.flag("fan_in_fan_out"));
  read_masks(keys);
  read_module_keys(keys, c);
  read_bias(keys, c);
}

inline constexpr std::array adalora_suffixes =
    std::to_array<std::string_view>({".lora_A", ".lora_B", ".lora_E"});

/// The true values in a mask. Throws for anything else.
inline index_t kept_ranks(const kind_module& m, const json_node& mask) {
  const auto wrong = [&] {
    m.refuse_key("rank_pattern",
                 sentence({std::to_string(m.config().r), " values true or false (init_r) for ",
                           in_quotes(m.name())}),
                 mask.kind == json_kind::array
                     ? sentence({"an array of ", std::to_string(mask.items.size()), " values"})
                     : mask.text());
  };
  if (mask.kind != json_kind::array || static_cast<index_t>(mask.items.size()) != m.config().r)
    wrong();
  index_t kept = 0;
  for (const auto& each : mask.items) {
    if (each.kind != json_kind::boolean) wrong();
    kept += each.boolean;
  }
  return kept;
}

inline index_t adalora_rank(const kind_module& m) {
  const auto* masks = m.settings(read_masks);
  if (masks == nullptr) return m.config().r;
  check_work(m.config(),
             static_cast<double>(m.modules()) * static_cast<double>(masks->items.size() + 1));
  const std::string key = m.name() + ".lora_E";
  for (const auto& each : masks->items)
    if (each.key == key) return kept_ranks(m, each);
  return m.config().r;
}

inline any_kind decode_adalora(const kind_module& m) {
  const auto &A = m.at(".lora_A"), &B = m.at(".lora_B"), &E = m.at(".lora_E");
  const index_t rank = adalora_rank(m);
  for (const auto* t : {&A, &B, &E}) {
    if (t->shape.size() != 2)
      m.refuse(*t, "two dimensions", t->text(),
               t->shape.size() == 4 ? "a convolution's AdaLoRA is not supported" : "");
    m.check_extent(*t, t == &B ? 1 : 0, rank, "the rank, of init_r or the mask in rank_pattern");
  }
  m.check_extent(E, 1, 1, "one value for each rank");
  for (const auto* t : {&A, &B})
    if (t->shape[t == &A ? 1 : 0] == 0) m.refuse(*t, "features", t->text());
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    using peft::layer_size;
    const adalora_adapter<T> kind(m.template matrix<T>(A), m.template matrix<T>(B),
                                  m.template values<T>(E),
                                  {.alpha = m.config().lora_alpha, .initial_rank = m.config().r});
    if (!m.config().fan_in_fan_out) return kind;
    return peft::open_kind(kind, layer_size::stored, layer_size::stored, true);
  });
}

/// The adapter keeps alpha / (init_r + 1e-5), of which the rank and an alpha are written that give
/// the same number: all modules of one rank and one scaling, then, or they disagree.
inline std::optional<kind_parts> encode_adalora(const any_kind& any) {
  kind_parts parts;
  const bool is = any_format([&]<scalar T>(std::type_identity<T>) {
    const auto* open = any.get_if<peft::open_kind<adalora_adapter<T>>>();
    const auto* kind = open == nullptr ? any.get_if<adalora_adapter<T>>() : &open->kind();
    if (kind == nullptr) return false;
    const auto rank = static_cast<std::uint64_t>(kind->rank());
    const double scaling = kind->factors().scaling();
    const auto alpha = numerator_for(scaling, static_cast<double>(rank) + 1e-5);
    if (rank == 0 || !alpha || *alpha <= 0)
      detail::raise_value("peft::write_adapters",
                          "no init_r and lora_alpha give this AdaLoRA: write the file that it was "
                          "read from");
    const auto& l = kind->factors();
    parts.tensors.push_back(kind_parts::of_matrix(
        ".lora_A", detail::row_major_matrix<T>(detail::exact_copy<T>(l.lora_A()))));
    parts.tensors.push_back(kind_parts::of_matrix(
        ".lora_B", detail::row_major_matrix<T>(detail::exact_copy<T>(l.lora_B()))));
    parts.tensors.push_back(kind_parts::of<T>(".lora_E", {rank, 1}, kind->lora_E()));
    parts.settings = {
        {"init_r", std::to_string(rank)},
        {"target_r", std::to_string(rank)},
        {"lora_alpha", json_real(*alpha)},
        {"total_step", "1"},  // PEFT wants a schedule
        {"fan_in_fan_out", open != nullptr && open->stored_in_out() ? "true" : "false"}};
    return true;
  });
  return is ? std::optional(std::move(parts)) : std::nullopt;
}

inline constexpr peft_kind adalora_kind{{"ADALORA", read_adalora_keys, adalora_fixed_keys},
                                        adalora_suffixes,
                                        {},
                                        decode_adalora,
                                        encode_adalora};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
