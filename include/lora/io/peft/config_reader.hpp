// SPDX-License-Identifier: Apache-2.0
//
// From the JSON of a PEFT config to peft::config. Every key is taken by the reader of its kind,
// known to have no effect, or refused by name; docs/formats.md has the table.
#pragma once

#include <algorithm>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/input_file.hpp"
#include "lora/io/detail/json_tree.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_kinds.hpp"
#include "lora/io/peft/config_object.hpp"
#include "lora/io/peft/read_options.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace io_detail {

/// Takes all keys of a kind.
inline void read_keys(const config_kind& kind, config_object& keys, peft::config& c) {
  c.peft_type = keys.text("peft_type");
  kind.read(keys, c);
  read_model_keys(keys, c);
}

/// The keys that the readers of a kind take: those that they ask an empty config for.
inline std::vector<std::string_view> keys_read(const config_kind& kind) {
  const json_node nothing;
  const peft::read_options options;
  config_object keys(nothing, "", options);
  peft::config scratch;
  read_keys(kind, keys, scratch);
  return keys.taken();
}

/// The key in one of the tables of keys that no reader takes; null when it is in none.
inline const fixed_key* fixed_key_of(const config_kind& kind, std::string_view name) {
  for (const std::span<const fixed_key> table :
       {kind.fixed, std::span<const fixed_key>(common_fixed_keys)})
    for (const auto& key : table)
      if (key.name == name) return &key;
  return nullptr;
}

/// Throws for a key that would change what the adapter is.
inline void check_fixed(const config_object& keys, const fixed_key& key, const json_node& value) {
  const bool passes =
      key.what == fixed_key::rule::no_effect ||
      (key.what == fixed_key::rule::refused ? value.asks_for_nothing() : is_off(value));
  if (!passes) keys.refuse(value, key.name, "null or false", value.text(), key.why);
}

/// The kind that peft_type names. Throws format_error for any other.
inline const config_kind& kind_of(const config_object& keys, const json_node& root,
                                  std::span<const config_kind> kinds) {
  const auto* type = keys.find("peft_type");
  if (type == nullptr)
    keys.refuse(root, "peft_type", "\"LORA\"", "none",
                keys.find("lora_parameters") != nullptr
                    ? "this is an MLX config, which is not read yet"
                    : "this is not the config of a PEFT adapter");
  if (type->kind == json_kind::string)
    for (const auto& kind : kinds)
      if (kind.peft_type == type->string) return kind;
  const auto& others = other_peft_types;
  const bool other = std::find(others.begin(), others.end(), type->string) != others.end();
  std::vector<std::string_view> names;
  for (const auto& kind : kinds) names.push_back(kind.peft_type);
  keys.refuse(*type, "peft_type",
              names.size() == 1 ? std::string(known_peft_types)
                                : sentence({"one of ", listed(names, names.size())}),
              type->text(),
              other ? "lora::peft::adapters reads it, as it is stored"
                    : "other kinds are not read; PEFT can convert some of them to LORA");
}

/// The config in a tree. The kinds are a parameter for tests.
inline peft::config read_config_tree(const std::shared_ptr<const json_node>& root,
                                     const std::string& path, const peft::read_options& options,
                                     std::span<const config_kind> kinds = config_kinds) {
  peft::config result;
  result.path = path;
  result.source = root;
  config_object keys(*root, path, options);
  if (root->kind != json_kind::object)
    keys.refuse(*root, "", "a JSON object", json_kind_name(root->kind));
  const auto& kind = kind_of(keys, *root, kinds);
  // Unknown keys first: they may be why the known ones look wrong.
  const auto known = keys_read(kind);
  for (const auto& item : root->items) {
    if (std::find(known.begin(), known.end(), item.key) != known.end()) continue;
    if (const auto* fixed = fixed_key_of(kind, item.key))
      check_fixed(keys, *fixed, item);
    else
      keys.pass_unknown(item.key, item);
  }
  read_keys(kind, keys, result);
  result.ignored_keys = keys.ignored();
  return result;
}

}  // namespace io_detail

namespace peft {

/// Reads a config from its text; `path` names it in messages. Throws format_error.
inline config parse_config(
    std::string_view text, const std::string& path, const read_options& options = {},
    std::span<const io_detail::config_kind> kinds = io_detail::config_kinds) {
  const auto root = std::make_shared<const io_detail::json_node>(
      io_detail::parse_json_tree({.text = text, .path = path}));
  return io_detail::read_config_tree(root, path, options, kinds);
}

/// Reads a config file of at most 16 MiB. Throws format_error.
inline config read_config(const std::filesystem::path& path, const read_options& options = {},
                          std::span<const io_detail::config_kind> kinds = io_detail::config_kinds) {
  const auto text = io_detail::read_text(path, 16u << 20);
  if (io_detail::is_git_lfs_pointer(text))
    io_detail::refuse({.path = path.string(), .offset = 0}, "a JSON object", "a Git LFS pointer",
                      io_detail::git_lfs_hint);
  return parse_config(text, path.string(), options, kinds);
}

}  // namespace peft
}  // namespace lora::inline LORA_DETAIL_ABI
