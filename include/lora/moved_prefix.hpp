// SPDX-License-Identifier: Apache-2.0
//
// A rule of new names, for a base whose modules have moved since an adapter was trained.
#pragma once

#include <string>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Names that begin with one prefix get another; the others stay. For adapter_set::renamed and
/// peft::adapter_file::renamed.
///   set.renamed(lora::moved_prefix{"language_model.model.", "model.language_model."})
struct moved_prefix {
  std::string from, to;
  std::string operator()(const std::string& name) const {
    return name.starts_with(from) ? to + name.substr(from.size()) : name;
  }
};

}  // namespace lora::inline LORA_DETAIL_ABI
