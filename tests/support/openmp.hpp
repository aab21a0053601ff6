// SPDX-License-Identifier: Apache-2.0
//
// OpenMP's two functions that tests use, also where the compiler has no OpenMP and every call is
// serial.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
inline void omp_set_num_threads(int) {}
#endif
