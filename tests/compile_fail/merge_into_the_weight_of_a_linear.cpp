// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements
#include "lora/lora.hpp"

void use(lora::linear<float>& q, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(q.weight(), l);
#else
  q.attach("l", l);
  q.merge("l");
#endif
}
