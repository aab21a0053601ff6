// SPDX-License-Identifier: Apache-2.0
//
// What a refused call says: its message, if it throws exactly the expected type.
#pragma once

#include <initializer_list>
#include <string>
#include <typeinfo>

#include "lora/error.hpp"

namespace test {

/// The message of the exception, or why there is none: never text that a check for a message would
/// accept.
template <class Error, class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const lora::error& e) {
    return typeid(e) == typeid(Error) ? std::string(e.what())
                                      : std::string("(another type of exception)");
  }
  return "(no exception)";
}

inline bool mentions(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    if (text.find(part) == std::string::npos) return false;
  return true;
}

}  // namespace test
