// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::adapters(path)   a PEFT adapter of any kind that is read, in the format in which it
//                              is stored
//
//   const lora::adapter_set set = lora::peft::adapters("adapters/style");
//   lora::merge(W, set.at("model.layers.0.self_attn.q_proj"));
//
// Kinds: LORA with all its variants (module_adapter::kind() is "DORA" where a magnitude is stored)
// and those of peft/adapter_kinds.hpp; docs/formats.md has the tensors of each. A path is a
// directory, or a single file whose metadata holds the config.
//   format    T of a LORA is that of all adapter tensors of its file: BF16 or F16 where all are,
//             double where one is F64, else float. Of other kinds that of each module. No value
//             rounds.
//   memory    values are read from disk to where they are kept: once, and nothing of the file's
//             size beside them (docs/formats.md has exceptions of the size of a module).
//   replaced  modules_to_save, trained biases and embeddings are in adapter_set::replaced(),
//             trained rows in rows(). Integers there are refused: peft::read<T> gives their bytes.
//   notes     settings without effect, and what read_options::lenient let pass.
//   throws    format_error naming the file and the tensor or key; std::bad_alloc. Every tensor is
//             used or named.
#pragma once

#include <filesystem>
#include <string>
#include <system_error>

#include "lora/adapter_set.hpp"
#include "lora/io/detail/peft_directory.hpp"
#include "lora/io/peft/set_reader.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// Reads a directory or a file; see the top of this file.
inline adapter_set adapters(const std::filesystem::path& path, const read_options& options = {}) {
  using adapters_detail::assembled;
  using adapters_detail::by_metadata;
  std::error_code failure;
  if (std::filesystem::is_regular_file(path, failure))
    return by_metadata(safetensors::open(path), options, {});
  const io_detail::peft_directory directory(path);
  const auto weights = directory.weights();
  if (!directory.has_config()) {
    if (!directory.has_weights()) directory.refuse_config();
    const auto tensors = safetensors::open(weights);
    if (io_detail::configs_in_metadata(tensors).empty()) directory.refuse_config();
    return by_metadata(tensors, options, directory.trained_files());
  }
  const auto kinds = io_detail::all_config_kinds();
  const auto c = read_config(directory.config(), options, kinds);
  if (!directory.has_weights()) {
    const auto wanted = "the tensors of peft_type " + io_detail::in_quotes(c.peft_type);
    io_detail::refuse({.path = weights.string()}, wanted, "no such file",
                      "adapter_config.json is there alone: fetch or save both");
  }
  return assembled(c, safetensors::open(weights), options, directory.trained_files());
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
