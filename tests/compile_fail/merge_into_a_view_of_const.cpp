// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is read-only
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
void use(const float* data, const lora::adapter<float>& l) {
#else
void use(float* data, const lora::adapter<float>& l) {
#endif
  lora::merge(lora::row_major(data, 4, 3), l);
}
