// SPDX-License-Identifier: Apache-2.0
//
// The JSON object of a PEFT config while it is read. A reader takes each key from it by name, and
// what was taken is what the reader knows: no list beside the code says so.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "lora/concepts.hpp"
#include "lora/io/detail/json_tree.hpp"
#include "lora/io/detail/module_pattern.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/read_options.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// null or false: what PEFT takes for "not used" where an empty object means "used".
inline bool is_off(const json_node& value) {
  return value.kind == json_kind::null || (value.kind == json_kind::boolean && !value.boolean);
}

/// Gives the values of a config by their keys, and records which keys were asked for. Looks at
/// everything it is given.
class config_object {
 public:
  config_object(const json_node& object, std::string_view path, const peft::read_options& options)
      : object_(object), path_(path), options_(options) {}

  const peft::read_options& options() const { return options_; }

  // ---- keys
  /// The value of a key; null when the config does not have it. The key is known from now on: `key`
  /// is a literal.
  const json_node* take(std::string_view key) {
    if (!has_taken(key)) taken_.push_back(key);
    return find(key);
  }
  /// The same, and null also for a value that is null.
  const json_node* take_value(std::string_view key) {
    const auto* value = take(key);
    return value == nullptr || value->kind == json_kind::null ? nullptr : value;
  }
  const json_node* find(std::string_view key) const {
    for (const auto& item : object_.items)
      if (item.key == key) return &item;
    return nullptr;
  }
  /// The keys that were taken, in the order of the first time.
  const std::vector<std::string_view>& taken() const { return taken_; }
  bool has_taken(std::string_view key) const {
    return std::find(taken_.begin(), taken_.end(), key) != taken_.end();
  }

  /// A key that no reader knows, here or in an object inside. It is listed where it may be ignored,
  /// and refused elsewhere.
  void pass_unknown(const std::string& key, const json_node& value) {
    if (!may_ignore(key, value))
      refuse(value, key, "a key that this version knows", value.text(),
             "if it does not change the arithmetic, name it in read_options::ignore_keys");
    ignored_.push_back(key);
  }
  bool may_ignore(std::string_view key, const json_node& value) const {
    const auto& vouched = options_.ignore_keys;
    return options_.lenient || value.asks_for_nothing() ||
           std::find(vouched.begin(), vouched.end(), key) != vouched.end();
  }
  void ignore(std::string key) { ignored_.push_back(std::move(key)); }
  const std::vector<std::string>& ignored() const { return ignored_; }

  // ---- one value of a kind
  bool flag(std::string_view key) {
    const auto* value = take_value(key);
    if (value == nullptr) return false;
    if (value->kind != json_kind::boolean) refuse(*value, key, "true or false", value->text());
    return value->boolean;
  }
  std::string text(std::string_view key) {
    const auto* value = take_value(key);
    if (value == nullptr) return {};
    if (value->kind != json_kind::string) refuse(*value, key, "text or null", value->text());
    return value->string;
  }
  /// Text (one name), an array of names, or null.
  std::vector<std::string> names(std::string_view key) {
    const auto* value = take(key);
    if (value == nullptr || value->asks_for_nothing()) return {};
    if (value->kind == json_kind::string) return {value->string};
    if (value->kind != json_kind::array) refuse(*value, key, "module names or null", value->text());
    return list_in(*value, key);
  }
  /// Names that PEFT takes for regular expressions in one place and for ends of names in another.
  std::vector<std::string> plain_names(std::string_view key) {
    auto result = names(key);
    for (const auto& name : result)
      if (name.empty() || !is_plain(name))
        refuse(*find(key), key, "plain names (letters, digits, _, - and dots)", in_quotes(name),
               "PEFT reads it as a regular expression, which is not supported here: list the "
               "modules' names");
    return result;
  }
  peft::module_selection selection(std::string_view key) {
    const auto* value = take_value(key);
    if (value == nullptr) return {};
    if (value->kind == json_kind::string) return {.expression = value->string};
    if (value->kind != json_kind::array)
      refuse(*value, key, "text, an array of names, or null", value->text());
    return {.names = list_in(*value, key)};
  }

  // ---- a value that was taken; `key` is what a message calls it
  index_t positive_in(const json_node& value, std::string_view key,
                      std::string_view what = "a rank") const {
    if (value.kind != json_kind::unsigned_integer || value.unsigned_integer == 0 ||
        value.unsigned_integer > 0x7fffffffu)
      refuse(value, key, sentence({what, " above 0, as an integer"}), value.text());
    return static_cast<index_t>(value.unsigned_integer);
  }
  double finite_in(const json_node& value, std::string_view key) const {
    const bool number = value.kind == json_kind::unsigned_integer ||
                        value.kind == json_kind::negative_integer || value.kind == json_kind::real;
    if (!number || !detail::is_finite(value.number))
      refuse(value, key, "a finite number", value.text());
    return value.number;
  }
  std::vector<std::string> list_in(const json_node& array, std::string_view key) const {
    std::vector<std::string> result;
    for (const auto& item : array.items) {
      if (item.kind != json_kind::string) refuse(item, key, "module names", item.text());
      result.push_back(item.string);
    }
    return result;
  }

  [[noreturn]] void refuse(const json_node& at, std::string_view key, std::string_view expected,
                           std::string_view found, std::string_view hint = {}) const {
    io_detail::refuse({.path = path_, .item = key, .offset = at.offset}, expected, found, hint);
  }

 private:
  const json_node& object_;
  std::string_view path_;
  const peft::read_options& options_;
  std::vector<std::string_view> taken_;
  std::vector<std::string> ignored_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
