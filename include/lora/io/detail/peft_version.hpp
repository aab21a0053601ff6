// SPDX-License-Identifier: Apache-2.0
//
// The version of PEFT that wrote a file, as adapter_config.json has it: "0.18.1",
// "0.20.1.dev0@abc123".
#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <optional>
#include <string_view>
#include <system_error>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Whether a version comes before a release; nothing for a text that is no version. Alphas, betas,
/// candidates and development versions of a release come before it.
inline std::optional<bool> comes_before(std::string_view version,
                                        const std::array<int, 3>& release) {
  std::array<int, 3> parts{};
  const char* at = version.data();
  const char* const end = at + version.size();
  std::size_t count = 0;
  while (count < parts.size()) {
    const auto parsed = std::from_chars(at, end, parts[count]);
    if (parsed.ec != std::errc() || parts[count] < 0) break;
    at = parsed.ptr;
    ++count;
    if (at == end || *at != '.') break;
    ++at;
  }
  if (count < 2) return std::nullopt;
  if (parts != release) return parts < release;
  // "0.19.1a1", "0.19.1b2", "0.19.1rc1", "0.19.1.dev0"; behind + or @ stands what says nothing.
  std::string_view rest(at, static_cast<std::size_t>(end - at));
  rest = rest.substr(0, rest.find_first_of("+@"));
  return rest.starts_with('a') || rest.starts_with('b') || rest.find("rc") != rest.npos ||
         rest.find("dev") != rest.npos;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
