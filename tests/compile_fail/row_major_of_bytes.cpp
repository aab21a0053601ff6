// SPDX-License-Identifier: Apache-2.0
// expect: bytes do not say what their elements are
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using stored = void;
#else
using stored = float;
#endif
void use(stored* data, const lora::adapter<float>& l) {
  lora::merge(lora::row_major(data, 4, 3), l);
}
