// SPDX-License-Identifier: Apache-2.0
//
// The floating-point mode of a thread: how sums and products round, and what happens to subnormal
// numbers. Programs change it for themselves (audio engines and torch.set_flush_denormal flush
// subnormals; -ffast-math links code that does), and a new thread has the mode of the thread that
// made it. The library's arithmetic and its bounds need the default mode. ARMv7 NEON always
// flushes, and on processors that are not listed below the caller's mode is used as it is.
#pragma once

#include <cstdint>

#include "lora/version.hpp"

#if defined(_MSC_VER) && defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The register that holds the mode. `mode` are the bits that this library sets to zero: rounding,
/// and flushing of subnormal operands and results. Exception masks and flags are other bits, and
/// stay the caller's.
struct control_register {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__SSE__))
  using bits = std::uint32_t;
  static constexpr bool is_known = true;
  static constexpr bits mode = 0x8000 | 0x6000 | 0x0040;  // FTZ, rounding, DAZ of MXCSR
  static bits read() {
    bits value;
    asm volatile("stmxcsr %0" : "=m"(value) : : "memory");
    return value;
  }
  // The clobber keeps loads and stores on their side of the change. Arithmetic on values that stay
  // in registers may move across it: verbs load what they compute with, and store it.
  static void write(bits value) { asm volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
#elif defined(_MSC_VER) && defined(_M_X64)
  using bits = std::uint32_t;
  static constexpr bool is_known = true;
  static constexpr bits mode = 0x8000 | 0x6000 | 0x0040;
  static bits read() { return _mm_getcsr(); }
  static void write(bits value) { _mm_setcsr(value); }
#elif defined(__GNUC__) && defined(__aarch64__)
  using bits = std::uint64_t;
  static constexpr bool is_known = true;
  static constexpr bits mode =
      0x0100'0000 | 0x00c0'0000 | 0x0008'0000 | 0x0001;  // FZ, rounding, FZ16, FIZ of FPCR
  static bits read() {
    bits value;
    asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
    return value;
  }
  static void write(bits value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
  using bits = std::uint32_t;
  static constexpr bool is_known = false;  // the caller's mode is used as it is
  static constexpr bits mode = 0;
  static bits read() { return 0; }
  static void write(bits) {}
#endif
};

/// While it lives, this thread rounds to nearest and keeps subnormal numbers; then it has the mode
/// it had before. Writes the register only where the mode differs. Other threads have one of their
/// own.
class default_environment {
 public:
  default_environment() : before_(control_register::read() & control_register::mode) {
    if (before_ != 0) set(0);
  }
  ~default_environment() {
    if (before_ != 0) set(before_);
  }
  default_environment(const default_environment&) = delete;
  default_environment& operator=(const default_environment&) = delete;

 private:
  static void set(control_register::bits mode) {
    control_register::write((control_register::read() & ~control_register::mode) | mode);
  }

  control_register::bits before_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
