// SPDX-License-Identifier: Apache-2.0
//
// A number as text, read to the nearest double whatever the program's locale is.
#pragma once

#include <charconv>
#include <string_view>
#include <system_error>
#include <version>

#if !defined(__cpp_lib_to_chars)
#include <locale>
#include <sstream>
#include <string>
#endif

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Whether the whole text is a number within the range of double; value is that number then.
inline bool read_double(std::string_view text, double& value) {
#if defined(__cpp_lib_to_chars)
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  return parsed.ec == std::errc() && parsed.ptr == end;
#else
  // libc++ before 20 has no std::from_chars for double.
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  stream >> std::noskipws >> value;
  return !stream.fail() && stream.peek() == std::istringstream::traits_type::eof();
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
