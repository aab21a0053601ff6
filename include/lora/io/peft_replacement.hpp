// SPDX-License-Identifier: Apache-2.0
//
// What a PEFT file holds beside adapters: tensors that replace ones of the base.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "lora/io/dtype.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// A tensor of the file that replaces one of the base: values, not a difference. Owns its bytes.
struct replacement {
  enum class reason {
    saved_module,  ///< of modules_to_save: the whole module is another
    bias,          ///< a trained bias (bias = "all" or "lora_only")
    embedding,     ///< an embedding's weight, saved because it was adapted or resized
    unused_copy,   ///< written by PEFT beside the value that counts; not to be applied
    /// A tensor under the name of one in PEFT's model, which the config does not ask for. Only with
    /// read_options::lenient. Apply it if the base has a tensor of this name: PEFT loads it then,
    /// and drops it otherwise.
    unasked,
  };
  std::string name;  ///< of the base's tensor
  std::string key;   ///< in the file, without base_model.model.
  reason why;
  safetensors::dtype dtype;
  std::vector<std::uint64_t> shape;
  std::vector<std::byte> bytes;
  /// Other layers of layer_replication use the base's tensor, too: each needs a copy of it with its
  /// own replacement.
  bool shared = false;

  bool applies() const { return why != reason::unused_copy; }
  /// The values, widened exactly. Throws value_error for a dtype whose values T does not hold.
  template <scalar T>
  std::vector<T> values() const {
    std::vector<T> result;
    if (!safetensors::widen_to(dtype, bytes, result))
      lora::detail::raise_value(
          "peft::replacement::values",
          key + " is " + std::string(name_of(dtype)) + ", whose values this type does not hold");
    return result;
  }
};

}  // namespace lora::inline LORA_DETAIL_ABI::peft
