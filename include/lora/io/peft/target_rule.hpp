// SPDX-License-Identifier: Apache-2.0
//
// Which modules a PEFT config selects by name: target_modules, exclude_modules, modules_to_save and
// layers_to_transform.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "lora/error.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/detail/module_pattern.hpp"
#include "lora/io/detail/name_tables.hpp"
#include "lora/io/peft/config.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace io_detail {

/// The number in a name, of any length: "007" is layer 7. Nothing beyond 64 bits.
inline std::optional<std::uint64_t> number_of(std::string_view digits) {
  std::uint64_t value = 0;
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return parsed.ec == std::errc() ? std::optional(value) : std::nullopt;
}

using module_patterns = std::vector<module_pattern>;
inline bool any_matches(const module_patterns& all, std::string_view module) {
  return std::any_of(all.begin(), all.end(),
                     [&](const auto& each) { return each.match(module) == pattern::verdict::yes; });
}

/// The layer number in a name: behind one of the containers, or without containers the first number
/// that has two segments before and one behind it. Empty when there is none.
inline std::string_view layer_number(std::string_view module, const module_patterns& containers) {
  const auto parts = segments(module);
  const auto before = [&](std::size_t k) {  // without the dot
    return module.substr(0, static_cast<std::size_t>(parts[k].data() - module.data()) - 1);
  };
  if (containers.empty()) {
    for (std::size_t k = 2; k + 1 < parts.size(); ++k)
      if (is_number(parts[k])) return parts[k];
    return {};
  }
  for (const auto& container : containers)
    for (std::size_t k = 1; k + 1 < parts.size(); ++k)
      if (is_number(parts[k]) && container.match(before(k)) == pattern::verdict::yes)
        return parts[k];
  return {};
}

/// What a config selects by name, compiled once for all names of a file. Looks at the config.
class target_rule {
 public:
  explicit target_rule(const peft::config& c)
      : config_(c),
        target_(c.target_modules),
        exclude_(c.exclude_modules),
        saved_(compiled(c.excluded_by_saving())),
        containers_(compiled(c.layers_pattern)),
        layers_(c.layers_to_transform) {
    std::sort(layers_.begin(), layers_.end());
  }

  struct answer {
    std::optional<bool> selected;   ///< nothing: a name does not tell
    std::string why = {};           ///< it does not
    bool excluded_unicode = false;  ///< because exclude_modules asks for tables of Unicode
  };
  answer decide(std::string_view module) const {
    answer excluded = fits(config_.exclude_modules, exclude_, module, "exclude_modules");
    if (!excluded.selected) {
      excluded.excluded_unicode = exclude_.expression->fault().empty();
      return excluded;
    }
    const auto is_saved = [&](std::string_view path) { return any_matches(saved_, path); };
    if (*excluded.selected || any_on_the_way(module, is_saved)) return {false};
    const auto& target = config_.target_modules;
    if (!target.expression && !target.names) {
      // PEFT then adapts parameters only.
      if (!config_.target_parameters.empty()) return {false};
      return {{}, "target_modules is null: PEFT then chooses by the base's architecture"};
    }
    if (target.expression && lower_case(*target.expression) == "all-linear")
      return {{}, "target_modules is \"all-linear\": a name does not tell a module's type"};
    answer result = fits(target, target_, module, "target_modules");
    if (target.names && *result.selected)
      result.selected = target_.names.contains(module) || in_layers(module);
    return result;
  }

  /// An upper bound for the work of decide().
  double work(std::string_view module) const {
    const auto size = [](const auto& list) { return static_cast<double>(list.size()); };
    const auto of = [&](const compiled_selection& s) {
      return (s.expression ? static_cast<double>(s.expression->cost()) * size(module) : 0) +
             s.names.work(module);
    };
    const auto depth = 1 + static_cast<double>(std::count(module.begin(), module.end(), '.'));
    return of(target_) + of(exclude_) + size(module) * (depth * size(saved_) + size(containers_));
  }

 private:
  static module_patterns compiled(const std::vector<std::string>& names) {
    return {names.begin(), names.end()};
  }
  struct compiled_selection {
    std::optional<pattern> expression;
    path_endings names;

    explicit compiled_selection(const peft::module_selection& s)
        : names(s.names.value_or(std::vector<std::string>{})) {
      if (s.expression && !s.expression->empty()) expression.emplace(*s.expression);
    }
  };
  static answer fits(const peft::module_selection& selection, const compiled_selection& compiled,
                     std::string_view module, const char* key) {
    const auto& expression = compiled.expression;
    if (!expression) return {compiled.names.select(module)};
    if (!expression->fault().empty())
      return {{},
              std::string(key) + " " + in_quotes(*selection.expression) +
                  " is not supported: " + expression->fault()};
    const auto verdict = expression->matches_all(code_points(module));
    if (verdict == pattern::verdict::not_ascii)
      return {{}, unicode_text(*selection.expression, module)};
    return {verdict == pattern::verdict::yes};
  }
  bool in_layers(std::string_view module) const {
    if (config_.layers_to_transform.empty()) return true;
    const auto number = number_of(layer_number(module, containers_));
    return number && std::binary_search(layers_.begin(), layers_.end(), *number);
  }

  const peft::config& config_;
  compiled_selection target_, exclude_;
  module_patterns saved_, containers_;
  std::vector<std::uint64_t> layers_;  // in rising order
};

}  // namespace io_detail

namespace peft {

/// Whether the config selects a module by name, as PEFT 0.21 decides it: not excluded, not in
/// modules_to_save, named by target_modules, and in one of layers_to_transform. Throws value_error
/// where a name does not tell (target_modules null without target_parameters, or "all-linear"), or
/// a pattern is not supported. Compiles the config's patterns on each call.
inline bool matches_target(const config& c, std::string_view module) {
  const auto answer = io_detail::target_rule(c).decide(module);
  if (!answer.selected) lora::detail::raise_value("peft::matches_target", answer.why);
  return *answer.selected;
}

}  // namespace peft
}  // namespace lora::inline LORA_DETAIL_ABI
