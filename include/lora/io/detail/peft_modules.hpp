// SPDX-License-Identifier: Apache-2.0
//
// What the adapted thing behind a path of a PEFT file is: a module, a part of an attention, a parameter. The path alone does
// not say it; config and neighbours do, and where they do not, the file is refused with what is missing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/peft_entry.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// An adapted thing: what it is, its name in the base, and the name under which the config's patterns are looked up.
struct adapted {
  peft::entry_kind kind;
  std::string name, looked_up;
};

class peft_modules {
 public:
  peft_modules(const peft::config& config, const peft_keys& keys, const safetensors::file& tensors,
               const peft::read_options& options)
      : config_(config), keys_(keys), tensors_(tensors), options_(options) {}

  adapted identify(const std::string& path, const module_tensors& t) const {
    const auto [bare, depth] = unwrapped(path);
    constexpr std::string_view out = ".base_layer.out_proj";
    if (path.ends_with(out)) {
      const std::string module(path.substr(0, path.size() - out.size()));
      if (keys_.modules().contains(module)) return {peft::entry_kind::attention_out, module + ".out_proj", module};
    }
    if (depth == 0 && keys_.modules().contains(path + std::string(out)))
      return {peft::entry_kind::attention_in, path + ".in_proj", path};
    const auto parameters = parameters_of(bare);
    if (!parameters.empty() && !selected(bare)) return parameter(bare, depth, parameters, t);
    if (depth != 0)
      refuse(t, "an adapter of a module",
             "an adapter inside " + in_quotes(bare) + ", which is neither an attention nor named by target_parameters");
    if (t.embedding) return {peft::entry_kind::embedding, bare, bare};
    const auto* factor = t.A != nullptr ? t.A : t.B;
    const bool kernel = factor != nullptr && factor->shape.size() > 2;
    return {kernel ? peft::entry_kind::convolution : peft::entry_kind::linear, bare, bare};
  }

  /// Whether PEFT would load the adapter of this module: its config must select it. True where a name does not decide it.
  bool would_load(const adapted& a) const {
    if (a.kind == peft::entry_kind::parameter || config_.ensure_weight_tying) return true;
    return decide(a.looked_up).value_or(true);
  }

  /// The module of the base that a replicated layer is made of, when other layers use it too; empty otherwise. Throws
  /// format_error for a layer that the map does not have.
  std::string shared_with(const std::string& name, const safetensors::entry& t) const {
    if (config_.layer_replication.empty()) return {};
    const auto number = peft::config_detail::layer_number(name, config_.layers_pattern);
    if (number.empty()) return {};
    std::vector<std::uint64_t> origin;
    for (const auto& [begin, end] : config_.layer_replication)
      for (auto layer = begin; layer < end; ++layer) origin.push_back(layer);
    const auto layer = std::find_if(origin.begin(), origin.end(), [&, k = std::uint64_t{0}](auto) mutable {
      return peft::config_detail::same_number(number, k++);
    });
    if (layer == origin.end())
      refuse_tensor(tensors_, t, "a layer of the " + std::to_string(origin.size()) + " that layer_replication makes",
                    "layer " + std::string(number));
    if (std::count(origin.begin(), origin.end(), *layer) == 1 && peft::config_detail::same_number(number, *layer)) return {};
    std::string base = name;
    base.replace(static_cast<std::size_t>(number.data() - name.data()), number.size(), std::to_string(*layer));
    return base;
  }

 private:
  /// x.base_layer.base_layer: the module x inside two wrappers.
  static std::pair<std::string, std::size_t> unwrapped(std::string_view path) {
    constexpr std::string_view wrapper = ".base_layer";
    std::size_t depth = 0;
    while (path.ends_with(wrapper)) {
      path.remove_suffix(wrapper.size());
      ++depth;
    }
    return {std::string(path), depth};
  }

  /// What target_modules says of a name; nothing when it does not decide.
  std::optional<bool> decide(const std::string& module) const {
    const auto& target = config_.target_modules;
    if (!target.names && !target.expression) return std::nullopt;
    if (target.expression) {
      std::string lower = *target.expression;
      std::transform(lower.begin(), lower.end(), lower.begin(),
                     [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
      if (lower == "all-linear" || !pattern(*target.expression).fault().empty()) return std::nullopt;
      if (std::any_of(module.begin(), module.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; }))
        return std::nullopt;
    }
    if (const auto& excluded = config_.exclude_modules.expression; excluded && !pattern(*excluded).fault().empty())
      return std::nullopt;
    return peft::matches_target(config_, module);
  }
  bool selected(const std::string& module) const { return decide(module).value_or(false); }

  /// The parameters of a module that target_parameters names, in its order.
  std::vector<std::string> parameters_of(std::string_view module) const {
    std::vector<std::string> result;
    for (const auto& target : config_.target_parameters) {
      const auto owner = without_last_segment(target);
      std::string leaf(last_segment(target));
      const bool fits = owner.empty() || peft::config_detail::is_or_ends_with(module, owner);
      if (fits && std::find(result.begin(), result.end(), leaf) == result.end()) result.push_back(std::move(leaf));
    }
    return result;
  }

  /// The wrappers of a module are nested in the order in which it registers its parameters: the last one is outermost.
  adapted parameter(const std::string& module, std::size_t depth, std::vector<std::string> names,
                    const module_tensors& t) const {
    std::size_t wrappers = 0;
    for (std::string path = module; keys_.modules().contains(path); path += ".base_layer") ++wrappers;
    if (names.size() != wrappers)
      refuse(t, std::to_string(names.size()) + " adapters inside " + in_quotes(module) + ", for " + listed(names),
             std::to_string(wrappers));
    if (names.size() > 1) names = in_order(module, std::move(names), t);
    std::string name = module + "." + names[names.size() - 1 - depth];
    return {peft::entry_kind::parameter, name, name};
  }

  std::vector<std::string> in_order(const std::string& module, std::vector<std::string> names,
                                    const module_tensors& t) const {
    const auto& order = options_.parameter_order;
    std::vector<std::string> result;
    for (const auto& each : order)
      if (std::find(names.begin(), names.end(), each) != names.end()) result.push_back(each);
    if (result.size() != names.size())
      refuse(t, "to know in which order " + in_quotes(module) + " registers " + listed(names),
             order.empty() ? "no order: it is in the model's code, not in the files" : "an order without all of them",
             "give it in read_options::parameter_order");
    return result;
  }

  [[noreturn]] void refuse(const module_tensors& t, std::string expected, std::string found, std::string hint = "") const {
    refuse_tensor(tensors_, *t.any(), std::move(expected), std::move(found), std::move(hint));
  }

  const peft::config& config_;
  const peft_keys& keys_;
  const safetensors::file& tensors_;
  const peft::read_options& options_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
