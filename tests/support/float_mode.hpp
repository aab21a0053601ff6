// SPDX-License-Identifier: Apache-2.0
//
// The floating-point mode of the calling thread, changed as a program around the library may change
// it.
#pragma once

#include "lora/kernel/environment.hpp"

namespace test {

using float_register = lora::detail::control_register;

/// Subnormal operands and results count as zero.
inline constexpr float_register::bits flush =
#if defined(__aarch64__)
    0x0100'0000;
#else
    0x8040 & float_register::mode;
#endif
/// Every operation rounds towards zero.
inline constexpr float_register::bits truncate =
#if defined(__aarch64__)
    0x00c0'0000;
#else
    0x6000 & float_register::mode;
#endif

inline float_register::bits float_mode() { return float_register::read() & float_register::mode; }

/// This thread computes in another mode while it lives.
class in_float_mode {
 public:
  explicit in_float_mode(float_register::bits mode) : before_(float_mode()) { set(mode); }
  ~in_float_mode() { set(before_); }
  in_float_mode(const in_float_mode&) = delete;
  in_float_mode& operator=(const in_float_mode&) = delete;

 private:
  static void set(float_register::bits mode) {
    float_register::write((float_register::read() & ~float_register::mode) | mode);
  }
  float_register::bits before_;
};

}  // namespace test
