// SPDX-License-Identifier: Apache-2.0
//
// The kinds of adapters that the reader of a PEFT config knows. A new kind is a file with its
// config_kind, an include and a line here, and where it has values of its own a struct of them in
// peft::config.
#pragma once

#include <array>

#include "lora/io/peft/config_kind.hpp"
#include "lora/io/peft/lora_keys.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array config_kinds{lora_kind};

/// The sentence about any other kind.
inline constexpr std::string_view known_peft_types = "LORA, the only kind that is supported";

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
