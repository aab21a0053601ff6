// SPDX-License-Identifier: Apache-2.0
//
// A key of PEFT's rank_pattern or alpha_pattern: the regular expression (.*\.)?(KEY)$, matched from
// the beginning of a module's name. Most keys are plain names, or whole names behind ^ as
// peft::write writes them. Both are compared as text, without an automaton.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lora/io/detail/pattern.hpp"
#include "lora/io/detail/text.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Letters, digits, _ and -, and dots, which stand for any character: a pattern that is compared as
/// it stands.
inline bool is_plain(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
  });
}

inline bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

/// Why pattern::verdict::not_ascii is no answer.
inline std::string unicode_text(std::string_view expression, std::string_view module) {
  return "whether " + in_quotes(expression) + " matches " + in_quotes(module) +
         " depends on the Unicode class of a letter, which is not supported";
}

/// The name that a key fits alone: ^ and characters that stand for themselves, dots and other
/// punctuation behind a backslash, perhaps a $ at the end. Nothing for any other key.
inline std::optional<std::string> anchored_name(std::string_view key) {
  if (!key.starts_with('^')) return std::nullopt;
  key.remove_prefix(1);
  if (key.ends_with('$') && !key.ends_with("\\$")) key.remove_suffix(1);
  std::string name;
  for (std::size_t k = 0; k < key.size(); ++k) {
    const bool escaped = key[k] == '\\';
    if (escaped && ++k == key.size()) return std::nullopt;
    const bool letter =
        is_plain(key.substr(k, 1)) && key[k] != '.' && key[k] != '-' && key[k] != '_';
    const bool punctuation =
        std::string_view("._-^$*+?{}[]\\|()").find(key[k]) != std::string_view::npos;
    if (escaped ? !punctuation : !letter && key[k] != '-' && key[k] != '_') return std::nullopt;
    name += key[k];
  }
  return name;
}

class module_pattern {
 public:
  enum class form {
    plain,       ///< fits the end of a path; a dot fits any character
    whole,       ///< ^ before a plain key: fits a whole path
    name,        ///< ^ before characters that all stand for themselves
    expression,  ///< anything else
  };

  explicit module_pattern(std::string_view key) : text_(key) {
    if (is_plain(key)) return;
    form_ = form::expression;
    if (key.starts_with('^') && is_plain(key.substr(1))) {
      form_ = form::whole;
      text_.erase(0, 1);
    } else if (auto name = anchored_name(key)) {
      form_ = form::name;
      text_ = std::move(*name);
    } else {
      compiled_ = pattern::at_end_of_path(key);
    }
  }

  /// Empty when the key is supported.
  std::string fault() const { return compiled_ ? compiled_->fault() : ""; }

  form what() const { return form_; }
  /// The key, or what is behind its ^.
  const std::string& text() const { return text_; }

  pattern::verdict match(std::string_view module) const {
    if (compiled_) return compiled_->matches_beginning(code_points(module));
    if (form_ == form::name) return verdict(is_name(module));
    const auto points = code_points(module);
    return verdict(form_ == form::whole ? whole_fits(points) : plain_fits_any(points));
  }

  /// An upper bound for the work of match() per character of a name.
  std::size_t cost() const { return compiled_ ? compiled_->cost() : 1; }

 private:
  static pattern::verdict verdict(bool fits) {
    return fits ? pattern::verdict::yes : pattern::verdict::no;
  }
  /// As Python has it: $ is also before a line end at the end.
  bool is_name(std::string_view module) const {
    return module == text_ ||
           (module.ends_with('\n') && module.substr(0, module.size() - 1) == text_);
  }
  /// As Python has it: no dot is a line end, and $ is also before one at the end.
  bool whole_fits(std::u32string_view module) const {
    const auto fits = [&](std::u32string_view text) {
      return text.size() == text_.size() && plain_fits(text);
    };
    return fits(module) || (module.ends_with(U'\n') && fits(module.substr(0, module.size() - 1)));
  }
  template <class C>
  bool plain_fits(std::basic_string_view<C> module) const {
    if (module.size() < text_.size()) return false;
    const auto path = module.substr(0, module.size() - text_.size()),
               end = module.substr(path.size());
    if (!path.empty() && path.back() != '.') return false;
    return std::equal(text_.begin(), text_.end(), end.begin(),
                      [](char k, C c) { return k == '.' ? c != '\n' : c == static_cast<C>(k); });
  }
  /// As Python has it: no dot is a line end, and $ is also before one at the end.
  bool plain_fits_any(std::u32string_view module) const {
    const auto fits = [&](std::u32string_view text) {
      return plain_fits(text) &&
             text.substr(0, text.size() - text_.size()).find(U'\n') == text.npos;
    };
    return fits(module) || (module.ends_with(U'\n') && fits(module.substr(0, module.size() - 1)));
  }

  std::string text_;
  form form_ = form::plain;
  std::optional<pattern> compiled_;  // of an expression
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
