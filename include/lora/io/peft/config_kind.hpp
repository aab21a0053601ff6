// SPDX-License-Identifier: Apache-2.0
//
// What the reader of a PEFT config needs of each peft_type: which keys it has, and what they say. A
// kind's file defines one config_kind; lora/io/peft/config_kinds.hpp lists them.
#pragma once

#include <span>
#include <string_view>

#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_object.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// A key that no reader takes, because it changes nothing or because nothing can be done with it.
struct fixed_key {
  enum class rule {
    no_effect,           ///< on the arithmetic, whatever its value
    refused,             ///< unless it asks for nothing: null, false, "", [] and {}
    refused_also_empty,  ///< unless null or false
  };
  std::string_view name;
  rule what = rule::no_effect;
  std::string_view why = {};  ///< it is refused
};

/// One value of peft_type.
struct config_kind {
  std::string_view peft_type;
  /// Takes every key of the kind and puts what it says into the config. It takes the same keys from
  /// every config, and refuses nothing of an object without keys: what it takes from that one are
  /// the keys that the kind knows.
  void (*read)(config_object&, peft::config&);
  std::span<const fixed_key> fixed;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
