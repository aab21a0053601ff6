// SPDX-License-Identifier: Apache-2.0
//
// JSON as text: strings with their escapes, numbers with the digits that were read, and a tree as
// Python's json.dumps(indent=2) lays it out.
#pragma once

#include <array>
#include <charconv>
#include <cmath>
#include <string>
#include <string_view>

#include "lora/io/detail/json_tree.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// In quotes, with the escapes that JSON needs. The text is well-formed UTF-8 and stays it.
inline std::string json_string(std::string_view text) {
  constexpr char digits[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    switch (c) {
      case '"': result += "\\\""; break;
      case '\\': result += "\\\\"; break;
      case '\n': result += "\\n"; break;
      case '\r': result += "\\r"; break;
      case '\t': result += "\\t"; break;
      case '\b': result += "\\b"; break;
      case '\f': result += "\\f"; break;
      default:
        if (byte < 0x20)
          result += {'\\', 'u', '0', '0', digits[byte >> 4], digits[byte & 15]};
        else
          result += c;
    }
  }
  return result + '"';
}

/// The shortest text that reads as the same double, as Python writes it: with an exponent below
/// 1e-4 and from 1e16 on; a whole number keeps ".0".
inline std::string json_real(double value) {
  std::array<char, 64> buffer{};
  const double size = std::abs(value);
  const auto format = size != 0 && (size < 1e-4 || size >= 1e16) ? std::chars_format::scientific
                                                                 : std::chars_format::fixed;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, format);
  std::string text(buffer.data(), end.ptr);
  if (text.find_first_of(".en") == std::string::npos) text += ".0";
  return text;
}

inline void append_json(std::string& out, const json_node& node, int depth) {
  const std::string inner(static_cast<std::size_t>(2 * (depth + 1)), ' '),
      outer(static_cast<std::size_t>(2 * depth), ' ');
  const bool object = node.kind == json_kind::object;
  switch (node.kind) {
    case json_kind::null: out += "null"; return;
    case json_kind::boolean: out += node.boolean ? "true" : "false"; return;
    case json_kind::unsigned_integer:
    case json_kind::negative_integer:
    case json_kind::real: out += node.string; return;
    case json_kind::string: out += json_string(node.string); return;
    case json_kind::array:
    case json_kind::object: break;
  }
  if (node.items.empty()) {
    out += object ? "{}" : "[]";
    return;
  }
  out += object ? "{\n" : "[\n";
  for (std::size_t k = 0; k < node.items.size(); ++k) {
    out += inner;
    if (object) out += json_string(node.items[k].key) + ": ";
    append_json(out, node.items[k], depth + 1);
    out += k + 1 < node.items.size() ? ",\n" : "\n";
  }
  out += outer + (object ? "}" : "]");
}

/// The tree as text, two spaces a level, without a line end behind it.
inline std::string json_text(const json_node& node) {
  std::string result;
  append_json(result, node, 0);
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
