// SPDX-License-Identifier: Apache-2.0
//
// What the library throws, and the cold functions that throw it. Every message says what is wrong,
// where, and what to do; checks run always, also under NDEBUG, because they are O(1) beside the
// work they guard.
//
// Without exceptions (-fno-exceptions) a failed check calls LORA_ON_ERROR(message), a macro that
// may be defined before the first include of the library (message is a const char*; the default
// does nothing), and then std::terminate().
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "lora/version.hpp"

#if !defined(__cpp_exceptions) && !defined(LORA_ON_ERROR)
#define LORA_ON_ERROR(message) static_cast<void>(message)
#endif

namespace lora::inline LORA_DETAIL_ABI {

/// Base of everything the library throws on purpose (allocation failures stay std::bad_alloc).
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Two operands do not fit together: sizes, strides, or memory that overlaps.
class shape_error : public error {
 public:
  using error::error;
};

/// An argument has a value that the operation is not defined for: rank 0, a non-finite alpha, an
/// unknown name.
class value_error : public error {
 public:
  using error::error;
};

namespace detail {

template <class Error>
[[noreturn]]
#if defined(__GNUC__)
__attribute__((noinline, cold))
#endif
void raise(const Error& e) {
#if defined(__cpp_exceptions)
  throw e;
#else
  LORA_ON_ERROR(e.what());
  std::terminate();
#endif
}

/// "4096x11008", for messages.
template <class Integer>
std::string shape_text(Integer rows, Integer cols) {
  return std::to_string(rows) + "x" + std::to_string(cols);
}

[[noreturn]] inline void raise_shape(const std::string& operation, const std::string& what) {
  raise(shape_error("lora::" + operation + ": " + what));
}

[[noreturn]] inline void raise_value(const std::string& operation, const std::string& what) {
  raise(value_error("lora::" + operation + ": " + what));
}

}  // namespace detail
}  // namespace lora::inline LORA_DETAIL_ABI
