// SPDX-License-Identifier: Apache-2.0
//
// A key of PEFT's rank_pattern or alpha_pattern: the regular expression (.*\.)?(KEY)$, matched from the beginning of a
// module's name. Most keys are plain names; those are compared from the end, without an automaton.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "lora/io/detail/pattern.hpp"
#include "lora/io/detail/text.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Letters, digits, _ and -, and dots, which stand for any character: a pattern that is compared as it stands.
inline bool is_plain(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
  });
}

inline bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

/// Why pattern::verdict::not_ascii is no answer.
inline std::string unicode_text(std::string_view expression, std::string_view module) {
  return "whether " + in_quotes(expression) + " matches " + in_quotes(module) +
         " depends on the Unicode class of a letter, which is not supported";
}

class module_pattern {
 public:
  explicit module_pattern(std::string_view key) : key_(key) {
    if (!is_plain(key)) compiled_ = pattern::at_end_of_path(key);
  }

  /// Empty when the key is supported.
  std::string fault() const { return compiled_ ? compiled_->fault() : ""; }

  pattern::verdict match(std::string_view module) const {
    if (compiled_) return compiled_->matches_beginning(code_points(module));
    const bool fits = is_plain(module) ? plain_fits(module) : plain_fits_any(code_points(module));
    return fits ? pattern::verdict::yes : pattern::verdict::no;
  }

  /// An upper bound for the work of match() per character of a name.
  std::size_t cost() const { return compiled_ ? compiled_->cost() : 1; }

 private:
  template <class C>
  bool plain_fits(std::basic_string_view<C> module) const {
    if (module.size() < key_.size()) return false;
    const auto path = module.substr(0, module.size() - key_.size()), end = module.substr(path.size());
    if (!path.empty() && path.back() != '.') return false;
    return std::equal(key_.begin(), key_.end(), end.begin(),
                      [](char k, C c) { return k == '.' ? c != '\n' : c == static_cast<C>(k); });
  }
  /// As Python has it: no dot is a line end, and $ is also before one at the end.
  bool plain_fits_any(std::u32string_view module) const {
    const auto fits = [&](std::u32string_view text) {
      return plain_fits(text) && text.substr(0, text.size() - key_.size()).find(U'\n') == text.npos;
    };
    return fits(module) || (module.ends_with(U'\n') && fits(module.substr(0, module.size() - 1)));
  }

  std::string key_;
  std::optional<pattern> compiled_;  // none for a plain key
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
