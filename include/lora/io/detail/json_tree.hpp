// SPDX-License-Identifier: Apache-2.0
//
// A small JSON document as a tree that keeps the order of its keys, refuses a key that is given
// twice, and is bounded in depth and in number of values. For configs; headers of many megabytes
// are read as events instead.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "lora/io/detail/json.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// One value. Items are the values of an array, or those of an object with their keys, in the order
/// of the file.
struct json_node {
  std::string key;
  json_kind kind = json_kind::null;
  bool boolean = false;
  double number = 0;
  std::uint64_t unsigned_integer = 0;
  std::uint64_t offset = 0;  ///< in the file, near the end of the value's first token
  /// Of a string; of a number, as it is written: its digits may be more than a double holds.
  std::string string;
  std::vector<json_node> items;

  /// null, false, "", [] and {}: a key with such a value asks for nothing.
  bool asks_for_nothing() const {
    switch (kind) {
      case json_kind::null: return true;
      case json_kind::boolean: return !boolean;
      case json_kind::string: return string.empty();
      case json_kind::array:
      case json_kind::object: return items.empty();
      default: return false;
    }
  }
  /// As it stands in a message.
  std::string text() const {
    if (kind == json_kind::boolean) return boolean ? "true" : "false";
    if (kind == json_kind::unsigned_integer) return std::to_string(unsigned_integer);
    if (kind == json_kind::string) return in_quotes(string);
    return json_kind_name(kind);
  }
};

class json_tree_builder {
 public:
  json_tree_builder(std::string_view path, json_node& root) : path_(path), open_{&root} {}

  void key(std::string_view name, std::uint64_t) { pending_ = name; }
  void scalar(const json_scalar& value, std::uint64_t offset) {
    json_node& node = place(offset);
    node.kind = value.kind;
    node.boolean = value.boolean;
    node.number = value.number;
    node.unsigned_integer = value.unsigned_integer;
    node.string = value.string;
  }
  void begin(json_kind kind, std::uint64_t offset) {
    json_node& node = place(offset);
    node.kind = kind;
    open_.push_back(&node);
  }
  void end(json_kind kind, std::uint64_t) {
    if (kind == json_kind::object) refuse_twice(*open_.back());
    open_.pop_back();
  }

 private:
  static constexpr std::size_t most_values = std::size_t{1} << 20;

  /// Where the next value goes. Pointers in open_ stay valid: only the innermost container grows.
  json_node& place(std::uint64_t offset) {
    if (++values_ > most_values)
      refuse(offset, "", sentence({"at most ", std::to_string(most_values), " values"}), "more");
    json_node* node = open_.back();
    if (open_.size() > 1) {
      node = &node->items.emplace_back();
      node->key = std::exchange(pending_, {});
    }
    node->offset = offset;
    return *node;
  }
  void refuse_twice(const json_node& object) const {
    std::vector<const json_node*> sorted;
    for (const auto& item : object.items) sorted.push_back(&item);
    std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) {
      return std::tie(a->key, a->offset) < std::tie(b->key, b->offset);
    });
    for (std::size_t k = 1; k < sorted.size(); ++k)
      if (sorted[k]->key == sorted[k - 1]->key)
        refuse(sorted[k]->offset, sorted[k]->key, "a key once", "it twice");
  }
  [[noreturn]] void refuse(std::uint64_t offset, std::string_view item, std::string_view expected,
                           std::string_view found) const {
    io_detail::refuse({.path = path_, .item = item, .offset = offset}, expected, found);
  }

  std::string_view path_;
  std::vector<json_node*> open_;
  std::string pending_;
  std::size_t values_ = 0;
};

/// Throws format_error.
inline json_node parse_json_tree(const json_source& source) {
  json_node root;
  json_tree_builder builder(source.path, root);
  parse_json(source, builder);
  return root;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
