// SPDX-License-Identifier: Apache-2.0
//
// The kinds that lora::peft::adapters reads beside LORA: one include and one line each.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "lora/io/peft/adalora.hpp"
#include "lora/io/peft/config_kinds.hpp"
#include "lora/io/peft/ia3.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/loha.hpp"
#include "lora/io/peft/lokr.hpp"
#include "lora/io/peft/oft.hpp"
#include "lora/io/peft/vera.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array adapter_kinds{
    loha_kind, lokr_kind, ia3_kind, oft_kind, adalora_kind, vera_kind,
};
static_assert(std::equal(adapter_kinds.begin(), adapter_kinds.end(), other_peft_types.begin(),
                         other_peft_types.end(), [](const auto& kind, const auto& name) {
                           return kind.keys.peft_type == name;
                         }));

/// The configs of LORA and of all of them.
inline std::vector<config_kind> all_config_kinds() {
  std::vector<config_kind> result(config_kinds.begin(), config_kinds.end());
  for (const auto& kind : adapter_kinds) result.push_back(kind.keys);
  return result;
}
/// The kind of a config that is not LORA's; null for LORA.
inline const peft_kind* kind_named(std::string_view peft_type) {
  for (const auto& kind : adapter_kinds)
    if (kind.keys.peft_type == peft_type) return &kind;
  return nullptr;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
