// SPDX-License-Identifier: Apache-2.0
//
// The tensor names of a PEFT file: which belong to which module and which part of its adapter they
// are, which replace a tensor of the base, and which are nothing that is known. Every name ends in
// one of these places.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/module_path.hpp"
#include "lora/io/detail/peft_name_meanings.hpp"
#include "lora/io/detail/wrapper_names.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_replacement.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The tensors of one adapted module (or of one wrapper of it), each null when it is not there.
struct module_tensors {
  const safetensors::tensor_info* A = nullptr;
  const safetensors::tensor_info* B = nullptr;
  const safetensors::tensor_info* bias = nullptr;
  const safetensors::tensor_info* magnitude = nullptr;
  const safetensors::tensor_info* diagonal = nullptr;
  bool embedding = false;

  const safetensors::tensor_info* any() const {
    for (const auto* t : {A, B, bias, magnitude, diagonal})
      if (t != nullptr) return t;
    return nullptr;
  }
};

/// A tensor that replaces one of the base, under its name there.
struct replacing_tensor {
  const safetensors::tensor_info* tensor;
  std::string name;
  peft::replacement::reason why;
};

/// Throws format_error about one tensor of a file.
[[noreturn]] inline void refuse_tensor(const safetensors::index& tensors,
                                       const safetensors::tensor_info& t, std::string_view expected,
                                       std::string_view found, std::string_view hint = {}) {
  io_detail::refuse({.path = tensors.name(), .item = t.name, .offset = t.offset}, expected, found,
                    hint);
}

/// Throws format_error about a tensor without elements.
[[noreturn]] inline void refuse_empty(const safetensors::index& tensors,
                                      const safetensors::tensor_info& t) {
  refuse_tensor(tensors, t, "values", t.text(),
                "an empty tensor: saved from a sharded model (DeepSpeed ZeRO-3, FSDP) without "
                "gathering its parts");
}

/// Throws format_error when the config's patterns and lists take too many steps for the names of a
/// file: both come from strangers, and their product is bounded by nothing else.
inline void check_work(const peft::config& c, double steps) {
  constexpr double most = 2e9;
  if (steps <= most) return;
  io_detail::refuse({.path = c.path},
                    "patterns and lists of names (rank_pattern, alpha_pattern, target_modules, "
                    "modules_to_save ...) that can be looked up for every name of the file",
                    "more work than a reader may do for a file",
                    "use plain names, or fewer of them");
}

class peft_keys {
 public:
  /// Throws format_error for the first tensor, in byte order of the names, that nothing explains;
  /// with lenient they are listed by passed_over() instead.
  peft_keys(const peft::config& config, const safetensors::index& tensors,
            const peft::read_options& options)
      : config_(config),
        tensors_(tensors),
        options_(options),
        saved_modules_(config.saved_modules()) {
    unwrap();
    for (const auto name : tensors.names()) place(tensors.at(name));
    double steps = 0;
    for (const auto* t : other_)
      steps += static_cast<double>(1 + std::count(t->name.begin(), t->name.end(), '.'));
    check_work(config, steps * static_cast<double>(saved_modules_.size()));
    for (const auto* t : other_) place_other(*t);
    for (const auto& each : copies_) place_copy(each);
    check_replacing_once();
    std::sort(replacing_.begin(), replacing_.end(),
              [&](const auto& a, const auto& b) { return bare(*a.tensor) < bare(*b.tensor); });
  }

  /// By PEFT's path: the module's name, with base_layer where wrappers are nested.
  const std::map<std::string, module_tensors, std::less<>>& modules() const { return modules_; }
  /// Trained rows by the embedding's name.
  const std::map<std::string, const safetensors::tensor_info*, std::less<>>& token_rows() const {
    return token_rows_;
  }
  const std::vector<replacing_tensor>& replacing() const { return replacing_; }
  const std::vector<std::string>& left_out() const { return left_out_; }
  const std::vector<std::string>& passed_over() const { return passed_over_; }
  const std::vector<std::string>& notes() const { return notes_; }
  /// Whether a module's name is another than the config knows it by.
  bool names_changed() const {
    return std::any_of(own_paths_.begin(), own_paths_.end(),
                       [](const auto& each) { return each.first != each.second; });
  }
  /// Whether the file's names begin with base_model.model.
  bool prefixed() const { return prefixed_.value_or(true); }

  /// A module's name as the config knows it. `path` is one of modules(); `module` is what it
  /// adapts: its first segments, and perhaps a parameter's name. Where names carried a wrapper
  /// inside base_model.model., the config was written for them.
  std::string own_name(const std::string& path, const std::string& module) const {
    const auto own = own_paths_.find(path);
    if (own == own_paths_.end()) return module;
    const auto from = segments(path), to = segments(module);
    const auto differ = std::mismatch(from.begin(), from.end(), to.begin(), to.end());
    auto own_parts = segments(own->second);
    own_parts.resize(own_parts.size() - std::min(own_parts.size(), static_cast<std::size_t>(
                                                                       from.end() - differ.first)));
    own_parts.insert(own_parts.end(), differ.second, to.end());
    return joined(own_parts);
  }
  /// A tensor's name without wrappers and base_model.model.
  std::string_view bare(const safetensors::tensor_info& t) const {
    const std::string_view name = whole(t);
    return prefixed() ? name.substr(std::min(prefix.size(), name.size())) : name;
  }

  static constexpr std::string_view prefix = peft_prefix;

 private:
  using reason = peft::replacement::reason;
  struct part {
    std::string_view suffix;
    const safetensors::tensor_info* module_tensors::*where;
    bool embedding;
  };
  static constexpr std::array<part, 8> parts{
      {{".lora_A.weight", &module_tensors::A, false},
       {".lora_B.weight", &module_tensors::B, false},
       {".lora_embedding_A", &module_tensors::A, true},
       {".lora_embedding_B", &module_tensors::B, true},
       {".lora_B.bias", &module_tensors::bias, false},
       {".lora_magnitude_vector", &module_tensors::magnitude, false},
       {".lora_magnitude_vector.weight", &module_tensors::magnitude, false},
       {".lora_diag", &module_tensors::diagonal, false}}};
  static constexpr std::string_view token_suffix = ".token_adapter.trainable_tokens_delta";

  std::string_view whole(const safetensors::tensor_info& t) const {
    const auto found = unwrapped_.find(&t);
    return found == unwrapped_.end() ? t.name : std::string_view(found->second);
  }

  /// Throws for names that carry a wrapper, or takes it off. A component of a config in metadata is
  /// such a wrapper, too.
  void unwrap() {
    if (!config_.component.empty()) return take_off_component();
    if (options_.wrappers == peft::wrapper_names::keep) return;
    const safetensors::tensor_info *nested = nullptr, *single = nullptr, *wrapped = nullptr,
                                   *first = nullptr;
    std::string front;
    for (const auto name : tensors_.names()) {
      const auto& t = tensors_.at(name);
      unwrapped_name bare(name);
      (bare.nested() ? nested : single) = &t;
      if (first == nullptr) front = bare.front();
      if (first != nullptr && bare.front() != front)
        refuse_tensor(tensors_, t, "one adapter in a file",
                      sentence({"another front than in ", in_quotes(first->name)}),
                      "a dict of several state dicts was saved: save each by itself");
      first = &t;
      if (bare.part().empty()) continue;
      if (wrapped == nullptr) wrapped = &t;
      unwrapped_.emplace(&t, bare.name());
    }
    if (nested != nullptr && single != nullptr)
      refuse_tensor(tensors_, *nested, "one adapter in a file",
                    "two, of a PeftModel inside a PeftModel",
                    "the config is true of one of them at most: unload or merge the inner one, or "
                    "save each by itself. A base "
                    "with a module base_model.model of its own is read with wrapper_names::keep");
    if (wrapped == nullptr) return;
    const unwrapped_name bare(wrapped->name);
    if (!options_.lenient && options_.wrappers == peft::wrapper_names::refuse)
      refuse_wrapper(*wrapped, bare);
    notes_.push_back(in_quotes(bare.part()) + " of " + bare.who() + " was taken off " +
                     std::to_string(unwrapped_.size()) +
                     " names; PEFT loads none of these tensors");
  }
  [[noreturn]] void refuse_wrapper(const safetensors::tensor_info& t,
                                   const unwrapped_name& bare) const {
    refuse_tensor(
        tensors_, t, "a name of the base's modules",
        sentence({in_quotes(bare.part()), " in it, left by ", bare.who()}),
        sentence(
            {"a base has no weight of this name: save the unwrapped model, or read the tensor as ",
             in_quotes(bare.name()),
             " with read_options::wrappers = wrapper_names::strip. A base whose own modules "
             "are called so is read with wrapper_names::keep"}));
  }
  void take_off_component() {
    const std::string front = config_.component + ".";
    for (const auto name : tensors_.names()) {
      const auto& t = tensors_.at(name);
      if (!name.starts_with(front))
        refuse_tensor(tensors_, t,
                      sentence({"a name that begins with ", in_quotes(front),
                                ", for whose model the config is"}),
                      "another", "give each model's adapter a file of its own");
      unwrapped_.emplace(&t, std::string(name.substr(front.size())));
    }
  }

  void place(const safetensors::tensor_info& t) {
    const bool prefixed = whole(t).starts_with(prefix);
    if (prefixed_.value_or(prefixed) != prefixed)
      refuse_tensor(tensors_, t, "all names with the prefix base_model.model., or none",
                    prefixed ? "both" : "a name without it",
                    "two files were put together, or keys renamed in part: give all of them the "
                    "prefix, or none");
    prefixed_ = prefixed;
    const std::string_view name = bare(t);
    for (const auto& p : parts) {
      if (!name.ends_with(p.suffix) || name.size() == p.suffix.size()) continue;
      const auto path = name.substr(0, name.size() - p.suffix.size());
      if (has_factor_inside(path)) break;
      if (unwrapped_.contains(&t)) own_paths_.emplace(path, own_path(t, p.suffix.size()));
      auto& module = modules_.try_emplace(std::string(path)).first->second;
      const bool factor = p.where == &module_tensors::A || p.where == &module_tensors::B;
      if (module.*p.where != nullptr || (factor && (module.A != nullptr || module.B != nullptr) &&
                                         module.embedding != p.embedding))
        refuse_tensor(
            tensors_, t, "one adapter for a module",
            sentence({"a second tensor of the same part, ", in_quotes(module.any()->name)}));
      module.*p.where = &t;
      if (factor) module.embedding = p.embedding;
      return;
    }
    if (name.ends_with(token_suffix)) {
      const auto embedding = name.substr(0, name.size() - token_suffix.size());
      if (!token_rows_.emplace(embedding, &t).second)
        refuse_tensor(tensors_, t,
                      sentence({"the trained rows of ", in_quotes(embedding), " once"}),
                      "them twice");
      return;
    }
    other_.push_back(&t);
  }

  /// m.lora_A.default: a factor of a state that PEFT did not save, not a module with a factor.
  static bool has_factor_inside(std::string_view path) {
    const auto all = segments(path);
    return std::any_of(all.begin(), all.end(), [](auto part) {
      return part == "lora_A" || part == "lora_B" || part.starts_with("lora_embedding_") ||
             part == "lora_magnitude_vector";
    });
  }
  /// The path in the file, behind the first base_model.model. or the component, with the wrappers
  /// that are inside it.
  std::string own_path(const safetensors::tensor_info& t, std::size_t suffix) const {
    std::string_view path = t.name.substr(0, t.name.size() - suffix);
    if (!config_.component.empty()) return std::string(path.substr(config_.component.size() + 1));
    if (const auto at = path.find(prefix); at != std::string_view::npos)
      path.remove_prefix(at + prefix.size());
    return std::string(path);
  }

  /// Tensors that are no part of an adapter. All adapters are known by now.
  void place_other(const safetensors::tensor_info& t) {
    const std::string_view name = bare(t);
    const auto leaf = last_segment(name);
    const auto module = without_last_segment(name);
    const auto inner = last_segment(module);
    if (const auto of = as_copy(t)) {
      copies_.push_back(*of);
      return;
    }
    if (is_saved(module)) {
      saved_.emplace(name, &t);
      if (!options_.leave_out_saved_modules)
        return add_replacing(t, std::string(name), reason::saved_module);
      left_out_.emplace_back(t.name);
      return;
    }
    if (name.empty()) return place_unasked(t, name);
    const auto wrapped = inner == "base_layer" ? without_last_segment(module) : module;
    if ((leaf == "bias" && trains_bias_of(wrapped)) || is_called_bias(name))
      return add_replacing(t, without_peft_layers(name), reason::bias);
    // PEFT saves such a module whole, its bias too. A bias alone does not show that a module was
    // saved.
    const bool beside_weight =
        leaf == "bias" &&
        tensors_.find(std::string(without_last_segment(t.name)) + ".weight") != nullptr;
    if ((leaf == "weight" || beside_weight) && is_saved_embedding(wrapped))
      return add_replacing(t, without_peft_layers(name), reason::embedding);
    place_unasked(t, name);
  }

  /// PEFT loads what has the name of a tensor in its model, whatever the config says. There an
  /// adapted module's own weight lies under base_layer, and under no other name.
  void place_unasked(const safetensors::tensor_info& t, std::string_view name) {
    if (name.empty() || !meaning_of(tensors_, t).empty())
      return options_.lenient ? pass_over(t) : refuse_unknown(t, name);
    const std::string bare = without_peft_layers(name);
    const auto module = without_last_segment(bare);
    const bool adapted = modules_.contains(module) || token_rows_.contains(module);
    if (adapted == (bare == name)) {
      const char* why =
          adapted ? "PEFT drops it: the module is adapted, and its own weight is under base_layer"
                  : "PEFT drops it: the module has no adapter, so that nothing is under base_layer";
      if (!options_.lenient)
        refuse_tensor(tensors_, t, "a name that ends in lora_A.weight or lora_B.weight",
                      "a tensor of the base model under another name than PEFT's, which nothing in "
                      "the config asks for",
                      why);
      passed_over_.push_back("tensor " + in_quotes(t.name) + ": " + why);
      return;
    }
    if (!options_.lenient) refuse_unknown(t, name);
    add_replacing(t, bare, reason::unasked);
  }

  /// Two values for one tensor of the base: which is meant is not known.
  void check_replacing_once() const {
    std::map<std::string_view, const safetensors::tensor_info*> seen;
    for (const auto& each : replacing_) {
      if (each.why == reason::unused_copy) continue;
      const auto [other, first] = seen.emplace(each.name, each.tensor);
      const auto &a = *other->second, &b = *each.tensor;
      if (!first && !tensors_.same_bytes(a, b))
        refuse_tensor(tensors_, b, sentence({"one tensor for ", in_quotes(each.name)}),
                      sentence({"another in ", in_quotes(a.name)}),
                      "remove the one that is not meant");
    }
  }

  /// Whether PEFT saves the module, or one that it lies in, whole: it takes every module whose name
  /// ends in an entry, also in the middle of a word.
  bool is_saved(std::string_view module) const {
    return any_on_the_way(module, [&](std::string_view path) {
      return std::any_of(saved_modules_.begin(), saved_modules_.end(),
                         [&](const auto& saved) { return path.ends_with(saved); });
    });
  }
  /// The name in the base, which has none of PEFT's own modules.
  static std::string without_peft_layers(std::string_view name) {
    auto all = segments(name);
    std::erase_if(all, [](auto part) { return part == "base_layer" || part == "token_adapter"; });
    return joined(all);
  }
  void pass_over(const safetensors::tensor_info& t) {
    const auto meaning = meaning_of(tensors_, t);
    passed_over_.push_back(
        "tensor " + in_quotes(t.name) + ": " +
        (meaning.empty() ? "not a part of a LoRA adapter" : std::string(meaning)));
  }

  /// With bias = "all", PEFT up to 0.17 saves every tensor with "bias" in its name.
  bool is_called_bias(std::string_view name) const {
    return config_.bias == peft::trained_biases::all && name.find("bias") != std::string_view::npos;
  }
  bool trains_bias_of(std::string_view module) const {
    if (config_.bias == peft::trained_biases::none) return false;
    return config_.bias == peft::trained_biases::all || modules_.find(module) != modules_.end();
  }
  /// An embedding that has factors, or trained rows (x.token_adapter), or a name of one.
  bool is_saved_embedding(std::string_view module) const {
    const auto adapted = modules_.find(module);
    if (adapted != modules_.end() && adapted->second.embedding) return true;
    if (last_segment(module) == "token_adapter" && !config_.trainable_tokens.empty()) return true;
    return is_embedding_name(module);
  }
  /// No trained tensor is empty.
  void add_replacing(const safetensors::tensor_info& t, std::string name, reason why) {
    if (t.empty()) refuse_empty(tensors_, t);
    replacing_.push_back({&t, std::move(name), why});
  }

  /// PEFT writes some tensors of saved modules also as x.modules_to_save.bias, a copy of x.bias,
  /// and x.original_module.bias, the base's.
  struct copy {
    const safetensors::tensor_info* tensor;
    std::string_view module, rest;
    bool trained;
  };
  std::optional<copy> as_copy(const safetensors::tensor_info& t) const {
    const std::string_view name = bare(t);
    for (const std::string_view wrapper : {".modules_to_save.", ".original_module."}) {
      const auto at = name.find(wrapper);
      if (at != std::string_view::npos && is_saved(name.substr(0, at)))
        return copy{&t, name.substr(0, at), name.substr(at + wrapper.size()),
                    wrapper == ".modules_to_save."};
    }
    return std::nullopt;
  }
  /// Copies must agree, or which is meant is not known; and PEFT never reads x from them.
  void place_copy(const copy& of) {
    const auto& t = *of.tensor;
    const auto beside = [&](std::string_view inside) {
      return saved_.find(std::string(of.module) + "." + std::string(inside));
    };
    auto saved = beside(of.rest);
    // Inside a module of modules, PEFT leaves the adapter's name before the rest.
    if (saved == saved_.end() && of.trained) saved = beside(of.rest.substr(of.rest.find('.') + 1));
    if (saved == saved_.end()) {
      if (options_.lenient) return pass_over(t);
      refuse_tensor(
          tensors_, t,
          sentence({"a tensor ", in_quotes(std::string(of.module) + "." + std::string(of.rest)),
                    " beside it, which PEFT reads"}),
          "none", "the file is incomplete; read_options::lenient passes over this tensor");
    }
    const auto& other = *saved->second;
    if (of.trained && (t.dtype != other.dtype || !tensors_.same_bytes(t, other)))
      refuse_tensor(tensors_, t,
                    sentence({"the values of ", in_quotes(other.name), ", of which it is a copy"}),
                    "others",
                    sentence({"PEFT reads ", in_quotes(other.name),
                              ": remove the copy if that is the one that is meant"}));
    add_replacing(t, saved->first, reason::unused_copy);
  }

  [[noreturn]] void refuse_unknown(const safetensors::tensor_info& t, std::string_view name) const {
    const std::string expected = "a name that ends in lora_A.weight or lora_B.weight";
    // The first unknown name may say little where a later one tells what the file is. An alpha says
    // the least.
    const auto own = meaning_of(tensors_, t);
    if (!own.empty() && last_segment(name) != "alpha")
      refuse_tensor(tensors_, t, expected, std::string(own));
    for (const auto* other : other_)
      if (const auto meaning = meaning_of(tensors_, *other);
          !meaning.empty() && last_segment(other->name) != "alpha")
        refuse_tensor(tensors_, t, expected, "another",
                      sentence({"the file has also ", in_quotes(other->name), ": ", meaning}));
    if (!own.empty()) refuse_tensor(tensors_, t, expected, std::string(own));
    const std::string lenient =
        "PEFT loads it where the base has a tensor of this name, and read_options::lenient gives "
        "it as "
        "a replacement";
    if (name.find(".base_layer.") != std::string_view::npos)
      refuse_tensor(tensors_, t, expected,
                    "a weight of the base under an adapter, which nothing in the config asks for",
                    lenient);
    const bool of_base = name.ends_with(".weight") || name.ends_with(".bias");
    refuse_tensor(
        tensors_, t, expected, "another",
        of_base ? "a tensor of the base model, saved with the adapter without a word in the config "
                  "(modules_to_save, bias, task_type): " +
                      lenient
                : "this is not a file that PEFT wrote for LoRA, or it is a tensor of the base: " +
                      lenient);
  }

  const peft::config& config_;
  const safetensors::index& tensors_;
  const peft::read_options& options_;
  std::vector<std::string> saved_modules_;
  std::map<const safetensors::tensor_info*, std::string>
      unwrapped_;                                              // names that carried a wrapper
  std::map<std::string, std::string, std::less<>> own_paths_;  // of modules whose names carried one
  std::optional<bool> prefixed_;
  std::map<std::string, module_tensors, std::less<>> modules_;
  std::map<std::string, const safetensors::tensor_info*, std::less<>> token_rows_;
  std::vector<const safetensors::tensor_info*> other_;
  std::vector<copy> copies_;
  std::map<std::string, const safetensors::tensor_info*, std::less<>>
      saved_;  // by name, also those that are left out
  std::vector<replacing_tensor> replacing_;
  std::vector<std::string> left_out_, passed_over_, notes_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
