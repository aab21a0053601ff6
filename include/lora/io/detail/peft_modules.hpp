// SPDX-License-Identifier: Apache-2.0
//
// What the adapted thing behind a path of a PEFT file is: a module, a part of an attention, a
// parameter. The path alone does not say it; config and neighbours do, and where they do not, the
// file is refused with what is missing.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/peft_entry.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// An adapted thing: what it is, its name in the base, and the name under which the config's
/// patterns are looked up.
struct adapted {
  peft::entry_kind kind;
  std::string name, looked_up;
  /// Of rank_pattern; null for the config's r.
  const peft::pattern_table<index_t>::row* rank = nullptr;
  /// Of alpha_pattern; null for lora_alpha.
  const peft::pattern_table<double>::row* alpha = nullptr;
};

/// The name in the base of an adapted thing, and whether other layers of layer_replication use it
/// too.
struct base_name {
  std::string name;
  bool shared = false;
};

class peft_modules {
 public:
  /// Throws format_error when looking up all modules would take too long.
  peft_modules(const peft::config& config, const peft_keys& keys, const safetensors::index& tensors,
               const peft::read_options& options)
      : config_(config), keys_(keys), tensors_(tensors), options_(options), rule_(config) {
    check_work(config, work());
    for (const auto& [begin, end] : config.layer_replication)
      for (auto layer = begin; layer < end; ++layer) {
        origins_.push_back(layer);
        ++copies_[layer];
      }
  }

  adapted identify(const std::string& path, const module_tensors& t) const {
    auto result = told_by_neighbours(path, t);
    result.looked_up = keys_.own_name(path, result.looked_up);
    result.rank = decided("rank_pattern", config_.rank_pattern, result.looked_up);
    result.alpha = decided("alpha_pattern", config_.alpha_pattern, result.looked_up);
    return result;
  }

  /// Whether PEFT would load the adapter of this module: its config must select it. True where a
  /// name does not decide it. Throws format_error where only tables of Unicode tell whether the
  /// module is excluded.
  bool would_load(const adapted& a) const {
    if (a.kind == peft::entry_kind::parameter || config_.ensure_weight_tying ||
        options_.select_by_tensors)
      return true;
    const auto answer = rule_.decide(a.looked_up);
    if (answer.excluded_unicode)
      refuse_undecided("exclude_modules", *config_.exclude_modules.expression, a.looked_up);
    return answer.selected.value_or(true);
  }

  /// Throws format_error for a layer that layer_replication does not make.
  base_name in_base(const std::string& name, const safetensors::tensor_info& t) const {
    const auto number = replicated_layer(name);
    if (number.empty()) return {name};
    std::uint64_t layer = 0;
    const auto parsed = std::from_chars(number.data(), number.data() + number.size(), layer);
    if (parsed.ec != std::errc() || layer >= origins_.size())
      refuse_tensor(tensors_, t,
                    sentence({"a layer of the ", std::to_string(origins_.size()),
                              " that layer_replication makes"}),
                    sentence({"layer ", number}),
                    "the config and the tensors do not belong together");
    const auto origin = origins_[static_cast<std::size_t>(layer)];
    base_name result{name, copies_.at(origin) > 1};
    if (origin != layer)
      result.name.replace(static_cast<std::size_t>(number.data() - name.data()), number.size(),
                          std::to_string(origin));
    return result;
  }

 private:
  adapted told_by_neighbours(const std::string& path, const module_tensors& t) const {
    const auto [bare, depth] = unwrapped(path);
    constexpr std::string_view out = ".base_layer.out_proj";
    if (path.ends_with(out)) {
      const std::string module(path.substr(0, path.size() - out.size()));
      if (keys_.modules().contains(module))
        return {peft::entry_kind::attention_out, module + ".out_proj", module};
    }
    if (depth == 0 && keys_.modules().contains(path + std::string(out)))
      return {peft::entry_kind::attention_in, path + ".in_proj", path};
    const auto parameters = parameters_of(path, bare);
    if (!parameters.empty() && !selected(path, bare)) return parameter(bare, depth, parameters, t);
    if (depth != 0)
      refuse(t, "an adapter of a module",
             sentence({"an adapter inside ", in_quotes(bare),
                       ", which is neither an attention nor named by target_parameters"}),
             "a PeftModel around a PeftModel saves so, too: each of its adapters needs a file of "
             "its own");
    if (t.embedding) return {peft::entry_kind::embedding, bare, bare};
    const auto* factor = t.A != nullptr ? t.A : t.B;
    const bool kernel = factor != nullptr && factor->shape.size() > 2;
    return {kernel ? peft::entry_kind::convolution : peft::entry_kind::linear, bare, bare};
  }

  /// PEFT replicates the layers of x.layers, x.encoder.layer or x.h; numbers elsewhere
  /// (classifier.0) count nothing.
  std::string_view replicated_layer(std::string_view name) const {
    if (origins_.empty()) return {};
    const auto parts = segments(name);
    for (std::size_t k = 1; k < parts.size(); ++k)
      if (is_number(parts[k]) &&
          (parts[k - 1] == "layers" || parts[k - 1] == "layer" || parts[k - 1] == "h"))
        return parts[k];
    return {};
  }

  /// Steps that all look-ups may take.
  double work() const {
    const auto size = [](const auto& list) { return static_cast<double>(list.size()); };
    const double blocks = config_.bd ? size(config_.bd->in_A) + size(config_.bd->in_B) : 0;
    double steps = size(keys_.token_rows()) * size(config_.trainable_tokens);
    for (const auto& [path, t] : keys_.modules())
      steps += config_.rank_pattern.work(path) + config_.alpha_pattern.work(path) +
               rule_.work(path) + size(config_.target_parameters) + blocks;
    return steps;
  }

  /// The row of a pattern table that counts for a module; null for none.
  template <class Table>
  const typename Table::row* decided(const char* key, const Table& table,
                                     const std::string& module) const {
    const auto answer = table.look_up(module);
    if (answer.unicode != nullptr) refuse_undecided(key, answer.unicode->key, module);
    return answer.fits;
  }
  [[noreturn]] void refuse_undecided(const char* key, const std::string& expression,
                                     const std::string& module) const {
    io_detail::refuse(
        {.path = config_.path, .item = key},
        "an expression whose answer does not depend on the Unicode class of a letter",
        sentence({in_quotes(expression), " for the module ", in_quotes(module)}),
        "write the module's name, or a class of characters in place of \\w, \\d, \\s or \\b");
  }

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

  bool selected(const std::string& path, const std::string& module) const {
    return rule_.decide(keys_.own_name(path, module)).selected.value_or(false);
  }

  /// The parameters of a module that target_parameters names, in its order.
  std::vector<std::string> parameters_of(const std::string& path, const std::string& bare) const {
    const std::string module = keys_.own_name(path, bare);
    std::vector<std::string> result;
    std::set<std::string_view> seen;
    for (const auto& target : config_.target_parameters) {
      const auto owner = without_last_segment(target), leaf = last_segment(target);
      const bool fits = owner.empty() || is_or_ends_with(module, owner);
      if (fits && seen.insert(leaf).second) result.emplace_back(leaf);
    }
    return result;
  }

  /// The wrappers of a module are nested in the order in which it registers its parameters: the
  /// last one is outermost.
  adapted parameter(const std::string& module, std::size_t depth, std::vector<std::string> names,
                    const module_tensors& t) const {
    std::size_t wrappers = 0;
    for (std::string path = module; keys_.modules().contains(path); path += ".base_layer")
      ++wrappers;
    if (depth >= wrappers)
      refuse(t,
             sentence({"an adapter inside each of the ", std::to_string(depth + 1), " wrappers of ",
                       in_quotes(module)}),
             sentence({std::to_string(wrappers), " from the outermost on"}),
             "the file is incomplete");
    if (names.size() < wrappers ||
        (names.size() > wrappers && listed_in_order(names).size() != wrappers))
      refuse(t,
             sentence({std::to_string(names.size()), " adapters inside ", in_quotes(module),
                       ", for ", listed(names)}),
             std::to_string(wrappers),
             names.size() < wrappers
                 ? ""
                 : "list the parameters that the file has in read_options::parameter_order");
    names = names.size() > wrappers ? listed_in_order(names) : names;
    if (names.size() > 1) names = in_order(module, std::move(names), t);
    std::string name = module + "." + names[names.size() - 1 - depth];
    return {peft::entry_kind::parameter, name, name};
  }

  std::vector<std::string> in_order(const std::string& module, std::vector<std::string> names,
                                    const module_tensors& t) const {
    auto result = listed_in_order(names);
    if (result.size() != names.size())
      refuse(
          t, sentence({"to know in which order ", in_quotes(module), " registers ", listed(names)}),
          options_.parameter_order.empty() ? "no order: it is in the model's code, not in the files"
                                           : "an order without all of them",
          "give it in read_options::parameter_order");
    return result;
  }
  /// Those of the names that read_options::parameter_order lists, in its order.
  std::vector<std::string> listed_in_order(const std::vector<std::string>& names) const {
    std::vector<std::string> result;
    for (const auto& each : options_.parameter_order)
      if (std::find(names.begin(), names.end(), each) != names.end()) result.push_back(each);
    return result;
  }

  [[noreturn]] void refuse(const module_tensors& t, std::string_view expected,
                           std::string_view found, std::string_view hint = {}) const {
    refuse_tensor(tensors_, *t.any(), expected, found, hint);
  }

  const peft::config& config_;
  const peft_keys& keys_;
  const safetensors::index& tensors_;
  const peft::read_options& options_;
  target_rule rule_;
  std::vector<std::uint64_t> origins_;           // of the layers that layer_replication makes
  std::map<std::uint64_t, std::size_t> copies_;  // of a layer of the base
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
