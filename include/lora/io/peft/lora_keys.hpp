// SPDX-License-Identifier: Apache-2.0
//
// The config keys of PEFT's LoraConfig, which peft_type LORA has: up to PEFT 0.21, and those of its
// first versions and neighbours.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/json_tree.hpp"
#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_kind.hpp"
#include "lora/io/peft/config_object.hpp"
#include "lora/io/peft/expert_layout_keys.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array lora_fixed_keys = std::to_array<fixed_key>({
    {"lora_dropout"},
    {"megatron_config"},
    {"megatron_core"},
    {"loftq_config"},
    {"eva_config"},
    {"corda_config"},
    {"lora_ga_config"},
    {"velora_config"},
    {"monteclora_config"},
    {"qalora_group_size"},
    {"merge_weights"},
    {"use_qalora", fixed_key::rule::refused,
     "its lora_A takes means of groups of inputs beside a quantized base, which is not supported"},
    {"alora_invocation_tokens", fixed_key::rule::refused,
     "the adapter applies only from its invocation tokens on, so it is no change of a weight"},
    {"enable_lora", fixed_key::rule::refused, "this variant of LoRA is not supported"},
    {"arrow_config", fixed_key::rule::refused_also_empty,
     "each token is routed over several adapters, so it is no change of a weight"},
});

// ---- rank and scaling

inline void read_rank_and_alpha(config_object& keys, peft::config& c) {
  if (const auto* r = keys.take("r")) c.r = keys.positive_in(*r, "r");
  const auto* alpha = keys.take("lora_alpha");
  if (alpha != nullptr) c.lora_alpha = keys.finite_in(*alpha, "lora_alpha");
  // Some writers add `alpha`. PEFT ignores it, so it must not say anything else.
  if (const auto* other = keys.take_value("alpha")) {
    if (alpha == nullptr)
      keys.refuse(*other, "alpha", "lora_alpha, which PEFT reads", "alpha alone", "rename the key");
    if (keys.finite_in(*other, "alpha") != c.lora_alpha)
      keys.refuse(*other, "alpha", "the value of lora_alpha, or no such key", other->text(),
                  "PEFT reads lora_alpha and ignores alpha: remove the wrong one");
  }
  if (keys.flag("use_rslora")) c.rule = scaling_rule::rank_stabilized;
  c.fan_in_fan_out = keys.options().fan_in_fan_out.value_or(keys.flag("fan_in_fan_out"));
}

// ---- variants

inline void read_bias(config_object& keys, peft::config& c) {
  const auto* bias = keys.take_value("bias");
  if (bias == nullptr) return;
  const std::string_view name = bias->kind == json_kind::string ? bias->string : std::string_view{};
  if (name == "none") return;
  if (name != "all" && name != "lora_only")
    keys.refuse(
        *bias, "bias", "\"none\", \"all\" or \"lora_only\"", bias->text(),
        "write \"none\" if the file has no tensor of a bias, else the one with which it was "
        "trained");
  c.bias = name == "all" ? peft::trained_biases::all : peft::trained_biases::lora_only;
}

/// What init_lora_weights does to the base.
struct initialization {
  enum class effect {
    none,        ///< the base stays, so that the stored factors are the whole adapter
    computable,  ///< the base changes in a way that can be computed again
    random,      ///< the base changes by random numbers or data
  };
  std::string_view name;
  effect what;
  bool any_case = false;  ///< PEFT compares it in lower case
};
inline constexpr std::array initializations = std::to_array<initialization>({
    {"true", initialization::effect::none},
    {"false", initialization::effect::none},
    {"gaussian", initialization::effect::none, true},
    {"eva", initialization::effect::none},
    {"orthogonal", initialization::effect::none},
    {"mica", initialization::effect::none, true},
    {"pissa", initialization::effect::computable},
    {"olora", initialization::effect::computable, true},
    {"corda", initialization::effect::random},
    {"loftq", initialization::effect::random},
    {"lora_ga", initialization::effect::random},
    {"pissa_niter_", initialization::effect::random},  // and a number
});
/// The one of a name as PEFT spells it; null for none.
inline const initialization* initialization_of(std::string_view name) {
  if (name.starts_with("pissa_niter_")) return &initializations.back();
  for (const auto& each : initializations)
    if (each.name == name) return &each;
  return nullptr;
}

[[noreturn]] inline void refuse_init(const config_object& keys, const json_node& init,
                                     const std::string& name) {
  constexpr std::string_view expected =
      "an initialization that leaves the base as it is, pissa or olora";
  if (initialization_of(name) != nullptr)
    keys.refuse(init, "init_lora_weights", expected, init.text(),
                "PEFT also changes the base when it loads this adapter, in a way that the files do "
                "not determine (random "
                "numbers, data): convert it with path_initial_model_for_weight_conversion of "
                "save_pretrained");
  const auto lowered = lower_case(name);
  const bool known = initialization_of(lowered) != nullptr;
  keys.refuse(
      init, "init_lora_weights", expected, init.text(),
      known ? sentence(
                  {"PEFT knows ", in_quotes(lowered),
                   " in lower case only, and refuses this spelling: write the one that is meant"})
            : "PEFT knows no such initialization: write true if the base was left as it is");
}
inline void read_init(config_object& keys, peft::config& c) {
  if (const auto* kasa = keys.take("kasa_config"); kasa != nullptr && !is_off(*kasa))
    c.change = peft::base_change::kasa;
  const auto* init = keys.take_value("init_lora_weights");
  if (init == nullptr) return;
  c.init_lora_weights = init->kind == json_kind::string ? init->string : init->text();
  const auto* in_lower_case = initialization_of(lower_case(c.init_lora_weights));
  const std::string name = in_lower_case != nullptr && in_lower_case->any_case
                               ? std::string(in_lower_case->name)
                               : c.init_lora_weights;
  const bool is_flag =
      in_lower_case != nullptr && (in_lower_case->name == "true" || in_lower_case->name == "false");
  if (is_flag && init->kind == json_kind::string)
    keys.refuse(*init, "init_lora_weights", "true or false, or the name of an initialization",
                init->text(),
                "PEFT knows no initialization of this name: write the word without quotes");
  const auto* known = initialization_of(name);
  if (known != nullptr && known->what == initialization::effect::none) return;
  if (known == nullptr || known->what == initialization::effect::random)
    refuse_init(keys, *init, name);
  if (c.change != peft::base_change::none)
    keys.refuse(*init, "init_lora_weights", "true beside kasa_config", init->text());
  c.change = name == "pissa" ? peft::base_change::pissa : peft::base_change::olora;
}

inline void read_block_diagonal(config_object& keys, peft::config& c) {
  constexpr std::string_view key = "use_bdlora";
  const auto* bd = keys.take(key);
  if (bd == nullptr || is_off(*bd)) return;
  if (bd->kind != json_kind::object) keys.refuse(*bd, key, "an object or null", bd->text());
  peft::block_diagonal result;
  for (const auto& item : bd->items) {
    if (item.key == "nblocks") {
      result.blocks = static_cast<std::uint64_t>(keys.positive_in(item, key));
    } else if (item.key == "match_strict") {
      if (item.kind != json_kind::boolean)
        keys.refuse(item, key, "match_strict as true or false", item.text());
      result.strict = item.boolean;
    } else if (item.key == "target_modules_bd_a" || item.key == "target_modules_bd_b") {
      if (item.kind == json_kind::null) continue;
      if (item.kind != json_kind::array) keys.refuse(item, key, "module names", item.text());
      (item.key.back() == 'a' ? result.in_A : result.in_B) = keys.list_in(item, key);
    } else {
      const std::string name = "use_bdlora." + item.key;
      if (!keys.may_ignore(name, item))
        keys.refuse(
            item, key, "a key that this version knows", in_quotes(item.key),
            sentence(
                {"if it does not change the arithmetic, name it in read_options::ignore_keys as ",
                 in_quotes(name)}));
      keys.ignore(name);
    }
  }
  c.bd = std::move(result);
}

inline void read_layer_replication(config_object& keys, peft::config& c) {
  const auto* map = keys.take("layer_replication");
  if (map == nullptr || map->asks_for_nothing()) return;
  const auto bad = [&](const json_node& at) {
    keys.refuse(at, "layer_replication", "pairs [begin, end) of layer numbers", at.text(),
                "each pair names layers of the base, as in [[0, 16], [8, 24]]: begin below end, at "
                "most 1000000 layers in all");
  };
  if (map->kind != json_kind::array) bad(*map);
  std::uint64_t layers = 0;
  for (const auto& pair : map->items) {
    if (pair.kind != json_kind::array || pair.items.size() != 2) bad(pair);
    for (const auto& number : pair.items)
      if (number.kind != json_kind::unsigned_integer || number.unsigned_integer > 100'000)
        bad(number);
    const auto begin = pair.items[0].unsigned_integer, end = pair.items[1].unsigned_integer;
    if (end <= begin || (layers += end - begin) > 1'000'000) bad(pair);
    c.layer_replication.emplace_back(begin, end);
  }
}

inline std::vector<index_t> token_numbers(const config_object& keys, const json_node& array) {
  constexpr std::string_view key = "trainable_token_indices";
  constexpr std::string_view hint =
      "write a list of token numbers, or an object with such a list for each embedding's name";
  std::vector<index_t> result;
  if (array.kind != json_kind::array)
    keys.refuse(array, key, "token numbers, or an object of them", array.text(), hint);
  for (const auto& id : array.items) {
    if (id.kind != json_kind::unsigned_integer || id.unsigned_integer > 0x7fffffffu)
      keys.refuse(id, key, "token numbers", id.text(), hint);
    result.push_back(static_cast<index_t>(id.unsigned_integer));
  }
  return result;
}
inline void read_tokens(config_object& keys, peft::config& c) {
  const auto* tokens = keys.take("trainable_token_indices");
  if (tokens == nullptr || tokens->asks_for_nothing()) return;
  if (tokens->kind != json_kind::object) {
    c.trainable_tokens.emplace("", token_numbers(keys, *tokens));
    return;
  }
  for (const auto& item : tokens->items)
    c.trainable_tokens.emplace(item.key, token_numbers(keys, item));
}

inline void read_target_parameters(config_object& keys, peft::config& c) {
  const auto* value = keys.take("target_parameters");
  if (value != nullptr && value->kind == json_kind::string)
    keys.refuse(*value, "target_parameters", "a list of names or null, as PEFT does",
                value->text());
  c.target_parameters = keys.names("target_parameters");
}

// ---- all of them

inline void read_lora_keys(config_object& keys, peft::config& c) {
  read_rank_and_alpha(keys, c);
  read_pattern_keys(keys, c);
  read_module_keys(keys, c);
  c.use_dora = keys.flag("use_dora");
  c.lora_bias = keys.flag("lora_bias");
  c.ensure_weight_tying = keys.flag("ensure_weight_tying");
  read_target_parameters(keys, c);
  read_bias(keys, c);
  read_init(keys, c);
  read_block_diagonal(keys, c);
  read_expert_layouts(keys, c);
  read_layer_replication(keys, c);
  read_tokens(keys, c);
  if (c.use_dora && c.lora_bias)
    keys.refuse(*keys.find("lora_bias"), "lora_bias", "false beside use_dora", "true",
                "PEFT refuses the two together");
}

inline constexpr config_kind lora_kind{"LORA", read_lora_keys, lora_fixed_keys};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
