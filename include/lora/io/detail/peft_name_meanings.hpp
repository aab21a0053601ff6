// SPDX-License-Identifier: Apache-2.0
//
// What a tensor of a PEFT file is when nothing in the file or its config explains its name: who writes such names, in a sentence.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "lora/io/detail/embedding_names.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

struct name_meaning {
  std::string_view part, what;
};
/// The first part that a name has counts.
inline constexpr std::array peft_name_meanings = std::to_array<name_meaning>({
    {".lora_E", "AdaLoRA, which is not supported"},
    {".ranknum", "AdaLoRA, which is not supported"},
    {".modules_to_save.", "a whole module that modules_to_save does not name"},
    {".original_module.", "the base's own copy of a module that modules_to_save does not name"},
    {".lora_A.bias", "a bias of lora_A, which PEFT does not have"},
    {".lora_alpha", "a buffer of alpha: the scaling comes from the config, and PEFT saves no such tensor"},
    {".weight_packed",
     "a part of a quantized factor (compressed-tensors), which is not read: save the factors in 16 or 32 bits"},
    {".weight_scale",
     "a part of a quantized factor (compressed-tensors), which is not read: save the factors in 16 or 32 bits"},
    {".lora_magnitude_vector.", "a magnitude under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_A.", "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_B.", "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {"lora_A_", "one of several factors in a module (diffusers numbers a second adapter so): save each adapter by itself"},
    {"lora_B_", "one of several factors in a module (diffusers numbers a second adapter so): save each adapter by itself"},
    {"lora_down", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {"lora_up", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {".lora.down", "a name of the diffusers format, which is not read yet"},
    {".lora.up", "a name of the diffusers format, which is not read yet"},
    {".lora_a.weight", "a name of the torchtune format, which is not read yet (its lora_a is [rank, in], as PEFT's lora_A)"},
    {".lora_b.weight",
     "a name of the torchtune format, which is not read yet (its lora_b is [out, rank], as PEFT's lora_B)"},
    {".lora_a", "a name of the MLX format, which is not read yet"},
    {".lora_b", "a name of the MLX format, which is not read yet"},
    {".alpha", "a name of the kohya or ComfyUI formats, which are not read yet"},
    {".dora_scale", "a name of the kohya or ComfyUI formats, which are not read yet"},
    {"lokr_", "a factor of LoKr, which is not supported"},
    {"hada_", "a factor of LoHa, which is not supported"},
});

/// lora_B0, lora_A1 ...: several factors of which a route chooses.
inline bool is_routed_factor(std::string_view name) {
  for (const std::string_view factor : {"lora_A", "lora_B"}) {
    const auto at = name.find(factor);
    if (at != std::string_view::npos && at + factor.size() < name.size()) {
      const char next = name[at + factor.size()];
      if (next >= '0' && next <= '9') return true;
    }
  }
  return false;
}

/// PEFT before 0.18 cut an adapter's name out of the whole key, so that an adapter called "lora", or a beginning of that, took
/// a part of ".lora_A.weight" with it: q_proj_A.weight. Such names come in pairs.
inline bool is_cut_factor(const safetensors::file& tensors, std::string_view name) {
  constexpr std::string_view end = ".weight";
  if (!name.ends_with(end)) return false;
  const auto stem = name.substr(0, name.size() - end.size());
  for (const std::string_view cut : {"ora_", "ra_", "a_", "_"})
    for (const char factor : {'A', 'B'}) {
      const auto suffix = std::string(cut) + factor;
      if (!stem.ends_with(suffix) || stem.size() == suffix.size()) continue;
      std::string other(name);
      other[stem.size() - 1] = factor == 'A' ? 'B' : 'A';
      if (tensors.find(other) != nullptr) return true;
    }
  return false;
}

/// What a name means that is no part of an adapter; empty when it may be a tensor of the base.
inline std::string_view meaning_of(const safetensors::file& tensors, std::string_view name) {
  if (is_routed_factor(name))
    return "one of several factors of a module, of which a route chooses (HydraLoRA and its like): no "
           "single low-rank difference";
  for (const auto& each : peft_name_meanings)
    if (name.find(each.part) != std::string_view::npos) return each.what;
  if (is_cut_factor(tensors, name))
    return "a factor whose name lost a part: PEFT before 0.18 cut the name of an adapter called \"lora\" out of it: save the "
           "adapter again under another name";
  if (name.find("lora_") != std::string_view::npos) return "a part of an adapter under a name that PEFT does not write";
  return {};
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
