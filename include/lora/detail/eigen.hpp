// SPDX-License-Identifier: Apache-2.0
//
// Eigen's core, without gcc 12's false warnings. The AVX-512 intrinsics of gcc 12 leave registers undefined on purpose, and gcc
// warns of them wherever Eigen inlines one (GCC bug 105593, mended in 13): 400 warnings in this project's examples. A program
// that includes Eigen before lora gets them as it would without lora.
#pragma once

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <Eigen/Core>
#pragma GCC diagnostic pop
#else
#include <Eigen/Core>
#endif
