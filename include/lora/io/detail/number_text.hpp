// SPDX-License-Identifier: Apache-2.0
//
// A number as text, read to the nearest double whatever the program's locale is.
#pragma once

#include <charconv>
#include <string_view>
#include <system_error>
#include <version>

#if !defined(__cpp_lib_to_chars)
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#endif

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Whether the whole text is a number as JSON writes it, within the range of double; value is that
/// number then.
inline bool read_double(std::string_view text, double& value) {
  const std::string_view digits = text.substr(text.starts_with('-') ? 1 : 0);
  const bool begins = !digits.empty() && digits[0] >= '0' && digits[0] <= '9';
  if (!begins || text.find_first_not_of("0123456789+-.eE") != std::string_view::npos) return false;
#if defined(__cpp_lib_to_chars)
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  return parsed.ec == std::errc() && parsed.ptr == end;
#else
  // libc++ before 20 has no std::from_chars for double.
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  stream >> value;
  // A subnormal number is reported as a failure by some libraries, and read all the same.
  const bool subnormal = value != 0 && std::abs(value) < std::numeric_limits<double>::min();
  if (stream.fail() && !subnormal) return false;
  stream.clear();
  return stream.peek() == std::istringstream::traits_type::eof();
#endif
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
