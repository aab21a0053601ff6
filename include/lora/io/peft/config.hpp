// SPDX-License-Identifier: Apache-2.0
//
// What adapter_config.json of Hugging Face PEFT says, as a struct with PEFT's defaults.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/json_tree.hpp"
#include "lora/io/detail/text.hpp"
#include "lora/io/peft_patterns.hpp"
#include "lora/scaling.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// target_modules or exclude_modules: nothing, one regular expression for the whole name, or names
/// and ends of names.
struct module_selection {
  std::optional<std::string> expression = {};
  std::optional<std::vector<std::string>> names = {};

  /// As it stands in a message; long lists are shortened.
  std::string text() const {
    if (expression) return io_detail::in_quotes(*expression);
    return names ? "[" + io_detail::listed(*names) + "]" : "null";
  }
};

/// Which of the base's biases the adapter's file holds.
enum class trained_biases { none, all, lora_only };

/// What PEFT does to the base's weight when it loads the adapter. Only `none` leaves the stored
/// factors the whole adapter; the others are made plain with converted()
/// (lora/io/peft_convert.hpp).
enum class base_change {
  none,
  pissa,  ///< its principal part is subtracted
  olora,  ///< the part of its first columns is subtracted
  kasa,   ///< its smallest components are dropped
};

/// BD-LoRA: the modules whose A or B is block-diagonal and stored as its blocks. Entries are parts
/// of a module's last name.
struct block_diagonal {
  std::uint64_t blocks = 1;
  std::vector<std::string> in_A, in_B;
  bool strict = true;  ///< a module in neither list is an error
};

/// The order of lora_B's columns in a stack of E experts of rank r.
enum class expert_columns {
  rank_major,         ///< PEFT's: column k E + e
  grouped_by_expert,  ///< another writer's, said in lora_B_layout: column e r + k
};

/// What a config says of the stacks of one parameter.
struct expert_layout {
  std::optional<expert_columns> lora_B = {};
  std::optional<std::uint64_t> experts = {};
};

/// The config, with PEFT's defaults for keys that are absent.
struct config {
  std::string path;  ///< for messages
  /// Of a config in metadata that is one of several models': names of the file's tensors begin with
  /// it and a dot. Names of modules, patterns and targets are those behind it.
  std::string component = {};
  std::string peft_type = "LORA";
  index_t r = 8;
  double lora_alpha = 8;
  scaling_rule rule = scaling_rule::standard;
  pattern_table<index_t> rank_pattern;
  pattern_table<double> alpha_pattern;
  bool fan_in_fan_out = false;
  module_selection target_modules, exclude_modules;
  std::vector<std::uint64_t> layers_to_transform;
  std::vector<std::string> layers_pattern;
  std::vector<std::string> modules_to_save;
  std::vector<std::string> target_parameters;
  trained_biases bias = trained_biases::none;
  bool use_dora = false, lora_bias = false, ensure_weight_tying = false;
  base_change change = base_change::none;
  std::optional<block_diagonal> bd;
  /// lora_B_layout and unsloth_fused_expert_lora, by the parameter's name or its last segments;
  /// under "" for all stacks.
  std::map<std::string, expert_layout, std::less<>> expert_layouts;
  /// [begin, end) of the base's layers, one behind the other.
  std::vector<std::pair<std::uint64_t, std::uint64_t>> layer_replication;
  /// Rows of embeddings by the module's name, or under "" for the input embedding.
  std::map<std::string, std::vector<index_t>> trainable_tokens;
  std::string task_type, base_model_name_or_path, revision, peft_version;
  std::string init_lora_weights = "true";
  /// Unknown keys that were ignored: their value is null, false or empty, or the caller listed them
  /// in ignore_keys.
  std::vector<std::string> ignored_keys;
  /// The keys as they were read, for writing them back; null for a config that was not read.
  std::shared_ptr<const io_detail::json_node> source;

  /// The rank and the scaling (alpha with its rule) of one module.
  index_t rank_of(std::string_view module) const { return rank_pattern.find(module).value_or(r); }
  lora::scaling scaling_of(std::string_view module) const {
    return {.alpha = alpha_pattern.find(module).value_or(lora_alpha), .rule = rule};
  }
  /// The modules that PEFT does not adapt because it saves them whole. The heads of SEQ_CLS are
  /// among them; those of other tasks PEFT adds after it has chosen what to adapt.
  std::vector<std::string> excluded_by_saving() const {
    return task_type == "SEQ_CLS" ? saved_modules() : modules_to_save;
  }
  /// The modules that PEFT saves whole: modules_to_save, and the heads that it adds for task_type.
  std::vector<std::string> saved_modules() const {
    auto result = modules_to_save;
    if (task_type == "SEQ_CLS" || task_type == "TOKEN_CLS")
      result.insert(result.end(), {"classifier", "score"});
    if (task_type == "QUESTION_ANS") result.emplace_back("qa_outputs");
    return result;
  }
};

}  // namespace lora::inline LORA_DETAIL_ABI::peft
