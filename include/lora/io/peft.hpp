// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::read<T = float>(directory)   a LoRA adapter as Hugging Face PEFT saves it:
//                                          adapter_config.json and adapter_model.safetensors, as a
//                                          map from module names to entries
//
//   const auto file = lora::peft::read("adapters/style");
//   lora::merge(W, file.at("model.layers.0.self_attn.q_proj"));
//   for (const auto& each : file.replacements()) ...              // tensors that replace ones of
//                                                                 the base
//   for (const auto& [embedding, rows] : file.token_rows()) ...   // trained rows of embeddings,
//                                                                 into the replaced table
//   for (const auto& note : file.notes()) ...                     // what else a user should know
//   file.renamed(peft::moved_prefix{"model.", "language_model."}) // for a base whose modules have
//   moved
//
// Names are the modules' without base_model.model. Each entry holds A [rank, in] and B [out, rank],
// widened exactly to T, the scaling that PEFT would use (alpha / r or alpha / sqrt(r), with
// rank_pattern and alpha_pattern: the first key that fits wins) and whatever else the file has for
// the module: docs/formats.md has the table of every kind. What cannot be right from the files
// alone is refused with what is missing: no tensor is passed over in silence. read_options has what
// a caller may know beyond the files, and `lenient`, which follows PEFT and lists what it let pass.
// Values are not looked at: NaN passes, and merge_checked finds it.
//
//   memory   values are read from disk to where they are kept, as by peft::adapters.
//   throws   format_error naming the file and the tensor or key; std::bad_alloc.
#pragma once

#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_assembler.hpp"
#include "lora/io/detail/peft_directory.hpp"
#include "lora/io/detail/peft_metadata.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_file.hpp"
#include "lora/io/peft_verbs.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// The adapters that a config and the tensors beside it describe; for parts that did not come from
/// one directory.
template <scalar T = float>
adapter_file<T> assemble(const config& c, const safetensors::index& tensors,
                         const read_options& options = {}) {
  return read_detail::assembler<T>(c, tensors, options).run({});
}

namespace read_detail {

/// The adapters of a file whose metadata holds the one config that it needs. Throws format_error
/// where it does not.
template <scalar T>
adapter_file<T> by_metadata(const safetensors::index& tensors, const read_options& options,
                            std::vector<std::string> notes) {
  const auto found = io_detail::configs_in_metadata(tensors);
  if (found.size() != 1)
    io_detail::refuse({.path = tensors.name()},
                      "an adapter's directory, or a file whose metadata holds the config",
                      found.empty() ? "a file in place of the directory"
                                    : "the configs of " + std::to_string(found.size()) + " models",
                      found.empty() ? "PEFT saves adapter_config.json beside the weights; without "
                                      "it the scaling is not known: "
                                      "pass the directory with both"
                                    : "give each model's adapter a file of its own");
  auto c = parse_config(found.front().text, tensors.name() + " (metadata)", options);
  c.component = found.front().component;
  return assembler<T>(c, tensors, options).run(std::move(notes));
}

}  // namespace read_detail

/// Reads a directory, or a single file whose metadata holds the whole config (as diffusers writes
/// it); see the top of this file. Names of a config for one component of a pipeline
/// ("transformer.") are those inside the component. T is float, double, or a 16-bit type when the
/// file holds that type.
template <scalar T = float>
adapter_file<T> read(const std::filesystem::path& path, const read_options& options = {}) {
  std::error_code failure;
  if (std::filesystem::is_regular_file(path, failure))
    return read_detail::by_metadata<T>(safetensors::open(path), options, {});
  const io_detail::peft_directory directory(path);
  if (!directory.has_config()) {
    if (!directory.has_weights()) directory.refuse_config();
    const auto tensors = safetensors::open(directory.weights());
    if (io_detail::configs_in_metadata(tensors).empty()) directory.refuse_config();
    return read_detail::by_metadata<T>(tensors, options, directory.trained_files());
  }
  // The config first: it says why a file of another kind is refused, also where its weights are
  // missing.
  const auto c = read_config(directory.config(), options);
  if (!directory.has_weights()) directory.refuse_weights();
  const auto tensors = safetensors::open(directory.weights());
  return read_detail::assembler<T>(c, tensors, options).run(directory.trained_files());
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
