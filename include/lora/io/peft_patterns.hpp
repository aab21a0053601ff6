// SPDX-License-Identifier: Apache-2.0
//
// rank_pattern and alpha_pattern of a PEFT config.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/error.hpp"
#include "lora/io/detail/module_pattern.hpp"
#include "lora/io/detail/name_tables.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// Values under keys that are regular expressions for the end of a module's name. The first key in
/// the order of the file that fits wins. Plain keys, also behind ^, are found by binary search;
/// expressions are tried one by one.
template <class V>
class pattern_table {
 public:
  struct row {
    std::string key;
    V value;
    io_detail::module_pattern pattern;
  };

  /// Throws value_error when the key is a pattern that is not supported.
  void add(std::string key, V value) {
    const std::string quoted = io_detail::in_quotes(key);
    const std::string fault = try_add(std::move(key), std::move(value));
    if (!fault.empty())
      lora::detail::raise_value("peft::pattern_table", "the pattern " + quoted + " has " + fault);
  }
  /// Adds the key, or says what is wrong with it.
  std::string try_add(std::string key, V value) {
    io_detail::module_pattern pattern(key);
    if (std::string fault = pattern.fault(); !fault.empty()) return fault;
    if (pattern.cost() > most_cost - cost_)
      return "more steps than the patterns of a table may have together";
    cost_ += pattern.cost();
    using form = io_detail::module_pattern::form;
    if (pattern.what() == form::plain) ends_.add(pattern.text(), rows_.size());
    if (pattern.what() == form::whole) wholes_.add(pattern.text(), rows_.size());
    if (pattern.what() == form::name) names_.emplace(pattern.text(), rows_.size());
    if (pattern.what() == form::expression) {
      expressions_.push_back(rows_.size());
      cost_of_expressions_ += pattern.cost();
    }
    rows_.push_back({std::move(key), std::move(value), std::move(pattern)});
    return "";
  }

  /// The first key that fits a module, or before it one whose answer depends on tables of Unicode
  /// that are not here.
  struct answer {
    const row* fits = nullptr;
    const row* unicode = nullptr;
  };
  answer look_up(std::string_view module) const {
    if (!io_detail::is_plain(module)) return look_through(module);
    std::size_t first = std::min(ends_.first_for_end(module), wholes_.first_for_whole(module));
    if (const auto named = names_.find(module); named != names_.end())
      first = std::min(first, named->second);
    for (const auto k : expressions_) {
      if (k > first) break;
      if (const answer found = ask(rows_[k], module);
          found.fits != nullptr || found.unicode != nullptr)
        return found;
    }
    return {.fits = first == io_detail::plain_keys::none ? nullptr : &rows_[first]};
  }
  /// What the first fitting key says of a module (its name without base_model.model.); nothing when
  /// none fits. Throws value_error where the answer depends on tables of Unicode.
  std::optional<V> find(std::string_view module) const {
    const answer found = look_up(module);
    if (found.unicode != nullptr)
      lora::detail::raise_value("peft", io_detail::unicode_text(found.unicode->key, module));
    return found.fits == nullptr ? std::nullopt : std::optional<V>(found.fits->value);
  }
  const std::vector<row>& rows() const { return rows_; }
  bool empty() const { return rows_.empty(); }
  /// An upper bound for the steps of a look-up of this module.
  double work(std::string_view module) const {
    const auto size = static_cast<double>(module.size());
    if (!io_detail::is_plain(module))
      return (static_cast<double>(cost_) + static_cast<double>(rows_.size())) * size;
    return static_cast<double>(cost_of_expressions_ + !names_.empty()) * size +
           ends_.work_for_end(module) + wholes_.work_for_whole(module);
  }

 private:
  static answer ask(const row& r, std::string_view module) {
    const auto verdict = r.pattern.match(module);
    if (verdict == io_detail::pattern::verdict::yes) return {.fits = &r};
    if (verdict == io_detail::pattern::verdict::not_ascii) return {.unicode = &r};
    return {};
  }
  answer look_through(std::string_view module) const {
    for (const auto& each : rows_)
      if (const answer found = ask(each, module); found.fits != nullptr || found.unicode != nullptr)
        return found;
    return {};
  }

  // Of steps in memory: 64 MiB.
  static constexpr std::size_t most_cost = std::size_t{1} << 22;

  std::vector<row> rows_;
  io_detail::plain_keys ends_, wholes_;
  std::map<std::string, std::size_t, std::less<>> names_;
  std::vector<std::size_t> expressions_;
  std::size_t cost_ = 0, cost_of_expressions_ = 0;
};

}  // namespace lora::inline LORA_DETAIL_ABI::peft
