// SPDX-License-Identifier: Apache-2.0
//
// What the fuzzer calls with bytes of its choice: each reader, to its end. Anything but a
// format_error (or value_error where what was read is written) is a finding, and so is what the
// sanitizers see. The tests replay the corpora beside this file through the same functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"
#include "lora/io/safetensors_write.hpp"

namespace fuzz {

namespace st = lora::safetensors;

inline void trap_unless(bool holds) {
  if (!holds) __builtin_trap();
}

/// A file of the fuzzer's: strict, then with all tolerances. What is accepted lies inside the
/// bytes, and can be written.
inline void safetensors(std::span<const std::byte> bytes) {
  for (const bool tolerant : {false, true}) {
    try {
      const auto file =
          st::parse(bytes, "fuzz", {.tensors = 10'000}, {tolerant, tolerant, tolerant});
      std::vector<st::tensor> tensors;
      for (const auto& t : file) {
        trap_unless(t.bytes.empty() ||
                    (t.bytes.data() >= bytes.data() && t.bytes.size() <= bytes.size()));
        trap_unless(file.find(t.name) == &t);
        tensors.push_back(st::tensor_of(t));
      }
      const auto once = st::to_bytes(tensors, file.metadata());
      trap_unless(st::parse(once, "again").size() == file.size());
    } catch (const lora::format_error& e) {
      trap_unless(!e.path().empty() && (!e.expected().empty() || !e.found().empty()));
    }
  }
}

/// What cannot be written is refused with a value_error.
inline void write(const lora::peft::adapter_file<double>& file) {
  try {
    const auto written = lora::peft::tensor_bytes(file);
    (void)lora::peft::config_text(file);
    trap_unless(st::parse(written, "written").size() > 0);
  } catch (const lora::value_error&) {
  }
}

/// Strict, lenient, and with what a caller may know beyond the files.
inline std::vector<lora::peft::read_options> peft_options() {
  const std::vector<std::string> order{"a", "b"};
  return {{.parameter_order = order},
          {.lenient = true, .parameter_order = order},
          {.select_by_tensors = true,
           .wrappers = lora::peft::wrapper_names::strip,
           .parameter_order = order,
           .parameters_in_out = true,
           .experts_grouped_b = true}};
}

/// A config up to the first NUL byte, tensors behind it. What is accepted is listed, renamed,
/// written and read back.
inline void peft(std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto end = std::min(text.find('\0'), text.size());
  const auto content = bytes.subspan(std::min(end + 1, bytes.size()));
  for (const auto& options : peft_options()) {
    try {
      const auto tensors = st::parse(content, "tensors", {.tensors = 1000});
      (void)lora::io_detail::configs_in_metadata(tensors);
      const auto c = lora::peft::parse_config(text.substr(0, end), "config", options);
      const auto file = lora::peft::assemble<double>(c, tensors, options);
      trap_unless(!lora::peft::inventory_of(file).text().empty());
      trap_unless(file.renamed([](const std::string& name) { return "x." + name; }).size() ==
                  file.size());
      if (!file.left_out().empty() || !file.passed_over().empty()) continue;
      write(file);
    } catch (const lora::format_error& e) {
      trap_unless(!e.path().empty());
    }
  }
}

}  // namespace fuzz
