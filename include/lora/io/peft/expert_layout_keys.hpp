// SPDX-License-Identifier: Apache-2.0
//
// Config keys that say in which order lora_B of a stack of experts has its columns: lora_B_layout
// and unsloth_fused_expert_lora. Where both say it, they must say the same.
#pragma once

#include <string>
#include <string_view>

#include "lora/io/detail/json_tree.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_object.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::string_view fused_expert_key = "unsloth_fused_expert_lora";
inline constexpr std::string_view one_layout =
    "find out in which order the columns were trained, and write it in both places";

inline peft::expert_columns expert_columns_in(const config_object& keys, const json_node& value) {
  const std::string_view name = value.kind == json_kind::string ? value.string : std::string_view{};
  if (name == "rank_major") return peft::expert_columns::rank_major;
  if (name == "grouped_by_expert") return peft::expert_columns::grouped_by_expert;
  keys.refuse(value, "lora_B_layout", "\"rank_major\" (PEFT's) or \"grouped_by_expert\"",
              value.text(),
              "it says in which order the columns of lora_B go over ranks and experts");
}

/// Whether the key is one of a layout.
inline bool read_layout_key(const config_object& keys, const json_node& item,
                            peft::expert_layout& layout) {
  if (item.kind == json_kind::null)
    return item.key == "lora_A_layout" || item.key == "lora_B_layout" || item.key == "num_experts";
  if (item.key == "lora_A_layout") {
    if (item.kind != json_kind::string || item.string != "grouped_by_expert")
      keys.refuse(item, fused_expert_key, "lora_A_layout \"grouped_by_expert\", as PEFT has it",
                  item.text());
  } else if (item.key == "lora_B_layout") {
    const auto order = expert_columns_in(keys, item);
    if (layout.lora_B.value_or(order) != order)
      keys.refuse(item, fused_expert_key, "the same lora_B_layout in every place", item.text(),
                  one_layout);
    layout.lora_B = order;
  } else if (item.key == "num_experts") {
    layout.experts =
        static_cast<std::uint64_t>(keys.positive_in(item, fused_expert_key, "a number of experts"));
  } else {
    return false;
  }
  return true;
}

/// The key of a parameter, as its entry is called. An empty one would be that of all stacks.
inline std::string bare_parameter(const config_object& keys, const json_node& of) {
  constexpr std::string_view prefix = "base_model.model.";
  if (of.key.empty()) keys.refuse(of, fused_expert_key, "the name of a parameter", "an empty one");
  return of.key.starts_with(prefix) ? of.key.substr(prefix.size()) : of.key;
}
inline void read_parameter_layout(config_object& keys, peft::config& c, const json_node& of) {
  const auto name = bare_parameter(keys, of);
  if (of.kind != json_kind::object)
    keys.refuse(of, fused_expert_key, sentence({"an object for ", in_quotes(name)}), of.text());
  auto& layout = c.expert_layouts[name];
  for (const auto& item : of.items)
    if (!read_layout_key(keys, item, layout))
      keys.pass_unknown(sentence({fused_expert_key, ".parameters.", name, ".", item.key}), item);
}

/// Throws where a parameter's layout is another than that of all stacks.
inline void check_layouts_agree(const config_object& keys, const peft::config& c,
                                const json_node& fused) {
  const auto& all = c.expert_layouts.at("");
  for (const auto& [name, layout] : c.expert_layouts)
    if (all.lora_B && layout.lora_B && all.lora_B != layout.lora_B)
      keys.refuse(fused, fused_expert_key, "the lora_B_layout that the config says for all stacks",
                  sentence({"another for ", in_quotes(name)}), one_layout);
    else if (all.experts && layout.experts && all.experts != layout.experts)
      keys.refuse(fused, fused_expert_key, "the num_experts that the config says for all stacks",
                  sentence({"another for ", in_quotes(name)}));
}

inline void read_expert_layouts(config_object& keys, peft::config& c) {
  const auto* of_all = keys.take_value("lora_B_layout");
  if (of_all != nullptr) c.expert_layouts[""].lora_B = expert_columns_in(keys, *of_all);
  const auto* fused = keys.take(fused_expert_key);
  if (fused == nullptr || is_off(*fused)) return;
  if (fused->kind != json_kind::object)
    keys.refuse(*fused, fused_expert_key, "an object or null", fused->text());
  auto& all = c.expert_layouts[""];
  for (const auto& item : fused->items) {
    if (item.key == "parameters") {
      if (item.kind != json_kind::object)
        keys.refuse(item, fused_expert_key, "parameters as an object", item.text());
      for (const auto& parameter : item.items) read_parameter_layout(keys, c, parameter);
    } else if (!read_layout_key(keys, item, all)) {
      keys.pass_unknown(sentence({fused_expert_key, ".", item.key}), item);
    }
  }
  check_layouts_agree(keys, c, *fused);
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
