// SPDX-License-Identifier: Apache-2.0
//
// The adapters of a set as the two files of a PEFT directory, for kinds that are not LORA. Nothing
// here knows a kind.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/adapter_set.hpp"
#include "lora/io/detail/json_text.hpp"
#include "lora/io/peft/adapter_kinds.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/set_reader.hpp"
#include "lora/io/safetensors_write.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft::adapters_detail {

/// One module, written.
struct encoded_module {
  const io_detail::peft_kind* kind;
  io_detail::kind_parts parts;
};

[[noreturn]] inline void refuse_written(const std::string& module, const std::string& why) {
  lora::detail::raise_value("peft::write_adapters", io_detail::in_quotes(module) + " " + why);
}

inline encoded_module encoded(const module_adapter& l) {
  const std::string& name = l.target().module;
  if (l.experts() != 1) refuse_written(name, "is a stack of experts, which only a LORA has");
  if (l.target().weight != name + ".weight")
    refuse_written(name, "is for the weight " + io_detail::in_quotes(l.target().weight) +
                             ": PEFT adapts <module>.weight alone");
  if (l.target().weight_rows != 0)
    refuse_written(name, "is for some rows of a fused weight: PEFT adapts all rows of one");
  for (const auto& kind : io_detail::adapter_kinds)
    if (auto parts = kind.encode(l.expert(0))) return {&kind, std::move(*parts)};
  refuse_written(name, "is no adapter of " + io_detail::listed(io_detail::other_peft_types) +
                           (l.kind().empty() ? "" : " but of the kind " + l.kind()) +
                           ": a LORA is written by peft::write from a file of peft::read<T>");
}

/// What two files hold.
struct written_files {
  std::string config;
  std::vector<std::byte> weights;
};

/// Builds both files from the modules of a set.
class set_writer {
 public:
  explicit set_writer(const adapter_set& set) {
    for (const auto& [name, l] : set) modules_.emplace(name, encoded(l));
    if (modules_.empty())
      lora::detail::raise_value("peft::write_adapters", "the set has no adapter");
  }

  const std::map<std::string, encoded_module>& modules() const { return modules_; }

  written_files files() const {
    std::vector<safetensors::tensor> tensors;
    std::map<std::string, const io_detail::kind_parts::tensor*> shared;
    for (const auto& [name, module] : modules_) {
      for (const auto& t : module.parts.tensors)
        tensors.push_back(
            {std::string(io_detail::peft_prefix) + name + t.name, t.dtype, t.shape, t.bytes});
      for (const auto& t : module.parts.shared) {
        const auto [there, first] = shared.emplace(t.name, &t);
        if (first)
          tensors.push_back({t.name, t.dtype, t.shape, t.bytes});
        else if (!same(t, *there->second))
          refuse_written(name, "has another " + t.name + " than the modules before it");
      }
    }
    return {config_text(), safetensors::to_bytes(tensors, {{"format", "pt"}})};
  }

 private:
  using parts = io_detail::kind_parts;
  static bool same(const parts::tensor& a, const parts::tensor& b) {
    return a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes;
  }
  friend bool same_parts(const parts& a, const parts& b);

  /// A key of a pattern table that fits one module alone.
  static std::string exact_key(const std::string& name) {
    std::string key = "^";
    for (const char c : name) {
      if (std::string_view(".^$*+?{}[]\\|()").find(c) != std::string_view::npos) key += '\\';
      key += c;
    }
    return key;
  }
  static std::string object(const std::map<std::string, std::string>& items) {
    std::string text = "{";
    for (const auto& [key, value] : items)
      text += (text.size() > 1 ? ", " : "") + io_detail::json_string(key) + ": " + value;
    return text + "}";
  }

  std::string config_text() const {
    const auto& [first_name, first] = *modules_.begin();
    std::map<std::string, std::string> keys = first.parts.settings, ranks, alphas;
    std::map<std::string, std::set<std::string>> lists;
    std::map<std::string, std::map<std::string, std::string>> tables;
    std::set<std::string> names;
    for (const auto& [name, module] : modules_) {
      const auto& p = module.parts;
      if (module.kind != first.kind)
        refuse_written(name, "is of another kind than " + io_detail::in_quotes(first_name) +
                                 ": write each kind to a directory of its own");
      // A key that a module does not mention is right for it with any value.
      for (const auto& [key, value] : p.settings)
        if (keys.emplace(key, value).first->second != value)
          refuse_written(name, "needs " + key + " = " + value + ", and a module before it " +
                                   keys.at(key) + ": a config has one for all");
      if (p.rank && p.rank != first.parts.rank) ranks[exact_key(name)] = std::to_string(*p.rank);
      if (p.alpha && p.alpha != first.parts.alpha)
        alphas[exact_key(name)] = io_detail::json_real(*p.alpha);
      for (const auto& [key, listed] : p.lists) {
        lists[key];
        if (listed) lists[key].insert(name);
      }
      for (const auto& [key, item] : p.tables) tables[key][name + item.first] = item.second;
      names.insert(name);
    }
    const auto list = [](const std::set<std::string>& all) {
      std::string text = "[";
      for (const auto& each : all)
        text += (text.size() > 1 ? ", " : "") + io_detail::json_string(each);
      return text + "]";
    };
    keys["peft_type"] = io_detail::json_string(first.kind->keys.peft_type);
    keys["peft_version"] = "\"0.21.2\"";  // whose format it is
    keys["inference_mode"] = "true";
    keys["base_model_name_or_path"] = keys["task_type"] = "null";
    keys["target_modules"] = list(names);
    if (first.parts.rank) keys["r"] = std::to_string(*first.parts.rank);
    if (first.parts.alpha) keys["alpha"] = io_detail::json_real(*first.parts.alpha);
    if (first.parts.rank) keys["rank_pattern"] = object(ranks);
    if (first.parts.alpha) keys["alpha_pattern"] = object(alphas);
    for (const auto& [key, all] : lists) keys[key] = list(all);
    for (const auto& [key, items] : tables) keys[key] = object(items);
    const auto tree = io_detail::parse_json_tree({.text = object(keys), .path = "the config"});
    return io_detail::json_text(tree);
  }

  std::map<std::string, encoded_module> modules_;
};

inline bool same_parts(const io_detail::kind_parts& a, const io_detail::kind_parts& b) {
  const auto all = [](const auto& one, const auto& other) {
    return std::equal(
        one.begin(), one.end(), other.begin(), other.end(),
        [](const auto& t, const auto& u) { return t.name == u.name && set_writer::same(t, u); });
  };
  return all(a.tensors, b.tensors) && all(a.shared, b.shared) && a.settings == b.settings &&
         a.rank == b.rank && a.alpha == b.alpha && a.lists == b.lists && a.tables == b.tables;
}

/// Throws value_error unless a reader finds the same adapters in the files.
inline void read_back(const set_writer& written, const written_files& files) {
  const auto kinds = io_detail::all_config_kinds();
  const read_options options;
  const auto c = parse_config(files.config, "adapter_config.json", options, kinds);
  const auto tensors = safetensors::parse(files.weights, "adapter_model.safetensors");
  const auto set = assembled(c, tensors, options, {});
  const set_writer again(set);
  for (const auto& [name, module] : written.modules()) {
    const auto found = again.modules().find(name);
    if (found == again.modules().end() || !same_parts(found->second.parts, module.parts))
      refuse_written(name,
                     "would be read back as another adapter: its name, or that of a module "
                     "beside it, means something else in a config");
  }
  if (again.modules().size() != written.modules().size())
    lora::detail::raise_value("peft::write_adapters", "more modules would be read back");
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft::adapters_detail
