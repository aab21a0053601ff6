// SPDX-License-Identifier: Apache-2.0
// expect: a DoRA adapter scales the rows of W, too, which linear, batch and packed_adapter cannot
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(lora::linear<float>& q, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  q.attach("style", l);
#else
  q.attach("style", l.factors());  // not the same function
#endif
}
