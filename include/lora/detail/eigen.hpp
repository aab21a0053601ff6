// SPDX-License-Identifier: Apache-2.0
//
// Eigen's core, without gcc 12's false warnings. The AVX-512 intrinsics of gcc 12 leave registers
// undefined on purpose, and gcc warns of them wherever Eigen inlines one (GCC bug 105593, mended in
// 13): 400 warnings in this project's examples. A program that includes Eigen before lora gets them
// as it would without lora.
//
// LORA_DETAIL_QUIET_BEGIN and _END stand around code of ours that sums by Eigen, so that nobody who
// includes Eigen first gets those warnings about it.
#pragma once

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#define LORA_DETAIL_QUIET_BEGIN                                                              \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"") \
      _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")
#define LORA_DETAIL_QUIET_END _Pragma("GCC diagnostic pop")
#else
#define LORA_DETAIL_QUIET_BEGIN
#define LORA_DETAIL_QUIET_END
#endif

LORA_DETAIL_QUIET_BEGIN
#include <Eigen/Core>
LORA_DETAIL_QUIET_END
