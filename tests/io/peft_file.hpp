// SPDX-License-Identifier: Apache-2.0
//
// PEFT adapters made in memory: a config with the keys that every adapter needs, and a file beside
// it.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

#include "io/build.hpp"
#include "lora/io/peft.hpp"

namespace build {

inline const std::string prefix = "base_model.model.";
inline const lora::peft::read_options lenient{.lenient = true};

/// A config with more keys behind the ones that every adapter needs.
inline std::string config(const std::string& more = "", const std::string& rank = "2") {
  return R"({"peft_type":"LORA","r":)" + rank + R"(,"lora_alpha":6)" +
         (more.empty() ? "" : "," + more) + "}";
}
inline lora::peft::config parse(const std::string& text,
                                const lora::peft::read_options& options = {}) {
  return lora::peft::parse_config(text, "adapter_config.json", options);
}
template <class T = float>
lora::peft::adapter_file<T> assemble(const std::string& json, const file& tensors,
                                     const lora::peft::read_options& options = {}) {
  const auto content = to_bytes(tensors.text());
  return lora::peft::assemble<T>(parse(json, options),
                                 lora::safetensors::parse(content, "adapter_model.safetensors"),
                                 options);
}
inline void file_refused(const std::string& json, const file& tensors,
                         std::initializer_list<std::string_view> parts) {
  refused([&] { (void)assemble(json, tensors); }, parts);
}

/// A rank-2 adapter of a 3 x 4 layer under a whole tensor name, added to a file.
inline file factors_of(const std::string& whole, file into = {}) {
  return into.add(whole + ".lora_A.weight", {2, 4}, 0.5F)
      .add(whole + ".lora_B.weight", {3, 2}, 0.25F);
}

}  // namespace build
