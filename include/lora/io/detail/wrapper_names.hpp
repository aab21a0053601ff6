// SPDX-License-Identifier: Apache-2.0
//
// Names of tensors that carry a wrapper of the training program: torch.compile, DataParallel, FSDP, activation checkpointing, a
// PeftModel around a PeftModel, a dict of state dicts. No base has a tensor of such a name, so that merging by name would merge
// nothing.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::string_view peft_prefix = "base_model.model.";

struct name_wrapper {
  std::string_view part;  ///< of the name
  std::string_view what;  ///< who wraps so
};
/// Elements of a path that are never a module's own name.
inline constexpr std::array wrapper_elements = std::to_array<name_wrapper>({
    {"_orig_mod", "torch.compile"},
    {"_fsdp_wrapped_module", "FSDP"},
    {"_fpw_module", "FSDP"},
    {"_checkpoint_wrapped_module", "activation checkpointing"},
    {"_forward_module", "Lightning or DeepSpeed"},
});

/// Where an element of a path begins, from a place on; npos when the path has none.
inline std::size_t find_element(std::string_view name, std::string_view element, std::size_t from = 0) {
  for (auto at = name.find(element, from); at != std::string_view::npos; at = name.find(element, at + 1)) {
    const bool begins = at == 0 || name[at - 1] == '.';
    const auto end = at + element.size();
    if (begins && (element.ends_with('.') || end == name.size() || name[end] == '.')) return at;
  }
  return std::string_view::npos;
}

/// Whether base_model.model. stands twice in a name: a PeftModel inside a PeftModel.
inline bool is_nested_peft(std::string_view name) {
  const auto first = find_element(name, peft_prefix);
  return first != std::string_view::npos && find_element(name, peft_prefix, first + 1) != std::string_view::npos;
}

/// The first wrapper in a name.
inline std::optional<name_wrapper> wrapper_in(std::string_view name) {
  for (const auto& each : wrapper_elements)
    if (find_element(name, each.part) != std::string_view::npos) return each;
  if (is_nested_peft(name)) return name_wrapper{peft_prefix, "a PeftModel inside a PeftModel"};
  const auto prefix = find_element(name, peft_prefix);
  const auto inside = prefix == 0 ? name.substr(peft_prefix.size()) : name;
  if (inside.starts_with("module.")) return name_wrapper{"module.", "DataParallel or DistributedDataParallel"};
  if (prefix != std::string_view::npos && prefix != 0)
    return name_wrapper{name.substr(0, prefix), "a dict that holds state dicts, or a model around the PeftModel"};
  return std::nullopt;
}

/// The name without its wrappers: base_model.model. stands at the front or nowhere.
inline std::string unwrapped_name(std::string name) {
  for (const auto& each : wrapper_elements)
    for (auto at = find_element(name, each.part); at != std::string::npos; at = find_element(name, each.part))
      name.erase(at, each.part.size() + 1);
  if (const auto first = find_element(name, peft_prefix); first != std::string::npos) {
    name.erase(0, first + peft_prefix.size());
    for (auto at = find_element(name, peft_prefix); at != std::string::npos; at = find_element(name, peft_prefix))
      name.erase(at, peft_prefix.size());
    while (name.starts_with("module.")) name.erase(0, 7);
    return std::string(peft_prefix) + name;
  }
  while (name.starts_with("module.")) name.erase(0, 7);
  return name;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
