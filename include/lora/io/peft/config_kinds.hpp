// SPDX-License-Identifier: Apache-2.0
//
// The kinds of adapters that are read. LORA has entries of its own (lora::peft::read); the others
// are read by lora::peft::adapters, as LORA is. A new one is a file with its peft_kind, its name
// here, and an include and a line in adapter_kinds.hpp.
#pragma once

#include <array>
#include <string_view>

#include "lora/io/peft/config_kind.hpp"
#include "lora/io/peft/lora_keys.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array config_kinds{lora_kind};

/// Those of the other kinds, in the order of adapter_kinds.hpp.
inline constexpr std::array other_peft_types =
    std::to_array<std::string_view>({"LOHA", "LOKR", "IA3", "OFT", "ADALORA", "VERA"});

/// The sentence about a kind that lora::peft::read does not read.
inline constexpr std::string_view known_peft_types = "LORA, the only kind that has entries";

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
