// SPDX-License-Identifier: Apache-2.0
//
// A key of PEFT's rank_pattern or alpha_pattern: the regular expression (.*\.)?(KEY)$, matched from the beginning of a
// module's name. Most keys are plain names; those are compared from the end, without an automaton.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/error.hpp"
#include "lora/io/detail/pattern.hpp"
#include "lora/io/detail/text.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The answer of a pattern, or value_error where it depends on tables of Unicode that are not here.
inline bool decided(pattern::verdict verdict, std::string_view expression, std::string_view module) {
  if (verdict == pattern::verdict::not_ascii)
    detail::raise_value("peft", "whether " + in_quotes(expression) + " matches " + in_quotes(module) +
                                    " depends on the Unicode class of a letter, which is not supported");
  return verdict == pattern::verdict::yes;
}

class module_pattern {
 public:
  explicit module_pattern(std::string_view key) : key_(key) {
    if (is_plain(key)) return;
    // Parentheses that only fit together with ours would be another expression than the writer's.
    pattern alone(key);
    compiled_.push_back(alone.fault().empty() ? anchored(key_) : std::move(alone));
  }

  /// Empty when the key is supported.
  std::string fault() const { return compiled_.empty() ? "" : compiled_.front().fault(); }

  bool fits(std::string_view module) const {
    if (compiled_.empty() && is_plain(module)) return plain_fits(module);
    const auto text = code_points(module);
    if (compiled_.empty()) return decided(anchored(key_).matches_beginning(text), key_, module);
    return decided(compiled_.front().matches_beginning(text), key_, module);
  }

  /// An upper bound for the work of fits() per character of a name.
  std::size_t cost() const { return compiled_.empty() ? 1 : compiled_.front().size(); }

 private:
  /// Letters, digits, _ and -, and dots, which stand for any character.
  static bool is_plain(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
    });
  }
  bool plain_fits(std::string_view module) const {
    if (module.size() < key_.size()) return false;
    const auto end = module.substr(module.size() - key_.size());
    if (module.size() > key_.size() && module[module.size() - key_.size() - 1] != '.') return false;
    return std::equal(key_.begin(), key_.end(), end.begin(), [](char k, char c) { return k == '.' || k == c; });
  }
  static pattern anchored(const std::string& key) { return pattern("(.*\\.)?(" + key + ")$"); }

  std::string key_;
  std::vector<pattern> compiled_;  // none for a plain key
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
