// SPDX-License-Identifier: Apache-2.0
// expect: a linear keeps its weight to itself: layer.attach\(name, l\), then layer.merge\(name\)
#include "lora/lora.hpp"

void use(lora::linear<float>& q, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(q, l);
#else
  q.attach("l", l);
  q.merge("l");
#endif
}
