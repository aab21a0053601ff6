// SPDX-License-Identifier: Apache-2.0
//
// The file of an adapter that is not LoRA: its tensors by module and part, and those that replace
// tensors of the base. Every tensor is used, or named in an error. Nothing here knows a kind.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/adapter_set.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/detail/wrapper_names.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/target_rule.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// A tensor that replaces one of the base, in its format. Throws format_error for one that is none
/// of the four.
inline replaced_tensor replaced_of(const safetensors::index& tensors,
                                   const safetensors::tensor_info& t, std::string name) {
  if (!common_format({t.dtype}))
    refuse_tensor(tensors, t, "F64, F32, F16 or BF16", t.text(),
                  "an adapter_set holds no other values: lora::peft::read<T> gives the bytes of "
                  "what a LORA replaces");
  replaced_tensor result{std::move(name), tensors.name() + ": " + std::string(t.name), {}, {}};
  for (const auto extent : t.shape) result.shape.push_back(static_cast<index_t>(extent));
  visit_format(t.dtype, [&]<scalar T>(std::type_identity<T>) {
    result.values = tensors.template copy<T>(t.name);
  });
  return result;
}

/// Reads the modules of one file.
class kind_file {
 public:
  kind_file(const peft_kind& kind, const peft::config& c, const safetensors::index& tensors,
            const peft::read_options& options)
      : kind_(kind),
        config_(c),
        tensors_(tensors),
        options_(options),
        rule_(c),
        saved_(c.saved_modules()) {
    for (const auto name : tensors.names()) place(tensors.at(name));
    for (const auto& [name, t] : other_) place_other(name, *t);
    if (modules_.empty())
      io_detail::refuse({.path = tensors.name()}, expected(), "none",
                        tensors.size() == 0 ? "the file holds no tensor at all: nothing was saved"
                                            : "the config is of another kind than the tensors");
    double steps = 0;
    for (const auto& [name, parts] : modules_)
      steps += rule_.work(name) + c.rank_pattern.work(name) + c.alpha_pattern.work(name);
    check_work(c, steps);
  }

  /// Into the set, in byte order of the modules.
  void add_to(adapter_set& set) {
    std::size_t selected = 0;
    for (const auto& [name, parts] : modules_) selected += selects(name);
    for (const auto& [name, parts] : modules_) {
      if (!selects(name)) {
        pass_unselected(name, *parts.begin()->second, selected == 0);
        continue;
      }
      const kind_module m(name, config_, tensors_, options_, parts, shared_, modules_.size());
      const std::string key(parts.begin()->second->name);
      const auto end = key.size() - parts.begin()->first.size();
      set.add(module_adapter({.module = name}, kind_.decode(m), std::string(kind_.keys.peft_type),
                             tensors_.name() + ": " + key.substr(0, end)));
    }
    for (auto& each : replaced_) set.add(std::move(each));
    for (auto& note : notes_) set.add_note(std::move(note));
  }

 private:
  /// A tensor's name without base_model.model., a component or wrappers.
  std::string bare_name(const safetensors::tensor_info& t) {
    std::string name(t.name);
    if (!config_.component.empty()) {
      const std::string front = config_.component + ".";
      if (!name.starts_with(front))
        refuse(t, sentence({"a name that begins with ", in_quotes(front)}), "another",
               "the config is for this model: give each model's adapter a file of its own");
      name.erase(0, front.size());
    } else if (options_.wrappers != peft::wrapper_names::keep) {
      const unwrapped_name bare(name);
      if (!bare.part().empty() && options_.wrappers == peft::wrapper_names::refuse &&
          !options_.lenient)
        refuse(t, "a name of the base's modules",
               sentence({in_quotes(bare.part()), " in it, left by ", bare.who()}),
               "a base has no weight of this name: save the unwrapped model, or read with "
               "read_options::wrappers = wrapper_names::strip");
      name = bare.name();
    }
    const bool prefixed = name.starts_with(peft_prefix);
    if (prefixed_.value_or(prefixed) != prefixed)
      refuse(t, "all names with the prefix base_model.model., or none",
             prefixed ? "both" : "a name without it",
             "two files were put together, or keys renamed in part");
    prefixed_ = prefixed;
    if (prefixed) name.erase(0, peft_prefix.size());
    return name;
  }

  void place(const safetensors::tensor_info& t) {
    for (const auto name : kind_.shared)
      if (t.name == name) {
        shared_.parts.emplace(name, &t);
        return;
      }
    std::string name = bare_name(t);
    for (const auto suffix : kind_.suffixes) {
      if (!name.ends_with(suffix) || name.size() == suffix.size()) continue;
      name.erase(name.size() - suffix.size());
      if (!modules_[name].emplace(suffix, &t).second)
        refuse(t, "one adapter for a module", "a second tensor of the same part");
      return;
    }
    other_.emplace_back(std::move(name), &t);
  }

  /// A tensor of the base that the config says was trained, or that PEFT saves with embeddings.
  void place_other(const std::string& name, const safetensors::tensor_info& t) {
    const auto module = without_last_segment(name);
    const bool bias = last_segment(name) == "bias" &&
                      (config_.bias == peft::trained_biases::all ||
                       (config_.bias == peft::trained_biases::lora_only &&
                        modules_.contains(std::string(without_base_layer(module)))));
    const bool saved = any_on_the_way(module, [&](std::string_view path) {
      return std::any_of(saved_.begin(), saved_.end(),
                         [&](const auto& each) { return path.ends_with(each); });
    });
    if (saved && options_.leave_out_saved_modules) {
      notes_.push_back("tensor " + in_quotes(name) + " of a saved module was left out");
      return;
    }
    const bool embedding =
        last_segment(name) == "weight" && is_embedding_name(without_base_layer(module));
    if (!bias && !saved && !embedding) return refuse_other(name, t);
    if (t.empty()) refuse_empty(tensors_, t);
    const auto wrapped = saved ? std::string_view(module) : without_base_layer(module);
    replaced_.push_back(
        replaced_of(tensors_, t, std::string(wrapped) + "." + std::string(last_segment(name))));
  }
  void refuse_other(const std::string& name, const safetensors::tensor_info& t) {
    if (!options_.lenient)
      refuse(t, expected(), "another",
             "PEFT loads it only where the base has a tensor of this name, and nothing in the "
             "config asks for it; read_options::lenient passes over it");
    notes_.push_back("tensor " + in_quotes(name) + " was passed over: no part of this kind");
  }
  static std::string_view without_base_layer(std::string_view module) {
    constexpr std::string_view wrapper = ".base_layer";
    if (module.ends_with(wrapper)) module.remove_suffix(wrapper.size());
    return module;
  }

  /// Whether PEFT would load the adapter of a module. True where a name does not decide it.
  bool selects(const std::string& name) const {
    if (options_.select_by_tensors) return true;
    const auto answer = rule_.decide(name);
    if (answer.excluded_unicode)
      io_detail::refuse({.path = config_.path, .item = "exclude_modules"},
                        "an expression whose answer does not depend on the Unicode class of a "
                        "letter",
                        *config_.exclude_modules.expression, "list the modules' names");
    return answer.selected.value_or(true);
  }
  void pass_unselected(const std::string& name, const safetensors::tensor_info& t, bool none) {
    if (none)
      refuse(t, "an adapter of a module that target_modules selects",
             sentence({"target_modules ", config_.target_modules.text(), ", which selects none of ",
                       std::to_string(modules_.size())}),
             "correct the config, or read with read_options::select_by_tensors");
    if (!options_.lenient)
      refuse(t, "an adapter of a module that target_modules selects", "one that it does not",
             "PEFT would ignore this tensor; read_options::lenient does too");
    notes_.push_back("module " + in_quotes(name) + ": not selected by target_modules");
  }

  /// "tensors that end in ..., as LOHA has them".
  std::string expected() const {
    return sentence({"a tensor of ", kind_.keys.peft_type, ", whose name ends in one of ",
                     listed(kind_.suffixes)});
  }
  [[noreturn]] void refuse(const safetensors::tensor_info& t, std::string_view expected,
                           std::string_view found, std::string_view hint = {}) const {
    refuse_tensor(tensors_, t, expected, found, hint);
  }

  const peft_kind& kind_;
  const peft::config& config_;
  const safetensors::index& tensors_;
  const peft::read_options& options_;
  target_rule rule_;
  std::vector<std::string> saved_;
  std::optional<bool> prefixed_;
  std::map<std::string, part_map> modules_;
  shared_tensors shared_;
  std::vector<std::pair<std::string, const safetensors::tensor_info*>> other_;
  std::vector<replaced_tensor> replaced_;
  std::vector<std::string> notes_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
