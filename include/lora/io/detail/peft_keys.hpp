// SPDX-License-Identifier: Apache-2.0
//
// The tensor names of a PEFT file: which belong to which module and which part of its adapter they are, which replace a tensor
// of the base, and which are nothing that is known. Every name ends in one of these places.
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

#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The tensors of one adapted module (or of one wrapper of it), each null when it is not there.
struct module_tensors {
  const safetensors::entry* A = nullptr;
  const safetensors::entry* B = nullptr;
  const safetensors::entry* bias = nullptr;
  const safetensors::entry* magnitude = nullptr;
  const safetensors::entry* diagonal = nullptr;
  bool embedding = false;

  const safetensors::entry* any() const {
    for (const auto* t : {A, B, bias, magnitude, diagonal})
      if (t != nullptr) return t;
    return nullptr;
  }
};

/// A tensor that replaces one of the base, under its name there.
struct replacing_tensor {
  enum class reason { saved_module, bias, embedding, unused_copy };
  const safetensors::entry* tensor;
  std::string name;
  reason why;
};

/// Throws format_error about one tensor of a file.
[[noreturn]] inline void refuse_tensor(const safetensors::file& tensors, const safetensors::entry& t, std::string expected,
                                       std::string found, std::string hint = "") {
  detail::raise(format_error({.path = tensors.name(),
                              .item = std::string(t.name),
                              .offset = t.offset,
                              .expected = std::move(expected),
                              .found = std::move(found),
                              .hint = std::move(hint)}));
}

/// Throws format_error when the config's patterns and lists take too many steps for the names of a file: both come from
/// strangers, and their product is bounded by nothing else.
inline void check_work(const peft::config& c, double steps) {
  constexpr double most = 2e9;
  if (steps <= most) return;
  detail::raise(format_error({.path = c.path,
                              .expected = "patterns and lists of names (rank_pattern, alpha_pattern, target_modules, "
                                          "modules_to_save ...) that can be looked up for every name of the file",
                              .found = "more work than a reader may do for a file",
                              .hint = "use plain names, or fewer of them"}));
}

/// What a part of a tensor's name means when nothing in the file or its config explains it.
struct name_meaning {
  std::string_view part;
  std::string_view what;
};
inline constexpr std::array peft_name_meanings = std::to_array<name_meaning>({
    {".lora_E", "AdaLoRA, which is not supported"},
    {".ranknum", "AdaLoRA, which is not supported"},
    {".modules_to_save.", "a whole module that modules_to_save does not name"},
    {".original_module.", "the base's own copy of a module that modules_to_save does not name"},
    {".base_layer.", "a weight of the base under an adapter, which nothing in the config asks for"},
    {".lora_A.bias", "a bias of lora_A, which PEFT does not have"},
    {".lora_A.", "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_B.", "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {"lora_down", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {"lora_up", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {".lora.down", "a name of the diffusers format, which is not read yet"},
    {".lora.up", "a name of the diffusers format, which is not read yet"},
    {".lora_a", "a name of the MLX format, which is not read yet"},
    {".lora_b", "a name of the MLX format, which is not read yet"},
    {"lokr_", "a factor of LoKr, which is not supported"},
    {"hada_", "a factor of LoHa, which is not supported"},
});

/// Names of embeddings whose weight PEFT saves with an adapter that changes or resizes them.
inline constexpr std::array embedding_names =
    std::to_array<std::string_view>({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared",
                                     "embeddings", "tok_embeddings"});

/// The part of a path behind its last dot.
inline std::string_view last_segment(std::string_view path) { return path.substr(path.rfind('.') + 1); }
/// The part before it; empty without a dot.
inline std::string_view without_last_segment(std::string_view path) {
  const auto dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string_view{} : path.substr(0, dot);
}

class peft_keys {
 public:
  /// Throws format_error for the first tensor, in byte order of the names, that nothing explains; with lenient they are
  /// listed by passed_over() instead.
  peft_keys(const peft::config& config, const safetensors::file& tensors, const peft::read_options& options)
      : config_(config), tensors_(tensors), options_(options) {
    for (const auto name : tensors.names()) place(tensors.at(name));
    double steps = 0;
    for (const auto* t : other_) steps += static_cast<double>(1 + std::count(t->name.begin(), t->name.end(), '.'));
    check_work(config, steps * static_cast<double>(config.modules_to_save.size()));
    for (const auto* t : other_) place_other(*t);
    for (const auto& each : copies_) place_copy(each);
    std::sort(replacing_.begin(), replacing_.end(),
              [](const auto& a, const auto& b) { return a.tensor->name < b.tensor->name; });
  }

  /// By PEFT's path: the module's name, with base_layer where wrappers are nested.
  const std::map<std::string, module_tensors, std::less<>>& modules() const { return modules_; }
  /// Trained rows by the embedding's name.
  const std::map<std::string, const safetensors::entry*, std::less<>>& token_rows() const { return token_rows_; }
  const std::vector<replacing_tensor>& replacing() const { return replacing_; }
  const std::vector<std::string>& left_out() const { return left_out_; }
  const std::vector<std::string>& passed_over() const { return passed_over_; }
  /// Whether the file's names begin with base_model.model.
  bool prefixed() const { return prefixed_.value_or(true); }

  static constexpr std::string_view prefix = "base_model.model.";

 private:
  struct part {
    std::string_view suffix;
    const safetensors::entry* module_tensors::*where;
    bool embedding;
  };
  static constexpr std::array<part, 8> parts{{{".lora_A.weight", &module_tensors::A, false},
                                              {".lora_B.weight", &module_tensors::B, false},
                                              {".lora_embedding_A", &module_tensors::A, true},
                                              {".lora_embedding_B", &module_tensors::B, true},
                                              {".lora_B.bias", &module_tensors::bias, false},
                                              {".lora_magnitude_vector", &module_tensors::magnitude, false},
                                              {".lora_magnitude_vector.weight", &module_tensors::magnitude, false},
                                              {".lora_diag", &module_tensors::diagonal, false}}};
  static constexpr std::string_view token_suffix = ".token_adapter.trainable_tokens_delta";

  std::string_view bare(const safetensors::entry& t) const {
    return prefixed() ? t.name.substr(std::min(prefix.size(), t.name.size())) : t.name;
  }

  void place(const safetensors::entry& t) {
    const bool prefixed = t.name.starts_with(prefix);
    if (prefixed_.value_or(prefixed) != prefixed)
      refuse_tensor(tensors_, t, "all names with the prefix base_model.model., or none",
                    prefixed ? "both" : "a name without it",
                    "two files were put together, or keys renamed in part: give all of them the prefix, or none");
    prefixed_ = prefixed;
    const std::string_view name = bare(t);
    for (const auto& p : parts) {
      if (!name.ends_with(p.suffix) || name.size() == p.suffix.size()) continue;
      const auto path = name.substr(0, name.size() - p.suffix.size());
      if (path.find(".lora_") != std::string_view::npos) break;
      auto& module = modules_.try_emplace(std::string(path)).first->second;
      const bool factor = p.where == &module_tensors::A || p.where == &module_tensors::B;
      if (module.*p.where != nullptr ||
          (factor && (module.A != nullptr || module.B != nullptr) && module.embedding != p.embedding))
        refuse_tensor(tensors_, t, "one adapter for a module",
                      "a second tensor of the same part, " + in_quotes((module.any())->name));
      module.*p.where = &t;
      if (factor) module.embedding = p.embedding;
      return;
    }
    if (name.ends_with(token_suffix)) {
      token_rows_.emplace(name.substr(0, name.size() - token_suffix.size()), &t);
      return;
    }
    other_.push_back(&t);
  }

  /// Tensors that are no part of an adapter. All adapters are known by now.
  void place_other(const safetensors::entry& t) {
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
        return add_replacing(t, std::string(name), replacing_tensor::reason::saved_module);
      left_out_.emplace_back(t.name);
      return;
    }
    const auto wrapped = inner == "base_layer" ? without_last_segment(module) : module;
    if (leaf == "bias" && trains_bias_of(wrapped))
      return add_replacing(t, without_wrappers(name), replacing_tensor::reason::bias);
    // PEFT saves all of such a module: also the bias, which is no reason to take a module for one that it saves.
    const bool beside_weight =
        leaf == "bias" && tensors_.find(std::string(without_last_segment(t.name)) + ".weight") != nullptr;
    if ((leaf == "weight" || beside_weight) && is_saved_embedding(wrapped))
      return add_replacing(t, without_wrappers(name), replacing_tensor::reason::embedding);
    if (options_.lenient) return pass_over(t);
    refuse_unknown(t, name);
  }

  /// Whether PEFT saves the module, or one that it lies in, whole: it takes every module whose name ends in an entry, also in
  /// the middle of a word.
  bool is_saved(std::string_view module) const {
    return peft::config_detail::any_on_the_way(module, [&](std::string_view path) {
      return std::any_of(config_.modules_to_save.begin(), config_.modules_to_save.end(),
                         [&](const auto& saved) { return path.ends_with(saved); });
    });
  }
  /// The name in the base, which has no base_layer.
  static std::string without_wrappers(std::string_view name) {
    std::string result;
    for (const auto segment : peft::config_detail::segments(name))
      if (segment != "base_layer") result += "." + std::string(segment);
    return result.substr(1);
  }
  void pass_over(const safetensors::entry& t) {
    passed_over_.push_back("tensor " + in_quotes(t.name) + ": not a part of a LoRA adapter");
  }

  bool trains_bias_of(std::string_view module) const {
    if (config_.bias == peft::trained_biases::none) return false;
    return config_.bias == peft::trained_biases::all || modules_.find(module) != modules_.end();
  }
  bool is_saved_embedding(std::string_view module) const {
    const auto adapted = modules_.find(module);
    if (adapted != modules_.end() && adapted->second.embedding) return true;
    return std::find(embedding_names.begin(), embedding_names.end(), last_segment(module)) != embedding_names.end();
  }
  void add_replacing(const safetensors::entry& t, std::string name, replacing_tensor::reason why) {
    replacing_.push_back({&t, std::move(name), why});
  }

  /// PEFT writes some tensors of saved modules also as x.modules_to_save.bias, a copy of x.bias, and x.original_module.bias, the
  /// base's.
  struct copy {
    const safetensors::entry* tensor;
    std::string_view module, rest;
    bool trained;
  };
  std::optional<copy> as_copy(const safetensors::entry& t) const {
    const std::string_view name = bare(t);
    for (const std::string_view wrapper : {".modules_to_save.", ".original_module."}) {
      const auto at = name.find(wrapper);
      if (at != std::string_view::npos && is_saved(name.substr(0, at)))
        return copy{&t, name.substr(0, at), name.substr(at + wrapper.size()), wrapper == ".modules_to_save."};
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
          "a tensor " + in_quotes(std::string(of.module) + "." + std::string(of.rest)) + " beside it, which PEFT reads",
          "none", "the file is incomplete; read_options::lenient passes over this tensor, as PEFT does");
    }
    const auto& other = *saved->second;
    if (of.trained &&
        (t.dtype != other.dtype || !std::equal(t.bytes.begin(), t.bytes.end(), other.bytes.begin(), other.bytes.end())))
      refuse_tensor(tensors_, t, "the values of " + in_quotes(other.name) + ", of which it is a copy", "others",
                    "PEFT reads " + in_quotes(other.name) + ": remove the copy if that is the one that is meant");
    add_replacing(t, saved->first, replacing_tensor::reason::unused_copy);
  }

  static const name_meaning* meaning_of(std::string_view name) {
    const auto found = std::find_if(peft_name_meanings.begin(), peft_name_meanings.end(),
                                    [&](const auto& m) { return name.find(m.part) != std::string_view::npos; });
    return found == peft_name_meanings.end() ? nullptr : &*found;
  }
  [[noreturn]] void refuse_unknown(const safetensors::entry& t, std::string_view name) const {
    const std::string expected = "a name that ends in lora_A.weight or lora_B.weight";
    if (const auto* meaning = meaning_of(name)) refuse_tensor(tensors_, t, expected, std::string(meaning->what));
    const bool of_base = name.ends_with(".weight") || name.ends_with(".bias");
    std::string hint = of_base ? "a tensor of the base model, saved with the adapter without a word in the config "
                                 "(modules_to_save, bias)"
                               : "this is not a file that PEFT wrote for LoRA";
    // The first unknown name may say nothing where a later one tells what the file is.
    for (const auto* other : other_)
      if (const auto* meaning = meaning_of(bare(*other))) {
        hint = "the file has also " + in_quotes(other->name) + ": " + std::string(meaning->what);
        break;
      }
    refuse_tensor(tensors_, t, expected, "another", std::move(hint));
  }

  const peft::config& config_;
  const safetensors::file& tensors_;
  const peft::read_options& options_;
  std::optional<bool> prefixed_;
  std::map<std::string, module_tensors, std::less<>> modules_;
  std::map<std::string, const safetensors::entry*, std::less<>> token_rows_;
  std::vector<const safetensors::entry*> other_;
  std::vector<copy> copies_;
  std::map<std::string, const safetensors::entry*, std::less<>> saved_;  // by name, also those that are left out
  std::vector<replacing_tensor> replacing_;
  std::vector<std::string> left_out_, passed_over_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
