// SPDX-License-Identifier: Apache-2.0
//
// From a config and the tensors beside it, or a file with both, to the adapters of a set.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter_set.hpp"
#include "lora/io/peft.hpp"
#include "lora/io/peft/adapter_kinds.hpp"
#include "lora/io/peft/kind_file.hpp"
#include "lora/io/peft/lora_set.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {
namespace adapters_detail {

/// The adapters of a config and the tensors beside it. `notes` is what is known beyond them.
inline adapter_set assembled(const config& c, const safetensors::index& tensors,
                             const read_options& options, std::vector<std::string> notes) {
  adapter_set set;
  if (const auto* kind = io_detail::kind_named(c.peft_type)) {
    io_detail::kind_file(*kind, c, tensors, options).add_to(set);
    for (auto& note : notes) set.add_note(std::move(note));
    for (const auto& key : c.ignored_keys)
      set.add_note("config key " + in_quotes(key) + " was ignored");
    return set;
  }
  io_detail::visit_format(lora_format(tensors), [&]<scalar T>(std::type_identity<T>) {
    read_detail::assembler<T> reader(c, tensors, options);
    const auto file = reader.run(std::move(notes), read_detail::replaced_values::left_in_file);
    for (const auto& each : file) add_entry(set, each.second, tensors.name());
    add_replaced(set, file, reader.replacing(), tensors);
    add_rest(set, file, tensors);
  });
  return set;
}

inline adapter_set by_metadata(const safetensors::index& tensors, const read_options& options,
                               std::vector<std::string> notes) {
  const auto found = io_detail::configs_in_metadata(tensors);
  if (found.size() != 1)
    io_detail::refuse(
        {.path = tensors.name()},
        "an adapter's directory, or a file whose metadata holds one config",
        found.empty() ? "no config" : "the configs of " + std::to_string(found.size()) + " models",
        found.empty()
            ? "PEFT saves adapter_config.json beside the weights: pass the directory with both"
            : "give each model's adapter a file of its own");
  const auto kinds = io_detail::all_config_kinds();
  auto c = parse_config(found.front().text, tensors.name() + " (metadata)", options, kinds);
  c.component = found.front().component;
  return assembled(c, tensors, options, std::move(notes));
}

}  // namespace adapters_detail

}  // namespace lora::inline LORA_DETAIL_ABI::peft
