// SPDX-License-Identifier: Apache-2.0
//
// The version, in its only place (CMake and the pkg-config file read it here), and the tag of the
// inline namespace.
//
// A header-only library is compiled into every translation unit with that unit's flags. Two units
// built with different instruction sets, with and without OpenMP, -ffast-math or exceptions hold
// different code under the same names, and a linker would silently keep one of the two. All names
// therefore live in an inline namespace whose name carries what changes the code: such units link
// side by side, and a function that takes a lora object from a unit of another kind is an error at
// link time (one that only returns it is not: its name does not tell).
#pragma once

#define LORA_VERSION_MAJOR 0
#define LORA_VERSION_MINOR 1
#define LORA_VERSION_PATCH 0

// Private from here on: the parts of the namespace's name.
#if defined(__AVX512F__)
#define LORA_DETAIL_AVX512
#if defined(__AVX512BF16__) && defined(__F16C__)
#define LORA_DETAIL_DOTS
#define LORA_DETAIL_ISA avx512dots
#elif defined(__F16C__)
#define LORA_DETAIL_ISA avx512
#else
#define LORA_DETAIL_ISA avx512nohalf
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define LORA_DETAIL_AVX2
#if defined(__F16C__)
#define LORA_DETAIL_ISA avx2
#else
#define LORA_DETAIL_ISA avx2nohalf
#endif
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define LORA_DETAIL_FMA
#define LORA_DETAIL_ISA fma
#elif defined(__AVX__)
#define LORA_DETAIL_ISA avx  // Eigen aligns for it
#else
#define LORA_DETAIL_ISA base
#endif

#if defined(_OPENMP)
#define LORA_DETAIL_THREADS omp
#else
#define LORA_DETAIL_THREADS serial
#endif

#if defined(__FAST_MATH__)
#define LORA_DETAIL_MATH fast
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#define LORA_DETAIL_MATH finite
#else
#define LORA_DETAIL_MATH ieee
#endif

#if defined(__cpp_exceptions)
#define LORA_DETAIL_ERRORS throws
#else
#define LORA_DETAIL_ERRORS ends
#endif

#define LORA_DETAIL_PASTE(a, b, c, d, e, f, g) v##a##_##b##_##c##_##d##_##e##_##f##_##g
#define LORA_DETAIL_EXPAND(a, b, c, d, e, f, g) LORA_DETAIL_PASTE(a, b, c, d, e, f, g)
#define LORA_DETAIL_ABI                                                                           \
  LORA_DETAIL_EXPAND(LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH, LORA_DETAIL_ISA, \
                     LORA_DETAIL_THREADS, LORA_DETAIL_MATH, LORA_DETAIL_ERRORS)
