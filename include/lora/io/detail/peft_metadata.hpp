// SPDX-License-Identifier: Apache-2.0
//
// What the metadata of a safetensors file says of an adapter. PEFT writes none of it and reads none
// of it. diffusers writes the whole config as JSON, its keys behind the component's name; other
// writers add alpha and rank as text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "lora/io/detail/json_text.hpp"
#include "lora/io/detail/json_tree.hpp"
#include "lora/io/detail/number_text.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The JSON object in a text of the metadata; nothing where it is none. Without exceptions a
/// malformed text could not be passed over, so that none is parsed then.
inline std::optional<json_node> json_object_in(const std::string& text) {
#if defined(__cpp_exceptions)
  constexpr std::size_t longest = std::size_t{16} << 20;  // as a config's file
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos || text[first] != '{' || text.size() > longest)
    return std::nullopt;
  try {
    return parse_json_tree({.text = text, .path = "metadata"});
  } catch (const format_error&) {
    return std::nullopt;
  }
#else
  static_cast<void>(text);
  return std::nullopt;
#endif
}

/// A whole config in the metadata, as the text of adapter_config.json.
struct config_in_metadata {
  std::string component;  ///< before the dot of its keys; empty for the file as a whole
  std::string text;

  friend bool operator<(const config_in_metadata& a, const config_in_metadata& b) {
    return std::tie(a.component, a.text) < std::tie(b.component, b.text);
  }
  friend bool operator==(const config_in_metadata&, const config_in_metadata&) = default;
};

/// The whole configs in the metadata: objects with peft_type, perhaps behind a component's name.
/// The same one twice is one.
inline std::vector<config_in_metadata> configs_in_metadata(const safetensors::index& tensors) {
  std::vector<config_in_metadata> result;
  for (const auto& [name, text] : tensors.metadata()) {
    const auto object = json_object_in(text);
    if (!object) continue;
    std::map<std::string, json_node> components;
    for (const auto& item : object->items) {
      const auto dot = item.key.find('.');
      const bool whole = dot == std::string::npos;
      json_node& into = components[whole ? std::string() : item.key.substr(0, dot)];
      into.kind = json_kind::object;
      into.items.push_back(item);
      if (!whole) into.items.back().key = item.key.substr(dot + 1);
    }
    for (const auto& [component, config] : components)
      for (const auto& item : config.items)
        if (item.key == "peft_type") result.push_back({component, json_text(config)});
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

/// The number that a metadata text or a value in its JSON is.
inline std::optional<double> number_in(std::string_view text) {
  double value = 0;
  return read_double(text, value) ? std::optional<double>(value) : std::nullopt;
}

inline std::string number_text(double value) {
  const std::string text = json_real(value);
  return text.ends_with(".0") ? text.substr(0, text.size() - 2) : text;
}

/// Where the metadata states another alpha or rank than the config, in sentences.
inline std::vector<std::string> differences_of_metadata(const peft::config& c,
                                                        const safetensors::index& tensors) {
  constexpr std::size_t most = 16;
  std::vector<std::string> result;
  const auto compare = [&](const std::string& where, std::string_view key,
                           std::optional<double> value) {
    const bool alpha = key == "lora_alpha" || key == "alpha" || key == "ss_network_alpha";
    const bool rank = key == "r" || key == "rank" || key == "lora_rank" || key == "ss_network_dim";
    const double ours = alpha ? c.lora_alpha : static_cast<double>(c.r);
    if (!(alpha || rank) || !value || *value == ours || result.size() == most) return;
    result.push_back("metadata " + in_quotes(where) + " says " + number_text(*value) +
                     " and the config has " + (alpha ? "lora_alpha " : "r ") + number_text(ours) +
                     ": PEFT takes the config, other programs may take the metadata");
  };
  for (const auto& [key, text] : tensors.metadata()) {
    compare(key, key, number_in(text));
    const auto object = json_object_in(text);
    if (!object) continue;
    for (const auto& item : object->items)
      if (item.kind == json_kind::unsigned_integer || item.kind == json_kind::real)
        compare(key + ": " + item.key, std::string_view(item.key).substr(item.key.rfind('.') + 1),
                item.number);
  }
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
