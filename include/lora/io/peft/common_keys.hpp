// SPDX-License-Identifier: Apache-2.0
//
// Keys of a PEFT config that several kinds share. A kind's reader calls the functions of the groups
// that its PEFT class has.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "lora/io/detail/json_tree.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_kind.hpp"
#include "lora/io/peft/config_object.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// PEFT's PeftConfig: keys of every kind.
inline constexpr std::array<fixed_key, 3> common_fixed_keys{
    {{"auto_mapping"}, {"inference_mode"}, {"runtime_config"}}};

inline constexpr std::array<std::string_view, 6> task_types{
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};

/// What every kind says of its model and its writer.
inline void read_model_keys(config_object& keys, peft::config& c) {
  c.task_type = keys.text("task_type");
  if (!c.task_type.empty() &&
      std::find(task_types.begin(), task_types.end(), c.task_type) == task_types.end())
    keys.refuse(*keys.find("task_type"), "task_type",
                sentence({"one of PEFT's ", listed(task_types)}), in_quotes(c.task_type),
                "it does not change the arithmetic: write null, or the one that is meant");
  c.base_model_name_or_path = keys.text("base_model_name_or_path");
  c.revision = keys.text("revision");
  c.peft_version = keys.text("peft_version");
}

/// rank_pattern and alpha_pattern. `add` puts a key with its value into the table and says what is
/// wrong with the key.
template <class Add>
void read_pattern_table(config_object& keys, std::string_view name, const Add& add) {
  const auto* table = keys.take_value(name);
  if (table == nullptr) return;
  if (table->kind != json_kind::object)
    keys.refuse(*table, name, "an object of patterns", json_kind_name(table->kind));
  for (const auto& item : table->items) {
    const std::string fault = add(item);
    if (!fault.empty())
      keys.refuse(
          item, name, "a pattern that this reader supports",
          sentence({in_quotes(item.key), " with ", fault}),
          "write the module's name instead; docs/formats.md lists the supported expressions");
  }
}
inline void read_pattern_keys(config_object& keys, peft::config& c) {
  read_pattern_table(keys, "rank_pattern", [&](const json_node& value) {
    return c.rank_pattern.try_add(value.key, keys.positive_in(value, "rank_pattern"));
  });
  read_pattern_table(keys, "alpha_pattern", [&](const json_node& value) {
    return c.alpha_pattern.try_add(value.key, keys.finite_in(value, "alpha_pattern"));
  });
}

inline void read_layer_numbers(config_object& keys, peft::config& c) {
  const auto* layers = keys.take_value("layers_to_transform");
  if (layers == nullptr) return;
  const auto add = [&](const json_node& value) {
    if (value.kind != json_kind::unsigned_integer)
      keys.refuse(value, "layers_to_transform", "layer numbers", value.text());
    c.layers_to_transform.push_back(value.unsigned_integer);
  };
  if (layers->kind != json_kind::array) return add(*layers);
  for (const auto& item : layers->items) add(item);
}

/// Which modules the adapter is for.
inline void read_module_keys(config_object& keys, peft::config& c) {
  c.target_modules = keys.selection("target_modules");
  c.exclude_modules = keys.selection("exclude_modules");
  c.modules_to_save = keys.plain_names("modules_to_save");
  c.layers_pattern = keys.plain_names("layers_pattern");
  read_layer_numbers(keys, c);
  const auto* layers = keys.take_value("layers_to_transform");
  if (layers != nullptr && c.target_modules.expression)
    keys.refuse(
        *layers, "layers_to_transform", "target_modules as a list", "target_modules as text",
        "PEFT refuses the two together: write the layers into the expression of target_modules");
  if (!c.layers_pattern.empty() && layers == nullptr)
    keys.refuse(*keys.find("layers_pattern"), "layers_pattern", "layers_to_transform beside it",
                "none", "PEFT refuses it alone: remove it, or add layers_to_transform");
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
