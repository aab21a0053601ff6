// SPDX-License-Identifier: Apache-2.0
//
// Explains names of tensors that neither the file nor its config explains. Each sentence names the
// writer.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include "lora/io/detail/module_path.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Text that a name holds, or ends in, and what it means.
struct name_meaning {
  enum class where { anywhere, at_end };
  std::string_view part, what;
  where at = where::anywhere;
};
/// The first one that fits counts.
inline constexpr std::array peft_name_meanings = std::to_array<name_meaning>({
    {".lora_E", "AdaLoRA: lora::peft::adapters reads it, with peft_type ADALORA in the config"},
    {".ranknum", "a part of AdaLoRA that PEFT does not save"},
    {".modules_to_save.", "a whole module that modules_to_save does not name"},
    {".original_module.", "the base's own copy of a module that modules_to_save does not name"},
    {".lora_A.bias", "a bias of lora_A, which PEFT does not have"},
    {".lora_alpha",
     "a buffer of alpha: the scaling comes from the config, and PEFT saves no such tensor"},
    {".lora_A.weight_",
     "a part of a quantized factor (compressed-tensors), which is not read: save the factors in 16 "
     "or 32 bits"},
    {".lora_B.weight_",
     "a part of a quantized factor (compressed-tensors), which is not read: save the factors in 16 "
     "or 32 bits"},
    {".lora_magnitude_vector.",
     "a magnitude under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_A.",
     "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_B.",
     "a factor under the name of an adapter: a state that was not saved with save_pretrained"},
    {".lora_A_",
     "one of several factors in a module (diffusers numbers a second adapter so): save each "
     "adapter by itself"},
    {".lora_B_",
     "one of several factors in a module (diffusers numbers a second adapter so): save each "
     "adapter by itself"},
    {"lora_down", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {"lora_up", "a name of the kohya, diffusers or ComfyUI formats, which are not read yet"},
    {".lora.down", "a name of the diffusers format, which is not read yet"},
    {".lora.up", "a name of the diffusers format, which is not read yet"},
    {".lora_a.weight",
     "a name of the torchtune format, which is not read yet (its lora_a is [rank, in], as PEFT's "
     "lora_A)"},
    {".lora_b.weight",
     "a name of the torchtune format, which is not read yet (its lora_b is [out, rank], as PEFT's "
     "lora_B)"},
    {".lora_a", "a name of the MLX format, which is not read yet"},
    {".lora_b", "a name of the MLX format, which is not read yet"},
    {".dora_scale", "a name of the kohya or ComfyUI formats, which are not read yet",
     name_meaning::where::at_end},
    {".lokr_w",
     "a factor of LoKr: lora::peft::adapters reads it, with peft_type LOKR in the config"},
    {".lokr_t",
     "a factor of LoKr: lora::peft::adapters reads it, with peft_type LOKR in the config"},
    {".hada_w",
     "a factor of LoHa: lora::peft::adapters reads it, with peft_type LOHA in the config"},
    {".hada_t",
     "a factor of LoHa: lora::peft::adapters reads it, with peft_type LOHA in the config"},
});

/// lora_B0, lora_A1 ...: several factors of which a route chooses.
inline bool is_routed_factor(std::string_view segment) {
  const bool factor = segment.starts_with("lora_A") || segment.starts_with("lora_B");
  return factor && segment.size() > 6 && is_number(segment.substr(6));
}

/// PEFT before 0.18 cut an adapter's name out of the whole key, so that an adapter called "lora",
/// or a beginning of that, took a part of ".lora_A.weight" with it: q_proj_A.weight. Such names
/// come in pairs, whose shapes share the rank.
inline bool is_cut_factor(const safetensors::index& tensors, const safetensors::tensor_info& t) {
  constexpr std::string_view end = ".weight";
  if (!t.name.ends_with(end) || t.shape.size() != 2) return false;
  const auto stem = t.name.substr(0, t.name.size() - end.size());
  for (const std::string_view cut : {"ora_", "ra_", "a_", "_"})
    for (const char factor : {'A', 'B'}) {
      const auto suffix = std::string(cut) + factor;
      if (!stem.ends_with(suffix) || stem.size() == suffix.size()) continue;
      std::string name(t.name);
      name[stem.size() - 1] = factor == 'A' ? 'B' : 'A';
      const auto* other = tensors.find(name);
      if (other == nullptr || other->shape.size() != 2) continue;
      const auto &A = factor == 'A' ? t : *other, &B = factor == 'A' ? *other : t;
      if (A.shape[0] == B.shape[1]) return true;
    }
  return false;
}

/// What a name means that is no part of an adapter; empty when it may be a tensor of the base.
inline std::string_view meaning_of(const safetensors::index& tensors,
                                   const safetensors::tensor_info& t) {
  const auto parts = segments(t.name);
  if (std::any_of(parts.begin(), parts.end(), is_routed_factor))
    return "one of several factors of a module, of which a route chooses (HydraLoRA and its like): "
           "no single low-rank "
           "difference";
  for (const auto& each : peft_name_meanings)
    if (each.at == name_meaning::where::at_end ? t.name.ends_with(each.part)
                                               : t.name.find(each.part) != std::string_view::npos)
      return each.what;
  if (is_cut_factor(tensors, t))
    return "a factor whose name lost a part: PEFT before 0.18 cut the name of an adapter called "
           "\"lora\" out of it. Save the "
           "adapter again under another name";
  const bool of_adapter =
      std::any_of(parts.begin(), parts.end(), [](auto part) { return part.starts_with("lora_"); });
  if (of_adapter && parts.back() == "alpha")
    return "a name of the kohya or ComfyUI formats, which are not read yet";
  return of_adapter ? "a part of an adapter under a name that PEFT does not write"
                    : std::string_view{};
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
