// SPDX-License-Identifier: Apache-2.0
// expect: a pointer, vector or span stands where a matrix is expected, and has no shape
#include "lora/lora.hpp"

void use(float* data, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(data, l);
#else
  lora::merge(lora::row_major(data, 4, 3), l);
#endif
}
