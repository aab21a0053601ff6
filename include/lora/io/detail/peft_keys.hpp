// SPDX-License-Identifier: Apache-2.0
//
// The tensor names of a PEFT file: which belong to which module, and what those ask for that are not plain factors. Every
// name ends in one of these two places.
#pragma once

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

struct factor_pair {
  const safetensors::entry* A = nullptr;
  const safetensors::entry* B = nullptr;
};

/// What a part of a tensor's name means when the tensor is not a plain factor.
struct name_meaning {
  std::string_view part;
  std::string_view what;
};
inline constexpr std::array peft_name_meanings = std::to_array<name_meaning>({
    {".lora_magnitude_vector", "the magnitude of DoRA, which is not supported"},
    {".lora_embedding_", "an adapter of an embedding, which is not supported"},
    {".lora_A.bias", "a bias of an adapter (lora_bias), which is not supported"},
    {".lora_B.bias", "a bias of an adapter (lora_bias), which is not supported"},
    {".lora_diag", "the diagonal of KaSA, which is not supported"},
    {".lora_E", "AdaLoRA, which is not supported"},
    {".ranknum", "AdaLoRA, which is not supported"},
    {".trainable_tokens_delta", "rows of an embedding (trainable tokens), which are not supported"},
    {".modules_to_save.", "a whole module (modules_to_save), which is not supported"},
    {".base_layer.",
     "a weight of the base, or an adapter of a parameter or of attention in one piece, which is not supported"},
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

class peft_keys {
 public:
  /// Throws format_error for the first tensor, in byte order of the names, that is not a factor.
  peft_keys(const peft::config& config, const safetensors::file& tensors, bool leave_out_saved)
      : config_(config), path_(tensors.name()) {
    for (const auto name : tensors.names()) place(tensors.at(name), leave_out_saved);
  }

  const std::map<std::string, factor_pair, std::less<>>& modules() const { return modules_; }
  const std::vector<std::string>& left_out() const { return left_out_; }

 private:
  static constexpr std::string_view prefix = "base_model.model.";

  void place(const safetensors::entry& t, bool leave_out_saved) {
    std::string_view name = t.name;
    const bool prefixed = name.starts_with(prefix);
    if (prefixed) name.remove_prefix(prefix.size());
    if (prefixed_.value_or(prefixed) != prefixed)
      refuse(t, "all names with the prefix base_model.model., or none", prefixed ? "both" : "a name without it", "");
    prefixed_ = prefixed;
    const bool is_A = name.ends_with(".lora_A.weight"), is_B = name.ends_with(".lora_B.weight");
    const std::string_view module = is_A || is_B ? name.substr(0, name.size() - 14) : std::string_view{};
    if (module.empty() || nested(module)) return place_other(t, name, leave_out_saved);
    auto& pair = modules_.try_emplace(std::string(module)).first->second;
    (is_A ? pair.A : pair.B) = &t;
  }

  /// x.base_layer.y: PEFT wraps a module in an adapter for another part of it.
  static bool nested(std::string_view module) {
    return module.find(".base_layer") != std::string_view::npos || module.starts_with("base_layer") ||
           module.find(".lora_") != std::string_view::npos;
  }

  void place_other(const safetensors::entry& t, std::string_view name, bool leave_out_saved) {
    const bool saved = peft::config_detail::is_saved(config_.modules_to_save, name);
    if (saved && leave_out_saved) {
      left_out_.push_back(t.name);
      return;
    }
    if (saved)
      refuse(t, "factors only", "a tensor of a module in modules_to_save, a whole copy that replaces the base's",
             "not supported yet; read_options::leave_out_saved_modules reads the rest");
    for (const auto& meaning : peft_name_meanings)
      if (name.find(meaning.part) != std::string_view::npos)
        refuse(t, "a name that ends in lora_A.weight or lora_B.weight", std::string(meaning.what), "");
    refuse(t, "a name that ends in lora_A.weight or lora_B.weight", "another",
           name.ends_with(".weight") || name.ends_with(".bias") ? "a tensor of the base model, saved with the adapter"
                                                                : "this is not a file that PEFT wrote for LoRA");
  }

  [[noreturn]] void refuse(const safetensors::entry& t, std::string expected, std::string found, std::string hint) const {
    detail::raise(format_error({.path = path_,
                                .item = t.name,
                                .offset = t.offset,
                                .expected = std::move(expected),
                                .found = std::move(found),
                                .hint = std::move(hint)}));
  }

  const peft::config& config_;
  std::string path_;
  std::optional<bool> prefixed_;
  std::map<std::string, factor_pair, std::less<>> modules_;
  std::vector<std::string> left_out_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
