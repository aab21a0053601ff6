// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::write_adapters(directory, set)   adapters of one kind as a PEFT directory
//
//   lora::peft::write_adapters("adapters/out", set);
//
// For the kinds of peft/adapter_kinds.hpp, read or made here; peft::write writes a LORA. Tensors
// are written in the format in which the adapters hold them, and the config is made for them: r and
// alpha of modules that differ from the first are named in full, and alpha is the one that gives
// the scaling, bit for bit. An ADALORA keeps no init_r: the rank is written for it, which is the
// same function where all modules have one rank and scaling; others are refused. Before anything is
// written, the bytes are read back as lora::peft::adapters would, and must hold the same adapters.
//   writes   as peft::write: both files are finished before either takes its name.
//   throws   value_error naming the module and why: another kind, a stack, settings that a config
//            has once for all modules, replaced tensors beside the adapters; format_error with the
//            system's reason.
#pragma once

#include <filesystem>
#include <span>
#include <system_error>

#include "lora/adapter_set.hpp"
#include "lora/io/detail/output_file.hpp"
#include "lora/io/detail/peft_directory.hpp"
#include "lora/io/peft/set_writer.hpp"
#include "lora/io/safetensors_write.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// Writes a directory; see the top of this file. It is created when it is not there.
inline void write_adapters(const std::filesystem::path& directory, const adapter_set& set,
                           const safetensors::write_options& options = {}) {
  set.check_adapters_alone("peft::write_adapters");
  const adapters_detail::set_writer writer(set);
  const auto files = writer.files();
  adapters_detail::read_back(writer, files);
  std::error_code failure;
  std::filesystem::create_directories(directory, failure);
  if (failure)
    io_detail::refuse({.path = directory.string()}, "a directory to write", failure.message(),
                      "nothing was written");
  const io_detail::peft_directory paths(directory);
  const auto durable = options.durability;
  io_detail::output_file weights(paths.weights(), files.weights.size(), durable);
  weights.write(files.weights);
  io_detail::output_file config(paths.config(), files.config.size(), durable);
  config.write(std::as_bytes(std::span(files.config)));
  weights.finish();
  config.finish();
  weights.publish();
  config.publish(
      "adapter_model.safetensors beside it is already the new one, and does not belong to this "
      "file: write both again before the adapter is read");
  io_detail::flush_folder(paths.weights(), durable);
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
